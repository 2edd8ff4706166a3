"""Sam_LoRA and its kin (SAMed, LoRA-ViT): factors by index, for the q and v slices of a vision transformer's qkv.

Conventions
-----------
``w_a_000`` (r, dim) and ``w_b_000`` (dim, r), numbered through the adapted blocks: even numbers are q, odd ones v
of block ``i // 2``. Module ``image_encoder.blocks.3.attn.qkv.v`` is pair ``007`` and acts on the last dim of the
3·dim rows of that block's fused ``qkv``, ``….q`` on the first. In a LoRA-ViT file, which holds a classifier
``fc_<in>in_<out>out`` as well, the modules are ``blocks.3.attn.qkv.v``.

The layers add w_b(w_a(x)) as it is: no alpha, a scale of 1. ``alpha=`` is the lora_alpha of the paper,
ΔW = alpha / r · w_b·w_a. The linear layers of Sam_LoRA have biases that are trained and not saved; they shift the
output and are no part of ΔW.

What the file does not say, and the reader takes from the writers' code: that all blocks were adapted (with their
``lora_layer=`` only some are numbered; given ``base=`` with another number of blocks, the file is refused), and
that q and v were: forks that adapt q, k and v under the same names exist, and some LoRA-ViT forks multiply by
``alpha // r``. Facts from ``src/lora.py`` of MathieuNlp/Sam_LoRA, ``sam_lora_image_encoder.py`` of hitachinsk/SAMed,
``lora.py`` of JamesQFreeman/LoRA-ViT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import low_rank
from lora_analysis.update import LowRankUpdate

NAME = "sam_lora"
TAKES = ()

_FACTOR = re.compile(r"w_(?P<side>[ab])_(?P<index>[0-9]{3,4})\Z")
_CLASSIFIER = re.compile(r"fc_[0-9]+in_[0-9]+out\Z")
_QKV = re.compile(r"(?P<blocks>(?:.+\.)?(?:blocks|layers))\.[0-9]+\.attn\.qkv\.weight\Z", re.DOTALL)
_SLICES = ("q", "v")
_SLOTS = (0, 2)
"""Their places among the three equal parts of the rows."""


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether some tensors are called ``w_a_000`` or ``w_b_000``."""
    return "peft_type" not in config and any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a Sam_LoRA file."""
    where = options.where
    pairs = _pairs(checkpoint, where)
    prefix = "blocks" if any(_CLASSIFIER.match(name) for name in checkpoint) else "image_encoder.blocks"
    in_base = prefix if options.base is None else _blocks_of(options.base, len(pairs) // len(_SLICES), where)
    modules: dict[str, Module] = {}
    for number, keys in enumerate(pairs):
        block, slot = divmod(number, len(_SLICES))
        name, tensor = f"{prefix}.{block}.attn.qkv.{_SLICES[slot]}", f"{in_base}.{block}.attn.qkv.weight"
        modules[name] = _module(checkpoint, keys, tensor, _SLOTS[slot], options)
    unused = unused_tensors(
        checkpoint,
        {key for keys in pairs for key in keys},
        (),
        _reason,
        otherwise="a full tensor trained beside LoRA, no part of any update",
        where=where,
    )
    note = (
        "the file does not name its slices: read as q (even numbers) and v (odd numbers) of block i // 2, as Sam_LoRA, "
        "SAMed and LoRA-ViT write them when they adapt all blocks."
    )
    return Contents(modules, unused, (note,))


def _pairs(checkpoint: Checkpoint, where: str) -> list[tuple[str, str]]:
    """The keys of A and B, by number: 0, 1, 2, … without a gap, a q and a v for each block."""
    found: dict[int, dict[str, str]] = {}
    for key in checkpoint:
        if match := _FACTOR.match(key):
            found.setdefault(int(match["index"]), {})[match["side"]] = key
    for number in range(max(found, default=-1) + 1):
        for side in "ab":
            if side not in found.get(number, {}):
                raise AdapterFormatError(
                    f"{where}: expected w_a and w_b numbered from 000 to {max(found):03d} without a gap, "
                    f"'w_{side}_{number:03d}' is missing."
                )
    if len(found) % len(_SLICES):
        raise AdapterFormatError(
            f"{where}: expected a q and a v for every block, so an even number of pairs w_a, w_b, got {len(found)}."
        )
    return [(found[number]["a"], found[number]["b"]) for number in range(len(found))]


def _module(checkpoint: Checkpoint, keys: tuple[str, str], tensor: str, slot: int, options: ReadOptions) -> Module:
    shape_a, shape_b = (checkpoint.shape(key) for key in keys)
    fits = len(shape_a) == len(shape_b) == 2 and shape_a == shape_b[::-1] and 0 not in shape_a
    if not fits:
        raise AdapterFormatError(
            f"{options.where}: {keys[0]!r}: expected w_a (r, dim) and w_b (dim, r) of one dim, "
            f"got {shape_a} and {shape_b}."
        )
    r, dim = shape_a
    scale, source = _scale(options.alpha, r)
    return Module(
        shape=(dim, dim),
        r=r,
        scale=scale,
        scale_source=source,
        target=Target(tensor, rows=(slot * dim, (slot + 1) * dim)),
        tensors=keys,
        read=partial(_read_update, checkpoint, keys, scale, options.device),
    )


def _blocks_of(base: BaseWeights, blocks: int, where: str) -> str:
    """What the base calls its list of blocks, of which there must be as many as the file adapts."""
    found = Counter(match["blocks"] for match in map(_QKV.match, base) if match)
    if list(found.values()) != [blocks]:
        counts = ", ".join(f"{count} in {stem!r}" for stem, count in found.items()) or "none"
        raise AdapterFormatError(
            f"{where}: expected a base with {blocks} blocks of a fused qkv ('….blocks.<i>.attn.qkv.weight'), found "
            f"{counts} in {base.source}. The file numbers only the blocks it adapts, so which they are it does not say."
        )
    return next(iter(found))


def _scale(alpha: float | None, r: int) -> tuple[float, ScaleSource]:
    return (1.0, "format default") if alpha is None else (alpha / r, "caller")


def _read_update(checkpoint: Checkpoint, keys: tuple[str, str], scale: float, device: torch.device) -> LowRankUpdate:
    down, up = (checkpoint[key].to(device) for key in keys)
    return low_rank(up, down, scale)


def _reason(key: str) -> str | None:
    return "the classifier trained beside LoRA, no part of any update" if _CLASSIFIER.match(key) else None
