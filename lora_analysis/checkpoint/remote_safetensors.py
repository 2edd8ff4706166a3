"""A safetensors file at a URL: its header by range, then each tensor by range when it is asked for.

References
----------
The safetensors format: https://huggingface.co/docs/safetensors: eight bytes of length, a JSON header of names,
dtypes, shapes and offsets, then the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lora_analysis.checkpoint.json_files import MAX_JSON, json_object
from lora_analysis.checkpoint.remote import RemoteFile, RemotePlace
from lora_analysis.checkpoint.safetensors_file import DTYPES
from lora_analysis.errors import CheckpointError

_LENGTH = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a header: where its numbers lie, from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class RemoteSafetensors:
    """A lazy checkpoint over a safetensors file at a URL.

    Parameters
    ----------
    source : str, RemotePlace or RemoteFile
        URL of the file, or that file.

    Attributes
    ----------
    metadata : mapping of str to str
        The ``__metadata__`` of the header.
    count : ByteCount
        Bytes that came over the network so far, the header among them.

    Raises
    ------
    CheckpointError
        If the file cannot be read by range, is truncated, is not safetensors, or its header lies about its tensors.
    """

    def __init__(self, source: str | RemotePlace | RemoteFile) -> None:
        self._file = source if isinstance(source, RemoteFile) else RemoteFile(source)
        self.count = self._file.place.count
        header, self._numbers = _header(self._file)
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self._file}: expected {_METADATA!r} to map names to strings.")
        self.metadata: Mapping[str, str] = metadata
        self._entries = _entries(header, self._file.size - self._numbers, str(self._file))

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteSafetensors, (self._file.place.url,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self._tensor(name, entry.shape, entry.start, entry.stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis: only its bytes are read."""
        entry = self._entries[name]
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"{name!r}: expected rows inside {entry.shape}, got {start}:{stop}.")
        row = (entry.stop - entry.start) // max(1, entry.shape[0])
        return self._tensor(name, (stop - start, *entry.shape[1:]), entry.start + start * row, entry.start + stop * row)

    def _tensor(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        dtype = self.dtype(name)
        data = self._file.read(self._numbers + start, self._numbers + stop)
        # frombuffer refuses a buffer of no bytes.
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    @property
    def bytes_total(self) -> int:
        """Bytes of the file."""
        return self._file.size

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        code = self._entries[name].dtype
        if code not in DTYPES:
            raise CheckpointError(f"{self._file}: {name!r}: expected a dtype torch knows, got {code!r}.")
        return DTYPES[code]


def _header(file: RemoteFile) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    if file.size < _LENGTH:
        raise CheckpointError(f"{file}: expected a safetensors file, got {file.size} bytes.")
    head = bytes(file.read(0, _LENGTH))
    length = int.from_bytes(head, "little")
    if head[:1] == b"<" or head.startswith((b"version ", b"GGUF", b"PK")):
        raise CheckpointError(f"{file}: expected a safetensors file, got {_what(head)}.")
    if not 2 <= length <= min(MAX_JSON, file.size - _LENGTH):
        raise CheckpointError(
            f"{file}: expected a safetensors file, got {file.size:,} bytes that are truncated or something else."
        )
    return json_object(bytes(file.read(_LENGTH, _LENGTH + length)), f"{file}: header"), _LENGTH + length


def _what(head: bytes) -> str:
    if head[:1] == b"<":
        return "an HTML or XML page. On the Hugging Face hub give the id, org/name, or the address with /resolve/ in it"
    if head.startswith(b"PK"):
        return "a zip archive (a torch file?). Only safetensors are read by range: download it and give the path"
    return "a GGUF file. Download it and give the path" if head[:4] == b"GGUF" else "a Git LFS pointer"


def _entries(header: Mapping[str, Any], available: int, where: str) -> dict[str, _Entry]:
    """The tensors of a header, checked: their numbers lie one behind the other and fill the file."""
    entries = {name: _entry(name, value, where) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise CheckpointError(f"{where}: {name!r}: expected its numbers at byte {end:,}, got {entry.start:,}.")
        end = entry.stop
    if end != available:
        raise CheckpointError(f"{where}: expected {end:,} bytes of numbers, got {available:,}. Is it uploaded whole?")
    return entries


def _entry(name: str, value: Any, where: str) -> _Entry:
    found = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: {name!r}: expected a dtype, a shape and two offsets in the header.")
    start, stop = offsets
    if start > stop or (dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize):
        raise CheckpointError(f"{where}: {name!r}: expected {dtype} of shape {shape}, got bytes {start:,} to {stop:,}.")
    return _Entry(dtype, tuple(shape), start, stop)


def _whole(numbers: object) -> TypeGuard[list[int]]:
    """Whether these are sizes or offsets."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
