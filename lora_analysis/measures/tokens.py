"""Which tokens a direction points at: singular vectors of an update held against the rows of an embedding.

Conventions
-----------
A module that reads the residual stream (q, k, v, the first layer of an MLP) is seen in its input directions ``v_k``,
through the input embedding; one that writes to it (o, the last layer of an MLP) in its output directions ``u_k``,
through the unembedding. Rows of the embedding are taken less their mean: what all tokens have in common tells none
apart, and in an unembedding it shifts all logits alike. A direction has no sign of its own, so tokens on either side
count, those on the negative side with a negative cosine; ``u_k`` and ``v_k`` of one k share their sign.

In d dimensions some token of many is close to *any* direction: the largest cosine is held against that of random
directions for the same embedding. In the middle of a network tokens need not be what directions mean at all.

Measures
--------
``nearest_tokens``, ``largest_token_cosine_null``.

References
----------
Dar et al. 2022, *Analyzing Transformers in Embedding Space*, arXiv:2209.02535; nostalgebraist 2020, *interpreting GPT:
the logit lens*.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2**24


class NearestTokens(NamedTuple):
    """The tokens that directions are closest to.

    Attributes
    ----------
    ids : Tensor, shape (k, top), int64
        By descending ``|cos|``.
    cosines : Tensor, shape (k, top)
        In [-1, 1].
    """

    ids: Tensor
    cosines: Tensor


def nearest_tokens(directions: Tensor, embedding: Tensor, *, top: int = 5) -> NearestTokens:
    """The rows of an embedding that lie closest to directions, or to their opposites.

    Parameters
    ----------
    directions : Tensor, shape (d, k)
    embedding : Tensor, shape (vocabulary, d)
    top : int
        Tokens of each direction; at most the vocabulary.

    Returns
    -------
    NearestTokens

    Raises
    ------
    ValueError
        If the dimensions differ, ``top`` is below 1, or the embedding holds NaN or infinities.

    Examples
    --------
    >>> found = nearest_tokens(torch.eye(3)[:, :1], torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, -1.0]]), top=2)
    >>> found.ids.tolist(), [[round(x, 2) for x in row] for row in found.cosines.tolist()]
    ([[0, 1]], [[0.9, -0.9]])
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}.")
    if directions.shape[0] != embedding.shape[1]:
        raise ValueError(
            f"directions: expected ({embedding.shape[1]}, k) for an embedding of that width, got "
            f"{tuple(directions.shape)}."
        )
    cosines = _cosines(directions.double(), _unit_rows(embedding))
    found = cosines.abs().topk(min(top, len(embedding)), dim=0).indices.mT
    return NearestTokens(found, cosines.mT.gather(1, found))


def largest_token_cosine_null(embedding: Tensor, *, draws: int = 199, seed: int = 0) -> Tensor:
    """Sample of the largest ``|cos|`` of a random direction with any token; shape (draws,), ascending.

    Examples
    --------
    >>> tokens = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    >>> round(float(largest_token_cosine_null(tokens).median()), 1)
    0.4
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}.")
    generator = torch.Generator().manual_seed(seed)
    rows = _unit_rows(embedding)
    found = []
    chunk = max(1, _CHUNK // max(1, len(rows)))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        directions = torch.randn(rows.shape[1], size, dtype=torch.float64, generator=generator)
        found.append(_cosines(directions.to(rows.device), rows).abs().amax(dim=0))
    return torch.cat(found).sort().values


def _unit_rows(embedding: Tensor) -> Tensor:
    # float32: a cosine is wanted to three digits, and vocabularies are large.
    rows = embedding.float()
    if not bool(rows.isfinite().all()):
        raise ValueError("embedding: expected finite numbers, got NaN or infinities.")
    rows = rows - rows.mean(dim=0)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return unit


def _cosines(directions: Tensor, rows: Tensor) -> Tensor:
    unit = directions / directions.norm(dim=0)
    cosines: Tensor = rows @ unit.float()
    return cosines.double()
