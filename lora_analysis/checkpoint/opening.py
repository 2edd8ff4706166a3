"""Which kind of checkpoint a file is; one file, or many behind an index."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from lora_analysis.checkpoint.diagnosis import TORCH_SUFFIXES, exists, is_file
from lora_analysis.checkpoint.gguf_file import GGUFFile
from lora_analysis.checkpoint.json_files import read_json
from lora_analysis.checkpoint.npz_file import NpzFile
from lora_analysis.checkpoint.protocol import Checkpoint, rows
from lora_analysis.checkpoint.safetensors_file import SafetensorsFile
from lora_analysis.checkpoint.torch_file import load_torch, looks_like_torch
from lora_analysis.errors import CheckpointError

_OTHERS = {".safetensors", ".npz", *TORCH_SUFFIXES}
"""Names that promise something else than GGUF, which a file without any, as in a hub's cache, may be."""

_SHOWN = 100
"""Characters of a shard's name that messages show: an index may hold anything."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A lazy checkpoint over a file: safetensors, torch (``.bin .pt .pth .ckpt``), GGUF, npz, or an index of shards.

    What a file is, its content decides; a safetensors file under a torch name still opens.

    Parameters
    ----------
    path : str or path
        A file.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, foreign, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not is_file(path):
        what = "expected a file, got a directory" if exists(path) and path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {what}.")
    try:
        return _opened(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error


def _opened(path: Path) -> Checkpoint:
    if is_index(path.name):
        return Shards(path)
    if path.suffix == ".gguf" or (path.suffix not in _OTHERS and _begins_with(path, b"GGUF")):
        return GGUFFile(path)
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix in TORCH_SUFFIXES and looks_like_torch(path):
        return load_torch(path)
    return SafetensorsFile(path)


def is_index(name: str) -> bool:
    """Whether a file is an index of shards, by its name: ``….index.json``, or diffusers' ``….index.fp16.json``.

    Examples
    --------
    >>> is_index("model.safetensors.index.json"), is_index("model_index.json")
    (True, False)
    """
    return re.search(r"\.index(\.[\w-]+)?\.json\Z", name) is not None


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


class Shards:
    """A checkpoint spread over files by an index, each opened when one of its tensors is asked for.

    Parameters
    ----------
    index : path
        The ``*.index.json`` with a ``weight_map`` from tensor names to file names.

    Raises
    ------
    CheckpointError
        If the index is damaged, or names a file that is absent or outside its folder.
    """

    def __init__(self, index: str | os.PathLike[str]) -> None:
        self.index = Path(index)
        self._begin(str(self.index), shard_files(read_json(self.index), str(self.index)))
        for name in self.files:
            if not is_file(self.index.parent / name):
                raise CheckpointError(f"{self.index}: expected the shard {name[:_SHOWN]!r} beside it, found none.")

    def _begin(self, where: str, files: dict[str, str]) -> None:
        self._where = where
        self._files = files
        self._open: dict[str, Checkpoint] = {}
        self._opening = threading.Lock()
        self.metadata: Mapping[str, str] = {}

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, sorted."""
        return tuple(sorted(set(self._files.values())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.index,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._shard(name)[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""
        return rows(self._shard(name), name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its shard's header."""
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from its shard's header."""
        return self._shard(name).dtype(name)

    def _shard(self, name: str) -> Checkpoint:
        file = self._files[name]
        with self._opening:
            if file not in self._open:
                self._open[file] = self._opened(file)
        shard = self._open[file]
        if name not in shard:
            raise CheckpointError(f"{self._where}: expected {name!r} in {file!r}, it is not there.")
        return shard

    def _opened(self, file: str) -> Checkpoint:
        return open_checkpoint(self.index.parent / file)


def shard_files(index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Tensor names to file names, as an index of shards says, all of them inside its folder.

    Raises
    ------
    CheckpointError
        If there is no such map, or it names a file elsewhere.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where}: expected a 'weight_map' of tensor names to file names.")
    if not weight_map:
        raise CheckpointError(f"{where}: expected a 'weight_map' with tensors in it, got an empty one.")
    for name in sorted(set(weight_map.values())):
        _require_confined(where, name)
    return weight_map


def _require_confined(index: str, name: str) -> None:
    # Lexical, because hub caches hold shards as links that point elsewhere on purpose.
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if not name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise CheckpointError(f"{index}: expected shards inside its folder, got {name[:_SHOWN]!r}.")
    if is_index(name):
        raise CheckpointError(f"{index}: expected shards of tensors, got another index, {name[:_SHOWN]!r}.")
