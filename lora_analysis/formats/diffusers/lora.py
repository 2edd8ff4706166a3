"""The modules of a file of diffusers': two factors each, perhaps an alpha and a magnitude."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.diffusers.names import Parts, parts_by_module
from lora_analysis.formats.diffusers.scaling import Header, scale_of
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import low_rank, true_update
from lora_analysis.update import Update

_DORA = "dora-low-rank-part"
_SIDE_TENSORS = (
    (r"\.lora_B(\.[^.]+)?\.bias$", "lora_bias: adds scale times it to the output, no part of ΔW"),
    (r"\.diff_b$", "diff_b: added to a bias, no part of ΔW"),
    (r"\.alpha$", "beside no factors, no part of any update"),
    (r"_custom_diffusion\.", "custom diffusion: a full tensor in place of the base's"),
)
_SLICE = re.compile(r"(?P<tensor>(?:.+\.)?single_blocks\.[0-9]+\.linear1)\.qkv\Z", re.DOTALL)
"""XLabs' update of the rows of q, k and v, which the weight of Flux's single blocks has before its MLP's."""


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a LoRA file of diffusers' or its kin's."""
    where = options.where
    header = Header(checkpoint, options.alpha, where)
    found, of_others = parts_by_module(checkpoint, options)
    modules: dict[str, Module] = {}
    doubts: list[tuple[str, str]] = []
    for module, parts in found.items():
        modules[module], more = _module(checkpoint, module, parts, header, options)
        doubts += more
    notes = header.notes(modules) + first_of_each(doubts)
    rescaled = sum(_DORA in module.flags for module in modules.values())
    if rescaled:
        notes.append(
            f"{rescaled} modules have DoRA magnitudes, which rescale the merged weight: what is given is their "
            "low-rank part. Pass base= for the true update."
        )
    unused = unused_tensors(
        checkpoint,
        {key for parts in found.values() for key in parts.keys.values()},
        {stem for parts in found.values() for stem in parts.stems},
        partial(_reason, of_others=of_others),
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    return Contents(modules, unused, tuple(notes))


def _module(
    checkpoint: Checkpoint, module: str, parts: Parts, header: Header, options: ReadOptions
) -> tuple[Module, list[tuple[str, str]]]:
    where = options.where
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts.keys:
            raise AdapterFormatError(
                f"{where}: {module!r}: expected down and up factors (lora_A and lora_B), got only "
                f"{parts.keys[other]!r}; {part} is missing."
            )
    keys = (parts.keys["up"], parts.keys["down"])
    up, down = (checkpoint.shape(key) for key in keys)
    fits = len(up) >= 2 and len(down) >= 2 and up[1] == down[0] and set(up[2:]) <= {1} and 0 not in up + down
    if not fits:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected down (r, in[, k, k]) and up (out, r[, 1, 1]) to share r, got {down} and "
            f"{up}. The file was read as 'diffusers'; pass format= to read it as another."
        )
    r, shape = down[0], (up[0], math.prod(down[1:]))
    (scale, source), notes = scale_of(module, r, parts.keys.get("alpha"), checkpoint, header, options.alpha, where)
    target = _target(module, shape, down[2:], parts.embedding, where)
    described = Module(
        shape=shape,
        r=r,
        scale=scale,
        scale_source=source,
        target=target,
        tensors=tuple(parts.keys.values()),
        read=partial(_read_update, checkpoint, keys, scale, options.device),
        embedding=parts.embedding,
    )
    if _magnitude_key(parts) is not None:
        return _with_magnitude(described, checkpoint, module, parts, options), notes
    if header.says("use_dora", module):
        raise AdapterFormatError(
            f"{where}: {module!r}: expected a magnitude beside its factors, as the header sets use_dora, found none."
        )
    return described, notes


def _target(module: str, shape: tuple[int, int], kernel: tuple[int, ...], embedding: bool, where: str) -> Target:
    if sliced := _SLICE.match(module):
        if shape[0] != 3 * shape[1]:
            raise AdapterFormatError(
                f"{where}: {module!r}: expected the update of q, k and v together, (3·dim, dim), got {shape}."
            )
        return Target(f"{sliced['tensor']}.weight", rows=(0, shape[0]))
    return Target(f"{module}.weight", transposed=embedding, kernel=kernel)


def _magnitude_key(parts: Parts) -> str | None:
    return parts.keys.get("magnitude") or parts.keys.get("dora_scale")


def _with_magnitude(
    described: Module, checkpoint: Checkpoint, module: str, parts: Parts, options: ReadOptions
) -> Module:
    """A module of DoRA: its low-rank part, or with a base its true update."""
    key = str(_magnitude_key(parts))
    if parts.embedding:
        raise UnsupportedAdapterError(f"{options.where}: {module!r}: DoRA on an embedding, which is not read yet.")
    axis = _magnitude_axis(checkpoint.shape(key), described, "dora_scale" in parts.keys)
    if {"magnitude", "dora_scale"} <= parts.keys.keys() or axis is None:
        raise AdapterFormatError(
            f"{options.where}: {module!r}: expected one magnitude for each of its {described.shape[0]} output rows"
            f" (or input columns, as (1, in)), got shape {checkpoint.shape(key)} in {key!r}."
        )
    magnitude = partial(_read_tensor, checkpoint, key, options.device)
    rescaled = replace(described, magnitude=magnitude, magnitude_axis=axis)
    if options.base is None:
        return replace(rescaled, flags=(_DORA,))
    return replace(rescaled, read=partial(_read_true_update, described, magnitude, axis, options.base))


def _magnitude_axis(shape: tuple[int, ...], described: Module, lycoris: bool) -> int | None:
    """What the norms run over: 1 with a magnitude per output row, 0 with one per input channel."""
    d_out, d_in = described.shape[0], described.shape[1] // math.prod(described.target.kernel)
    if lycoris and len(shape) > 1:
        # Which axis is whole tells, also where out = in: (out, 1, …) or (1, in, …).
        if shape[0] == d_out and math.prod(shape) == d_out:
            return 1
        return 0 if shape[1] == d_in and math.prod(shape) == d_in else None
    return 1 if math.prod(shape) == d_out else None


def _read_update(checkpoint: Checkpoint, keys: tuple[str, str], scale: float, device: torch.device) -> Update:
    up, down = (checkpoint[key].to(device) for key in keys)
    return low_rank(up, down, scale)


def _read_true_update(described: Module, magnitude: Callable[[], Tensor], axis: int, base: BaseWeights) -> Update:
    update, length = described.read(), magnitude()
    weight = base.matrix(described.target, described.shape).to(length.device)
    return true_update(update, weight, length, axis=axis, kernel=described.target.kernel)


def _read_tensor(checkpoint: Checkpoint, key: str, device: torch.device) -> Tensor:
    return checkpoint[key].to(device)


def _reason(key: str, of_others: Container[str]) -> str | None:
    if key in of_others:
        return "a factor of another adapter in the same file"
    return next((reason for pattern, reason in _SIDE_TENSORS if re.search(pattern, key)), None)
