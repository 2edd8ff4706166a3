"""The header of a GGUF file: its fields, and where its tensors lie.

Read here rather than by ``gguf.GGUFReader``, which believes the counts it finds: of an array of 2⁴⁰ numbers in a
file of a hundred bytes it makes 2⁴⁰ Python objects, and of a vocabulary one or two a token. Here every length is
held against the bytes that are left, and long arrays are stepped over.

Conventions
-----------
Little-endian, versions 2 and 3: magic, version, counts of tensors and of fields, the fields (key, type, value), the
tensors (name, dimensions, type, offset), padding, data. Dimensions are listed with the fastest first; here they
come in numpy's order. Facts from the specification, ggml ``docs/gguf.md``, and llama.cpp ``gguf-py``.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lora_analysis.checkpoint.diagnosis import what_is
from lora_analysis.errors import CheckpointError

Scalar = int | float | bool | str
Field = Scalar | tuple[Scalar, ...] | None
"""A value of a field; None of a long array, which is not read."""

_MAX_TENSORS = 2**17
_MAX_FIELDS = 2**16
_MAX_ITEMS = 2**23
"""Strings of all arrays together; the largest vocabularies with their merges have a million."""
_MAX_TEXT = 2**24
_MAX_HEADER = 2**28
_KEPT = 2**12
"""Longest array whose values are read: settings of each block, not vocabularies."""
_MAX_DIMENSIONS = 4
_MAX_SIDE = 2**40
_SHOWN = 100
"""Characters of a name that messages show: a damaged length makes one of half the header."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of the types of values, as formats of ``struct``."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says about one tensor."""

    shape: tuple[int, ...]
    kind: int
    """Code of its type in ggml."""
    offset: int
    """From the start of the data."""


@dataclass(frozen=True, slots=True)
class Header:
    """Fields and tensors of a file, and where its data start."""

    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises
    ------
    CheckpointError
        If the file is not GGUF, of another version or byte order, truncated, or its counts are impossible.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: expected a GGUF file, got {what_is(path)}. Fetch or copy it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(path, data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a GGUF file, it cannot be read ({error.strerror}).") from error


class _Walk:
    """A position that moves through the header and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._end = min(len(data), _MAX_HEADER)
        self._at = 4
        self._items = 0

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big") in (2, 3)
            found = "a big-endian one" if swapped else f"version {version}"
            self._refuse(f"expected GGUF of version 2 or 3, little-endian, got {found}")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if n_tensors > _MAX_TENSORS or n_fields > _MAX_FIELDS:
            self._refuse(
                f"expected at most {_MAX_TENSORS} tensors and {_MAX_FIELDS} fields, got {n_tensors} and {n_fields}"
            )
        fields: dict[str, Field] = {}
        for _ in range(int(n_fields)):
            key = self._name()
            if key in fields:
                self._refuse(f"expected every field once, got {key[:_SHOWN]!r} again")
            fields[key] = self._value(key, int(self._number("I")))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(int(n_tensors)):
            name = self._name()
            if name in tensors:
                self._refuse(f"expected every tensor once, got {name[:_SHOWN]!r} again")
            tensors[name] = self._tensor(name)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"expected an alignment that is a power of two, got {str(alignment)[:40]}")
        return Header(fields, tensors, -(-self._at // alignment) * alignment)

    def _tensor(self, name: str) -> TensorInfo:
        n_dimensions = int(self._number("I"))
        if n_dimensions > _MAX_DIMENSIONS:
            self._refuse(f"{name[:_SHOWN]!r}: expected at most {_MAX_DIMENSIONS} dimensions, got {n_dimensions}")
        shape = tuple(int(self._number("Q")) for _ in range(n_dimensions))[::-1]
        if max(shape, default=0) > _MAX_SIDE:  # an empty tensor may still claim a side that none can have
            self._refuse(f"{name[:_SHOWN]!r}: expected sides of at most {_MAX_SIDE}, got {shape}")
        return TensorInfo(shape, int(self._number("I")), int(self._number("Q")))

    def _value(self, key: str, kind: int) -> Field:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text().decode("utf-8", "backslashreplace")
        if kind != _ARRAY:
            self._refuse(f"{key[:_SHOWN]!r}: expected a type of value that GGUF has, got {kind}")
        kind, length = int(self._number("I")), int(self._number("Q"))
        if kind in _NUMBERS:
            layout = f"<{length}{_NUMBERS[kind]}" if length <= _KEPT else None
            start = self._advance(length * struct.calcsize(_NUMBERS[kind]))
            return struct.unpack_from(layout, self._data, start) if layout else None
        if kind != _STRING:
            self._refuse(f"{key[:_SHOWN]!r}: expected an array of numbers or strings, got one of type {kind}")
        self._items += length
        if self._items > _MAX_ITEMS:
            self._refuse(f"{key[:_SHOWN]!r}: expected at most {_MAX_ITEMS} strings in arrays, got {self._items}")
        if length <= _KEPT:
            return tuple(self._text().decode("utf-8", "backslashreplace") for _ in range(length))
        for _ in range(length):
            self._advance(int(self._number("Q")))
        return None

    def _name(self) -> str:
        text = self._text()
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"expected names in UTF-8, got {text[:40]!r}")

    def _text(self) -> bytes:
        length = int(self._number("Q"))
        if length > _MAX_TEXT:
            self._refuse(f"expected strings of at most {_MAX_TEXT} bytes, got one of {length}")
        start = self._advance(length)
        return self._data[start : start + length]

    def _number(self, layout: str) -> int | float:
        start = self._advance(struct.calcsize(layout))
        number: int | float = struct.unpack_from(f"<{layout}", self._data, start)[0]
        return number

    def _advance(self, count: int) -> int:
        """Step over some bytes; where they start."""
        start = self._at
        if count > self._end - start:
            what = "truncated" if self._end == len(self._data) else f"a header of more than {_MAX_HEADER} bytes"
            self._refuse(f"expected {count} bytes at {start} of the header, got {self._end - start}: {what}")
        self._at += count
        return start

    def _refuse(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {message}. Fetch or copy it again.")
