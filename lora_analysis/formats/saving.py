"""Files moved into place when they are whole, so that no reader meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def put_in_place(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files into a directory, made if absent: all under temporary names first, then moved.

    Parameters
    ----------
    directory : Path
    writers : mapping of str to callable
        File name to what writes it at the path it is given. They are moved in this order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        for name, write in writers.items():
            write(Path(scratch) / name)
        for name in writers:
            os.replace(Path(scratch) / name, directory / name)  # noqa: PTH105 (atomic)


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """What writes these tensors as one safetensors file."""

    def write(path: Path) -> None:
        # Copies, because safetensors refuses tensors that share memory.
        copied = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        save_file(copied, path, metadata=dict(metadata))

    return write
