"""Random orthonormal frames, several at once, at a cost that does not depend on the dimension of their space.

Conventions
-----------
Frames of sizes r_1 … r_T are independent and uniform (Haar) in dimension d. Whatever is asked of their inner products
hangs on coordinates in the space they span alone, which has R = r_1 + … + r_T dimensions at most: with Gaussian
columns ``X`` (d, R) these are the columns of the triangular factor of X, which Bartlett's decomposition draws directly.

Measures
--------
``haar_frames``; ``update_cosine_null``.

References
----------
Muirhead, *Aspects of Multivariate Statistical Theory*, theorem 3.2.14 (Bartlett).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_analysis.measures.spectrum_null import triangular_factors


def haar_frames(d: int, sizes: Sequence[int], *, draws: int, seed: int = 0) -> list[Tensor]:
    """Draws of independent random frames, in coordinates of the space they span together.

    Parameters
    ----------
    d : int
        Dimension of the whole space.
    sizes : sequence of int
        Columns of each frame, at most d.
    draws, seed : int

    Returns
    -------
    list of Tensor, shape (draws, min(d, R), r_t)
        Float64, with orthonormal columns; inner products between frames have the law of frames in dimension d.

    Raises
    ------
    ValueError
        If a frame has more columns than dimensions, or draws is below 1.

    Examples
    --------
    >>> a, b = haar_frames(400, [2, 3], draws=2000)
    >>> a.shape, round(float((a.mT @ b).square().sum((1, 2)).mean()), 3)  # 2 · 3 / 400
    (torch.Size([2000, 5, 2]), 0.015)
    """
    if draws < 1 or any(not 0 <= size <= d for size in sizes):
        raise ValueError(f"expected draws of at least 1 and frames of 0 to {d} columns, got {draws} and {list(sizes)}.")
    coordinates = triangular_factors(np.random.default_rng(seed), draws, d, sum(sizes))
    frames = []
    for block in torch.split(coordinates, list(sizes), dim=2):
        Q, R = torch.linalg.qr(block)
        # With positive diagonals the factor is unique, and Q is uniform.
        frames.append(Q * R.diagonal(dim1=1, dim2=2).sign()[:, None] if block.shape[2] else Q)
    return frames


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
    left = haar_frames(shape[0], sizes, draws=draws, seed=seed)
    right = haar_frames(shape[1], sizes, draws=draws, seed=seed + 1)
    outputs, inputs = left[0].mT @ left[1], right[0].mT @ right[1]
    cosines: Tensor = (a[:, None] * outputs * inputs * b).sum((1, 2)) / lengths
    return cosines.sort().values
