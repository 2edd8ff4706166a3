"""Where an adapter's tensors and configuration lie: a file, a folder, a repository of the hub, or a URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_analysis.checkpoint import Checkpoint, open_checkpoint, read_json
from lora_analysis.checkpoint.diagnosis import exists
from lora_analysis.checkpoint.hub import HubPlace
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats import remote

_CONFIG = "adapter_config.json"
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
    "adapters.npz",
    "adapter_model.pt",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""PEFT's, MLX's, torchtune's and diffusers'; torchtune writes PEFT's file beside its own where it can."""
_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf"}
_CHECKPOINT = "_adapters.safetensors"
"""End of the names of MLX's checkpoints of a run: ``0000100_adapters.safetensors``."""


def opened(
    source: str | os.PathLike[str], place: Path | HubPlace | str, name: str | None
) -> tuple[Checkpoint, dict[str, Any], bool]:
    """Tensors and configuration of an adapter, and whether ``name`` was that of an inner folder.

    Parameters
    ----------
    source : str or path
        What the caller named, for messages.
    place : Path, HubPlace or str
        Where that is (``checkpoint.hub.located``); a string is a URL.
    name : str, optional
        Which adapter, where there are several.
    """
    if isinstance(place, str):
        return remote.opened(place, name, _CONFIG, WEIGHTS)
    path = remote.fetched(place, name, _CONFIG, WEIGHTS, _SUFFIXES) if isinstance(place, HubPlace) else place
    _require_present(os.fspath(source), path)
    by_folder = name not in (None, "") and (path / str(name) / _CONFIG).is_file()
    weights, config_file = _files(path / str(name) if by_folder else path)
    return open_checkpoint(weights), read_json(config_file) if config_file else {}, by_folder


def _require_present(source: str, path: Path) -> None:
    if not exists(path):
        raise AdapterFormatError(f"{source}: no such file or directory.")


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors and, if there is one, the configuration beside it."""
    if path.is_file():
        config = path.parent / _CONFIG
        named = path.name in WEIGHTS or path.name.endswith(_CHECKPOINT)
        return path, config if named and config.is_file() else None
    if not path.is_dir():
        raise AdapterFormatError(f"{path}: expected a file or a directory.")
    config = path / _CONFIG
    for weights in WEIGHTS:
        if (path / weights).is_file():
            return path / weights, config if config.is_file() else None
    inner = sorted(entry.parent.name for entry in path.glob(f"*/{_CONFIG}"))
    if inner:
        raise AdapterFormatError(
            f"{path}: expected one adapter, found a folder of {len(inner)} ({', '.join(inner[:4])}). "
            "Pass one of them, or its name=."
        )
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise AdapterFormatError(f"{path}: expected {' or '.join(WEIGHTS[:2])}, or one file of tensors, found none.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
        raise AdapterFormatError(
            f"{path}: expected one file of tensors, found {len(files)} ({names}). Pass one of them."
        )
    return files[0], config if config.is_file() else None
