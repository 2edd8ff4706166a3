"""Inner products of random orthonormal frames, several at once, at a cost that does not depend on their dimension.

Conventions
-----------
Frames of sizes r_1 … r_T are independent and uniform (Haar) in dimension d. Whatever is asked of their inner products
hangs on coordinates in the space they span alone, which has R = r_1 + … + r_T dimensions at most: with Gaussian
columns ``X`` (d, R) these are the columns of the triangular factor of X, which Bartlett's decomposition draws directly.
Orthonormal frames are the columns of X, block by block, times the inverse of their Cholesky factor.

Measures
--------
``frame_products``; ``update_cosine_null``.

References
----------
Muirhead, *Aspects of Multivariate Statistical Theory*, theorem 3.2.14 (Bartlett).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_analysis.measures.spectrum_null import triangular_factors

Blocks = dict[tuple[int, int], Tensor]
"""Draws of ``U_s.T @ U_t`` for s < t, each of shape (draws, r_s, r_t), float64."""

_CHUNK = 2**20
"""Numbers drawn at a time."""
_KEPT = 2**24
"""Numbers (128 MB) up to which draws are kept: modules of one shape and r have the same null."""


def frame_products(d: int, sizes: Sequence[int], *, draws: int, seed: int = 0) -> Iterable[Blocks]:
    """Draws of the inner products of independent random frames, in chunks.

    Parameters
    ----------
    d : int
        Dimension of the space.
    sizes : sequence of int
        Columns of each frame, at most d.
    draws, seed : int

    Returns
    -------
    iterable of dict
        Chunks of draws; in how many depends on the sizes and draws alone.

    Raises
    ------
    ValueError
        If a frame has more columns than dimensions, or draws is below 1.

    Examples
    --------
    >>> [products] = frame_products(400, [2, 3], draws=2000)
    >>> products[0, 1].shape, round(float(products[0, 1].square().sum((1, 2)).mean()), 3)  # 2 · 3 / 400
    (torch.Size([2000, 2, 3]), 0.015)
    """
    if draws < 1 or any(not 0 <= size <= d for size in sizes):
        raise ValueError(f"expected draws of at least 1 and frames of 0 to {d} columns, got {draws} and {list(sizes)}.")
    kept = sum(a * b for a, b in itertools.combinations(sizes, 2)) * draws
    return (_kept if kept <= _KEPT else _drawn)(d, tuple(sizes), draws, seed)


def update_cosine_null(S_a: Tensor, S_b: Tensor, shape: tuple[int, int], *, draws: int = 1999, seed: int = 0) -> Tensor:
    """Sample of the cosine of two updates of given spectra, turned at random on both sides.

    Its variance is exactly ``1 / (d_out d_in)``; its tails are heavier than a normal law's, the more so at low rank.

    Parameters
    ----------
    S_a, S_b : Tensor, shape (r,) and (r',)
        Singular values, of which not all are 0.
    shape : (int, int)
        (d_out, d_in).
    draws, seed : int

    Returns
    -------
    Tensor, shape (draws,)
        Float64, ascending, in [-1, 1].

    Examples
    --------
    >>> null = update_cosine_null(torch.ones(4), torch.ones(8), (64, 48))
    >>> round(float(null.std() * (64 * 48) ** 0.5), 1)
    1.0
    """
    sizes = [min(len(S), *shape) for S in (S_a, S_b)]
    a, b = (S[:size].double() for S, size in zip((S_a, S_b), sizes, strict=True))
    lengths = a.norm() * b.norm()
    if not lengths > 0:
        raise ValueError("S_a, S_b: expected spectra that are not zero.")
    left, right = (frame_products(d, sizes, draws=draws, seed=seed + side) for side, d in enumerate(shape))
    cosines = [((outputs[0, 1] * inputs[0, 1]) @ b @ a) / lengths for outputs, inputs in zip(left, right, strict=True)]
    return torch.cat(cosines).sort().values


@functools.lru_cache(maxsize=8)
def _kept(d: int, sizes: tuple[int, ...], draws: int, seed: int) -> tuple[Blocks, ...]:
    return tuple(_drawn(d, sizes, draws, seed))


def _drawn(d: int, sizes: tuple[int, ...], draws: int, seed: int) -> Iterator[Blocks]:
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(1, sum(sizes) ** 2))
    for start in range(0, draws, chunk):
        coordinates = triangular_factors(rng, min(chunk, draws - start), d, sum(sizes))
        parts = torch.split(coordinates, list(sizes), dim=2)
        factors = [torch.linalg.cholesky(part.mT @ part) for part in parts]
        yield {
            (s, t): torch.linalg.solve_triangular(
                factors[t].mT,
                torch.linalg.solve_triangular(factors[s], parts[s].mT @ parts[t], upper=False),
                upper=True,
                left=False,
            )
            for s, t in itertools.combinations(range(len(sizes)), 2)
        }
