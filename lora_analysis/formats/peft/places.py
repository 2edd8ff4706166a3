"""Where on the base each adapted layer acts, by the names and shapes of its factors: linear, embedding, convolution.

Conventions
-----------
A convolution's A is (r, in, k, …) with the base's kernel and its B (out, r, 1, …): ΔW is their product, unfolded to
(out, in·k·…). An embedding's A is (r, vocab) and its B (dim, r): the map (dim, vocab), whose weight is stored the
other way round whatever ``fan_in_fan_out`` says. A ``MultiheadAttention`` holds LoRA of its ``in_proj_weight``, q, k
and v in one, under its own name, and LoRA of ``out_proj`` inside ``base_layer``; both take r and alpha of the
attention's own name. Facts from PEFT's ``tuners/lora/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from lora_analysis.adapter import Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.peft.configuration import Remark, about
from lora_analysis.formats.peft.factors import Expert
from lora_analysis.formats.peft.names import Layer

NESTED = ".base_layer"
_ATTENTION = f"{NESTED}.out_proj"


class Live(NamedTuple):
    """What a layer of a live model says of itself and its tensors do not."""

    scale: float
    transposed: bool
    """Whether the base stores a linear weight as (d_in, d_out), or a parameter as the transpose of B·A."""
    parameter: str | None = None
    """Which parameter of its module it adapts, if not the module."""
    stored: tuple[int, ...] = ()
    """Shape of that parameter."""
    reads_inputs: bool = True
    """Whether A of a parameter belongs to its inputs."""


@dataclass(frozen=True, slots=True)
class Place:
    """One module as the names and shapes of its tensors tell it.

    Parameters
    ----------
    name : str
        The base's name, without ``.weight``.
    path : str
        What the patterns of the configuration are matched with.
    layer : Layer
        Its tensors.
    shape : (int, int)
        (d_out, d_in).
    r : int
    target : Target
    expert : Expert, optional
        Which part of the factors it is, where they hold several experts.
    flags : tuple of str
    remarks : tuple of Remark
    """

    name: str
    path: str
    layer: Layer
    shape: tuple[int, int]
    r: int
    target: Target
    expert: Expert | None = None
    flags: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()


def place(checkpoint: Checkpoint, layer: Layer, stems: Container[str], *, transposed: bool, where: str) -> Place:
    """The place of a layer that is a module of the base.

    Parameters
    ----------
    checkpoint : Checkpoint
    layer : Layer
    stems : container of str
        The names of all layers, which tell an attention by its parts.
    transposed : bool
        Whether the base stores linear weights as (d_in, d_out).
    where : str
        The file, for messages.

    Raises
    ------
    AdapterFormatError
        If the factors do not fit each other.
    UnsupportedAdapterError
        If the layer is a grouped convolution.
    """
    stem = layer.stem
    shape_a, shape_b = checkpoint.shape(layer.down), checkpoint.shape(layer.up)
    shape, r, kernel = _geometry(where, layer, shape_a, shape_b)
    if f"{stem}{_ATTENTION}" in stems:
        name = f"{stem}.in_proj_weight"
        return Place(name, stem, layer, shape, r, Target(name))
    if stem.endswith(_ATTENTION) and stem.removesuffix(_ATTENTION) in stems:
        attention = stem.removesuffix(_ATTENTION)
        name = f"{attention}.out_proj"
        text = (
            "in a MultiheadAttention, whose layer in PEFT merges this update twice, in its forward pass too: what acts "
            "there is 2·s·B·A. ΔW is given as s·B·A."
        )
        return Place(name, attention, layer, shape, r, Target(f"{name}.weight"), remarks=(about(name, text),))
    turned = layer.embedding or (transposed and len(shape_a) == 2)
    return Place(stem, stem, layer, shape, r, Target(f"{stem}.weight", transposed=turned, kernel=kernel))


def _geometry(
    where: str, layer: Layer, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """Shape of ΔW, r, and the kernel of a convolution."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A", "lora_B")
    if 3 <= len(shape_a) <= 5 and len(shape_b) == len(shape_a) and not layer.embedding:
        _require_convolution(where, layer.stem, shape_a, shape_b)
        return (shape_b[0], math.prod(shape_a[1:])), shape_a[0], shape_a[2:]
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise AdapterFormatError(
            f"{where}: {layer.stem!r}: expected {a} (r, d_in) and {b} (d_out, r) to share r, "
            f"got {shape_a} and {shape_b}. The file was read as 'peft'; pass format= to read it as another."
        )
    return (shape_b[0], shape_a[1]), shape_a[0], ()


def _require_convolution(where: str, stem: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    if math.prod(shape_b[2:]) == 1 and shape_a[0] == shape_b[1]:
        return
    groups, rest = divmod(shape_a[0], shape_b[1]) if shape_b[1] else (0, 1)
    if math.prod(shape_b[2:]) == 1 and groups > 1 and rest == 0:
        raise UnsupportedAdapterError(
            f"{where}: {stem!r}: LoRA on a convolution with {groups} groups (lora_A {shape_a}, lora_B {shape_b}): its "
            "A sees every input channel and its B does not, so there is no ΔW in the shape of the grouped kernel, and "
            "PEFT cannot merge it either."
        )
    raise AdapterFormatError(
        f"{where}: {stem!r}: expected the lora_A (r, in, k, …) and lora_B (out, r, 1, …) of a convolution to share r, "
        f"got {shape_a} and {shape_b}. The file was read as 'peft'; pass format= to read it as another."
    )
