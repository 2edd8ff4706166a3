"""What spectrum chance alone gives: singular values of a product of two independent Gaussian factors.

Conventions
-----------
``ΔW = up @ down`` with independent standard Gaussian entries in up (d_out, r) and down (r, d_in): an update
that uses all its r directions alike and prefers none. Its singular values are *not* equal: at r = 64 and
d = 384 the stable rank of such noise is 26, not 64, and 48 directions hold 90 % of its energy. A rank measure
of a trained update is small only against this.

Only shapes compare: a scale, or any variance of the entries, multiplies all singular values alike, so divide
by the Frobenius norm of each draw, ``S / S.norm(dim=1, keepdim=True)``.

Measures
--------
``spectrum_null``, and ``triangular_factors`` that it is made of.

References
----------
Muirhead, *Aspects of Multivariate Statistical Theory*, theorem 3.2.14 (Bartlett's decomposition): the
triangular factor of a Gaussian (d, r) has independent entries, normal above the diagonal and chi with
d, d-1, ... degrees of freedom on it. Singular values of ``up @ down`` are those of ``R_up @ R_down.T``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**18
"""Numbers (2 MB of float64) drawn at a time for each factor, so that they stay in cache."""


def spectrum_null(shape: tuple[int, int], r: int, *, draws: int = 1000, seed: int = 0) -> Tensor:
    """Sample of the singular values of ``up @ down`` for independent standard Gaussian factors.

    Exact for every d_out, d_in and r, also r > d: a factor with r <= d enters by its triangular factor alone,
    drawn by Bartlett's decomposition, one with r > d as it is. A draw costs O(r³), whatever d.

    Parameters
    ----------
    shape : (int, int)
        (d_out, d_in) of the update.
    r : int
        Its inner dimension.
    draws : int
        Size of the sample.
    seed : int
        Of the function's own generator.

    Returns
    -------
    Tensor, shape (draws, min(r, d_out, d_in))
        Float64, each row descending, in units of the product of the factors' standard deviations; to compare
        with an update, divide each row by its norm.

    Raises
    ------
    ValueError
        If d_out, d_in or draws is below 1, or r is negative.

    References
    ----------
    Bartlett's decomposition: Muirhead, *Aspects of Multivariate Statistical Theory*, theorem 3.2.14. The update
    is that of Hu et al. 2021, arXiv:2106.09685, eq. 3.

    Examples
    --------
    >>> S = spectrum_null((384, 384), 64, draws=200)
    >>> S.shape
    torch.Size([200, 64])
    >>> round(float((S.norm(dim=1) / S[:, 0]).square().mean()))  # stable rank by chance
    26
    """
    d_out, d_in = shape
    if min(d_out, d_in) < 1 or r < 0 or draws < 1:
        raise ValueError(
            f"spectrum_null: expected d_out, d_in and draws of at least 1 and r of at least 0, got shape "
            f"({d_out}, {d_in}), r={r}, draws={draws}."
        )
    rng = np.random.default_rng(seed)
    S = torch.empty(draws, min(r, d_out, d_in), dtype=torch.float64)
    chunk = max(1, _CHUNK // max(1, r * max(min(r, d_out), min(r, d_in))))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        up, down = triangular_factors(rng, size, d_out, r), triangular_factors(rng, size, d_in, r)
        S[start : start + size] = torch.linalg.svdvals(up @ down.mT)
    return S


def triangular_factors(rng: np.random.Generator, draws: int, d: int, r: int) -> Tensor:
    """Draws of R with the law of ``R.T @ R = X.T @ X``, X Gaussian (d, r); shape (draws, min(d, r), r)."""
    factors = rng.standard_normal((draws, min(d, r), r))
    if r <= d:
        factors = np.triu(factors, 1)
        diagonal = np.arange(r)
        factors[:, diagonal, diagonal] = np.sqrt(rng.chisquare(d - diagonal, size=(draws, r)))
    return torch.from_numpy(factors)
