"""Files moved into place when they are whole, so that no reader meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIGURATION = "adapter_config.json"
_SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz"}
"""By which readers tell how a file of tensors is to be opened."""


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
        _move([(Path(scratch) / name, directory / name) for name in writers], Path(scratch))


def require_destination(path: Path, files: Collection[str], known: Collection[str], suffix: str = "") -> None:
    """Refuse to write where something else is, before anything is written.

    Parameters
    ----------
    path : Path
    files : collection of str
        What will be put into the directory ``path``; none where it is a file.
    known : collection of str
        What files of adapters are called that share one configuration: in one directory, one would be read with the
        configuration of another.
    suffix : str
        How the name of the file ends where the format has a suffix of its own: by another, no reader would know it.

    Raises
    ------
    ValueError
        If the path is of the other kind, lies in a file, or is called like a file of another format, or if its
        directory holds another adapter's file or configuration.
    """
    kind, other = ("a directory", "a file") if files else ("a file", "a directory")
    if path.exists() and path.is_dir() != bool(files):
        raise ValueError(f"{path}: expected {kind} to write to, or nothing there, got {other}. Name another place.")
    if not (parent := _nearest(path)).is_dir():
        raise ValueError(f"{path}: expected a place in a directory, but {parent} is a file. Name another place.")
    if odd := next((name for name in files if (path / name).is_dir()), None):
        raise ValueError(f"{path}: expected a file or nothing at {odd!r}, got a directory. Name another place.")
    if not files and path.suffix in _SUFFIXES - {suffix}:
        raise ValueError(
            f"{path}: expected a name that ends in {suffix}, the format's own, got {path.suffix}, another's. Name "
            "another place."
        )
    # Those of MLX's checkpoints of a run have their step in front.
    shares = not files and (path.name in known or path.name.endswith("_adapters.safetensors"))
    if shares and (path.parent / CONFIGURATION).exists():
        raise ValueError(
            f"{path}: expected no {CONFIGURATION} beside a file of this name, which would be read with its r and "
            "alpha. Name another place."
        )
    if files and (strange := next((name for name in known if name not in files and (path / name).exists()), None)):
        raise ValueError(
            f"{path}: expected a directory without another adapter in it, found {strange!r}, whose configuration would "
            "be overwritten. Name another place."
        )


def _nearest(path: Path) -> Path:
    """The nearest of a path's parents that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextmanager
def draft(path: Path, files: Collection[str]) -> Iterator[Path]:
    """Where to write a file or a directory first: moved to ``path`` at the end, and gone if there is an error.

    Parameters
    ----------
    path : Path
    files : collection of str
        What will be in the directory, in the order in which they are moved; none where ``path`` is a file.
    """
    # Inside a directory that is there: what it lies in may be another disk, or not ours to write to.
    near = path if path.is_dir() else _nearest(path)
    with tempfile.TemporaryDirectory(dir=near, prefix=".writing-") as scratch:
        first = Path(scratch) / ("adapter" if files else path.name)
        yield first
        (path if files else path.parent).mkdir(parents=True, exist_ok=True)
        _move([(first / name, path / name) for name in files] or [(first, path)], Path(scratch))


def _move(pairs: Sequence[tuple[Path, Path]], scratch: Path) -> None:
    """Move files into place: one atomically, several so that no two ever lie together that are not of one writing.

    New weights beside an old configuration would be read, with the wrong scale. So what is there is set aside first,
    the last file before the others, and put back if there is an error.
    """
    if len(pairs) == 1:
        os.replace(*pairs[0])  # noqa: PTH105 (atomic)
        return
    aside: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for _, target in reversed(pairs):
            if target.exists():
                before = scratch / f"before-{target.name}"
                os.replace(target, before)  # noqa: PTH105 (atomic)
                aside.append((before, target))
        for source, target in pairs:
            os.replace(source, target)  # noqa: PTH105 (atomic)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink()
        for before, target in reversed(aside):
            os.replace(before, target)  # noqa: PTH105 (atomic)
        raise


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """What writes these tensors as one safetensors file."""

    def write(path: Path) -> None:
        # Copies, because safetensors refuses tensors that share memory.
        copied = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        # The library makes its files readable by their owner alone; like any other file, this one is as readable as
        # the process's umask says.
        path.touch()
        mode = path.stat().st_mode
        save_file(copied, path, metadata=dict(metadata))
        path.chmod(mode)

    return write
