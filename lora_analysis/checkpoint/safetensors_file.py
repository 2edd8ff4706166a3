"""One safetensors file, its header read and its tensors mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_analysis.checkpoint.diagnosis import one_line, what_is
from lora_analysis.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}
"""The format's names of the dtypes that torch has."""

if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


class SafetensorsFile:
    """A lazy checkpoint over one safetensors file.

    Raises
    ------
    CheckpointError
        If the file is truncated, is not safetensors, or its header lies about its tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._handle = cast(Any, safe_open(self.path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: expected a safetensors file, got {what_is(self.path)} "
                f"({one_line(error)}). Fetch or copy it again."
            ) from error
        self._names = tuple(self._handle.keys())
        self._known = frozenset(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return SafetensorsFile, (self.path,)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of the header."""
        return self._handle.metadata() or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Tensor:
        self._require(name)
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""
        self._require(name)
        tensor: Tensor = self._handle.get_slice(name)[start:stop]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        self._require(name)
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        self._require(name)
        code = self._handle.get_slice(name).get_dtype()
        if code not in DTYPES:
            raise CheckpointError(f"{self.path}: {name!r}: expected a dtype torch knows, got {code!r}.")
        return DTYPES[code]

    def _require(self, name: str) -> None:
        if name not in self._known:
            raise KeyError(name)
