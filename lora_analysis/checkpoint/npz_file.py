"""One npz file, numpy's zip of arrays: headers read and checked, an array read when asked for.

Nothing is unpickled, and nothing is allocated before its header agrees with the archive about its size. MLX writes
bfloat16, which numpy does not have, as raw pairs of bytes of type ``V2``; they come back as bfloat16.
"""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from lora_analysis.checkpoint.diagnosis import one_line, what_is
from lora_analysis.errors import CheckpointError

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
    "V2": torch.bfloat16,
}
_READ = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BAD_HEADER = (ValueError, SyntaxError, TypeError, struct.error, tokenize.TokenError)
# What zipfile raises on a damaged archive depends on where the damage lies: UnicodeDecodeError of a name, say.
_BAD_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
)
_MAX_SIDE = 2**40
_FREE_INFLATION = 2**28
_MAX_INFLATION = 8
"""A compressed array may be this many times its size in the archive, and 256 MiB: factors hardly compress, zeros do."""


@dataclass(frozen=True, slots=True)
class _Array:
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool
    data_start: int
    nbytes: int


class NpzFile:
    """A lazy checkpoint over one npz file.

    Raises
    ------
    CheckpointError
        If the file is truncated, foreign, holds pickled objects or names twice, or a header lies about its array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: Mapping[str, str] = {}
        self._arrays: dict[str, _Array] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    name = info.filename.removesuffix(".npy")
                    if name == info.filename:
                        raise CheckpointError(f"{self.path}: expected members named .npy, got {name!r}.")
                    if name in self._arrays:
                        raise CheckpointError(f"{self.path}: expected every array once, got {name!r} again.")
                    self._arrays[name] = self._array(archive, info)
        except _BAD_ARCHIVE as error:
            raise CheckpointError(
                f"{self.path}: expected an npz file, got {what_is(self.path)} ({one_line(error)}). "
                "Fetch or copy it again."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return NpzFile, (self.path,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        array = self._arrays[name]
        if not array.nbytes:
            return torch.empty(array.shape, dtype=self.dtype(name))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(array.member) as member:
                member.read(array.data_start)
                data = bytearray(member.read(array.nbytes))
        except _BAD_ARCHIVE as error:
            raise CheckpointError(f"{self.path}: {name!r}: damaged ({one_line(error)}). Fetch it again.") from error
        if len(data) != array.nbytes:
            raise CheckpointError(f"{self.path}: {name!r}: expected {array.nbytes} bytes, got {len(data)}: truncated.")
        if array.dtype.kind != "V" and not array.dtype.isnative:
            data = bytearray(np.frombuffer(data, dtype=array.dtype).astype(array.dtype.newbyteorder("=")).tobytes())
        tensor = torch.frombuffer(data, dtype=self.dtype(name))
        if array.by_column:
            return tensor.reshape(array.shape[::-1]).permute(*reversed(range(len(array.shape))))
        return tensor.reshape(array.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array, from its header."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of an array, from its header."""
        return _DTYPES[_code(self._arrays[name].dtype)]

    def _array(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
        """What the header of a member says, after checking it against the archive."""
        where = f"{self.path}: {info.filename!r}"
        if info.compress_type not in _READ or info.flag_bits & 1:
            raise CheckpointError(
                f"{where}: expected a member stored or deflated, got another compression or a cipher."
            )
        if info.file_size > _FREE_INFLATION + _MAX_INFLATION * info.compress_size:
            raise CheckpointError(
                f"{where}: expected an array of plausible size, got {info.file_size} bytes in {info.compress_size} of "
                "the archive. Save it uncompressed if it is meant."
            )
        with archive.open(info) as member:
            try:
                shape, by_column, dtype = _npy_header(member)
            # numpy parses the header's text, and what that raises depends on where the damage lies.
            except (*_BAD_HEADER, RecursionError, MemoryError) as error:
                raise CheckpointError(f"{where}: expected an array of numpy's, got {one_line(error)}.") from error
            start = member.tell()
        if dtype.hasobject:
            raise CheckpointError(f"{where}: expected numbers, got pickled objects; nothing was executed.")
        if _code(dtype) not in _DTYPES:
            raise CheckpointError(f"{where}: expected a dtype torch knows, got {str(dtype)[:60]!r}.")
        nbytes = math.prod(shape) * dtype.itemsize
        # An empty array may still claim a side that no tensor can have.
        if not all(0 <= length <= _MAX_SIDE for length in shape) or start + nbytes != info.file_size:
            raise CheckpointError(
                f"{where}: expected {info.file_size - start} bytes of numbers, the header says {str(shape)[:60]} of "
                f"{dtype}. Fetch or copy it again."
            )
        return _Array(info.filename, shape, dtype, by_column, start, nbytes)


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first index runs fastest, and dtype."""
    version = npy.read_magic(member)
    if version == (1, 0):
        return npy.read_array_header_1_0(member)
    if version == (2, 0):
        return npy.read_array_header_2_0(member)
    raise ValueError(f"version {version} of the format, which only arrays of records need")


def _code(dtype: np.dtype[Any]) -> str:
    return dtype.str[1:] if dtype.names is None and dtype.subdtype is None else "record"
