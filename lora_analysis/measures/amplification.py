"""What does ΔW amplify? The base matrix W seen in the singular directions of the update.

Conventions
-----------
``weight`` is W, (d_out, d_in), as in ``torch.nn.Linear.weight``; ``ΔW = U @ diag(S) @ V.T``, S descending.
``G = U.T @ W @ V``, so ``G[:k, :k]`` is W projected on the top k directions of ΔW (the paper writes
``UᵀWVᵀ``, its V being transposed). At k, ΔW means its best rank-k part ΔW_k in every number. All numbers are
float64 whatever the dtype of W. Where W = 0, what divides by W is NaN.

G and the spectrum of W come from ``weight``; what chance alone gives is in ``projection_null``.

Measures
--------
``amplification`` (every figure at every k), ``gain_split`` and ``gains_of``, ``sign_p``; the closed forms
``amplification_factor``, ``amplification_null``, ``projected_null_rms``, ``gain``, ``ceiling_fraction``, which also
take the numbers printed in a paper.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3 (table 7) and appendix H.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

from lora_analysis.measures.projection_null import projection_null
from lora_analysis.measures.weight import WeightSpectrum, weight_norm, weight_rows
from lora_analysis.update import Svd


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

    ``amplification`` alone means little: for random directions it falls with k as ``1 / k``, and theirs is the
    larger one wherever the gain exceeds 1. Compare updates by ``gain`` and ``ceiling_fraction`` at equal k; the
    sign, which a norm cannot see, is in ``signed_positive`` and ``cosine``.

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
    >>> from lora_analysis.measures.weight import projected_weight, weight_spectrum
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
    rows = weight_rows(weight, svd)
    shape = (weight.shape[0], weight.shape[1])
    return gains_of(float(rows.norm()), float((rows @ svd.V.double()).norm()), weight_norm(weight), len(svd.S), shape)


def gains_of(
    one_sided: float, projected: float, norm_base: float, k: int, shape: tuple[int, int]
) -> tuple[float, float]:
    """``gain_split`` of the norms of ``U.T @ W``, ``U.T @ W @ V`` and W."""
    return (
        _ratio(one_sided, norm_base * math.sqrt(k / shape[0])),
        _ratio(projected, one_sided * math.sqrt(k / shape[1])),
    )


def sign_p(signed_positive: float, k: int) -> float:
    """Two-sided exact p of the number of positive ``g_l``; each is positive or negative alike by chance.

    Independently so: turning the sign of any u_l leaves the law of random directions as it is.

    Parameters
    ----------
    signed_positive : float
        Share of the k that is positive.
    k : int

    Returns
    -------
    float
        In (0, 1]; at least 2**(1 - k).

    Examples
    --------
    >>> sign_p(1.0, 4), sign_p(0.5, 4)
    (0.125, 1.0)
    """
    positive = round(signed_positive * k)
    # Twice a tail of the binomial law, which is symmetric.
    return min(1.0, 2 * float(special.bdtr(min(positive, k - positive), k, 0.5)))


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


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan
