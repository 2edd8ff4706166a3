"""Corpora cut into token ids, one a byte: held-out blocks in order, windows to train on at random places.

Values
------
``blocks``, ``held_out_blocks``, ``windows``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_analysis.study.corpora import Corpus


def blocks(data: bytes, length: int) -> Tensor:
    """Consecutive blocks of bytes as token ids; an incomplete last one is left out.

    Parameters
    ----------
    data : bytes
    length : int

    Returns
    -------
    Tensor, shape (n, length), int64
        n = len(data) // length.

    Raises
    ------
    ValueError
        If ``length`` is below 1.

    Examples
    --------
    >>> blocks(bytes(range(7)), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}.")
    n = len(data) // length
    return _ids(data[: n * length]).reshape(n, length)


def held_out_blocks(corpus: Corpus, length: int) -> tuple[Tensor, tuple[str, ...]]:
    """Held-out blocks, none across two files, and the file of each: the unit that intervals are clustered by.

    Parameters
    ----------
    corpus : Corpus
    length : int

    Returns
    -------
    ids : Tensor, shape (n, length), int64
    groups : tuple of str, length n

    Raises
    ------
    ValueError
        If no held-out file is that long.
    """
    parts = [(path, blocks(content, length)) for path, content in corpus.held_out_files]
    groups = tuple(path for path, part in parts for _ in range(len(part)))
    if not groups:
        raise ValueError(f"{corpus.name}: expected a held-out file of at least {length} bytes, got none.")
    return torch.cat([part for _, part in parts]), groups


def windows(corpus: Corpus, *, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Random stretches of the train side, without end.

    Parameters
    ----------
    corpus : Corpus
    length, batch_size : int
    seed : int
        Of a generator of its own: the global random state is neither used nor changed.

    Yields
    ------
    Tensor, shape (batch_size, length), int64

    Raises
    ------
    ValueError
        If a size is below 1 or the train side is shorter than ``length``.
    """
    data = corpus.train
    if length < 1 or batch_size < 1:
        raise ValueError(f"length, batch_size: expected at least 1, got {length} and {batch_size}.")
    if len(data) < length:
        raise ValueError(f"{corpus.name}: expected at least {length} bytes on the train side, got {len(data)}.")
    return _windows(_ids(data), length, batch_size, torch.Generator().manual_seed(seed))


def _windows(ids: Tensor, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    within = torch.arange(length)
    while True:
        starts = torch.randint(len(ids) - length + 1, (batch_size, 1), generator=generator)
        yield ids[starts + within]


def _ids(data: bytes) -> Tensor:
    # bytearray: torch warns of a buffer that must not be written to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0, dtype=torch.long)
