"""Writing PEFT's format: LoRA of linear layers, embeddings and convolutions, and DoRA's magnitudes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.patterns import PatternKeys
from lora_analysis.formats.peft.names import plain
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.components import COMPONENTS
from lora_analysis.formats.writers.losses import count
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written
from lora_analysis.formats.writers.refusals import require_base_names, require_magnitudes_of_outputs

_OF_PIPELINES = ("diffusers", "kohya", "lycoris")
"""Formats whose names begin with the component of a pipeline, where other models may have a module of that name."""


def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory."""
    require_base_names(adapter, parts, "peft")
    dora = _use_dora(adapter.source, parts)
    names, losses = _names_in_one_model(adapter, parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _require_place(adapter.source, part)
        stem = f"base_model.model.{names[part.name]}"
        tensors |= _tensors(stem, part)
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = _magnitude(part)
    modules = {names[part.name]: part for part in parts}
    text = json.dumps(_configuration(adapter.config, modules, dora), indent=2, sort_keys=True) + "\n"
    put_in_place(
        path,
        {
            "adapter_model.safetensors": safetensors_writer(tensors, {"format": "pt"}),
            "adapter_config.json": lambda file: file.write_text(text, encoding="utf-8"),
        },
    )
    return Written(parts, names, (*losses, *_orientations(parts)))


def _names_in_one_model(adapter: Adapter, parts: Sequence[Part]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Part to its name in the model that a PEFT adapter is of, without the pipeline's component, and what is lost."""
    components = sorted({part.name.partition(".")[0] for part in parts})
    if adapter.format not in _OF_PIPELINES or not set(components) <= set(COMPONENTS):
        return {part.name: part.name for part in parts}, ()
    if len(components) > 1:
        loss = (
            f"updates of {' and '.join(components)} are in one adapter, which peft loads into a model of all of them."
        )
        return {part.name: part.name for part in parts}, (loss,)
    loss = f"the component {components[0]!r} is not written: a PEFT adapter is of one model."
    return {part.name: part.name.partition(".")[2] for part in parts}, (loss,)


def _require_place(source: str, part: Part) -> None:
    """Refuse a module that PEFT's LoRA has no place for."""
    if plain(part.name) != part.name or "base_layer" in part.name.split("."):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected the base's own name of this module, got one with what compile, FSDP or "
            "PEFT put into it, which is no part of it when the file is read. Leave that out."
        )
    target = part.target
    whole = Target(f"{part.name}.weight", transposed=target.transposed, kernel=target.kernel)
    if target != whole or (target.transposed and target.kernel):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected an update of the whole of '{part.name}.weight', got one of "
            f"{target.tensor!r}{' turned' if target.transposed else ''}, which is not written as peft."
        )
    if len(target.kernel) > 3:
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected a kernel of one to three axes, got {target.kernel}."
        )


def _orientations(parts: Sequence[Part]) -> tuple[str, ...]:
    """What is lost where some linear weights are stored turned and others are not: the configuration has one flag."""
    linear = [part for part in parts if not part.embedding and not part.target.kernel]
    straight = [part.name for part in linear if not part.target.transposed]
    if len(straight) in (0, len(linear)):
        return ()
    return (
        f"{count(len(straight), 'module')} of weights that are not stored turned, beside others that are (first: "
        f"{straight[0]!r}): PEFT has one fan_in_fan_out for all, and tells them apart by the model's layers only.",
    )


def _use_dora(source: str, parts: Sequence[Part]) -> bool:
    """Whether the modules have magnitudes: all, as PEFT knows them, or none."""
    without = [part.name for part in parts if part.magnitude is None]
    if len(without) == len(parts):
        return False
    if without:
        raise UnsupportedAdapterError(
            f"{source}: {without[0]!r}: expected DoRA's magnitudes of every module or of none, as PEFT has one "
            "use_dora for all; this one has none."
        )
    require_magnitudes_of_outputs(source, parts, "peft")
    return True


def _tensors(stem: str, part: Part) -> dict[str, Tensor]:
    up, down = part.kernels()
    if part.embedding:
        return {f"{stem}.lora_embedding_A": down, f"{stem}.lora_embedding_B": up}
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def _magnitude(part: Part) -> Tensor:
    assert part.magnitude is not None
    magnitude = part.magnitude.flatten()
    return magnitude.reshape(1, -1, *(1 for _ in part.target.kernel)) if part.target.kernel else magnitude


def _configuration(config: Mapping[str, Any], modules: Mapping[str, Part], dora: bool) -> dict[str, Any]:
    fields = scale_fields(modules)
    if config.get("alora_invocation_tokens"):
        fields["alora_invocation_tokens"] = config["alora_invocation_tokens"]
    return fields | {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "fan_in_fan_out": any(part.target.transposed for part in modules.values() if not part.embedding),
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
    keys = _pattern_keys(parts)
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: value for name, value in ranks.items() if value != r},
        "alpha_pattern": {keys[name]: value for name, value in alphas.items() if value != alpha},
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


def _pattern_keys(modules: Collection[str]) -> dict[str, str]:
    r"""Keys of patterns, each of which PEFT resolves to its module and to no other of these.

    Names as they are where that is enough: PEFT knows anchors only since its #2419, and found whole names before.

    Examples
    --------
    >>> _pattern_keys(["lin", "layers.0.lin", "a+b"])
    {'lin': '^lin', 'layers.0.lin': 'layers.0.lin', 'a+b': '^a\\+b'}
    """
    literal = [name for name in modules if re.fullmatch(r"[\w./-]+", name)]
    found = PatternKeys()
    for name in literal:
        found.append(name)
    hits = Counter(index for module in modules for index in found.matching(module))
    alone = {name for index, name in enumerate(literal) if hits[index] == 1}
    return {name: name if name in alone else "^" + re.escape(name) for name in modules}
