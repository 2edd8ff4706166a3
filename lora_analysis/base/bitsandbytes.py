"""Weights that bitsandbytes quantised to 4 or 8 bits, as it and transformers save them, back as numbers.

Conventions
-----------
*4 bits*: ``weight`` holds two codes per byte, the first in the high bits, in row-major order; each block of
``blocksize`` codes has one ``absmax``: ``w = quant_map[code] · absmax``. With double quantisation the ``absmax`` are
codes themselves: ``absmax = nested_quant_map[code] · nested_absmax + nested_offset``. Shape, dtype and sizes of blocks
lie as JSON in ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``). *8 bits*: ``w = weight · SCB / 127``, one ``SCB``
per row.

The numbers are those that a QLoRA adapter saw in training: 4-bit weights come in the dtype that bitsandbytes gives
them, 8-bit ones in float32.

Sources: bitsandbytes ``functional.py`` (``QuantState``, ``dequantize_4bit``, ``int8_vectorwise_dequant``),
``nn/modules.py`` (``Linear4bit``, ``Linear8bitLt``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.checkpoint.protocol import Checkpoint
from lora_analysis.errors import BaseWeightsError

STATES = {"nf4": ".quant_state.bitsandbytes__nf4", "fp4": ".quant_state.bitsandbytes__fp4"}
"""Kinds of 4-bit weight, and the endings of the tensor that describes one."""

PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""Endings of the other tensors beside a 4-bit weight."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MOST_BYTES = 10_000
_LARGEST_OFFSET = 1e30
_LARGEST_INT8 = 127
_ROW_MAJOR = 0


@dataclass(frozen=True, slots=True)
class State4bit:
    """What describes one 4-bit weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float


def read_state(checkpoint: Checkpoint, weight: str, kind: str) -> State4bit:
    """The description of a 4-bit weight, a few hundred bytes that are read.

    Raises
    ------
    BaseWeightsError
        If it is damaged.
    """
    name = weight + STATES[kind]
    shape = checkpoint.shape(name)
    if len(shape) != 1 or shape[0] > _MOST_BYTES or checkpoint.dtype(name) is not torch.uint8:
        raise BaseWeightsError(f"{name!r}: expected some hundred bytes of JSON, got shape {shape}.")
    try:
        state = json.loads(bytes(checkpoint[name].tolist()))
    except (ValueError, RecursionError) as error:
        raise BaseWeightsError(f"{name!r}: expected JSON of a quantisation, got something else.") from error
    return _state(state if isinstance(state, Mapping) else {}, name)


def _state(state: Mapping[str, object], name: str) -> State4bit:
    shape, dtype = state.get("shape"), state.get("dtype")
    blocksize, nested = state.get("blocksize"), state.get("nested_blocksize")
    offset = state.get("nested_offset", 0.0)
    sizes = [*(shape if isinstance(shape, list) else [None]), blocksize, *([] if nested is None else [nested])]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise BaseWeightsError(f"{name!r}: expected a shape and sizes of blocks, got {str(dict(state))[:200]}.")
    # One that is NaN, infinite or a whole number past all floats would make every weight so.
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < _LARGEST_OFFSET:
        raise BaseWeightsError(f"{name!r}: expected a finite nested_offset, got {str(offset)[:40]!r}.")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BaseWeightsError(f"{name!r}: expected a dtype of {', '.join(_DTYPES)}, got {str(dtype)[:40]!r}.")
    return State4bit(
        shape=tuple(shape if isinstance(shape, list) else ()),
        dtype=_DTYPES[dtype],
        blocksize=blocksize if isinstance(blocksize, int) else 0,
        nested_blocksize=nested if isinstance(nested, int) else None,
        nested_offset=float(offset),
    )


def dequantised_4bit(checkpoint: Checkpoint, weight: str, state: State4bit) -> Tensor:
    """The numbers of a 4-bit weight, in the dtype that bitsandbytes gives them.

    Raises
    ------
    BaseWeightsError
        If its tensors do not fit its description.
    """
    count = math.prod(state.shape)
    blocks = -(-count // state.blocksize)
    stored = checkpoint[weight]
    packed = stored.contiguous().reshape(-1).view(torch.uint8)  # the storage may pose as another dtype
    needed = -(-count // 2)
    if not needed <= packed.numel() < needed + stored.itemsize:
        raise BaseWeightsError(f"{weight!r}: expected {needed:,} bytes of codes, got {packed.numel():,}.")
    absmax = _absmax(checkpoint, weight, state, blocks)
    values = _exactly(checkpoint, f"{weight}.quant_map", 16)
    # One look-up gives both numbers of a byte.
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
    numbers = pairs.index_select(0, packed[:needed].int()).reshape(-1)[:count]
    whole = count // state.blocksize * state.blocksize
    numbers[:whole].view(-1, state.blocksize).mul_(absmax[: count // state.blocksize, None])
    numbers[whole:].mul_(absmax[-1])
    return numbers.to(state.dtype).reshape(state.shape)


def _absmax(checkpoint: Checkpoint, weight: str, state: State4bit, blocks: int) -> Tensor:
    stored = f"{weight}.absmax"
    if state.nested_blocksize is None:
        return _exactly(checkpoint, stored, blocks)
    _require_there(checkpoint, stored)
    if checkpoint.dtype(stored) is not torch.uint8 or math.prod(checkpoint.shape(stored)) != blocks:
        raise BaseWeightsError(
            f"{stored!r}: expected {blocks} codes of one byte, got {checkpoint.dtype(stored)} "
            f"{checkpoint.shape(stored)}."
        )
    codes = checkpoint[stored].reshape(-1)
    scales = _exactly(checkpoint, f"{weight}.nested_absmax", -(-blocks // state.nested_blocksize))
    values = _exactly(checkpoint, f"{weight}.nested_quant_map", 256)
    # Not by repeating the scales: a block may claim to be larger than all codes together.
    return values[codes.int()] * scales[torch.arange(blocks) // state.nested_blocksize] + state.nested_offset


def dequantised_8bit(checkpoint: Checkpoint, weight: str, scales: str) -> Tensor:
    """The numbers of an 8-bit weight (d_out, d_in), in float32.

    Raises
    ------
    BaseWeightsError
        If there is not one scale per row, or the codes are in an order that was made for one kind of GPU.
    """
    layout = f"{scales.removesuffix('SCB')}weight_format"
    if layout in checkpoint and (math.prod(checkpoint.shape(layout)) != 1 or int(checkpoint[layout]) != _ROW_MAJOR):
        raise BaseWeightsError(
            f"{weight!r}: expected 8-bit codes in rows, got a layout of older bitsandbytes for one kind of GPU. Save "
            "it again with a newer bitsandbytes, or give the original weights."
        )
    codes = checkpoint[weight]
    if codes.ndim != 2:
        raise BaseWeightsError(f"{weight!r}: expected a matrix of codes, got shape {tuple(codes.shape)}.")
    return codes.float() * (_exactly(checkpoint, scales, codes.shape[0])[:, None] / _LARGEST_INT8)


def _require_there(checkpoint: Checkpoint, name: str) -> None:
    if name not in checkpoint:
        raise BaseWeightsError(f"{name!r}: expected it beside the quantised weight, found none.")


def _exactly(checkpoint: Checkpoint, name: str, count: int) -> Tensor:
    _require_there(checkpoint, name)
    if math.prod(checkpoint.shape(name)) != count or not checkpoint.dtype(name).is_floating_point:
        raise BaseWeightsError(
            f"{name!r}: expected {count} floating-point numbers, got {checkpoint.dtype(name)} {checkpoint.shape(name)}."
        )
    return checkpoint[name].reshape(-1).float()
