"""A base with quantised weights: those of bitsandbytes dequantised one by one, the others named and refused.

Conventions
-----------
A dequantised weight has the name, the shape and the orientation of the original, and not quite its numbers: it is the
rounded weight that a QLoRA adapter was trained on. Of what is refused (GPTQ, AWQ, fp8, …), the original weights are
asked for: an adapter moves by less than such rounding, and its merge goes into the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lora_analysis.base.bitsandbytes import (
    PARTS,
    STATES,
    State4bit,
    dequantised_4bit,
    dequantised_8bit,
    read_state,
)
from lora_analysis.checkpoint.protocol import Checkpoint, rows
from lora_analysis.errors import BaseWeightsError

_REFUSED = (
    # ending of a tensor beside the weight, what it stands in for, and what writes it
    (".qweight", ".weight", "GPTQ"),
    (".W_q", ".weight", "HQQ"),
    (".weight_packed", ".weight", "compressed-tensors"),
    (".weight:_data", ".weight", "torchao"),
    ("._weight_qdata", ".weight", "torchao"),
    (".weight_qdata", ".weight", "torchao"),
    (".weight._data", ".weight", "quanto"),
    (".codebooks", ".weight", "AQLM"),
    ("_blocks", "", "MXFP4"),
    (".weight_scale_inv", ".weight", "fp8 in blocks"),
    (".weight_scale", ".weight", "fp8 or compressed-tensors"),
    (".weight_scales", ".weight", "EETQ"),
    (".weight.scale", ".weight", "fp8"),
    ("_scale_inv", "", "fp8 in blocks"),
    ("_scale", "", "fp8"),
    ("_scales", "", "fp8"),
)
_ENDINGS = (*STATES.values(), "SCB", *(ending for ending, _, _ in _REFUSED))

Result = TypeVar("Result")


class Dequantised:
    """A checkpoint whose quantised weights read as matrices, under their own names, or are refused.

    Parameters
    ----------
    checkpoint : Checkpoint
    where : str
        What to call it in messages.

    Attributes
    ----------
    kinds : Counter
        How many weights are dequantised, by what they are stored as.
    """

    def __init__(self, checkpoint: Checkpoint, where: str) -> None:
        self._checkpoint = checkpoint
        self._where = where
        self.metadata: Mapping[str, str] = checkpoint.metadata
        self.kinds: Counter[str] = Counter()
        self._kind_of_4bit: dict[str, str] = {}
        self._scales_of_8bit: dict[str, str] = {}
        self._states: dict[str, State4bit] = {}
        self._refused: dict[str, tuple[str, str]] = {}
        hidden: set[str] = set()
        for name in checkpoint:
            hidden.update(self._recognised(name))
        self._names = dict.fromkeys(name for name in checkpoint if name not in hidden) | dict.fromkeys(self._refused)

    def _recognised(self, name: str) -> Iterator[str]:
        """The tensors beside a weight that are part of it, if this one shows what the weight is."""
        if not name.endswith(_ENDINGS):
            return
        for kind, ending in STATES.items():
            if name.endswith(ending) and (weight := name.removesuffix(ending)) in self._checkpoint:
                if weight in self._kind_of_4bit:
                    raise BaseWeightsError(f"{self._where}: {weight!r}: expected one kind of 4-bit weight, got two.")
                self._kind_of_4bit[weight] = kind
                self.kinds[f"bitsandbytes 4-bit ({kind})"] += 1
                yield name
                yield from (weight + part for part in PARTS)
        module, _, last = name.rpartition(".")
        weight = f"{module}.weight" if module else "weight"
        if last == "SCB" and weight in self._checkpoint and self._checkpoint.dtype(weight) is torch.int8:
            self._scales_of_8bit[weight] = name
            self.kinds["bitsandbytes 8-bit"] += 1
            yield name
            yield f"{module}.weight_format" if module else "weight_format"
        for ending, original, kind in _REFUSED:
            if name.endswith(ending):
                stem = name.removesuffix(ending)
                there = stem in self._checkpoint or (ending == "_blocks" and f"{stem}_scales" in self._checkpoint)
                if original or there:
                    self._refused.setdefault(stem + original, (name, kind))
                return

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        self.require_readable(name)
        if name in self._kind_of_4bit:
            state = self._state(name)
            return self._located(lambda: dequantised_4bit(self._checkpoint, name, state))
        if name in self._scales_of_8bit:
            return self._located(lambda: dequantised_8bit(self._checkpoint, name, self._scales_of_8bit[name]))
        return self._checkpoint[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""
        self.require_readable(name)
        return self[name][start:stop] if self._is_read(name) else rows(self._checkpoint, name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """The true shape of a weight, also of one that is stored packed."""
        if name in self._kind_of_4bit:
            return self._state(name).shape
        if name in self._refused and name not in self._checkpoint:
            self.require_readable(name)
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is given."""
        if name in self._kind_of_4bit:
            return self._state(name).dtype
        if name in self._refused and name not in self._checkpoint:
            self.require_readable(name)
        return torch.float32 if name in self._scales_of_8bit else self._checkpoint.dtype(name)

    def require_readable(self, name: str) -> None:
        """Raise a ``BaseWeightsError`` that names the quantisation, if a tensor is of one that is not read."""
        if self._is_read(name):
            return
        beside, kind = self._refused.get(name, ("", ""))
        if beside.endswith(".qweight"):
            kind = self._gptq_or_awq(beside.removesuffix(".qweight"))
        stored = name in self._checkpoint
        dtype = self._checkpoint.dtype(name) if stored else None
        if dtype is not None and not beside and dtype.is_floating_point and dtype.itemsize > 1:
            return
        got = " and ".join([*([str(dtype)] if stored else []), *([f"{beside!r} beside it"] if beside else [])])
        raise BaseWeightsError(
            f"{self._where}: {name!r}: expected floating-point weights of two bytes or more, got {got}: a quantised "
            f"base{f' ({kind})' if kind else ''}. Give the original weights."
        )

    def _gptq_or_awq(self, module: str) -> str:
        """GPTQ packs codes along the input, AWQ along the output, which has as many scales as there are outputs."""
        scales = f"{module}.scales"
        if f"{module}.g_idx" in self._checkpoint or scales not in self._checkpoint:
            return "GPTQ"
        packed = self._checkpoint.shape(f"{module}.qweight")
        return "GPTQ" if packed[-1:] == self._checkpoint.shape(scales)[-1:] else "AWQ"

    def _is_read(self, name: str) -> bool:
        """Whether a tensor is a quantised weight that comes back dequantised."""
        return name in self._kind_of_4bit or name in self._scales_of_8bit

    def _state(self, weight: str) -> State4bit:
        if weight not in self._states:
            kind = self._kind_of_4bit[weight]
            self._states[weight] = self._located(lambda: read_state(self._checkpoint, weight, kind))
        return self._states[weight]

    def _located(self, read: Callable[[], Result]) -> Result:
        """The result of reading, with the source named where it fails."""
        try:
            return read()
        except BaseWeightsError as error:
            raise BaseWeightsError(f"{self._where}: {error}") from error
