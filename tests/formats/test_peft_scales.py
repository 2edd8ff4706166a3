"""Scales of PEFT's LoRA: alpha, patterns, rank stabilisation, and what happens where they disagree with the tensors."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from peft_models import (
    CONFIG,
    MODULES,
    WEIGHTS,
    assert_equals_peft,
    edited,
    fresh_model,
    lora_layers,
    saved,
    trained,
    with_tensor,
)
from safetensors.torch import save_file

from lora_analysis.errors import (
    UndefinedUpdateError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.formats.patterns import PatternKeys, pattern_regex


def test_pattern_keys_are_found_by_pefts_own_rule() -> None:
    patterns = [
        "proj",
        "q_proj",
        "layers.0.lin",
        "layers?.*.lin",
        r".*\.0\..*",
        "^lin",
        "^layers.1",
        "(q_)?proj",
        "lin|proj",
        "x",
        "s.0.q_proj",
        "",
    ]
    for length in range(1, len(patterns) + 1):
        for keys in (patterns[:length], patterns[-length:], patterns[:length][::-1]):
            for module in [*MODULES, "classifier", "layers.10.proj"]:
                # PEFT gives the module's name back where nothing matches.
                ours = next((key for key in keys if pattern_regex(key).match(module)), module)
                found = looked_up(keys).matching(module)
                assert ours == get_pattern_key(keys, module) == (keys[found[0]] if found else module), (keys, module)


def looked_up(keys: list[str]) -> PatternKeys:
    found = PatternKeys()
    for key in keys:
        found.append(key)
    return found


def test_keys_that_are_names_are_looked_up_as_they_would_be_matched() -> None:
    draw = random.Random(0)
    parts = ["q", "q_proj", "layers", "0", "10", "x-y", "é", "a\nb", "\n", ""]
    for _ in range(1000):
        modules = [".".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(4)]
        keys = []
        for _ in range(4):
            key = draw.choice([draw.choice(modules), ".".join(draw.choices(parts, k=2))])
            key = key[draw.choice([0, 0, 1, 3]) :].replace(draw.choice(parts) or "q", ".", 1)
            keys.append(draw.choice(["", "", "^"]) + (re.escape(key) if draw.random() < 0.3 else key))
        for module in modules:
            theirs = [i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)]
            assert looked_up(keys).matching(module) == theirs, (keys, module)


def test_thousands_of_experts_with_a_key_each_open_at_once(tmp_path: Path) -> None:
    """As mergekit writes them: r and alpha of every module under its own name."""
    modules = [
        f"model.layers.{i}.mlp.experts.{j}.{name}" for i in range(20) for j in range(50) for name in ("w1", "w2")
    ]
    tensors = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(2, 2) for module in modules for side in "AB"}
    save_file(tensors, tmp_path / WEIGHTS)
    ranks = {module: 2 + i % 3 for i, module in enumerate(modules)}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": ranks}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    start = time.process_time()
    adapter = load_adapter(tmp_path)
    assert time.process_time() - start < 1  # 0.2 s; 2000 x 2000 x 4 matches would be 3 s
    assert {name: module.scale * 2 for name, module in adapter.modules.items()} == ranks
    assert [note.partition(": ")[2] for note in adapter.notes] == [
        "the configuration says r=3, the tensors have r=2; they win. The same of 666 others.",
        "the configuration says r=4, the tensors have r=2; they win. The same of 665 others.",
    ]


@pytest.mark.parametrize("patterns", [{"lin": 2, "layers.0.lin": 4}, {"layers.0.lin": 4, "lin": 2}], ids=str)
def test_the_first_matching_pattern_wins_not_the_longest(tmp_path: Path, patterns: dict[str, int]) -> None:
    folder = edited(saved(trained(), tmp_path), alpha_pattern=patterns)
    adapter = load_adapter(folder)
    assert adapter.modules["layers.0.lin"].scale == next(iter(patterns.values())) / 4
    assert adapter.modules["layers.1.lin"].scale == adapter.modules["lin"].scale == 2 / 4
    assert_equals_peft(adapter, peft.PeftModel.from_pretrained(fresh_model(), folder))


def test_patterns_whose_order_peft_lost_are_read_as_peft_reads_them_and_noted(tmp_path: Path) -> None:
    """``save_pretrained`` sorts the configuration, so that another key can come first."""
    model = trained(alpha_pattern={"lin": 2, "layers.1.lin": 9, "layers.0.lin": 2})
    assert lora_layers(model)["layers.1.lin"].scaling["default"] == 2 / 4
    adapter = load_adapter(saved(model, tmp_path))
    assert adapter.modules["layers.1.lin"].scale == 9 / 4
    assert_equals_peft(adapter, peft.PeftModel.from_pretrained(fresh_model(), tmp_path))
    # Where both keys say the same there is nothing to doubt.
    assert adapter.notes == (
        "layers.1.lin: 2 keys of alpha_pattern match; the first, 'layers.1.lin', applies. "
        "PEFT sorts them when it saves, so training may have used 'lin'.",
    )
    assert load_adapter(tmp_path, alpha=2).notes == ()


def test_a_pattern_for_every_module_is_read_quickly(tmp_path: Path) -> None:
    """More keys than the cache of ``re`` holds, as merging tools write them."""
    modules = [f"layers.{i}.q" for i in range(600)]
    tensors = {f"{m}.lora_{side}.weight": torch.ones(2, 2) for m in modules for side in "AB"}
    save_file(tensors, tmp_path / WEIGHTS)
    patterns = {module: i % 5 + 1 for i, module in enumerate(modules)}
    config = {"peft_type": "LORA", "r": 2, "rank_pattern": dict.fromkeys(modules, 2), "alpha_pattern": patterns}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    start = time.process_time()
    adapter = load_adapter(tmp_path)
    assert {name: module.scale for name, module in adapter.modules.items()} == {m: a / 2 for m, a in patterns.items()}
    # 0.2 s where keys are compiled once, 20 s where each comparison compiles one.
    assert time.process_time() - start < 5


def test_a_pattern_never_matches_inside_a_name(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(alpha_pattern={"proj": 100}), tmp_path))
    assert adapter.modules["layers.0.proj"].scale == 25
    assert adapter.modules["layers.0.q_proj"].scale == 6 / 4


def test_rank_and_alpha_are_looked_up_apart(tmp_path: Path) -> None:
    saved(trained(rank_pattern={"q_proj": 2}), tmp_path)
    adapter = load_adapter(edited(tmp_path, alpha_pattern={"layers.0": 9, r"layers\.0\..*": 3}))
    assert adapter.modules["layers.0.q_proj"].scale == 3 / 2
    assert adapter.modules["layers.1.q_proj"].scale == 6 / 2
    assert adapter.modules["layers.0.lin"].scale == 3 / 4


def test_a_missing_alpha_is_pefts_default_of_eight(tmp_path: Path) -> None:
    adapter = load_adapter(edited(saved(trained(), tmp_path), lora_alpha=None))
    assert {(m.scale, m.scale_source) for m in adapter.modules.values()} == {(8 / 4, "format default")}
    assert peft.LoraConfig().lora_alpha == 8
    assert any("no lora_alpha" in note and "8" in note for note in adapter.notes)


def test_a_pattern_beats_the_missing_alpha(tmp_path: Path) -> None:
    adapter = load_adapter(edited(saved(trained(alpha_pattern={"q_proj": 2}), tmp_path), lora_alpha=None))
    assert adapter.modules["layers.0.q_proj"].scale_source == "config"
    assert adapter.modules["lin"].scale_source == "format default"


def test_the_callers_alpha_beats_the_configuration(tmp_path: Path) -> None:
    saved(trained(alpha_pattern={"q_proj": 2}, rank_pattern={"lin": 2}), tmp_path)
    adapter = load_adapter(tmp_path, alpha=32)
    assert {module.scale_source for module in adapter.modules.values()} == {"caller"}
    assert adapter.modules["layers.0.q_proj"].scale == 32 / 4
    assert adapter.modules["lin"].scale == 32 / 2
    assert adapter.notes == ()


def test_without_a_configuration_the_scale_is_unknown(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    (tmp_path / CONFIG).unlink()
    adapter = load_adapter(tmp_path)
    module = adapter.modules["lin"]
    assert math.isnan(module.scale)
    assert module.scale_source == "unknown"
    assert module.r == 4
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        adapter["lin"].norm()
    assert load_adapter(tmp_path, alpha=6).modules["lin"].scale == 6 / 4


def test_tensors_win_over_the_configuration(tmp_path: Path) -> None:
    adapter = load_adapter(edited(saved(trained(), tmp_path), r=16, rank_pattern={"^lin": 3}))
    assert {module.r for module in adapter.modules.values()} == {4}
    assert {module.scale for module in adapter.modules.values()} == {6 / 4}
    assert adapter.notes == (
        "layers.0.lin: the configuration says r=16, the tensors have r=4; they win. The same of 5 others.",
        "lin: the configuration says r=3, the tensors have r=4; they win.",
    )


@pytest.mark.parametrize("ending", ["alpha", "lora_alpha"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_alphas_of_modules_are_refused_by_name(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    name = f"base_model.model.layers.0.q_proj.{ending}"
    with pytest.raises(UnsupportedAdapterError, match=f"'{name}': per-module alpha tensors, as diffusers and kohya"):
        load_adapter(with_tensor(tmp_path, name, torch.ones(shape)))


def test_a_file_whose_r_is_chosen_for_each_module_has_one_note_of_it(tmp_path: Path) -> None:
    tensors = {}
    for i in range(300):
        stem, r = f"base_model.model.layers.{i}.q", 1 + i % 64
        tensors |= {f"{stem}.lora_A.weight": torch.randn(r, 8), f"{stem}.lora_B.weight": torch.randn(8, r)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    others = sum(i % 64 != 63 for i in range(300)) - 1
    assert load_adapter(tmp_path).notes == (
        "layers.0.q: the configuration says r=64, the tensors have r=1; they win. "
        f"The like of {others} others, with other numbers.",
    )
