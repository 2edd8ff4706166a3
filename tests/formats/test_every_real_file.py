"""Every weight file of others that lies at hand: what it is read as, and its numbers by each format's rule in numpy.

The rules are written here once more, from FORMATS' facts and the raw tensors, without the readers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import load_adapter

Array = np.ndarray[Any, np.dtype[np.float64]]
Raw = Mapping[str, Array]
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
TOLERANCE = 1e-6
LARGE, EVERY = 1_000_000, 5
"""Entries of a module; of the larger ones every fifth is compared, for the time it takes."""


class Expected(NamedTuple):
    """What a file is to be read as."""

    format: str
    modules: int
    ranks: tuple[int, ...]
    scale: float | None
    source: str
    unused: int
    options: dict[str, Any]


def expected(
    format: str,
    modules: int,
    ranks: int | tuple[int, ...],
    scale: float | None,
    source: str,
    unused: int = 0,
    **options: Any,
) -> Expected:
    return Expected(format, modules, (ranks,) if isinstance(ranks, int) else ranks, scale, source, unused, options)


TOYLORA = "down=lora_layers.{module}.lora_A.T up=lora_layers.{module}.lora_B.T as=network.{module}"
FILES: dict[str, Expected] = {
    "cloneofsimo/analog_svd_rank4.safetensors": expected("cloneofsimo", 192, 4, 1, "format default"),
    "cloneofsimo/lora_disney.safetensors": expected("cloneofsimo", 192, 1, 1, "format default", 2),
    "cloneofsimo/lora_kiriko2.text_encoder.pt": expected("cloneofsimo", 48, 4, 1, "format default"),
    "cloneofsimo/lora_pop.pt": expected("cloneofsimo", 128, 4, 1, "format default"),
    "diffusers/sd15_attn_processor/pytorch_lora_weights.safetensors": expected(
        "diffusers", 128, 4, 1, "format default"
    ),
    "diffusers/sd_pokemon/pytorch_lora_weights.safetensors": expected("diffusers", 128, 4, 1, "format default"),
    "loralib/roberta_base_mnli_r8/roberta_base_lora_mnli.bin": expected("loralib", 24, 8, None, "unknown", 4),
    "lycoris/smart_falcon_16_lokr.safetensors": expected("lycoris", 350, 16, 1, "tensor"),
    "lycoris/smart_falcon_4_lokr.safetensors": expected("lycoris", 350, 4, 1, "tensor"),
    "mlx/qwen2.5_0.5b_dpo/adapters.safetensors": expected("mlx", 4, 8, 20, "config"),
    "peft/roberta_base_agnews_r4/checkpoint-1200/adapter_model.safetensors": expected("peft", 36, 4, 4, "config", 105),
    "peft/roberta_base_agnews_r4/checkpoint-500/adapter_model.safetensors": expected("peft", 36, 4, 4, "config", 105),
    "peft/roberta_base_mrpc_r8/adapter_model.safetensors": expected("peft", 24, 8, 2, "config", 4),
    "peft_regression/lora_conv2d/adapter_model.bin": expected("peft", 1, 8, 1, "config"),
    "peft_regression/lora_mlp/adapter_model.bin": expected("peft", 1, 8, 1, "config"),
    "peft_regression/lora_mlp_modules_to_save/adapter_model.bin": expected("peft", 1, 8, 1, "config", 2),
    "peft_regression/lora_opt-350m/adapter_model.bin": expected("peft", 48, 8, 1, "config"),
    "sam_lora/round_a/lora_rank16.safetensors": expected("sam_lora", 24, 16, 1, "format default"),
    "sam_lora/round_a/lora_rank2.safetensors": expected("sam_lora", 24, 2, 1, "format default"),
    "sam_lora/round_a/lora_rank4.safetensors": expected("sam_lora", 24, 4, 1, "format default"),
    "sam_lora/round_a/lora_rank8.safetensors": expected("sam_lora", 24, 8, 1, "format default"),
    "sam_lora/round_b/lora_rank16.safetensors": expected("sam_lora", 24, 16, 1, "format default"),
    "sam_lora/round_b/lora_rank2.safetensors": expected("sam_lora", 24, 2, 1, "format default"),
    "sam_lora/round_b/lora_rank4.safetensors": expected("sam_lora", 24, 4, 1, "format default"),
    "sam_lora/round_b/lora_rank8.safetensors": expected("sam_lora", 24, 8, 1, "format default"),
    "sam_lora/untrained/lora.safetensors": expected("sam_lora", 24, 4, 1, "format default"),
    "toylora/finetuned.pth": expected("pattern", 4, 16, 2, "caller", 16, pattern=TOYLORA, alpha=32),
}
REFUSED = {
    "cloneofsimo/lora_kiriko2.ti.pt": "learned token embeddings",
    "not_low_rank/ia3_mlp/adapter_model.bin": "holds PEFT IA3, which is no additive low-rank update",
    "not_low_rank/ia3_mlp/output.pt": "expected a mapping of names to tensors, got a Tensor",
    "not_low_rank/unilora/adapter_model.safetensors": "holds PEFT UNILORA, which shares one vector",
    "peft_regression/lora_conv2d/output.pt": "expected a mapping of names to tensors, got a Tensor",
    "peft_regression/lora_mlp/output.pt": "expected a mapping of names to tensors, got a Tensor",
    "toylora/pretrained.pth": "no known format matches its 8 tensors",
}
WITHOUT_OPTIONS = {"toylora/finetuned.pth": "looks transposed.*Read it with pattern='down={module}.lora_A.T up="}


def test_the_tables_name_every_file(shared_adapters: Path) -> None:
    found = {str(path.relative_to(shared_adapters)) for path in shared_adapters.rglob("*") if path.suffix in SUFFIXES}
    assert found == FILES.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", [*REFUSED, *WITHOUT_OPTIONS])
def test_a_file_that_is_no_adapter_is_refused(shared_adapters: Path, name: str) -> None:
    with pytest.raises(LoraAnalysisError, match={**REFUSED, **WITHOUT_OPTIONS}[name]) as caught:
        load_adapter(shared_adapters / name)
    assert str(caught.value).startswith(str(shared_adapters / name))
    assert "\n" not in str(caught.value)


def raw(path: Path) -> Raw:
    """A file's tensors in float64; those of a list by their positions."""
    if path.suffix == ".safetensors":
        return {name: array.astype(np.float64) for name, array in load_file(path).items()}
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    loaded = loaded.get("model_state_dict", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else loaded
    items = enumerate(loaded) if isinstance(loaded, list) else loaded.items()
    return {str(name): value.detach().double().numpy() for name, value in items if isinstance(value, torch.Tensor)}


def flat(factor: Array) -> Array:
    return factor.reshape(len(factor), -1)


def of_loralib(module: str, tensors: Raw, path: Path) -> Array:
    return tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]


def of_sam(module: str, tensors: Raw, path: Path) -> Array:
    found = re.fullmatch(r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.([qv])", module)
    assert found is not None
    number = 2 * int(found[1]) + "qv".index(found[2])
    return tensors[f"w_b_{number:03d}"] @ tensors[f"w_a_{number:03d}"]


def of_peft(module: str, tensors: Raw, path: Path) -> Array:
    config = json.loads((path.parent / "adapter_config.json").read_text())
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    a, b = (flat(tensors[f"base_model.model.{module}.lora_{side}.weight"]) for side in "AB")
    return config["lora_alpha"] / len(a) * (b @ a)


def of_lokr(module: str, tensors: Raw, path: Path) -> Array:
    def of(name: str) -> tuple[Array, int | None]:
        whole = tensors.get(f"{module}.{name}")
        if whole is not None:
            return flat(whole), None
        a, b = flat(tensors[f"{module}.{name}_a"]), flat(tensors[f"{module}.{name}_b"])
        return a @ b, len(b)

    (w1, r1), (w2, r2) = of("lokr_w1"), of("lokr_w2")
    r = r1 or r2
    assert r is not None
    return float(tensors[f"{module}.alpha"]) / r * np.kron(w1, w2)


def of_mlx(module: str, tensors: Raw, path: Path) -> Array:
    config = json.loads((path.parent / "adapter_config.json").read_text())
    return config["lora_parameters"]["scale"] * (tensors[f"{module}.lora_a"] @ tensors[f"{module}.lora_b"]).T


def of_diffusers(module: str, tensors: Raw, path: Path) -> Array:
    inner, _, last = module.removesuffix(".0").rpartition(".")
    stems = (f"{module}.lora", f"{inner}.processor.{last}_lora")
    stem = next(stem for stem in stems if f"{stem}.up.weight" in tensors)
    return flat(tensors[f"{stem}.up.weight"]) @ flat(tensors[f"{stem}.down.weight"])


def of_cloneofsimo(module: str, tensors: Raw, path: Path) -> Array:
    component, _, number = module.rpartition(".")
    keys = (f"{component}:{number}:up", f"{component}:{number}:down")
    if component == "lora":
        keys = (str(2 * int(number)), str(2 * int(number) + 1))
    return flat(tensors[keys[0]]) @ flat(tensors[keys[1]])


def of_toylora(module: str, tensors: Raw, path: Path) -> Array:
    stem = module.replace("network", "lora_layers")
    return 32 / 16 * (tensors[f"{stem}.lora_A"] @ tensors[f"{stem}.lora_B"]).T


RULES: dict[str, Callable[[str, Raw, Path], Array]] = {
    "loralib": of_loralib,
    "sam_lora": of_sam,
    "peft": of_peft,
    "lycoris": of_lokr,
    "mlx": of_mlx,
    "diffusers": of_diffusers,
    "cloneofsimo": of_cloneofsimo,
    "pattern": of_toylora,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_the_table_says(shared_adapters: Path, name: str) -> None:
    says = FILES[name]
    adapter = load_adapter(shared_adapters / name, **says.options)
    modules = adapter.modules.values()
    assert (adapter.format, len(adapter)) == (says.format, says.modules)
    assert tuple(sorted({module.r for module in modules})) == says.ranks
    assert {None if math.isnan(module.scale) else module.scale for module in modules} == {says.scale}
    assert {module.scale_source for module in modules} == {says.source}
    assert len(adapter.unused) == says.unused
    assert adapter.ledger.keys() == raw(shared_adapters / name).keys()


@pytest.mark.parametrize("name", FILES)
def test_every_update_is_what_its_formats_rule_gives(shared_adapters: Path, name: str) -> None:
    says, path = FILES[name], shared_adapters / name
    tensors, rule = raw(path), RULES[says.format]
    # r as alpha: a scale of 1, where the file leaves it open.
    adapter = load_adapter(path, **({"alpha": says.ranks[0]} if says.scale is None else says.options))
    for position, (module, described) in enumerate(adapter.modules.items()):
        if math.prod(described.shape) > LARGE and position % EVERY:
            continue
        update, by_hand = adapter[module], rule(module, tensors, path)
        assert described.shape == update.shape == by_hand.shape
        difference = np.abs(update.dense().numpy() - by_hand).max()
        assert difference <= TOLERANCE * np.abs(by_hand).max(), module
