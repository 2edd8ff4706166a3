"""Folders of checkpoints, local or remote: what lies in them, and opening one file of them.

Conventions
-----------
Only safetensors, alone or sharded behind an index, are read remotely: their numbers can be found by byte range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from lora_analysis.checkpoint.diagnosis import is_file
from lora_analysis.checkpoint.hub import FILE_SUFFIXES
from lora_analysis.checkpoint.json_files import read_json
from lora_analysis.checkpoint.opening import Shards, is_index, open_checkpoint, shard_files
from lora_analysis.checkpoint.protocol import Checkpoint
from lora_analysis.checkpoint.remote import RemoteFile, RemotePlace
from lora_analysis.checkpoint.remote_failures import NotThere
from lora_analysis.checkpoint.remote_safetensors import RemoteSafetensors
from lora_analysis.errors import CheckpointError


class Folder(Protocol):
    """A place with files and folders in it."""

    def names(self) -> tuple[str, ...] | None:
        """The names of its files; None where they cannot be listed, as on a plain HTTP server."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of its JSON files."""

    def open(self, name: str) -> Checkpoint:
        """One of its files of tensors."""

    def folder(self, name: str) -> Folder:
        """A folder in it, there or not."""


class LocalFolder:
    """A directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> tuple[str, ...]:
        """The names of its files, sorted."""
        if not self.path.is_dir():
            return ()
        return tuple(sorted(entry.name for entry in self.path.iterdir() if is_file(entry)))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return is_file(self.path / name)

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of its JSON files."""
        return read_json(self.path / name)

    def open(self, name: str) -> Checkpoint:
        """One of its files of tensors."""
        return open_checkpoint(self.path / name)

    def folder(self, name: str) -> LocalFolder:
        """A folder in it, there or not."""
        return LocalFolder(self.path / name)


class RemoteFolder:
    """A folder at a URL.

    Raises
    ------
    CheckpointError
        By its methods, if a request fails.
    """

    def __init__(self, source: str | RemotePlace) -> None:
        self.place = RemotePlace(source) if isinstance(source, str) else source
        self._sizes: dict[str, int | None] | None = None
        self._found: dict[str, RemoteFile | None] = {}

    def __str__(self) -> str:
        return str(self.place)

    def names(self) -> tuple[str, ...] | None:
        """The names of its files, sorted; None from a plain HTTP server, which has no list of them."""
        sizes = self.sizes()
        return None if sizes is None else tuple(sorted(sizes))

    def sizes(self) -> dict[str, int | None] | None:
        """The names and bytes of its files, or None."""
        if self.place.is_http:
            return None
        if self._sizes is None:
            found = self.place.tried(lambda: self.place.system.ls(self.place.path, detail=True))
            self._sizes = {
                PurePosixPath(item["name"]).name: item.get("size") for item in found if item["type"] == "file"
            }
        return self._sizes

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        names = self.names()
        return name in names if names is not None else self._file(name) is not None

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of its JSON files."""
        return (self._file(name) or RemoteFile(self.place.joined(name))).json()

    def open(self, name: str) -> Checkpoint:
        """One of its files of tensors."""
        return _opened(self.place.joined(name), self._found.get(name))

    def folder(self, name: str) -> RemoteFolder:
        """A folder in it, there or not."""
        return RemoteFolder(self.place.joined(name))

    def _file(self, name: str) -> RemoteFile | None:
        """A file of it, asked for once; None if there is none."""
        if name not in self._found:
            try:
                self._found[name] = RemoteFile(self.place.joined(name))
            except NotThere:
                self._found[name] = None
        return self._found[name]


class RemoteShards(Shards):
    """A checkpoint spread over safetensors files at URLs by an index beside them.

    Parameters
    ----------
    source : str, RemotePlace or RemoteFile
        URL of the ``*.index.json``, or that file.

    Attributes
    ----------
    count : ByteCount
        Bytes that came over the network so far, index and headers among them.

    Raises
    ------
    CheckpointError
        If the index is damaged, or names a file outside its folder; when a tensor is read, if its file is absent.
    """

    def __init__(self, source: str | RemotePlace | RemoteFile) -> None:
        file = source if isinstance(source, RemoteFile) else RemoteFile(source)
        self._place = file.place
        self.count = file.place.count
        content = file.json()
        self._begin(str(self._place), shard_files(content, str(self._place)))
        if other := next((name for name in self.files if not name.endswith(".safetensors")), None):
            raise _not_by_range(str(self._place), other)
        metadata = content.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        number = total if isinstance(total, int | float) and total is not True else 0  # True is an int to Python
        self._declared = int(number) if 0 < number < 2**63 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteShards, (self._place.url,)

    @property
    def bytes_total(self) -> int:
        """Bytes of all shards: as their folder lists them, else as the index declares, else as each server says."""
        sizes = RemoteFolder(self._place.parent()).sizes() or {}
        listed = [sizes.get(name) for name in self.files]
        if listed and all(size is not None for size in listed):
            return sum(size for size in listed if size is not None)
        if self._declared is not None:
            return self._declared
        return sum(RemoteFile(self._place.parent().joined(name)).size for name in self.files)

    def _opened(self, file: str) -> Checkpoint:
        return _opened(self._place.parent().joined(file))


def open_remote(source: str | RemotePlace) -> Checkpoint:
    """A lazy checkpoint over one file at a URL: safetensors, or an index of them.

    Raises
    ------
    CheckpointError
        If it cannot be read by range.
    """
    return _opened(RemotePlace(source) if isinstance(source, str) else source)


def _opened(place: RemotePlace, file: RemoteFile | None = None) -> Checkpoint:
    """The checkpoint at a place; ``file`` is what is known of it already."""
    name = PurePosixPath(place.url.partition("?")[0]).name
    if is_index(name):
        return RemoteShards(file or place)
    suffix = PurePosixPath(name).suffix
    if suffix in FILE_SUFFIXES - {".safetensors"}:
        raise _not_by_range(str(place), name)
    return RemoteSafetensors(file or place)


def _not_by_range(where: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: expected safetensors, the one kind that is read by byte range, got {name!r}. "
        "Download it and give the path."
    )


def confined(names: Iterable[str]) -> Iterator[str]:
    """Those of a file's own names for folders that are plain names."""
    for name in names:
        if PurePosixPath(name).parts == (name,) and name not in (".", "..") and "\\" not in name and ":" not in name:
            yield name
