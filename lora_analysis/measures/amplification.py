"""What does ΔW amplify? The base matrix W seen in the singular directions of the update.

Conventions
-----------
``weight`` is W, (d_out, d_in), as in ``torch.nn.Linear.weight``; ``ΔW = U @ diag(S) @ V.T``, S descending.
``G = U.T @ W @ V``, so ``G[:k, :k]`` is W projected on the top k directions of ΔW (the paper writes
``UᵀWVᵀ``, its V being transposed). At k, ΔW means its best rank-k part ΔW_k in every number. The null is
"U and V have nothing to do with W": independent Haar-distributed (uniformly random) orthonormal frames.
All numbers are float64 whatever the dtype of W. Where W = 0, what divides by W is NaN.

Measures
--------
``projected_weight`` (G), ``weight_spectrum``, ``amplification`` (every figure at every k), ``gain_split``;
the closed forms ``amplification_factor``, ``amplification_null``, ``projected_null_rms``, ``gain``,
``ceiling_fraction``, which also take the numbers printed in a paper; the null's exact mean and variance
``projection_null`` and its sampler ``projection_null_draws``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3 (table 7) and appendix H.4. The null is not in the paper: its
moments follow from the second moments of a random projection, its law from the invariance of the Haar
measure and Bartlett's decomposition of the Wishart distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, svds
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.update import Svd

_BLOCK_ROWS = 128
"""Rows of W converted at a time: 128 rows of 4096 float64 numbers stay in the second-level cache."""

_DENSE_SIDE = 1024
"""Smaller side of W up to which its whole spectrum is computed (0.16 s there) rather than the top."""

_RESIDUAL = 1e-5
"""Largest residual bound, relative to its singular value, accepted from float32 products with W."""

_PROBES = 8
"""Hutchinson probes for the fourth moment of the spectrum that was not computed."""

_CHUNK = 2**18
"""Gaussian numbers held at a time while drawing from the null: 2 MiB stay in cache, 16 take 1.3 times as
long."""

_NON_FINITE = "the base weight holds NaN or infinities, so nothing can be projected on it."


@dataclass(frozen=True, slots=True, eq=False)
class WeightSpectrum:
    """The singular values of W that are needed, and two moments of all of them.

    Parameters
    ----------
    S : Tensor, shape (K,)
        The largest singular values, descending, float64; all min(d_out, d_in) if ``complete``.
    bound : float
        Some singular value of W lies within ``bound`` of each ``S[l]``; in the unit of W. It is a residual:
        that they are the *largest* is the solver's promise, not part of the bound.
    norm : float
        Frobenius norm of W.
    fourth_moment : float
        ``sum(sigma**4) = ||W.T @ W||_F**2``; estimated where the spectrum is not complete.
    complete : bool
        Whether S is the whole spectrum.
    """

    S: Tensor
    bound: float
    norm: float
    fourth_moment: float
    complete: bool


class Amplification(NamedTuple):
    """The figures of ``amplification``, each a float64 Tensor of shape (len(ks),)."""

    norm_update: Tensor
    """``||ΔW_k||_F``."""
    norm_base: Tensor
    """``||W||_F``."""
    projected: Tensor
    """``||U_k.T @ W @ V_k||_F``: how much of W lies in the directions of ΔW_k."""
    projected_top: Tensor
    """``sqrt(sum(sigma_l(W)**2 for l <= k))``: the most that k directions of W can hold."""
    projected_null_rms: Tensor
    """``projected`` of random directions, root mean square: ``||W||_F * k / sqrt(d_out * d_in)``."""
    amplification: Tensor
    """``norm_update / projected``; infinite where ΔW_k lies outside W."""
    amplification_null: Tensor
    """``norm_update / projected_null_rms``: the factor that random directions would have."""
    gain: Tensor
    """``projected / projected_null_rms``; 1 by chance."""
    z: Tensor
    """Standard score of ``projected**2`` under the null; NaN at k = 1, where the null is too skewed."""
    p: Tensor
    """Upper-tail Monte Carlo p-value of ``projected``; NaN where no draws were given."""
    ceiling_fraction: Tensor
    """``projected / projected_top``, in [0, 1]."""
    signed_positive: Tensor
    """Share of ``g_l = u_l.T @ W @ v_l > 0`` among l <= k: amplified, not suppressed; 1/2 by chance."""
    cosine: Tensor
    """``<ΔW_k, W> / (||ΔW_k|| ||W||)``, in [-1, 1]; chance sd 1 / sqrt(d_out * d_in)."""


def projected_weight(weight: Tensor, svd: Svd) -> Tensor:
    """W in the singular directions of an update, ``G = U.T @ W @ V``.

    W is read once, in blocks of rows (in the order it is stored) converted to float64: g_l is about
    ``||W||_F / d``, small against the terms it sums, and half-precision products would lose it. No copy of
    W is made.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
        In any floating dtype and any memory layout.
    svd : Svd
        Of the update, k triples.

    Returns
    -------
    Tensor, shape (k, k)
        Float64, in the unit of W; ``G[l, l]`` is positive where ΔW adds to what W does in direction l.

    Raises
    ------
    BaseWeightsError
        If W does not have the update's shape, or holds NaN or infinities.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3.

    Examples
    --------
    >>> weight = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5]))
    >>> third = torch.eye(4, dtype=torch.float64)[:, 2:3]
    >>> projected_weight(weight, Svd(third, torch.tensor([2.0]), third.mT)).tolist()
    [[1.0]]
    """
    _require_weight(weight)
    _require_shape(weight, svd)
    U = svd.U.to(weight.device, torch.float64)
    G = U.mT @ _times(weight, svd.V.to(weight.device, torch.float64))
    if not bool(G.isfinite().all()):
        raise BaseWeightsError(_NON_FINITE)
    return G.to(svd.S.device)


def weight_spectrum(weight: Tensor, k: int, *, seed: int = 0) -> WeightSpectrum:
    """The top k singular values of W with a residual bound, and the moments that the nulls need.

    Up to min(d_out, d_in) = 1024, or where k exceeds a quarter of it, the whole spectrum by LAPACK. Beyond,
    Lanczos (ARPACK, float32 products with W, repeated in float64 unless the residuals are within 1e-5 of
    the values), then one Rayleigh-Ritz step in float64, whose error in the values is of second order. The
    fourth moment of the rest is Hutchinson's estimate ``E ||R.T @ R @ g||**2``, R being W without its top.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    k : int
        How many values at least. More of them make ``projection_null_draws`` closer to exact.
    seed : int
        Of the start vector and the probes.

    Returns
    -------
    WeightSpectrum
        ``bound`` is ``max sqrt((||W v - s u||**2 + ||W.T u - s v||**2) / 2)`` over the k triples, from
        residuals computed in float64; of the order of rounding where the spectrum is complete.

    Raises
    ------
    ValueError
        If k < 1.
    BaseWeightsError
        If W holds NaN or infinities.

    References
    ----------
    The bound: Parlett, *The Symmetric Eigenvalue Problem*, theorem 4.5.1, on ``[[0, W], [W.T, 0]]``.

    Examples
    --------
    >>> spectrum = weight_spectrum(torch.diag(torch.tensor([3.0, -4.0])), 1)
    >>> spectrum.S.tolist(), spectrum.norm, round(spectrum.fourth_moment, 9), spectrum.complete
    ([4.0, 3.0], 5.0, 337.0, True)
    """
    _require_weight(weight)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}.")
    norm = weight_norm(weight)
    # The spectrum is that of the transpose; ARPACK iterates on the smaller side, which is then V's.
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    p = tall.shape[1]
    if norm == 0:
        return WeightSpectrum(torch.zeros(p, dtype=torch.float64), 0.0, 0.0, 0.0, complete=True)
    if p > _DENSE_SIDE and 4 * k <= p:
        for dtype in (torch.float32, torch.float64):
            spectrum = _top_spectrum(tall, k, norm, dtype, seed)
            if spectrum is not None:
                return spectrum
    S = torch.linalg.svdvals(weight.double())
    bound = max(weight.shape) * torch.finfo(torch.float64).eps * float(S[0])
    return WeightSpectrum(S.cpu(), bound, norm, float((S**4).sum()), complete=True)


def amplification(
    G: Tensor,
    S: Tensor,
    spectrum: WeightSpectrum,
    shape: tuple[int, int],
    ks: Sequence[int],
    *,
    null_draws: Tensor | None = None,
) -> Amplification:
    """Everything section 7.3 asks of an update, at every truncation k, each figure with its null.

    ``amplification`` alone means little: random directions have a *larger* one, and it falls with k as
    ``1 / k``. Compare updates by ``gain`` and ``ceiling_fraction`` at equal k; the sign, which a norm cannot
    see, is in ``signed_positive`` and ``cosine``.

    Parameters
    ----------
    G : Tensor, shape (r, r)
        ``projected_weight`` of the update.
    S : Tensor, shape (r,)
        Singular values of the update. Directions beyond its numerical rank are arbitrary, and so are the
        figures there.
    spectrum : WeightSpectrum
        Of W, at least max(ks) values.
    shape : (int, int)
        (d_out, d_in).
    ks : sequence of int
        Truncations, each in 1 … r.
    null_draws : Tensor, shape (draws, >= max(ks)), optional
        From ``projection_null_draws``; without them ``p`` is NaN.

    Returns
    -------
    Amplification
        Tensors of shape (len(ks),). The four norms are in the unit of the weights, the rest dimensionless.
        Where W = 0, its norms and projections are 0 and everything else is NaN.

    Raises
    ------
    ValueError
        If a k is outside 1 … r, or beyond the values in ``spectrum`` or the columns of ``null_draws``.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3 and appendix H.4.

    Examples
    --------
    >>> weight = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5]))
    >>> third = torch.eye(4, dtype=torch.float64)[:, 2:3]
    >>> svd = Svd(third, torch.tensor([2.0]), third.mT)
    >>> figures = amplification(
    ...     projected_weight(weight, svd), svd.S, weight_spectrum(weight, 1), weight.shape, [1]
    ... )
    >>> figures.amplification.item(), round(figures.gain.item(), 7), round(figures.ceiling_fraction.item(), 7)
    (2.0, 0.3559953, 0.1)
    """
    G, S = G.double(), S.double()
    if G.shape != (len(S), len(S)):
        raise ValueError(f"expected G (r, r) and S (r,), got {tuple(G.shape)} and {tuple(S.shape)}.")
    for k in ks:
        if not 1 <= k <= len(S):
            raise ValueError(f"ks: expected truncations from 1 to {len(S)}, got {k}.")
        if k > len(spectrum.S):
            raise ValueError(
                f"ks: expected at most {len(spectrum.S)}, the singular values of W that are known, got {k}. "
                "Pass a larger k to weight_spectrum."
            )
        if null_draws is not None and k > null_draws.shape[1]:
            raise ValueError(f"null_draws: expected at least {k} columns, got {null_draws.shape[1]}.")
    rows = [_figures(G[:k, :k], S[:k], spectrum, shape, null_draws) for k in ks]
    return Amplification(
        **{name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in Amplification._fields}
    )


def gain_split(weight: Tensor, svd: Svd) -> tuple[float, float]:
    """The gain as a product: that of the output directions, and of the input directions given those.

    ``gain_out = ||U.T @ W||_F / (||W||_F sqrt(k / d_out))`` and
    ``gain_in = ||U.T @ W @ V||_F / (||U.T @ W||_F sqrt(k / d_in))``; their product is ``gain``. While A is
    still close to its random initialisation ``gain_in`` is about 1 and all alignment comes from B.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    svd : Svd
        Of the update, k triples.

    Returns
    -------
    gain_out : float
    gain_in : float
        Dimensionless, 1 by chance; NaN where W, or its part in the directions of U, is 0.

    Raises
    ------
    BaseWeightsError
        If W does not have the update's shape, or holds NaN or infinities.

    Examples
    --------
    >>> first = torch.eye(4, dtype=torch.float64)[:, :1]
    >>> gain_split(torch.eye(4), Svd(first, torch.tensor([1.0]), first.mT))
    (1.0, 2.0)
    """
    _require_weight(weight)
    _require_shape(weight, svd)
    d_out, d_in = weight.shape
    k = len(svd.S)
    norm = weight_norm(weight)
    rows = _times(weight.mT, svd.U.to(weight.device, torch.float64)).mT
    projected = float((rows @ svd.V.to(weight.device, torch.float64)).norm())
    one_sided = float(rows.norm())
    return (
        _ratio(one_sided, norm * math.sqrt(k / d_out)),
        _ratio(projected, one_sided * math.sqrt(k / d_in)),
    )


def amplification_factor(norm_update: float, projected: float) -> float:
    """The paper's amplification factor, ``||ΔW||_F / ||U.T @ W @ V||_F``.

    Parameters
    ----------
    norm_update, projected : float

    Returns
    -------
    float
        Dimensionless, >= 0; infinite where only ``projected`` is 0, NaN where both are.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, appendix H.4.

    Examples
    --------
    >>> round(amplification_factor(6.91, 0.32), 2)  # table 7, r = 4
    21.59
    """
    if projected == 0 and norm_update > 0:
        return math.inf
    return _ratio(norm_update, projected)


def projected_null_rms(norm_base: float, k: int, shape: tuple[int, int]) -> float:
    """Root mean square of ``||U.T @ W @ V||_F`` over random directions, ``||W||_F * k / sqrt(d_out * d_in)``.

    Parameters
    ----------
    norm_base : float
        Frobenius norm of W.
    k : int
        Number of directions on each side.
    shape : (int, int)
        (d_out, d_in).

    Returns
    -------
    float
        In the unit of W: the "Random" column of the paper's table 7, in closed form.

    Examples
    --------
    >>> round(projected_null_rms(61.95, 4, (12288, 12288)), 4)  # table 7 prints 0.02
    0.0202
    """
    return norm_base * k / math.sqrt(shape[0] * shape[1])


def amplification_null(norm_update: float, norm_base: float, k: int, shape: tuple[int, int]) -> float:
    """The amplification factor of random directions, ``norm_update / projected_null_rms``.

    Parameters
    ----------
    norm_update, norm_base : float
        Frobenius norms of ΔW_k and W.
    k : int
    shape : (int, int)
        (d_out, d_in).

    Returns
    -------
    float
        Dimensionless; NaN where W is 0.

    Examples
    --------
    >>> round(amplification_null(6.91, 61.95, 4, (12288, 12288)), 1)  # the paper observes 21.5
    342.7
    """
    return _ratio(norm_update, projected_null_rms(norm_base, k, shape))


def gain(projected: float, norm_base: float, k: int, shape: tuple[int, int]) -> float:
    """How much more of W the directions of ΔW hold than random ones, ``projected / projected_null_rms``.

    Parameters
    ----------
    projected : float
        ``||U_k.T @ W @ V_k||_F``.
    norm_base : float
        Frobenius norm of W.
    k : int
    shape : (int, int)
        (d_out, d_in).

    Returns
    -------
    float
        Dimensionless, >= 0, 1 by chance; NaN where W is 0. Equals amplification_null / amplification.

    Examples
    --------
    >>> round(gain(0.32, 61.95, 4, (12288, 12288)), 1)
    15.9
    """
    return _ratio(projected, projected_null_rms(norm_base, k, shape))


def ceiling_fraction(projected: float, projected_top: float) -> float:
    """``projected`` as a share of the most that k directions can hold, by Ky Fan's inequality.

    Parameters
    ----------
    projected : float
        ``||U_k.T @ W @ V_k||_F``.
    projected_top : float
        ``sqrt(sum(sigma_l(W)**2 for l <= k))``.

    Returns
    -------
    float
        Dimensionless, in [0, 1]; NaN where W is 0.

    Examples
    --------
    >>> round(ceiling_fraction(0.32, 21.67), 4)  # table 7, r = 4
    0.0148
    """
    return _ratio(projected, projected_top)


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


def weight_norm(weight: Tensor) -> float:
    """Frobenius norm of W in float64, without a copy of W.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)

    Returns
    -------
    float
        In the unit of W.

    Raises
    ------
    BaseWeightsError
        If W holds NaN or infinities.

    Examples
    --------
    >>> weight_norm(torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    6.0
    """
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in _row_blocks(weight)))
    if not math.isfinite(norm):
        raise BaseWeightsError(_NON_FINITE)
    return norm


def _figures(
    G: Tensor, S: Tensor, spectrum: WeightSpectrum, shape: tuple[int, int], null_draws: Tensor | None
) -> dict[str, float]:
    """The figures at k = len(S), by name."""
    k = len(S)
    norm_update, projected = float(S.norm()), float(G.norm())
    projected_top = float(spectrum.S[:k].norm())
    if spectrum.norm == 0:
        norms = {"norm_update": norm_update, "norm_base": 0.0, "projected": projected}
        undefined = dict.fromkeys(Amplification._fields, math.nan)
        return undefined | norms | {"projected_top": 0.0, "projected_null_rms": 0.0}
    mean, variance = projection_null(shape, k, k, spectrum.norm**2, spectrum.fourth_moment)
    diagonal = G.diagonal()
    z = p = math.nan
    if k > 1 and variance > 0:
        z = (projected**2 - mean) / math.sqrt(variance)
    if null_draws is not None:
        reached = int((null_draws[:, k - 1] >= projected**2).sum())
        # A null without variance (k = d_out = d_in) is one point, which every update hits: p is 1, and
        # must not hang on the rounding of that point.
        p = (1 + reached) / (1 + len(null_draws)) if variance > 0 else 1.0
    return {
        "norm_update": norm_update,
        "norm_base": spectrum.norm,
        "projected": projected,
        "projected_top": projected_top,
        "projected_null_rms": projected_null_rms(spectrum.norm, k, shape),
        "amplification": amplification_factor(norm_update, projected),
        "amplification_null": amplification_null(norm_update, spectrum.norm, k, shape),
        "gain": gain(projected, spectrum.norm, k, shape),
        "z": z,
        "p": p,
        "ceiling_fraction": ceiling_fraction(projected, projected_top),
        "signed_positive": float((diagonal > 0).sum()) / k,
        "cosine": _ratio(float(S @ diagonal), norm_update * spectrum.norm),
    }


def _top_spectrum(tall: Tensor, k: int, norm: float, dtype: torch.dtype, seed: int) -> WeightSpectrum | None:
    """The top k of a tall W, products with it in ``dtype``; None if Lanczos does not get there."""
    rng = np.random.default_rng(seed)
    p = tall.shape[1]
    matrix = tall.detach().to("cpu", dtype).numpy()
    try:
        _, _, rows = svds(matrix, k=k, v0=rng.standard_normal(p).astype(matrix.dtype))
    except ArpackNoConvergence:
        return None
    basis = torch.linalg.qr(torch.from_numpy(rows.T.astype(np.float64)).to(tall.device)).Q
    probes = torch.from_numpy(rng.choice([-1.0, 1.0], size=(p, _PROBES))).to(tall.device)
    probes -= basis @ (basis.mT @ probes)
    products = _times(tall, torch.hstack([basis, probes]))
    U, S, Zh = torch.linalg.svd(products[:, :k], full_matrices=False)
    V = basis @ Zh.mT
    back = _times(tall.mT, torch.hstack([U, products[:, k:]]))
    left, right = products[:, :k] @ Zh.mT - U * S, back[:, :k] - V * S
    bounds = ((left.square().sum(dim=0) + right.square().sum(dim=0)) / 2).sqrt()
    if dtype == torch.float32 and bool((bounds > _RESIDUAL * S).any()):
        return None
    curvature = back[:, k:] - V @ (V.mT @ back[:, k:])
    energy = max(norm**2 - float(S.square().sum()), 0.0)
    # What p - k values of this energy and none above S[-1] can have, whatever the probes say.
    rest = float(curvature.square().sum(dim=0).mean())
    rest = min(max(rest, energy**2 / (p - k)), energy * float(S[-1]) ** 2)
    fourth = float((S**4).sum()) + rest
    return WeightSpectrum(S.cpu(), float(bounds.max()), norm, fourth, complete=False)


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


def _row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in float64, in one reused buffer: use each before asking for the next."""
    weight = weight.detach()
    rows, columns = weight.shape
    buffer = torch.empty(min(rows, _BLOCK_ROWS), columns, dtype=torch.float64, device=weight.device)
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        yield slice(start, stop), buffer[: stop - start].copy_(weight[start:stop])


def _times(weight: Tensor, X: Tensor) -> Tensor:
    """``weight @ X`` in float64, reading the weight in the order it lies in memory."""
    if weight.stride(0) >= weight.stride(1):
        result = torch.empty(weight.shape[0], X.shape[1], dtype=torch.float64, device=weight.device)
        for rows, block in _row_blocks(weight):
            torch.matmul(block, X, out=result[rows])
        return result
    # Gathering the rows of a transposed view takes six times as long as reading it as it lies.
    turned = torch.zeros(X.shape[1], weight.shape[0], dtype=torch.float64, device=weight.device)
    for columns, block in _row_blocks(weight.mT):
        turned.addmm_(X[columns].mT, block)
    return turned.mT


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan


def _require_weight(weight: Tensor) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}.")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected floating-point numbers, got {weight.dtype}. Dequantise it first.")


def _require_shape(weight: Tensor, svd: Svd) -> None:
    shape = (svd.U.shape[0], svd.Vh.shape[1])
    if tuple(weight.shape) != shape:
        raise BaseWeightsError(
            f"expected a base weight of the update's shape {shape}, got {tuple(weight.shape)}. "
            "Check that it belongs to this module and is not stored transposed."
        )
