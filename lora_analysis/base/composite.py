"""A pipeline's components as one checkpoint, and how much of a checkpoint was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.checkpoint.byte_count import ByteCount
from lora_analysis.checkpoint.folders import RemoteShards
from lora_analysis.checkpoint.protocol import Checkpoint, nbytes, rows
from lora_analysis.checkpoint.remote_safetensors import RemoteSafetensors


class Components:
    """The checkpoints of several components as one, whose names begin with the component's.

    Examples
    --------
    >>> from lora_analysis.checkpoint import StateDict
    >>> list(Components({"unet": StateDict({"mid.weight": torch.ones(2, 2)})}))
    ['unet.mid.weight']
    """

    def __init__(self, components: Mapping[str, Checkpoint]) -> None:
        self._components = {name: counted(checkpoint) for name, checkpoint in components.items()}
        self._places = {
            f"{component}.{name}": (checkpoint, name)
            for component, checkpoint in self._components.items()
            for name in checkpoint
        }
        self.metadata: Mapping[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        checkpoint, inner = self._places[name]
        return checkpoint[inner]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""
        checkpoint, inner = self._places[name]
        return rows(checkpoint, inner, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        checkpoint, inner = self._places[name]
        return checkpoint.shape(inner)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        checkpoint, inner = self._places[name]
        return checkpoint.dtype(inner)

    @property
    def is_remote(self) -> bool:
        """Whether any component is read over a network."""
        return any(is_remote(checkpoint) for checkpoint in self._components.values())

    @property
    def counts(self) -> set[ByteCount]:
        """The counts of all components; those read from one remote folder share theirs."""
        return {checkpoint.count for checkpoint in self._components.values()}

    @property
    def bytes_total(self) -> int:
        """Bytes of all components."""
        return sum(checkpoint.bytes_total for checkpoint in self._components.values())


class Counted:
    """A checkpoint that counts the bytes of the tensors that are read, for those that do not count by themselves."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.metadata: Mapping[str, str] = checkpoint.metadata
        self.count = ByteCount()

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self._counted(self._checkpoint[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis."""
        return self._counted(rows(self._checkpoint, name, start, stop))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._checkpoint.dtype(name)

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(self._checkpoint, name) for name in self._checkpoint)

    def _counted(self, tensor: Tensor) -> Tensor:
        self.count.add(tensor.numel() * tensor.itemsize)
        return tensor


Counting = RemoteSafetensors | RemoteShards | GGUFWeights | Counted
"""Checkpoints with a ``count`` of the bytes read, and ``bytes_total``."""


def counted(checkpoint: Checkpoint) -> Counting:
    """A checkpoint that knows how much of it was read: itself, or one that counts."""
    return checkpoint if isinstance(checkpoint, Counting) else Counted(checkpoint)


def bytes_read(checkpoint: Components | Counting) -> int:
    """Bytes read so far of a checkpoint, or of all components of one."""
    counts = checkpoint.counts if isinstance(checkpoint, Components) else {checkpoint.count}
    return sum(count.value for count in counts)


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint, or any component of one, is read over a network."""
    if isinstance(checkpoint, Components):
        return checkpoint.is_remote
    return isinstance(checkpoint, RemoteSafetensors | RemoteShards)


def size_report(read: int, total: int | None) -> str:
    """How much of how much was read, both in the unit that suits the whole; without it where nobody knows.

    Examples
    --------
    >>> size_report(310_000_000, 13_477_000_000)
    'read 0.31 of 13.5 GB'
    >>> size_report(512, 40_000)
    'read 0.51 of 40.0 kB'
    >>> size_report(512_000, None)
    'read 0.51 MB'
    >>> size_report(80_300, 40_200)  # remote matrices are not kept: what is asked for twice is read twice
    'read 80.3 of 40.2 kB, headers and repeats counted'
    """
    whole = 2 * read if total is None else total
    unit, factor = next(
        ((unit, factor) for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if whole >= factor), ("kB", 1e3)
    )

    def written(count: int) -> str:
        return f"{count / factor:.2f}" if count < 10 * factor else f"{count / factor:.1f}"

    if total is None:
        return f"read {written(read)} {unit}"
    more = ", headers and repeats counted" if read > total else ""
    return f"read {written(read)} of {written(total)} {unit}{more}"
