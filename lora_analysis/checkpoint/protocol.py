"""What a checkpoint is to everything that reads one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_analysis.errors import CheckpointError


class Checkpoint(Protocol):
    """A lazy mapping from tensor names to tensors."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's own strings, as found."""

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""


def nbytes(checkpoint: Checkpoint, name: str) -> int:
    """Size of a tensor in bytes, without reading it."""
    count = 1
    for length in checkpoint.shape(name):
        count *= length
    return count * checkpoint.dtype(name).itemsize


@runtime_checkable
class HasRows(Protocol):
    """A checkpoint that reads part of a tensor without the rest of it."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""


def rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Part of a tensor along its first axis, read without the rest where the checkpoint can."""
    if isinstance(checkpoint, HasRows):
        return checkpoint.rows(name, start, stop)
    return checkpoint[name][start:stop]


def oddity(tensor: Tensor) -> str | None:
    """What is in the way of taking a tensor's numbers, if anything is.

    Examples
    --------
    >>> oddity(torch.empty(2, device="meta")), oddity(torch.ones(2))
    ("without data, on device 'meta'", None)
    """
    kinds = {
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "without data, on device 'meta'": tensor.is_meta,
        f"of layout {tensor.layout}": tensor.layout is not torch.strided,
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


class StateDict:
    """A checkpoint that is already in memory: a state dict, or a torch file mapped into memory.

    Raises
    ------
    CheckpointError
        When a tensor is asked for that has no numbers or none in rows and columns: a sparse one, or one on "meta".
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if kind := oddity(tensor):
            raise CheckpointError(f"{name!r}: expected a dense (strided) tensor, got one {kind}.")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype
