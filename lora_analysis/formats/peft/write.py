"""Writing an adapter as PEFT reads it."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_analysis.adapter import Adapter, Module, Target
from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.update import factors


def write(adapter: Adapter, directory: Path) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
    if not len(adapter):
        raise ValueError(f"{adapter.source}: expected an adapter with modules to save, got none.")
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        if math.isnan(module.scale):
            raise UndefinedUpdateError(
                f"{adapter.source}: {name!r}: expected a known scale to save, it is unknown. Pass alpha= when loading."
            )
        if module.target not in (Target(f"{name}.weight"), Target(f"{name}.weight", transposed=True)):
            raise UnsupportedAdapterError(
                f"{adapter.source}: {name!r}: expected an update of the whole of '{name}.weight', got one of "
                f"{_place(module.target)}, for which PEFT's LoRA has no place."
            )
        if module.r == 0:
            raise UnsupportedAdapterError(f"{adapter.source}: {name!r}: expected factors to save, got r=0.")
        up, down = factors(adapter[name])
        for side, factor in (("A", down), ("B", up)):
            # Copies, because safetensors refuses tensors that share memory.
            copied = factor.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = copied
    if adapter.unused:
        warnings.warn(
            f"{adapter.source}: {len(adapter.unused)} tensors that are no part of an update are not written "
            f"(first: {adapter.unused[0].tensor!r}).",
            stacklevel=3,
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        save_file(tensors, Path(scratch) / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_configuration(adapter), indent=2, sort_keys=True) + "\n"
        (Path(scratch) / "adapter_config.json").write_text(text, encoding="utf-8")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(scratch) / name, directory / name)  # noqa: PTH105 (atomic)
    return directory


def _configuration(adapter: Adapter) -> dict[str, Any]:
    ranks = {name: module.r for name, module in adapter.modules.items()}
    alphas = {name: _alpha(module) for name, module in adapter.modules.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(adapter.modules),
        "fan_in_fan_out": any(module.target.transposed for module in adapter.modules.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(module: Module) -> float | int:
    """The alpha that gives the scale back, whole where one does: 49 / 11 * 11 is not 49."""
    product = module.scale * module.r
    whole = round(product)
    if whole / module.r == module.scale:
        return whole
    neighbours = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return min(neighbours, key=lambda alpha: abs(alpha / module.r - module.scale))


def _place(target: Target) -> str:
    whole = (target.rows, target.columns, target.expert) == (None, None, None)
    return f"{target.tensor!r}" if whole else f"a slice of {target.tensor!r}"


def _exactly(module: str) -> str:
    """A pattern key that PEFT resolves to this module and to no other."""
    return "^" + re.escape(module)
