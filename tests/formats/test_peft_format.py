"""PEFT's LoRA: every ΔW equal to the one PEFT itself merges, and what PEFT reads back from our writing."""

from __future__ import annotations

import copy
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import (
    AdapterFormatError,
    UndefinedUpdateError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter, save_adapter
from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.update import DenseUpdate, LowRankUpdate

# PEFT multiplies and merges in float32: r products of numbers near 1, and a difference of weights near 1.
FLOAT32 = 1e-6

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Block(nn.Module):
    """Names where one ends in another, and widths that are all different."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 12)
        self.proj = nn.Linear(12, 9)
        self.lin = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(torch.tanh(self.proj(torch.tanh(self.q_proj(x)))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lin = nn.Linear(10, 10)
        self.classifier = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.classifier(self.lin(x))
        return out


MODULES = [
    "layers.0.q_proj",
    "layers.0.proj",
    "layers.0.lin",
    "layers.1.q_proj",
    "layers.1.proj",
    "layers.1.lin",
    "lin",
]
TARGETS = ["q_proj", "proj", "lin"]


def fresh_model() -> Model:
    torch.manual_seed(0)
    return Model()


def trained(model: nn.Module | None = None, adapter: str = "default", **options: Any) -> Any:
    """A model of PEFT whose B is no longer zero."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        made = peft.get_peft_model(model or fresh_model(), peft.LoraConfig(**given), adapter_name=adapter)
    randomise(made)
    return made


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape).to(parameter.dtype))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def merged_differences(model: Any) -> dict[str, Tensor]:
    """Merged minus base of every weight, by PEFT's own ``merge_and_unload``, in float64."""
    before = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone().double()
        for name, tensor in model.state_dict().items()
    }
    after = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): tensor - before[name]
        for name, tensor in after.items()
        if name.endswith(".weight") and before[name].shape == tensor.shape and not torch.equal(tensor, before[name])
    }


def assert_equals_peft(adapter: Adapter, model: Any, active: str = "default") -> None:
    """Modules, scales and ΔW are those of a live PEFT model."""
    layers = lora_layers(model)
    assert set(adapter) == set(layers)
    for name, layer in layers.items():
        module, update = adapter.modules[name], adapter[name]
        assert module.scale == pytest.approx(layer.scaling[active], rel=1e-15)
        assert module.r == update.r == layer.r[active]
        assert isinstance(update, LowRankUpdate)
        assert torch.equal(update.up, layer.lora_B[active].weight)
        assert torch.equal(update.down, layer.lora_A[active].weight)
        delta = layer.get_delta_weight(active).detach()
        assert module.target.transposed == layer.fan_in_fan_out
        oracle = delta.T if layer.fan_in_fan_out else delta
        assert update.shape == module.shape == tuple(oracle.shape)
        np.testing.assert_allclose(update.dense().numpy(), oracle.double().numpy(), atol=FLOAT32 * float(oracle.norm()))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        # peft 0.21 takes the bias of its own lora_bias for a broken factor.
        warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape", UserWarning)
        model.save_pretrained(folder, **options)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """The configuration with some values replaced; None removes a key."""
    path = folder / CONFIG
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.0.lin": 11, "proj": 5, "q_proj": 7}},
    "both patterns, rank-stabilised": {
        "rank_pattern": {"layers.0.proj": 2, "proj": 3, "lin": 5},
        "alpha_pattern": {"proj": 2, "q_proj": 9},
        "use_rslora": True,
    },
    "regular expressions": {
        "rank_pattern": {r".*\.0\..*proj": 2, r"layers\.\d+\.proj": 3, "^lin": 6},
        "alpha_pattern": {r"layers.(0|1).lin": 3, "^layers.0.proj": 7, r"q_.*": 13},
    },
    "all biases": {"bias": "all"},
    "their own biases": {"bias": "lora_only"},
    "a bias of B": {"lora_bias": True},
    "full modules": {"modules_to_save": ["classifier"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression of targets": {"target_modules": r"layers\.\d\.(q_)?proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_delta_w_is_the_one_peft_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    adapter = load_adapter(saved(model, tmp_path))
    assert adapter.format == "peft"
    assert adapter.notes == ()
    assert {module.scale_source for module in adapter.modules.values()} == {"config"}
    assert_equals_peft(adapter, model)
    assert_accounts_for(adapter, load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("name", ["plain", "both patterns, rank-stabilised", "their own biases", "some layers"])
def test_every_delta_w_is_the_one_that_merging_adds(tmp_path: Path, name: str) -> None:
    model = trained(**OPTIONS[name])
    adapter = load_adapter(saved(model, tmp_path))
    differences = merged_differences(model)
    assert set(differences) == set(adapter)
    for module, update in adapter.items():
        # PEFT merges in float64 here, but its scaled product passes through no other route than ours.
        np.testing.assert_allclose(update.dense().numpy(), differences[module].numpy(), atol=1e-10)


def assert_accounts_for(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    used = [name for module in adapter.modules.values() for name in module.tensors]
    listed = [unused.tensor for unused in adapter.unused]
    assert sorted(used + listed) == sorted(tensors)
    assert all(unused.reason for unused in adapter.unused)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    assert {unused.tensor: unused.nbytes for unused in adapter.unused} == {name: sizes[name] for name in listed}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bias": "all"}, {"bias: a full bias": 8}),
        ({"bias": "lora_only"}, {"bias: a full bias": 7}),
        ({"lora_bias": True}, {"lora_bias: adds scale times it": 7}),
        ({"modules_to_save": ["classifier"]}, {"modules_to_save: a full tensor": 1, "bias: a full bias": 1}),
    ],
    ids=["all", "lora_only", "lora_bias", "modules_to_save"],
)
def test_tensors_beside_the_factors_are_listed_with_their_reason(
    tmp_path: Path, options: dict[str, Any], expected: dict[str, int]
) -> None:
    adapter = load_adapter(saved(trained(**options), tmp_path))
    counts = {reason: sum(u.reason.startswith(reason) for u in adapter.unused) for reason in expected}
    assert counts == expected
    assert len(adapter.unused) == sum(expected.values())


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
                assert ours == get_pattern_key(keys, module), (keys, module)


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


def gpt2_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=32, bos_token_id=0, eos_token_id=0)
    return GPT2Model(config)


@pytest.mark.parametrize("stated", [True, False], ids=["flag given", "flag set by peft"])
def test_conv1d_updates_are_turned_against_their_weight(tmp_path: Path, stated: bool) -> None:
    base = load_base(gpt2_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        model = trained(
            gpt2_model(), target_modules=["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=stated
        )
    adapter = load_adapter(saved(model, tmp_path))
    assert len(adapter) == 8
    assert all(target.transposed for target in adapter.targets.values())
    assert_equals_peft(adapter, model)
    after = copy.deepcopy(model).double().merge_and_unload().state_dict()
    for name, update in adapter.items():
        weight = base.matrix(adapter.targets[name], update.shape)
        merged = after[f"{name}.weight"].T
        np.testing.assert_allclose(update.dense().numpy(), (merged - weight).numpy(), atol=1e-10)


def test_a_checkpoint_in_bin_reads_alike(tmp_path: Path) -> None:
    model = trained(bias="all")
    a = load_adapter(saved(model, tmp_path / "a"))
    b = load_adapter(saved(model, tmp_path / "b", safe_serialization=False))
    assert (tmp_path / "b" / "adapter_model.bin").is_file()
    assert a.modules.keys() == b.modules.keys()
    assert_equals_peft(b, model)
    assert {unused.tensor for unused in a.unused} == {unused.tensor for unused in b.unused}


def test_the_file_alone_finds_its_configuration(tmp_path: Path) -> None:
    model = trained()
    saved(model, tmp_path)
    assert_equals_peft(load_adapter(tmp_path / WEIGHTS), model)
    assert_equals_peft(load_adapter(str(tmp_path)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_factors_stay_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    adapter = load_adapter(saved(model, tmp_path))
    assert {update.up.dtype for update in adapter.values() if isinstance(update, LowRankUpdate)} == {dtype}
    for name, layer in lora_layers(model).items():
        a, b = (factor["default"].weight.detach().double().numpy() for factor in (layer.lora_A, layer.lora_B))
        oracle = layer.scaling["default"] * (b @ a)
        np.testing.assert_allclose(adapter[name].dense().numpy(), oracle, atol=1e-12)
        # PEFT itself rounds its result to the dtype.
        theirs = layer.get_delta_weight("default").detach().double().numpy()
        rounding = 2 * torch.finfo(dtype).eps
        np.testing.assert_allclose(adapter[name].dense().numpy(), theirs, atol=rounding * float(np.abs(oracle).max()))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_raw_dumps_keep_the_adapters_name(tmp_path: Path, prefix: str) -> None:
    model = trained(modules_to_save=["classifier"])
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / CONFIG).write_text(json.dumps(model.peft_config["default"].to_dict(), default=list))
    adapter = load_adapter(tmp_path)
    assert_equals_peft(adapter, model)
    assert_accounts_for(adapter, tensors)
    reasons = {unused.tensor.removeprefix(prefix): unused.reason for unused in adapter.unused}
    assert "modules_to_save" in reasons["base_model.model.classifier.modules_to_save.default.weight"]
    assert "the base's own" in reasons["base_model.model.classifier.original_module.weight"]
    assert "the base's own" in reasons["base_model.model.lin.base_layer.weight"]


def two_adapters(folder: Path) -> Any:
    model = trained(adapter="first")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    randomise(model)
    torch.save(model.state_dict(), folder / "both.bin")
    return model


def test_one_of_two_adapters_in_a_file_is_chosen_by_name(tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    for name, count, r in (("first", 7, 4), ("second", 2, 2)):
        adapter = load_adapter(tmp_path / "both.bin", name=name, alpha=8)
        assert (len(adapter), adapter.modules["layers.0.q_proj"].r) == (count, r)
        layer = lora_layers(model)["layers.0.q_proj"]
        update = adapter["layers.0.q_proj"]
        assert isinstance(update, LowRankUpdate)
        assert torch.equal(update.up, layer.lora_B[name].weight)
        assert_accounts_for(adapter, model.state_dict())
        others = [u for u in adapter.unused if "another adapter" in u.reason]
        assert len(others) == 2 * (9 - count)


def test_two_adapters_without_a_name_are_ambiguous(tmp_path: Path) -> None:
    two_adapters(tmp_path)
    for name in (None, "third"):
        with pytest.raises(AdapterFormatError, match=r"holds several adapters .*'first'.*'second'.*Pass name="):
            load_adapter(tmp_path / "both.bin", name=name)


def test_a_name_that_is_not_there_is_never_ignored(tmp_path: Path) -> None:
    model = trained()
    saved(model, tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "raw.bin")
    assert_equals_peft(load_adapter(tmp_path / "saved", name="default"), model)
    assert len(load_adapter(tmp_path / "raw.bin", name="default", alpha=1)) == 7
    for source in (tmp_path / "saved", tmp_path / "saved" / WEIGHTS, tmp_path / "raw.bin"):
        with pytest.raises(AdapterFormatError, match="expected an adapter named 'typo'"):
            load_adapter(source, name="typo", alpha=1)


def test_named_adapters_lie_in_folders(tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    saved(model, tmp_path / "shelf")
    with pytest.raises(AdapterFormatError, match=r"found a folder of 2 \(first, second\).*its name="):
        load_adapter(tmp_path / "shelf")
    second = load_adapter(tmp_path / "shelf", name="second")
    assert list(second) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert {module.scale for module in second.modules.values()} == {4.0}
    assert load_adapter(tmp_path / "shelf" / "first").modules["lin"].scale == 6 / 4


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
    assert len(adapter.notes) == 7
    assert "layers.0.q_proj: the configuration says r=16, the tensors have r=4; they win." in adapter.notes
    assert "lin: the configuration says r=3, the tensors have r=4; they win." in adapter.notes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": -4}, "r: expected a positive integer, got -4"),
        ({"r": 4.5}, r"r: expected a positive integer, got 4\.5"),
        ({"r": "4"}, "r: expected a positive integer, got '4'"),
        ({"r": True}, "r: expected a positive integer, got True"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected a finite number, got inf"),
        ({"lora_alpha": [16]}, r"lora_alpha: expected a finite number, got \[16\]"),
        ({"rank_pattern": {"lin": 0}}, r"rank_pattern\['lin'\]: expected a positive integer"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: expected regular expressions, got '\('"),
        ({"rank_pattern": ["lin"]}, "rank_pattern: expected an object, got list"),
        ({"alpha_pattern": {"lin": None}}, r"alpha_pattern\['lin'\]: expected a finite number, got None"),
        ({"alpha_pattern": {"*": 2}}, r"alpha_pattern: expected regular expressions, got '\*'"),
        ({"alpha_pattern": {"(" * 999: 2}}, r"alpha_pattern: expected regular expressions"),
        ({"alpha_pattern": {"(" * 5000: 2}}, r"alpha_pattern: expected keys .* \(more than 1000 characters\)"),
        ({"lora_alpha": 10**400}, r"lora_alpha: expected a plausible number, got 10+…\."),
        ({"lora_alpha": 1e308}, r"lora_alpha: expected a plausible number, got 1e\+308"),
        ({"alpha_pattern": {"lin": -1e101}}, r"alpha_pattern\['lin'\]: expected a plausible number, got -1e\+101"),
        ({"modules_to_save": 5}, "modules_to_save: expected a list of names, got 5"),
        ({"modules_to_save": ["lin", 5]}, r"modules_to_save: expected a list of names, got \['lin', 5\]"),
        ({"modules_to_save": "lin"}, "modules_to_save: expected a list of names, got 'lin'"),
        ({"peft_type": 7}, "peft_type: expected a name such as 'LORA', got 7"),
        ({"alpha_pattern": {"a{99999999999}": 2}}, r"alpha_pattern: expected regular expressions"),
        ({"alpha_pattern": "lin"}, "alpha_pattern: expected an object, got str"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out: expected true or false, got 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_values_the_format_forbids_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(edited(saved(trained(), tmp_path), **changes))
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 250


DANGEROUS = {
    "(a+)+b": "a repeated group whose body varies",
    "(?:a*)*b": "a repeated group whose body varies",
    "((a+)b?)+c": "a repeated group whose body varies",
    "(a|a)*b": "a repeated group whose body varies",
    "((a|aa))+b": "a repeated group whose body varies",
    "(a?){30}a": "a repeated group whose body varies",
    "(a{1,9})*b": "a repeated group whose body varies",
    "([)]+)+b": "a repeated group whose body varies",
    r"(\)+)+b": "a repeated group whose body varies",
    "(a+)+?b": "a repeated group whose body varies",
    "(a|a)" * 30 + "b": "more than 6 parts that vary",
    ".*" * 7 + "b": "more than 6 parts that vary",
    "a?" * 30 + "a" * 30: "more than 6 parts that vary",
    "(?x:(a+) +)b": "the construct '(?x'",
    "a+)+(b": "a parenthesis that closes none",
    "({}+)+b": "a repeated group whose body varies",
    "[](a+)+]+)": "a parenthesis that closes none",
    "(a+)(?#)+b": "the construct '(?#'",
    "a" * 1001: "more than 1000 characters",
}


@pytest.mark.parametrize("key", DANGEROUS, ids=lambda key: key[:20])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_keys_that_may_match_for_ever_are_refused_at_once(tmp_path: Path, key: str, option: str) -> None:
    name = "a" * 60
    save_file({f"{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", option: {key: 2}}))
    start = time.process_time()
    with pytest.raises(AdapterFormatError, match=f"{option}: expected keys that are matched quickly, got '") as caught:
        load_adapter(tmp_path)
    assert f"({DANGEROUS[key]})" in str(caught.value)
    assert repr(key)[1:30].rstrip("'") in str(caught.value)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "key",
    [
        r".*\.layers\.\d+\.(self_)?attn\.(q_)?proj",
        r"^model\.layers\.(0|1|2|30)\.mlp",
        "|".join(rf"layers\.{i}\..*\.q_proj" for i in range(40)),
        r"(?:encoder|decoder)\.block\.[0-9]{1,2}\.layer",
        "(ab){2}",
        "(lin)+",
        r"\(a\+\)\+b",
        "[(]a+[])]+",
        "a{b}",
        r"lin(?=$)|(?P<side>q|v)_proj",
        "[](a+)+]+",
        "(",
    ],
    ids=lambda key: key[:20],
)
def test_ordinary_keys_are_not_held_for_dangerous(key: str) -> None:
    """They compile where ``re`` alone compiles them."""
    try:
        theirs = re.compile(rf"(.*\.)?({key})$")
    except re.error:
        with pytest.raises(re.error):
            pattern_regex(key)
    else:
        assert pattern_regex(key) == theirs


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    for content, match in (("{", "expected JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(AdapterFormatError, match=match):
            load_adapter(tmp_path)


class Wide(nn.Module):
    """Square, so that OLoRA and PiSSA have something to decompose; an embedding; a convolution; experts."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(4, 6, 3)
        self.mlp = nn.Module()
        self.mlp.experts = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(self.embed(x))
        return out


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: peft.LoraConfig(target_modules=["lin"], use_dora=True), "use_dora is set: DoRA"),
    "embedding": (lambda: peft.LoraConfig(target_modules=["embed"]), "holds LoRA on embeddings"),
    "embedding and linear": (lambda: peft.LoraConfig(target_modules=["embed", "lin"]), "holds LoRA on embeddings"),
    "convolution": (lambda: peft.LoraConfig(target_modules=["conv"]), "'conv': holds LoRA on a convolution"),
    "parameters": (
        lambda: peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts"]),
        r"target_parameters is set: LoRA on parameters \(mixtures of experts\)",
    ),
    "PiSSA": (lambda: peft.LoraConfig(target_modules=["lin"], init_lora_weights="pissa"), "initialised by 'pissa'"),
    "PiSSA, fast": (
        lambda: peft.LoraConfig(target_modules=["lin"], init_lora_weights="pissa_niter_4"),  # type: ignore[arg-type]
        "initialised by 'pissa_niter_4', which moved the base",
    ),
    "OLoRA": (lambda: peft.LoraConfig(target_modules=["lin"], init_lora_weights="olora"), "initialised by 'olora'"),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(target_modules=["lin"], init_r=4, target_r=2, total_step=10),
        "PEFT ADALORA; it is not read yet",
    ),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["lin"]), "PEFT LOHA"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=["lin"]), "PEFT LOKR"),
    "VeRA": (lambda: peft.VeraConfig(target_modules=["lin"], r=4), "PEFT VERA"),
    "IA3": (lambda: peft.IA3Config(target_modules=["lin"], feedforward_modules=[]), "PEFT IA3"),
    "OFT": (lambda: peft.OFTConfig(target_modules=["lin"], oft_block_size=4), "PEFT OFT"),
    "QALoRA": (lambda: peft.LoraConfig(target_modules=["lin"], use_qalora=True), "use_qalora is set: QALoRA"),
}


def saved_kind(name: str, folder: Path) -> Path:
    """An adapter of a kind that is not read, as PEFT saves it."""
    if name == "QALoRA":  # which PEFT makes of quantised layers only
        saved(trained(), folder)
        return edited(folder, use_qalora=True)
    model = peft.get_peft_model(Wide(), REFUSED[name][0]())
    randomise(model)
    return saved(model, folder)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's advice on these kinds
@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = saved_kind(name, tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=REFUSED[name][1]) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["DoRA", "embedding", "convolution", "AdaLoRA", "LoHa", "LoKr", "VeRA", "IA3", "OFT"])
def test_their_tensors_alone_are_refused_too(tmp_path: Path, name: str) -> None:
    """Without the configuration, the tensors' names must do."""
    folder = saved_kind(name, tmp_path)
    (folder / CONFIG).unlink()
    with pytest.raises(UnsupportedAdapterError, match="not read yet"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_lora_weights": "corda"}, "initialised by 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "initialised by 'lora_ga'"),
        ({"init_lora_weights": "loftq"}, "initialised by 'loftq'"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora is set: block-diagonal"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set: activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"use_something_new": True}, "use_something_new is set, an option that may change the update"),
        ({"peft_type": "MISS"}, "PEFT MISS"),
    ],
    ids=str,
)
def test_options_that_change_the_update_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(edited(saved(trained(), tmp_path), **changes))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_converted_to_lora_reads_as_the_change_of_the_published_base(tmp_path: Path) -> None:
    published = nn.Sequential(nn.Linear(16, 16))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(published), config)
    config.init_lora_weights = True
    saved(model, tmp_path / "initial")
    randomise(model)
    config.init_lora_weights = "pissa"
    saved(model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = load_adapter(tmp_path / "converted")
    merged = copy.deepcopy(model).double().merge_and_unload().state_dict()["0.weight"]
    assert adapter.modules["0"].r == 8
    # PiSSA subtracts its product from the base in float32.
    change = (merged - published[0].weight.double()).detach().numpy()
    np.testing.assert_allclose(adapter["0"].dense().numpy(), change, atol=1e-5)


def test_split_is_for_other_formats(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="split= names the slots of a loralib MergedLinear"):
        load_adapter(saved(trained(), tmp_path), split="q,v")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    saved(trained(target_modules=["q_proj"]), folder)
    return dict(load_file(folder / WEIGHTS))


KEY = "base_model.model.layers.0.q_proj.lora_{}.weight"


@pytest.mark.parametrize(("lost", "kept"), [("A", "B"), ("B", "A")])
def test_a_factor_without_its_partner_is_named(tmp_path: Path, lost: str, kept: str) -> None:
    tensors = tensors_of(tmp_path)
    del tensors[KEY.format(lost)]
    save_file(tensors, tmp_path / WEIGHTS)
    match = f"'layers.0.q_proj': expected lora_A and lora_B, got only lora_{kept} .*; lora_{lost} is missing"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("side", "shape"), [("A", (3, 10)), ("B", (12, 5)), ("A", (4,)), ("B", ()), ("A", (0, 10))], ids=str
)
def test_factors_that_do_not_share_r_are_named(tmp_path: Path, side: str, shape: tuple[int, ...]) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format(side)] = torch.zeros(shape)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        AdapterFormatError, match=r"'layers\.0\.q_proj': expected lora_A .* to share r, got .*pass format="
    ):
        load_adapter(tmp_path)


@pytest.mark.parametrize("r", [0, 1])
def test_the_smallest_factors_are_read(tmp_path: Path, r: int) -> None:
    tensors = {KEY.format("A"): torch.ones(r, 10), KEY.format("B"): torch.ones(12, r)}
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path, alpha=3)
    assert adapter.modules["layers.0.q_proj"].r == r
    assert adapter["layers.0.q_proj"].norm() == pytest.approx(3 * r * math.sqrt(120))


@pytest.mark.parametrize("rslora", [False, True])
def test_factors_of_r_zero_are_an_update_of_zero_and_noted(tmp_path: Path, rslora: bool) -> None:
    save_file({KEY.format("A"): torch.ones(0, 10), KEY.format("B"): torch.ones(12, 0)}, tmp_path / WEIGHTS)
    assert load_adapter(tmp_path).modules["layers.0.q_proj"].scale_source == "unknown"
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16, "use_rslora": rslora}))
    adapter = load_adapter(tmp_path)
    module = adapter.modules["layers.0.q_proj"]
    assert (module.scale, module.scale_source) == (0.0, "config")
    assert adapter.notes == ("layers.0.q_proj: r=0, an update of zero whatever its scale; alpha / r is given as 0.",)
    assert not adapter["layers.0.q_proj"].dense().any()


def with_tensor(folder: Path, name: str, tensor: Tensor | None = None) -> Path:
    """An adapter's file with one more tensor in it."""
    save_file({**tensors_of(folder), name: torch.ones(2) if tensor is None else tensor}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("ending", ["alpha", "lora_alpha"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_alphas_of_modules_are_refused_by_name(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    name = f"base_model.model.layers.0.q_proj.{ending}"
    with pytest.raises(UnsupportedAdapterError, match=f"'{name}': per-module alpha tensors, as diffusers and kohya"):
        load_adapter(with_tensor(tmp_path, name, torch.ones(shape)))


@pytest.mark.parametrize(
    "name",
    [
        "lora_A.weight",
        "lora_alpha",
        "base_model.model.lin.lora_A",
        "base_model.model.lin.lora_A.a.b.weight",
        "base_model.model.lin.lora_A.weight\n",
        "base_model.model.lin.lora_A.bias",
        "base_model.model.layers.0.q_proj.lora_scaling",
    ],
)
def test_tensors_of_lora_that_are_no_factor_fail_the_load(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFormatError, match="expected the tensors of LoRA to be factors of a module") as caught:
        load_adapter(with_tensor(tmp_path, name))
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["head.weight", "base_model.model.snake.alpha", "head.bias"])
def test_other_tensors_are_listed(tmp_path: Path, name: str) -> None:
    adapter = load_adapter(with_tensor(tmp_path, name))
    assert [unused.tensor for unused in adapter.unused] == [name]
    assert adapter.ledger.keys() == load_file(tmp_path / WEIGHTS).keys()


def test_a_name_of_two_lines_is_a_name(tmp_path: Path) -> None:
    save_file({f"a\nb.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 8}))
    adapter = load_adapter(tmp_path)
    assert adapter.modules["a\nb"].scale == 2
    assert adapter.notes == (r"'a\nb': the configuration says r=8, the tensors have r=2; they win.",)


def test_wrappers_are_whole_components_of_a_name(tmp_path: Path) -> None:
    names = {
        "my_orig_mod.lin": "my_orig_mod.lin",
        "not_fsdp_wrapped_module.lin": "not_fsdp_wrapped_module.lin",
        "_orig_mod.a._fsdp_wrapped_module.b": "a.b",
        "c._orig_mod": "c",
    }
    save_file({f"{n}.lora_{side}.weight": torch.ones(2, 2) for n in names for side in "AB"}, tmp_path / WEIGHTS)
    assert set(load_adapter(tmp_path)) == set(names.values())


def test_modules_are_in_natural_order_whatever_their_digits(tmp_path: Path) -> None:
    long = "9" * 5000
    names = ["layers.2.q", "layers.10.q", "layers.010.v", f"layers.{long}.q", "layers.x", "layers.5²", "layers.٣"]
    tensors = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for name in reversed(names) for side in "AB"}
    save_file(tensors, tmp_path / WEIGHTS)
    ordered = list(load_adapter(tmp_path))
    assert set(ordered) == set(names)
    assert [name for name in ordered if name.endswith((".q", ".v"))] == names[:4]


def test_one_factor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors["module." + KEY.format("A")] = tensors[KEY.format("A")].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"expected one lora_A for 'layers\.0\.q_proj', got "):
        load_adapter(tmp_path)


def test_integer_factors_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format("A")] = tensors[KEY.format("A")].to(torch.int8)
    save_file(tensors, tmp_path / WEIGHTS)
    match = r"'layers.0.q_proj': expected floating-point factors, got torch.int8 in '.*lora_A.weight'"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


def test_nan_in_a_file_shows_only_in_its_own_numbers(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format("A")][0, 0] = math.nan
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path)
    assert len(adapter) == 2
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        adapter["layers.0.q_proj"].svd()
    assert adapter["layers.1.q_proj"].norm() > 0


def test_names_without_pefts_prefix_are_the_modules_own(tmp_path: Path) -> None:
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors_of(tmp_path).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert list(load_adapter(tmp_path)) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_configuration_without_factors_is_no_adapter(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    save_file({"base_model.model.classifier.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"expected LoRA factors, found none among its 1 tensors"):
        load_adapter(tmp_path)


# Writing


def written_and_loaded(adapter: Adapter, folder: Path, model: nn.Module) -> Any:
    save_adapter(adapter, folder)
    with warnings.catch_warnings():
        # PEFT finds target modules by the ends of their names: 'lin' also matches layers.1.lin, which then
        # stays at zero where the adapter has nothing for it.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder)


def assert_same_logits(a: Any, b: Any) -> None:
    x = torch.randn(5, 10)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))
        assert not torch.allclose(a(x), fresh_model()(x), atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "both patterns, rank-stabilised", "regular expressions", "some layers"])
def test_peft_reads_our_writing_with_identical_logits(tmp_path: Path, name: str) -> None:
    model = trained(**OPTIONS[name]).eval()
    adapter = load_adapter(saved(model, tmp_path / "theirs"))
    again = written_and_loaded(adapter, tmp_path / "ours", fresh_model()).eval()
    theirs, ours = lora_layers(model), lora_layers(again)
    for module in adapter:
        assert ours[module].scaling["default"] == pytest.approx(theirs[module].scaling["default"], rel=1e-15)
    assert_same_logits(model, again)


def test_our_writing_reads_back_equal(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(**OPTIONS["both patterns, rank-stabilised"]), tmp_path / "theirs"))
    again = load_adapter(save_adapter(adapter, tmp_path / "ours"))
    assert again.notes == ()
    assert again.unused == ()
    assert again.targets == adapter.targets
    for name, module in adapter.modules.items():
        assert (again.modules[name].shape, again.modules[name].r) == (module.shape, module.r)
        assert again.modules[name].scale == pytest.approx(module.scale, rel=1e-15)
        # The scale comes back to the last digit or so: not every quotient by r is one.
        np.testing.assert_allclose(again[name].dense().numpy(), adapter[name].dense().numpy(), rtol=1e-15)


def mixed_adapter(modules: list[str]) -> Adapter:
    """Every module with its own r, scale and dtype."""
    shapes = {name: tuple(weight.shape) for name, weight in fresh_model().named_parameters() if weight.ndim == 2}
    updates = {}
    for i, module in enumerate(modules):
        d_out, d_in = shapes[f"{module}.weight"]
        r = i % 4 + 1
        updates[module] = LowRankUpdate(
            torch.randn(d_out, r), torch.randn(r, d_in), scale=[1 / 3, 2.0, -0.7, 0.0][i % 4]
        )
    return Adapter(updates, source="mixed")


@pytest.mark.parametrize(
    "modules",
    [MODULES, ["lin", "layers.0.lin"], ["layers.0.lin", "lin"], ["lin", "layers.0.proj", "layers.0.q_proj"]],
    ids=["all", "lin first", "lin last", "proj"],
)
def test_mixed_ranks_and_scales_reach_the_right_modules(tmp_path: Path, modules: list[str]) -> None:
    adapter = mixed_adapter(modules)
    model = written_and_loaded(adapter, tmp_path, fresh_model())
    layers = lora_layers(model)
    for name, update in adapter.items():
        assert layers[name].scaling["default"] == pytest.approx(update.scale, rel=1e-15)
        theirs = layers[name].get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(theirs, update.dense().numpy(), atol=FLOAT32 * max(update.norm(), 1.0))
    for name in layers.keys() - adapter.keys():
        assert not layers[name].get_delta_weight("default").any()
    again = load_adapter(tmp_path)
    assert again.notes == ()
    for name, update in adapter.items():
        assert again[name].scale == pytest.approx(update.scale, rel=1e-15)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 7, 11, 49, 64])
def test_ordinary_alphas_come_back_as_whole_numbers(tmp_path: Path, r: int) -> None:
    for alpha in (1, 2, 3, 5, 8, 16, 32, 49):
        update = LowRankUpdate(torch.ones(70, r), torch.ones(r, 70), alpha / r)
        folder = save_adapter(Adapter({"lin": update}), tmp_path)
        assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == alpha
        assert load_adapter(folder)["lin"].scale == alpha / r


def test_names_with_the_signs_of_regular_expressions_are_meant_literally(tmp_path: Path) -> None:
    names = ["a.b", "axb", "a+b", "(x)", "a-b_c.0"]
    updates = {name: LowRankUpdate(torch.ones(3, i + 1), torch.ones(i + 1, 4), i + 0.5) for i, name in enumerate(names)}
    again = load_adapter(save_adapter(Adapter(updates), tmp_path))
    assert {name: (module.r, module.scale) for name, module in again.modules.items()} == {
        name: (update.r, update.scale) for name, update in updates.items()
    }
    assert again.notes == ()


def test_conv1d_adapters_survive_writing(tmp_path: Path) -> None:
    model = trained(gpt2_model(), target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True).eval()
    adapter = load_adapter(saved(model, tmp_path / "theirs"))
    again = written_and_loaded(adapter, tmp_path / "ours", gpt2_model()).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], again(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    update = LowRankUpdate(torch.randn(3, 2).to(dtype), torch.randn(4, 2).to(dtype).mT, 1.5)
    again = load_adapter(save_adapter(Adapter({"lin": update}), tmp_path))["lin"]
    assert isinstance(again, LowRankUpdate)
    assert again.up.dtype == again.down.dtype == dtype
    assert torch.equal(again.dense(), update.dense())


def test_factors_that_share_memory_or_ask_for_gradients_are_written(tmp_path: Path) -> None:
    up, down = torch.randn(3, 2, requires_grad=True), torch.randn(2, 3)
    adapter = Adapter({"a": LowRankUpdate(up, down, 1.0), "b": LowRankUpdate(up, down, 2.0)})
    again = load_adapter(save_adapter(adapter, tmp_path))
    assert torch.equal(again["b"].dense(), 2 * again["a"].dense())


def test_what_was_there_is_overwritten_cleanly(tmp_path: Path) -> None:
    save_adapter(mixed_adapter(MODULES), tmp_path)
    small = mixed_adapter(["lin"])
    save_adapter(small, tmp_path)
    again = load_adapter(tmp_path)
    assert list(again) == ["lin"]
    assert torch.equal(again["lin"].dense(), small["lin"].dense())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_an_adapter_may_be_written_over_its_own_file(tmp_path: Path) -> None:
    model = trained()
    adapter = load_adapter(saved(model, tmp_path))
    save_adapter(adapter, tmp_path)
    assert_equals_peft(load_adapter(tmp_path), model)


def test_the_same_adapter_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path / "theirs"))
    for folder in ("a", "b"):
        save_adapter(adapter, tmp_path / folder)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def low_rank(scale: float = 1.0, r: int = 1) -> LowRankUpdate:
    return LowRankUpdate(torch.ones(3, r), torch.ones(r, 4), scale)


UNWRITABLE: dict[str, tuple[Adapter, type[Exception], str]] = {
    "unknown scale": (Adapter({"lin": low_rank(math.nan)}), UndefinedUpdateError, "'lin': expected a known scale"),
    "rows": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", rows=(0, 3))}),
        UnsupportedAdapterError,
        "'q': expected an update of the whole of 'q.weight', got one of a slice of 'q.weight'",
    ),
    "columns": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", columns=(0, 4))}),
        UnsupportedAdapterError,
        "got one of a slice of 'q.weight'",
    ),
    "expert": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", expert=0)}),
        UnsupportedAdapterError,
        "got one of a slice of 'q.weight'",
    ),
    "another tensor": (
        Adapter({"q": low_rank()}, targets={"q": Target("attn.weight")}),
        UnsupportedAdapterError,
        "'q': expected an update of the whole of 'q.weight', got one of 'attn.weight'",
    ),
    "dense": (
        Adapter({"lin": DenseUpdate(torch.ones(3, 4))}),
        UnsupportedAdapterError,
        "expected an update with factors A and B",
    ),
    "r of zero": (Adapter({"lin": low_rank(r=0)}), UnsupportedAdapterError, "'lin': .*r=0"),
    "nothing": (Adapter({}, source="mine"), ValueError, "mine: expected an adapter with modules"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    adapter, error, match = UNWRITABLE[name]
    with pytest.raises(error, match=match):
        save_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_no_update_are_left_out_with_a_warning(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(bias="all"), tmp_path / "theirs"))
    with pytest.warns(UserWarning, match="8 tensors that are no part of an update are not written") as caught:
        save_adapter(adapter, tmp_path / "ours")
    assert caught[0].filename == __file__
    again = load_adapter(tmp_path / "ours")
    assert (len(again), again.unused) == (7, ())


def test_other_formats_are_not_written_yet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format: expected 'peft', the only one written so far, got 'kohya'"):
        save_adapter(mixed_adapter(["lin"]), tmp_path, format="kohya")
