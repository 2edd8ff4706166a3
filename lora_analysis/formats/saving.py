"""Files moved into place when they are whole, so that no reader meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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


def require_destination(path: Path, files: Collection[str], known: Collection[str]) -> None:
    """Refuse to write where something else is, before anything is written.

    Parameters
    ----------
    path : Path
    files : collection of str
        What will be put into the directory ``path``; none where it is a file.
    known : collection of str
        What files of adapters are called that share one configuration: in one directory, one would be read with the
        configuration of another.

    Raises
    ------
    ValueError
        If the path is of the other kind, or the directory holds another adapter's file.
    """
    kind, other = ("a directory", "a file") if files else ("a file", "a directory")
    if path.exists() and path.is_dir() != bool(files):
        raise ValueError(f"{path}: expected {kind} to write to, or nothing there, got {other}. Name another place.")
    if files and (strange := next((name for name in known if name not in files and (path / name).exists()), None)):
        raise ValueError(
            f"{path}: expected a directory without another adapter in it, found {strange!r}, whose configuration would "
            "be overwritten. Name another place."
        )


@contextmanager
def draft(path: Path, files: Collection[str]) -> Iterator[Path]:
    """Where to write a file or a directory first: moved to ``path`` at the end, and gone if there is an error.

    Parameters
    ----------
    path : Path
    files : collection of str
        What will be in the directory, in the order in which they are moved; none where ``path`` is a file.
    """
    near = next(parent for parent in path.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=near, prefix=".writing-") as scratch:
        first = Path(scratch) / ("adapter" if files else path.name)
        yield first
        (path if files else path.parent).mkdir(parents=True, exist_ok=True)
        for source, target in [(first / name, path / name) for name in files] or [(first, path)]:
            os.replace(source, target)  # noqa: PTH105 (atomic)


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """What writes these tensors as one safetensors file."""

    def write(path: Path) -> None:
        # Copies, because safetensors refuses tensors that share memory.
        copied = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        save_file(copied, path, metadata=dict(metadata))

    return write
