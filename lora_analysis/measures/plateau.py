"""Whether a spectrum ends in a plateau of noise, and, only then, which singular values stand above it.

Conventions
-----------
Thresholds of random matrix theory hold for a matrix of signal plus independent noise. ΔW is no such matrix: all but r
of its singular values are exactly 0, so a Marchenko-Pastur law of aspect d_out / d_in says nothing about the others.
What can be: noise in ``up`` (d_out, r), spread by a ``down`` of near-orthogonal rows, gives a *narrow* band of aspect
``r / d_out`` at the end of the spectrum (r = 64, d_out = 4096: its ends are in the ratio 1.29). Whether it is there is
tested first: the lower half of the singular values, over their median, against the lower half of that law. The
statistic is the Kolmogorov-Smirnov distance, its p that of pure noise by Monte Carlo, exact where all is noise. A
plateau that is rejected, and r of 8 or less, mean "not applicable", which is the usual answer for trained adapters.
It is a heuristic beyond that, for the noise of Adam is not independent.

Measures
--------
``noise_plateau``, a ``NoisePlateau``; ``marchenko_pastur_cdf``, ``optimal_threshold``.

References
----------
Marchenko and Pastur 1967; Gavish and Donoho 2014, *The optimal hard threshold for singular values is 4/sqrt(3)*,
arXiv:1305.5870, equations 3, 4 and 11.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_analysis.measures.spectrum_null import triangular_factors

FEWEST = 9
"""Singular values below which no plateau is looked for."""

LEVEL = 0.05
"""p below which the plateau is rejected."""

_GRID = 4097
_CHUNK = 2**22


class NoisePlateau(NamedTuple):
    """Whether there is a plateau of noise, and what stands above it.

    Attributes
    ----------
    applicable : bool
        Whether the lower half of the spectrum is consistent with noise; where it is not, the rest is NaN or None.
    p : float
        Of the lower half under pure noise; NaN where there are too few values.
    edge : float
        99 % quantile of the largest value of such noise, in the units of S.
    above_edge : int or None
        Singular values above it.
    threshold : float
        Gavish and Donoho's for unknown noise, which minimises the squared error and is above the edge.
    above_threshold : int or None
    """

    applicable: bool
    p: float
    edge: float
    above_edge: int | None
    threshold: float
    above_threshold: int | None


def noise_plateau(S: Tensor, d: int, *, draws: int = 999, seed: int = 0) -> NoisePlateau:
    """Test the end of a spectrum for a plateau of noise of aspect ``len(S) / d``.

    Parameters
    ----------
    S : Tensor, shape (r,)
        All r singular values of ΔW, descending.
    d : int
        d_out for noise in ``up``, the factor that begins at zero; at least r.
    draws, seed : int
        Of the Monte Carlo p.

    Returns
    -------
    NoisePlateau

    Raises
    ------
    ValueError
        If d is below the number of values.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.randn(512, 32, generator=generator, dtype=torch.float64)
    >>> noise[:, 0] *= 9
    >>> found = noise_plateau(torch.linalg.svdvals(noise), 512)
    >>> found.applicable, found.above_edge
    (True, 1)
    >>> noise_plateau(2.0 ** -torch.arange(32), 512).applicable
    False
    """
    r = len(S)
    if d < r:
        raise ValueError(f"d: expected at least the {r} singular values, got {d}.")
    values = S.detach().double().cpu().sort(descending=True).values.numpy()
    missing = NoisePlateau(False, math.nan, math.nan, None, math.nan, None)
    if r < FEWEST or not values[r // 2] > 0:
        return missing
    distances, largest = _noise(r, d, draws, seed)
    p = (1 + int((distances >= _distance(values[None], r / d)[0]).sum())) / (draws + 1)
    if p < LEVEL:
        return missing._replace(p=p)
    median = float(np.median(values))
    edge = median * largest
    threshold = median * optimal_threshold(r / d)
    return NoisePlateau(True, p, edge, int((values > edge).sum()), threshold, int((values > threshold).sum()))


def marchenko_pastur_cdf(x: npt.ArrayLike, beta: float) -> npt.NDArray[np.float64]:
    """Limit law of the singular values of ``G / sqrt(d)``, G Gaussian (d, r), ``beta = r / d`` in (0, 1].

    Examples
    --------
    >>> marchenko_pastur_cdf([0.0, 0.5, 1.5], 0.25).tolist()  # from 1 - sqrt(beta) to 1 + sqrt(beta)
    [0.0, 0.0, 1.0]
    """
    grid, cumulated = _law(beta)
    found: npt.NDArray[np.float64] = np.interp(np.asarray(x, dtype=float), grid, cumulated)
    return found


def marchenko_pastur_median(beta: float) -> float:
    """Median of that law.

    Examples
    --------
    >>> round(marchenko_pastur_median(1.0), 4)
    0.8079
    """
    grid, cumulated = _law(beta)
    return float(np.interp(0.5, cumulated, grid))


def optimal_threshold(beta: float) -> float:
    """Gavish and Donoho's factor on the median singular value, for noise of unknown variance.

    Examples
    --------
    >>> round(optimal_threshold(1.0), 3)
    2.858
    """
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / marchenko_pastur_median(beta)


@functools.lru_cache(maxsize=64)
def _law(beta: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if not 0 < beta <= 1:
        raise ValueError(f"beta: expected in (0, 1], got {beta}.")
    # x² = 1 + beta - 2 sqrt(beta) cos(t) makes the density of t smooth: sin²(t) / x², up to a constant.
    t = np.linspace(0, math.pi, _GRID)
    square = 1 + beta - 2 * math.sqrt(beta) * np.cos(t)
    density = np.sin(t) ** 2 / np.where(square > 0, square, 1.0)
    if beta == 1:  # its limit at t = 0, where x is 0
        density[0] = 1.0
    steps = (density[1:] + density[:-1]) / 2
    cumulated = np.concatenate([[0.0], np.cumsum(steps)])
    return np.sqrt(np.maximum(square, 0)), cumulated / cumulated[-1]


def _distance(values: npt.NDArray[np.float64], beta: float) -> npt.NDArray[np.float64]:
    """Kolmogorov-Smirnov distance of the lower halves of spectra (rows, descending) from that of the law."""
    r = values.shape[1]
    lower = values[:, (r + 1) // 2 :][:, ::-1] / np.median(values, axis=1, keepdims=True)
    expected = 2 * marchenko_pastur_cdf(lower * marchenko_pastur_median(beta), beta)
    count = lower.shape[1]
    over = np.arange(1, count + 1) / count - expected
    under = expected - np.arange(count) / count
    found: npt.NDArray[np.float64] = np.maximum(over, under).max(axis=1)
    return found


@functools.lru_cache(maxsize=64)
def _noise(r: int, d: int, draws: int, seed: int) -> tuple[npt.NDArray[np.float64], float]:
    """Distances of pure noise, and the 99 % quantile of its largest value over its median."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // r**2)
    parts = [
        torch.linalg.svdvals(triangular_factors(rng, min(chunk, draws - start), d, r))
        for start in range(0, draws, chunk)
    ]
    noise = torch.cat(parts).numpy()
    ratios = np.sort(noise[:, 0] / np.median(noise, axis=1))
    return _distance(noise, r / d), float(ratios[min(draws - 1, math.ceil(0.99 * (draws + 1)) - 1)])
