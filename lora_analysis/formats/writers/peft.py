"""Writing PEFT's format: LoRA of linear layers, embeddings and convolutions, and DoRA's magnitudes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written


def write(parts: list[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory."""
    dora = _use_dora(adapter.source, parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _require_place(adapter.source, part)
        tensors |= _tensors(f"base_model.model.{part.name}", part)
        if dora:
            tensors[f"base_model.model.{part.name}.lora_magnitude_vector"] = _magnitude(adapter.source, part)
    text = json.dumps(_configuration(adapter.config, parts, dora), indent=2, sort_keys=True) + "\n"
    put_in_place(
        path,
        {
            "adapter_model.safetensors": safetensors_writer(tensors, {"format": "pt"}),
            "adapter_config.json": lambda file: file.write_text(text, encoding="utf-8"),
        },
    )
    return Written({part.name: part.name for part in parts})


def _require_place(source: str, part: Part) -> None:
    """Refuse a module that PEFT's LoRA has no place for."""
    target = part.target
    whole = Target(f"{part.name}.weight", transposed=target.transposed, kernel=target.kernel)
    if target != whole or (target.transposed and target.kernel):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected an update of the whole of '{part.name}.weight', got one of "
            f"{target.tensor!r}, for which PEFT's LoRA has no place."
        )
    if len(target.kernel) > 3:
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected a kernel of one to three axes, got {target.kernel}."
        )


def _use_dora(source: str, parts: list[Part]) -> bool:
    """Whether the modules have magnitudes: all, as PEFT knows them, or none."""
    without = [part.name for part in parts if part.magnitude is None]
    if len(without) == len(parts):
        return False
    if without:
        raise UnsupportedAdapterError(
            f"{source}: {without[0]!r}: expected DoRA's magnitudes of every module or of none, as PEFT has one "
            "use_dora for all; this one has none."
        )
    if odd := next((part.name for part in parts if part.magnitude_axis != 1), None):
        raise UnsupportedAdapterError(
            f"{source}: {odd!r}: expected one magnitude for each output, as PEFT's, got one for each input."
        )
    return True


def _tensors(stem: str, part: Part) -> dict[str, Tensor]:
    up, down = part.kernels()
    if part.embedding:
        return {f"{stem}.lora_embedding_A": down, f"{stem}.lora_embedding_B": up}
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def _magnitude(source: str, part: Part) -> Tensor:
    assert part.magnitude is not None
    magnitude = part.magnitude.flatten()
    if len(magnitude) != len(part.up):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected {len(part.up)} magnitudes, one for each output, got {len(magnitude)}."
        )
    return magnitude.reshape(1, -1, *(1 for _ in part.target.kernel)) if part.target.kernel else magnitude


def _configuration(config: Mapping[str, Any], parts: list[Part], dora: bool) -> dict[str, Any]:
    fields = scale_fields({part.name: part for part in parts})
    return fields | {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "fan_in_fan_out": any(part.target.transposed for part in parts if not part.embedding),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_dora": dora,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def scale_fields(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The fields of a LoraConfig that give these modules, by their names in it, their r and scale."""
    ranks = {name: part.r for name, part in parts.items()}
    alphas = {name: _alpha(part.scale, part.r) for name, part in parts.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(parts),
        "use_rslora": False,
    }


def _alpha(scale: float, r: int) -> float | int:
    """The alpha that gives the scale back, whole where one does: 49 / 11 * 11 is not 49."""
    product = scale * r
    whole = round(product)
    if whole / r == scale:
        return whole
    neighbours = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return min(neighbours, key=lambda alpha: abs(alpha / r - scale))


def _exactly(module: str) -> str:
    """A pattern key that PEFT resolves to this module and to no other."""
    return "^" + re.escape(module)
