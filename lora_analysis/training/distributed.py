"""Data-parallel training: one process per device, started by ``torchrun``, gradients averaged by torch's DDP.

Each process runs the same script on the same model and seed, and trains on its part of every batch. With a loss that
is a mean over rows, and parts of one size, losses and updates are those of one process on whole batches, to rounding::

    with training.process_group():
        training.inject(model, ["query", "value"], r=8)
        training.train(model, training.local_parts(batches), loss, steps=1000)

    torchrun --nproc-per-node 2 script.py

Values
------
``process_group``, ``local_parts``; ``world_size``, ``rank``, ``mean_over_processes``, ``require_equal``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Batch = TypeVar("Batch")


@contextmanager
def process_group(backend: str | None = None) -> Iterator[None]:
    """The group of processes that ``torchrun`` started, for as long as the block runs; nothing where it did not.

    With nccl ``"cuda"`` means the process's own device, ``LOCAL_RANK``; model and batches are to be moved there.

    Parameters
    ----------
    backend : str, optional
        ``"nccl"`` where there are CUDA devices, else ``"gloo"``.

    Examples
    --------
    >>> with process_group():  # in one process
    ...     world_size()
    1
    """
    if not distributed.is_torchelastic_launched():
        yield
        return
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if chosen == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(chosen)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Processes that train together; 1 where there is no group."""
    return distributed.get_world_size() if _in_group() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if _in_group() else 0


def local_parts(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The part of every batch that is this process's: the tensors' rows in as many equal parts as there are processes.

    Parameters
    ----------
    batches : iterable
        Of tensors, or of tuples, lists and mappings that hold them. Other values are passed on.

    Raises
    ------
    ValueError
        If the rows of a tensor cannot be divided equally.

    Examples
    --------
    >>> next(local_parts([(torch.arange(4), "kept")]))  # in one process
    (tensor([0, 1, 2, 3]), 'kept')
    """
    for batch in batches:
        yield part_of(batch, rank(), world_size())


def part_of(batch: Any, index: int, count: int) -> Any:
    """One of ``count`` equal parts of a batch.

    Examples
    --------
    >>> part_of({"x": torch.arange(4)}, 1, 2)
    {'x': tensor([2, 3])}
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch
        if len(batch) % count:
            raise ValueError(f"batches: expected rows for {count} processes in equal parts, got {len(batch)}.")
        return batch.chunk(count)[index]
    if isinstance(batch, dict):
        return {key: part_of(value, index, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [part_of(value, index, count) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number that each process has."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def require_equal(what: str, value: object) -> None:
    """Refuse to go on where processes differ, before one waits for the others for ever.

    Raises
    ------
    ValueError
        In every process.
    """
    values = gathered(value)
    if any(other != values[0] for other in values):
        raise ValueError(f"{what}: expected the same in every process, got {values}.")


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
