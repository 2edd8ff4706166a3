"""Where along the whole spectrum of W an update lies: its share in each tenth of W's singular directions.

Conventions
-----------
W (d_out, d_in) has p = min(d_out, d_in) singular directions on either side, by descending singular value. They are
cut into ``parts`` runs of equal length (one more or less where p is no multiple), the first holding the
largest. On the longer side of W, what none of its directions reaches (d - p dimensions) is one more part, the
last. The shares over all parts sum to 1.

``overlap`` is the mean squared cosine of the update's top k directions with a part's span, ``||P U_k||_F**2 / k``:
n / d for a part of n directions by chance. ``energy_share`` weighs the directions by what they carry,
``||P dW_k||_F**2 / ||dW_k||_F**2``.

The null is a Haar-distributed frame, independent of W. Its moments are exact; p is the upper tail, exact (a Beta
law) at k = 1 and elsewhere sampled from the exact law, which does not depend on d's size:
``P U`` has the Gram matrix ``L⁻¹ A L⁻ᵀ`` for Wishart A and B of n and d - n degrees of freedom and
``L Lᵀ = A + B``. That an update lies low as well as high in the spectrum is the point of looking at all of it.

Measures
--------
``spectrum_overlap`` (``SpectrumOverlap``), ``part_sizes``, ``part_null``, ``part_null_draws``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3 and figure 8, look at the top of W only.
Shuttleworth et al. 2024, arXiv:2410.21228; Staats, Thamm and Rosenow 2024, arXiv:2410.17770, on small singular values.
Muirhead, *Aspects of Multivariate Statistical Theory*, section 3.3 (matrix Beta).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

_CHUNK = 2**18
"""Numbers of a Wishart matrix drawn at a time, 2 MiB."""


class SpectrumOverlap(NamedTuple):
    """The shares of an update's top k directions by part of W's spectrum; tensors of shape (parts,), float64."""

    size: Tensor
    """Directions in the part, n, integers."""
    overlap: Tensor
    """Dimensionless, in [0, 1]."""
    null_mean: Tensor
    """Of both shares: n / d."""
    null_sd: Tensor
    """Of ``overlap``."""
    z: Tensor
    """``(overlap - null_mean) / null_sd``; NaN at k = 1 or n = 1, where the null is strongly skewed."""
    p: Tensor
    """How often chance gives at least this overlap; NaN at k > 1 without draws."""
    energy_share: Tensor
    """Dimensionless, in [0, 1]; NaN where the update has no energy."""
    energy_null_sd: Tensor
    """Of ``energy_share``."""
    energy_z: Tensor
    """Its standard score, NaN as ``z`` is."""
    energy_p: Tensor
    """And its p."""


def part_sizes(d: int, p: int, parts: int = 10) -> list[int]:
    """How many directions each part has: ``parts`` runs of W's p, and the d - p that W does not reach.

    Raises
    ------
    ValueError
        If there are not that many directions.

    Examples
    --------
    >>> part_sizes(30, 24, 5)
    [5, 5, 5, 5, 4, 6]
    """
    if not 1 <= parts <= p <= d:
        raise ValueError(f"parts: expected 1 to {p}, the number of W's singular directions, got {parts}.")
    sizes = [p // parts + (part < p % parts) for part in range(parts)]
    return sizes + [d - p] * (d > p)


def part_null(d: int, n: int, weights: Tensor) -> tuple[float, float]:
    """Exact mean and standard deviation of a part's share of a random update.

    With weights w_l >= 0 that sum to 1 (1 / k each for ``overlap``)::

        mean = n / d
        var  = 2 n (d - n) / (d² (d + 2)) · (d sum(w²) - 1) / (d - 1)

    Parameters
    ----------
    d, n : int
        Dimension of the space, and of the part.
    weights : Tensor, shape (k,)

    Returns
    -------
    mean, sd : float
        Dimensionless.

    Examples
    --------
    >>> mean, sd = part_null(100, 10, torch.tensor([0.5, 0.5]))
    >>> round(mean, 4), round(sd, 4)
    (0.1, 0.0296)
    """
    squares = float(weights.double().square().sum())
    variance = 2 * n * (d - n) / (d**2 * (d + 2)) * (d * squares - 1) / max(d - 1, 1)
    return n / d, math.sqrt(max(variance, 0.0))


def part_null_draws(d: int, n: int, k: int, *, draws: int = 999, seed: int = 0) -> Tensor:
    """Draws of ``||P u_l||**2``, l = 1 … k, for a Haar frame of k columns and a part of n of d dimensions.

    Parameters
    ----------
    d, n, k : int
        0 <= n <= d and 1 <= k <= d.
    draws, seed : int
        Of a generator of its own.

    Returns
    -------
    Tensor, shape (draws, k)
        Float64, in [0, 1]. The first j columns are the draws of a frame of j.

    Raises
    ------
    ValueError
        If the sizes do not fit.

    Examples
    --------
    >>> shares = part_null_draws(50, 10, 3, draws=4000)
    >>> bool((shares.mean(dim=0) - 0.2).abs().max() < 0.005)
    True
    """
    if not (0 <= n <= d and 1 <= k <= d):
        raise ValueError(f"expected 0 <= n <= d and 1 <= k <= d, got d = {d}, n = {n}, k = {k}.")
    rng = np.random.default_rng(seed)
    found = torch.empty(draws, k, dtype=torch.float64)
    step = max(1, _CHUNK // k**2)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        inside, outside = (_wishart(rng, count, k, df) for df in (n, d - n))
        lower = torch.linalg.cholesky(inside + outside)
        half = torch.linalg.solve_triangular(lower, inside, upper=False)
        gram = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        found[start : start + count] = gram.diagonal(dim1=-2, dim2=-1)
    return found.clamp_(0.0, 1.0)


def spectrum_overlap(
    vectors: Tensor, S: Tensor, basis: Tensor, *, parts: int = 10, null_draws: Mapping[int, Tensor] | None = None
) -> SpectrumOverlap:
    """Shares of an update's top directions in each part of W's singular directions, on one side.

    Parameters
    ----------
    vectors : Tensor, shape (d, k)
        Singular vectors of the update on this side, top k.
    S : Tensor, shape (k,)
        Their singular values.
    basis : Tensor, shape (d, p)
        All singular vectors of W on this side.
    parts : int
    null_draws : mapping of int to Tensor, optional
        From a part's size n to ``part_null_draws(d, n, at least k)``: p for k > 1, at least 1 / (draws + 1).

    Returns
    -------
    SpectrumOverlap
        ``parts`` values each, one more where p < d.

    Raises
    ------
    ValueError
        If the shapes do not fit, or there are fewer singular directions than parts.

    References
    ----------
    Staats, Thamm and Rosenow 2024, arXiv:2410.17770.

    Examples
    --------
    >>> found = spectrum_overlap(torch.eye(10)[:, :2], torch.tensor([2.0, 1.0]), torch.eye(10), parts=5)
    >>> found.overlap.tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0]
    >>> round(float(found.null_mean[0]), 9), bool(found.p.isnan().all())
    (0.2, True)
    """
    if vectors.ndim != 2 or basis.ndim != 2 or vectors.shape[0] != basis.shape[0] or len(S) != vectors.shape[1]:
        raise ValueError(
            "expected vectors (d, k), k singular values and a basis (d, p), "
            f"got {tuple(vectors.shape)}, {len(S)} and {tuple(basis.shape)}."
        )
    (d, p), k = basis.shape, len(S)
    if k == 0:
        raise ValueError("vectors: expected at least one direction, got none.")
    sizes = part_sizes(d, p, parts)
    squares = (vectors.to(basis.device, torch.float64).mT @ basis.double()).mT.square().cpu()
    shares = torch.stack([run.sum(dim=0) for run in torch.split(squares, sizes[:parts])])
    if d > p:
        shares = torch.cat([shares, (1 - shares.sum(dim=0, keepdim=True)).clamp(min=0.0)])
    energy = S.double().cpu().square()
    total = float(energy.sum())
    even = torch.full((k,), 1 / k, dtype=torch.float64)
    columns: dict[str, list[float]] = {field: [] for field in SpectrumOverlap._fields}
    for n, share in zip(sizes, shares, strict=True):
        draws = None if null_draws is None or n not in null_draws else null_draws[n][:, :k]
        mean, sd, observed, z, tail = _score(d, n, even, share, draws)
        row = {"size": n, "null_mean": mean, "overlap": observed, "null_sd": sd, "z": z, "p": tail}
        values = [math.nan] * 4
        if total > 0:
            _, sd, observed, z, tail = _score(d, n, energy / total, share, draws)
            values = [observed, sd, z, tail]
        row |= dict(zip(SpectrumOverlap._fields[-4:], values, strict=True))
        for field, value in row.items():
            columns[field].append(value)
    sizes_column = torch.tensor(columns.pop("size"), dtype=torch.int64)
    return SpectrumOverlap(
        sizes_column, **{field: torch.tensor(values, dtype=torch.float64) for field, values in columns.items()}
    )


def _score(
    d: int, n: int, weights: Tensor, share: Tensor, draws: Tensor | None
) -> tuple[float, float, float, float, float]:
    """Null mean and sd of a weighted share, the share itself, its z and its p."""
    k = len(weights)
    mean, sd = part_null(d, n, weights)
    observed = float(weights @ share)
    z = (observed - mean) / sd if k > 1 and n > 1 and sd > 0 else math.nan
    if n == d or (k == d and sd == 0):
        return mean, sd, observed, z, 1.0  # one point, which must not hang on rounding
    if k == 1:
        tail = float(special.betaincc(n / 2, (d - n) / 2, min(max(observed, 0.0), 1.0)))
    elif draws is None:
        tail = math.nan
    else:
        tail = (1 + int((draws @ weights >= observed).sum())) / (1 + len(draws))
    return mean, sd, observed, z, tail


def _wishart(rng: np.random.Generator, draws: int, k: int, df: int) -> Tensor:
    """``X @ X.T`` for Gaussian X (k, df), by Bartlett's triangular factor where df >= k."""
    if df < k:
        factor = rng.standard_normal((draws, k, df))
    else:
        factor = np.tril(rng.standard_normal((draws, k, k)), -1)
        factor[:, range(k), range(k)] = np.sqrt(rng.chisquare(df - np.arange(k), size=(draws, k)))
    found = torch.from_numpy(factor)
    return found @ found.mT
