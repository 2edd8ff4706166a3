"""One GGUF file, llama.cpp's: its header read and checked, a tensor read when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_analysis.checkpoint.gguf_header import Field, TensorInfo, read_header
from lora_analysis.errors import CheckpointError

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that torch has; all others are quantised, and given as float32."""


class GGUFFile:
    """A lazy checkpoint over one GGUF file.

    Shapes are in numpy's order, the reverse of how ggml lists them. Quantised tensors are dequantised to float32
    one by one when asked for; ``stored_type`` tells how they lie in the file.

    Attributes
    ----------
    fields : mapping of str to value
        The header's fields with their types; None for long arrays (vocabularies), which are not read.

    Raises
    ------
    CheckpointError
        If the ``gguf`` library is absent, or the file is truncated, foreign, or its header lies about its tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._gguf = _library(self.path)
        header = read_header(self.path)
        self.fields: Mapping[str, Field] = MappingProxyType(header.fields)
        self._tensors = header.tensors
        self._data_start = header.data_start
        size = self.path.stat().st_size
        self._nbytes = {name: self._checked_nbytes(name, info, size) for name, info in self._tensors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return GGUFFile, (self.path,)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The fields as strings, but for long arrays."""
        return {key: str(value) for key, value in self.fields.items() if value is not None}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._numbers(name, self._tensors[name].shape, 0, self._nbytes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis, such as one expert of a stack, read without the rest."""
        shape = self._tensors[name].shape
        # A vector is one row of blocks.
        if len(shape) < 2 or not shape[0]:
            return self[name][start:stop]
        start, stop, _ = slice(start, stop).indices(shape[0])
        stride = self._nbytes[name] // shape[0]
        count = max(0, stop - start)
        return self._numbers(name, (count, *shape[1:]), start * stride, count * stride)

    def _numbers(self, name: str, shape: tuple[int, ...], start: int, nbytes: int) -> Tensor:
        """Some bytes of a tensor as numbers, dequantised where they must be."""
        dtype = _DTYPES.get(self.stored_type(name))
        if not nbytes:
            return torch.empty(shape, dtype=dtype or torch.float32)
        data = self._read(name, start, nbytes)
        if dtype is not None:
            return torch.frombuffer(data, dtype=dtype).reshape(shape)
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(*shape[:-1], -1)
        try:
            # Scales that are NaN or infinite give such weights, which measures name where they matter.
            with np.errstate(invalid="ignore", over="ignore"):
                kind = self._gguf.GGMLQuantizationType(self._tensors[name].kind)
                numbers = self._gguf.quants.dequantize(blocks, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name!r}: expected a type that gguf can dequantise, got {self.stored_type(name)}. "
                "Update gguf, or convert the file to f16."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in numpy's order, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is given: float32 for a quantised one."""
        return _DTYPES.get(self.stored_type(name), torch.float32)

    def stored_type(self, name: str) -> str:
        """What ggml calls the type a tensor is stored in: ``"F32"``, ``"BF16"``, ``"Q8_0"``, …."""
        return str(self._gguf.GGMLQuantizationType(self._tensors[name].kind).name)

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor is stored in blocks that share scales, so that its dtype says nothing of its rounding."""
        return self.stored_type(name) not in _DTYPES

    def stored_nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        return self._nbytes[name]

    def _checked_nbytes(self, name: str, info: TensorInfo, size: int) -> int:
        """Bytes that a tensor takes in the file, which must hold them."""
        where = f"{self.path}: {name!r}"
        try:
            kind = self._gguf.GGMLQuantizationType(info.kind)
        except ValueError:
            raise CheckpointError(
                f"{where}: expected a type of tensor that gguf knows, got {info.kind}. Is gguf older than the file?"
            ) from None
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if (info.shape[-1] if info.shape else 1) % block:
            raise CheckpointError(f"{where}: expected rows in blocks of {block} for {kind.name}, got {info.shape}.")
        nbytes: int = math.prod(info.shape) // block * block_bytes
        if self._data_start + info.offset + nbytes > size:
            raise CheckpointError(
                f"{where}: expected {nbytes} bytes at {self._data_start + info.offset}, the file has {size}: "
                "truncated. Fetch or copy it again."
            )
        return nbytes

    def _read(self, name: str, start: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        try:
            with self.path.open("rb") as file:
                file.seek(self._data_start + self._tensors[name].offset + start)
                count = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name!r}: cannot be read any more ({error.strerror}).") from error
        if count != len(data):
            raise CheckpointError(f"{self.path}: {name!r}: expected {len(data)} bytes, got {count}. Has it changed?")
        return data


def _library(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: expected the gguf library to read a GGUF file, it is not installed. Run pip install "
            '"lora-analysis[gguf]".'
        ) from error
    return gguf
