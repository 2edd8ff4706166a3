"""How many directions an update uses, from its singular values alone.

Conventions
-----------
``S`` is the spectrum of one update: shape (k,), nonnegative, descending as ``Update.singular_values`` gives
it (the order does not matter; zeros may pad it). Every measure is computed in float64 on ``S / S.max()``, so
it does not depend on scale and neither overflows nor underflows. An all-zero or empty spectrum has no shape:
NaN for the real-valued measures, 0 for the integer ones.

With p = s²/Σs² the energy shares, four of the measures are exponentials of Rényi entropies of p, of orders
∞, 2, 1 and 1/2, and so are ordered::

    1 <= stable_rank <= participation_ratio <= effective_rank_energy <= nuclear_ratio <= #{s > 0}
    effective_rank_energy <= effective_rank <= #{s > 0}

All are equal when the nonzero singular values are.

Measures
--------
``stable_rank``, ``participation_ratio``, ``effective_rank``, ``effective_rank_energy``, ``nuclear_ratio``,
``energy_rank``, ``numerical_rank``.

References
----------
Roy and Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.
Rudelson and Vershynin, *Sampling from large matrices*, arXiv:math/0503442 (stable rank, as numerical rank).
Golub and Van Loan, *Matrix Computations*, section 5.4 (rank in floating point).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TIE = 1e-12
"""Relative slack of energy thresholds, so that (.9, .1) has k90 = 1 whatever the rounding of 0.9."""

_DOUBLE_EPS = 2.0**-52
"""Spacing of float64 at 1."""


def stable_rank(S: Tensor) -> float:
    """Energy of the spectrum in units of its largest value.

    ``sum(S**2) / S[0]**2 = ‖ΔW‖_F² / ‖ΔW‖₂²``.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.

    Returns
    -------
    float
        Dimensionless, in [1, rank]; NaN if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    References
    ----------
    Rudelson and Vershynin 2005, arXiv:math/0503442.

    Examples
    --------
    >>> stable_rank(torch.tensor([4.0, 3.0]))
    1.5625
    """
    relative = _relative_values(S)
    return float(relative.square().sum()) if relative.numel() else math.nan


def participation_ratio(S: Tensor) -> float:
    """Number of equal singular values that would share the energy as unevenly.

    ``sum(S**2)**2 / sum(S**4)``, the inverse of the expected energy share of a direction drawn by energy.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.

    Returns
    -------
    float
        Dimensionless, in [1, rank]; NaN if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    Examples
    --------
    >>> round(participation_ratio(torch.tensor([4.0, 3.0])), 7)
    1.8545994
    """
    energies = _relative_values(S).square()
    if not energies.numel():
        return math.nan
    return float(energies.sum().square() / energies.square().sum())


def effective_rank(S: Tensor) -> float:
    """Exponential of the entropy of the singular values (Roy and Vetterli).

    ``exp(-sum(p * log(p)))`` with ``p = S / sum(S)``: of the values, not of their squares. The variant on
    energies is ``effective_rank_energy``; papers use both under this name.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.

    Returns
    -------
    float
        Dimensionless, in [1, rank]; NaN if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    References
    ----------
    Roy and Vetterli, EUSIPCO 2007.

    Examples
    --------
    >>> round(effective_rank(torch.tensor([4.0, 3.0])), 6)
    1.979626
    """
    return _exponential_entropy(_relative_values(S))


def effective_rank_energy(S: Tensor) -> float:
    """Exponential of the entropy of the energies.

    ``exp(-sum(p * log(p)))`` with ``p = S**2 / sum(S**2)``.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.

    Returns
    -------
    float
        Dimensionless, in [1, effective_rank]; NaN if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    Examples
    --------
    >>> round(effective_rank_energy(torch.tensor([4.0, 3.0])), 7)
    1.9220997
    """
    return _exponential_entropy(_relative_values(S).square())


def nuclear_ratio(S: Tensor) -> float:
    """Square of the nuclear norm over the square of the Frobenius norm.

    ``sum(S)**2 / sum(S**2)``, the exponential of the Rényi entropy of order 1/2 of the energies: the
    measure of this module that weighs small values most.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.

    Returns
    -------
    float
        Dimensionless, in [1, rank]; NaN if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    Examples
    --------
    >>> round(nuclear_ratio(torch.tensor([4.0, 3.0])), 12)
    1.96
    """
    relative = _relative_values(S)
    if not relative.numel():
        return math.nan
    return float(relative.sum().square() / relative.square().sum())


def energy_rank(S: Tensor, tau: float) -> int:
    """Number of directions that hold a share tau of the energy.

    ``min{k : sum(S[:k]**2) >= tau * (1 - 1e-12) * sum(S**2)}``; k90 is ``energy_rank(S, 0.9)``. The best
    rank-k approximation then has relative error ``‖ΔW - ΔW_k‖_F / ‖ΔW‖_F <= sqrt(1 - tau)``.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values.
    tau : float
        Share of the energy, in (0, 1].

    Returns
    -------
    int
        A count, in 1 .. rank; 0 if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers, or tau is out of range.

    Examples
    --------
    >>> energy_rank(torch.tensor([4.0, 3.0]), 0.6), energy_rank(torch.tensor([4.0, 3.0]), 0.9)
    (1, 2)
    """
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau: expected a share of the energy in (0, 1], got {tau}.")
    held = _relative_values(S).square().cumsum(0)
    if not held.numel():
        return 0
    return int((held < tau * (1.0 - _TIE) * held[-1]).sum()) + 1


def numerical_rank(S: Tensor, shape: tuple[int, int]) -> int:
    """Number of singular values above the rounding error of a float64 decomposition.

    ``#{S > S[0] * max(d_out, d_in) * 2**-52}``. It says what float64 can tell from zero, not what the file's
    own precision can: for that, see ``precision.resolved_rank``.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values, computed in float64.
    shape : (int, int)
        (d_out, d_in) of the matrix they belong to.

    Returns
    -------
    int
        A count, in 0 .. k; 0 if all values are zero.

    Raises
    ------
    ValueError, TypeError
        If ``S`` is not a vector of finite, nonnegative floating-point numbers.

    References
    ----------
    Golub and Van Loan, *Matrix Computations*, section 5.4; the default of ``numpy.linalg.matrix_rank``.

    Examples
    --------
    >>> numerical_rank(torch.tensor([1.0, 1e-3, 1e-17], dtype=torch.float64), (64, 32))
    2
    """
    return int((_relative_values(S) > max(shape) * _DOUBLE_EPS).sum())


def _relative_values(S: Tensor) -> Tensor:
    """``S / S.max()`` in float64, descending; empty if nothing is left to divide by."""
    if S.ndim != 1:
        raise ValueError(f"S: expected a vector of singular values, got shape {tuple(S.shape)}.")
    if not S.is_floating_point():
        raise TypeError(f"S: expected floating-point numbers, got {S.dtype}.")
    values = S.detach().double()
    wrong = ~(values.isfinite() & (values >= 0))
    if bool(wrong.any()):
        raise ValueError(
            f"S: expected finite, nonnegative singular values, got {float(values[wrong][0])}. "
            "Check the update for NaN and infinities."
        )
    if not values.numel() or float(values.max()) == 0.0:
        return values[:0]
    return (values / values.max()).sort(descending=True).values


def _exponential_entropy(weights: Tensor) -> float:
    """``exp(H(weights / sum(weights)))``, zeros counting nothing."""
    if not weights.numel():
        return math.nan
    return float(torch.special.entr(weights / weights.sum()).sum().exp())
