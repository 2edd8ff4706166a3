"""What chance alone would project of W: the law of ``||U.T @ W @ V||_F**2`` for random directions.

Conventions
-----------
The null is "U and V have nothing to do with W": independent Haar-distributed (uniformly random) orthonormal
frames. The law then depends on W through its singular values only. Everything is float64; draws come from
generators of their own, and no global random state is touched.

Measures
--------
``projection_null``, the exact mean and variance, and ``projection_null_draws``, a sampler.

References
----------
The null is not in the paper (Hu et al. 2021, arXiv:2106.09685, whose table 7 has one random draw): its moments
follow from the second moments of a random projection, its law from the invariance of the Haar measure and
Bartlett's decomposition of the Wishart distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_analysis.measures.weight import WeightSpectrum

_CHUNK = 2**18
"""Gaussian numbers held at a time while drawing from the null: 2 MiB stay in cache, 16 take 1.3 times as
long."""


def projection_null(shape: tuple[int, int], r: int, s: int, square: float, fourth: float) -> tuple[float, float]:
    """Exact mean and variance of ``||U.T @ W @ V||_F**2`` over independent Haar frames U and V.

    With ``mu = r / m`` and ``b = r (m - r) / (m (m - 1) (m + 2))`` for U, ``nu`` and ``c`` alike for V::

        mean = mu nu square
        var  = 2 b nu² (fourth - square²/m) + 2 c mu² (fourth - square²/n)
               + 2 b c (fourth (1 - 2/m - 2/n) + square² (1 + 2/(m n)))

    arranged so that nothing cancels. It is 0 where r = m and s = n.

    Parameters
    ----------
    shape : (int, int)
        (m, n) of W.
    r, s : int
        Columns of U (m, r) and V (n, s).
    square : float
        ``sum(sigma(W)**2)``.
    fourth : float
        ``sum(sigma(W)**4)``.

    Returns
    -------
    mean : float
        In the unit of W squared.
    variance : float
        In the unit of W to the fourth, >= 0.

    Raises
    ------
    ValueError
        If U or V cannot have that many orthonormal columns.

    Examples
    --------
    >>> mean, variance = projection_null((12288, 12288), 4, 4, 61.95**2, 61.95**4 / 200)
    >>> round(mean**0.5, 4)
    0.0202
    """
    m, n = shape
    if not (0 <= r <= m and 0 <= s <= n):
        raise ValueError(f"expected r <= {m} and s <= {n} orthonormal columns, got {r} and {s}.")
    mu, nu = r / m, s / n
    b, c = _projection_scatter(r, m), _projection_scatter(s, n)
    variance = (
        2 * b * nu**2 * (fourth - square**2 / m)
        + 2 * c * mu**2 * (fourth - square**2 / n)
        + 2 * b * c * (fourth * (1 - 2 / m - 2 / n) + square**2 * (1 + 2 / (m * n)))
    )
    return mu * nu * square, max(variance, 0.0)


def projection_null_draws(
    spectrum: WeightSpectrum, shape: tuple[int, int], k: int, *, draws: int = 1000, seed: int = 0
) -> Tensor:
    """Draws of ``||U_j.T @ W @ V_j||_F**2`` for random nested frames U_j, V_j and every j = 1 … k.

    The law depends on W through its singular values only. With ``W = P diag(sigma) Q.T`` on its smaller
    side p, the first k rows of a Haar frame are ``A = L⁻¹ X``, X (k, p) Gaussian and ``L Lᵀ = X Xᵀ``; then
    ``A diag(sigma)`` has the triangular factor ``T = L⁻¹ chol(X diag(sigma²) Xᵀ)``, and what remains is
    the leading block of a Haar matrix on the larger side, drawn at a cost that does not depend on it.

    Exact for a complete spectrum. Otherwise the unknown rest is taken as flat: N equal values with
    the rest's exact energy and, N being its participation ratio, its estimated fourth moment. The null then
    has the right mean and, to the error of that estimate, the right variance at every j; the rest enters
    as a sum of many small terms, of which little more than these can be seen.

    Parameters
    ----------
    spectrum : WeightSpectrum
        Of W.
    shape : (int, int)
        (d_out, d_in).
    k : int
        At most min(d_out, d_in).
    draws : int
    seed : int
        Of a generator of its own; no global state is touched.

    Returns
    -------
    Tensor, shape (draws, k)
        Float64, in the unit of W squared, ascending along each row.

    Raises
    ------
    ValueError
        If k exceeds the smaller side, or the spectrum does not fit the shape.

    References
    ----------
    Bartlett 1933 (see Anderson, *An Introduction to Multivariate Statistical Analysis*, theorem 7.2.1).

    Examples
    --------
    >>> from lora_analysis.measures.weight import weight_spectrum
    >>> spectrum = weight_spectrum(torch.eye(6, 4), 4)
    >>> null = projection_null_draws(spectrum, (6, 4), 3, draws=4000)
    >>> bool((null.mean(dim=0) / 4 * 24 / torch.tensor([1, 4, 9]) - 1).abs().max() < 0.1)
    True
    """
    p, q = min(shape), max(shape)
    known = len(spectrum.S)
    if not 1 <= k <= p:
        raise ValueError(f"k: expected 1 to {p} directions for shape {tuple(shape)}, got {k}.")
    if known > p or (spectrum.complete and known < p):
        raise ValueError(f"spectrum: expected {p} singular values for shape {tuple(shape)}, got {known}.")
    if spectrum.norm == 0:
        return torch.zeros(draws, k, dtype=torch.float64)
    flat, flat_square = _flat_rest(spectrum, p)
    squares = (spectrum.S.double() ** 2).cpu()
    source = _Source(torch.Generator().manual_seed(seed), np.random.default_rng(seed))
    result = torch.empty(draws, k, dtype=torch.float64)
    step = max(1, _CHUNK // (k * max(known, k)))
    for start in range(0, draws, step):
        n = min(step, draws - start)
        X = _gaussian(source, n, k, known)
        weighted, gram = (X * squares) @ X.mT, X @ X.mT
        if flat:
            rest = _wishart(source, n, k, flat)
            weighted += flat_square * rest
            gram += rest + _wishart(source, n, k, p - known - flat)
        # A W of rank below k leaves `weighted` singular; this much is below its rounding error.
        size = weighted.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        weighted += 1e-14 * size * torch.eye(k, dtype=torch.float64)
        lower = torch.linalg.cholesky(gram)
        T = torch.linalg.solve_triangular(lower, torch.linalg.cholesky(weighted), upper=False)
        G = T @ _haar_block(source, n, k, q)
        nested = G.square().cumsum(dim=1).cumsum(dim=2)
        result[start : start + n] = nested.diagonal(dim1=1, dim2=2)
    return result


def _flat_rest(spectrum: WeightSpectrum, p: int) -> tuple[int, float]:
    """How many equal values stand for the unknown rest of the spectrum, and the square of one."""
    unknown = p - len(spectrum.S)
    energy = spectrum.norm**2 - float(spectrum.S.square().sum())
    # Energies are known to about 1e-16 of the whole; below that there is no rest.
    if unknown == 0 or energy <= 1e-14 * spectrum.norm**2:
        return (unknown, 0.0)
    fourth = spectrum.fourth_moment - float((spectrum.S**4).sum())
    count = unknown if fourth <= 0 else min(max(round(energy**2 / fourth), 1), unknown)
    return count, energy / count


def _projection_scatter(r: int, m: int) -> float:
    """``E[P_12²]`` of a random projection P of rank r in m dimensions; 0 where P is constant."""
    return 0.0 if r in (0, m) else r * (m - r) / (m * (m - 1) * (m + 2))


class _Source(NamedTuple):
    """Random numbers: torch is three times as fast at normal ones, and has no seeded chi-square."""

    normal: torch.Generator
    chi_square: np.random.Generator


def _gaussian(source: _Source, draws: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers, drawn in float32 (five times faster), returned in float64."""
    return torch.randn(draws, rows, columns, generator=source.normal, dtype=torch.float32).double()


def _wishart(source: _Source, draws: int, k: int, df: int) -> Tensor:
    """``X @ X.T`` for Gaussian X (k, df), by Bartlett's triangular factor where df >= k."""
    if df < k:
        X = _gaussian(source, draws, k, df)
        return X @ X.mT
    factor = _gaussian(source, draws, k, k).tril(-1)
    chi_square = source.chi_square.chisquare(df - np.arange(k), size=(draws, k))
    factor += torch.diag_embed(torch.from_numpy(np.sqrt(chi_square)))
    return factor @ factor.mT


def _haar_block(source: _Source, draws: int, k: int, d: int) -> Tensor:
    """The leading (k, k) block of a Haar matrix of size d, the Q of a Gaussian matrix's QR."""
    X = _gaussian(source, draws, k, k)
    upper = torch.linalg.cholesky(X.mT @ X + _wishart(source, draws, k, d - k)).mT
    block: Tensor = torch.linalg.solve_triangular(upper, X, upper=True, left=False)
    return block
