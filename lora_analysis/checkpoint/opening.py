"""Which kind of checkpoint a file is; one file, or many behind an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from lora_analysis.checkpoint.diagnosis import TORCH_SUFFIXES, is_file, one_line, what_is
from lora_analysis.checkpoint.protocol import Checkpoint, StateDict
from lora_analysis.checkpoint.safetensors_file import SafetensorsFile
from lora_analysis.checkpoint.torch_file import load_torch, looks_like_torch
from lora_analysis.errors import CheckpointError


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A lazy checkpoint over a file: safetensors, torch (``.bin .pt .pth .ckpt``), or an index of shards.

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
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix in TORCH_SUFFIXES and looks_like_torch(path):
        return StateDict(load_torch(path))
    return SafetensorsFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {what_is(path)} ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


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
        content = read_json(self.index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(f"{self.index}: expected a 'weight_map' of tensor names to file names.")
        self._files: dict[str, str] = weight_map
        for name in sorted(set(weight_map.values())):
            _require_confined(self.index, name)
            if not is_file(self.index.parent / name):
                raise CheckpointError(f"{self.index}: expected the shard {name!r} beside it, found none.")
        self._open: dict[str, Checkpoint] = {}
        self.metadata: Mapping[str, str] = {}

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

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its shard's header."""
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from its shard's header."""
        return self._shard(name).dtype(name)

    def _shard(self, name: str) -> Checkpoint:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = open_checkpoint(self.index.parent / file)
        shard = self._open[file]
        if name not in shard:
            raise CheckpointError(f"{self.index}: expected {name!r} in {file!r}, it is not there.")
        return shard


def _require_confined(index: Path, name: str) -> None:
    # Lexical, because hub caches hold shards as links that point elsewhere on purpose.
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if not name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise CheckpointError(f"{index}: expected shards inside its folder, got {name!r}.")
    if name.endswith(".index.json"):
        raise CheckpointError(f"{index}: expected shards of tensors, got another index, {name!r}.")
