"""What the rounding of stored factors does to a spectrum: error bars and the floor below which it is noise.

Conventions
-----------
``ΔW = scale · up @ down`` with ``b_j`` the columns of ``up`` and ``a_j`` the rows of ``down``. Every stored
entry x carries an independent error of rms ``eps · |x|`` (``Update.eps``: 1.66e-3 for bfloat16, 2.07e-4 for
float16), so the noise depends on how the product is spread over its factors: it is large where big columns
cancel. Scaling column j of ``up`` by a power of two and row j of ``down`` by its inverse changes neither
the errors nor any formula here, for ``b_j`` and ``a_j`` only occur in the products ``b_j a_j``.

Measures
--------
``noise_floors``, ``resolved_rank``, ``singular_value_sd``.

References
----------
First-order perturbation of singular values: Stewart and Sun, *Matrix Perturbation Theory*, section IV.4.
The floors are derived here from the expected squared norm of the error that falls outside the leading
singular vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_analysis.update import Svd

RESOLVED = 3.0
"""Singular values above this many floors are told from storage noise."""


def noise_floors(r_up: Tensor, r_down: Tensor, *, scale: float, eps: float) -> Tensor:
    """Storage noise that reaches each singular value: below its floor a stored one is inflated.

    With P_U and P_V the projections off the first k-1 singular vectors, the error outside them has the
    expected squared norm ``eps² scale² (sum_j |b_j|² |P_V a_j|² + sum_j |P_U b_j|² |a_j|²)``; ``floor_k`` is
    the root of its mean over the singular values that are left, k .. min(r, d_out, d_in).

    All of it follows from the triangular factors of ``up`` and ``down.T``, in O(r³) and without the long
    sides: ``noise_floors(*update.core(), scale=update.scale, eps=update.eps)``.

    Parameters
    ----------
    r_up : Tensor, shape (min(d_out, r), r)
        Columns ``b_j``, turned into the space the columns of ``up`` span.
    r_down : Tensor, shape (min(d_in, r), r)
        Columns ``a_j``, likewise.
    scale : float
        Of the update.
    eps : float
        Relative rms error of the stored entries.

    Returns
    -------
    Tensor, shape (min(r, d_out, d_in),)
        In units of the singular values, nonnegative; NaN if ``scale`` or ``eps`` is. Not below the rounding
        of float64 itself, ``r · 2**-52 · |scale| sum_j |b_j| |a_j|``, so that exact zeros are not resolved.

    Raises
    ------
    ValueError
        If the factors are not matrices with r columns each, or ``eps`` is negative.

    Notes
    -----
    Projecting off k - 1 vectors also takes the share (k - 1)/d from the errors on a side of length d. Where
    r > d, the factors tell d and the share is taken off; where r <= d they do not, and the floors are too high
    by that much, which matters only where r is close to d.

    Examples
    --------
    >>> b, a = torch.tensor([[1.0, 0.0], [0.0, 0.25]]), torch.eye(2)
    >>> [round(floor, 6) for floor in noise_floors(b, a, scale=1.0, eps=0.01).tolist()]
    [0.010308, 0.003536]
    """
    if r_up.ndim != 2 or r_down.ndim != 2 or r_up.shape[1] != r_down.shape[1]:
        raise ValueError(
            f"r_up, r_down: expected matrices with r columns each, got shapes {tuple(r_up.shape)} and "
            f"{tuple(r_down.shape)}. Pass both from LowRankUpdate.core()."
        )
    if eps < 0:
        raise ValueError(f"eps: expected a relative error, nonnegative, got {eps}.")
    b, a = r_up.double(), r_down.double()
    k, r = min(b.shape[0], a.shape[0]), b.shape[1]
    # Full matrices: off the leading vectors, the complement counts as much as the trailing vectors.
    U, _, Vh = torch.linalg.svd(b @ a.mT, full_matrices=True)
    outside_b = _reverse_cumulative((U.mT @ b).square())[:k]
    outside_a = _reverse_cumulative((Vh @ a).square())[:k]
    b_energies, a_energies = b.square().sum(0), a.square().sum(0)
    energy = _kept_share(b, k) * (outside_a @ b_energies) + _kept_share(a, k) * (outside_b @ a_energies)
    left = torch.arange(k, 0, -1, device=energy.device)
    floors = eps * abs(scale) * (energy / left).sqrt()
    arithmetic = r * torch.finfo(torch.float64).eps * abs(scale) * (b_energies.sqrt() @ a_energies.sqrt())
    return torch.maximum(floors, arithmetic)


def resolved_rank(S: Tensor, floors: Tensor) -> int:
    """Number of singular values that stand clear of storage noise.

    ``#{S[k] >= 3 * floors[k]}``, zeros never counted.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values, descending.
    floors : Tensor, shape (k,)
        From ``noise_floors``, in the same units.

    Returns
    -------
    int
        A count, in 0 .. k.

    Raises
    ------
    ValueError
        If the shapes differ, or the floors are NaN: where the precision of storage is unknown, so is this.

    Examples
    --------
    >>> resolved_rank(torch.tensor([1.0, 0.1, 0.002]), torch.tensor([0.001, 0.001, 0.001]))
    2
    """
    if S.ndim != 1 or S.shape != floors.shape:
        raise ValueError(
            f"S, floors: expected vectors of one length, got shapes {tuple(S.shape)} and {tuple(floors.shape)}."
        )
    if bool(floors.isnan().any()):
        raise ValueError(
            "floors: expected numbers, got NaN. The update's eps or scale is unknown, and its resolved rank too."
        )
    clear = S.double() / floors.double() >= RESOLVED  # inf above a floor of 0, NaN and so False for 0/0
    return int(clear.sum())


def singular_value_sd(svd: Svd, up: Tensor, down: Tensor, *, scale: float, eps: float) -> Tensor:
    """First-order standard deviation of each singular value under rounding of the stored factors.

    ``sd_k = eps |scale| sqrt((u_k²)ᵀ (up²) (down v_k)² + ((upᵀ u_k)²)ᵀ (down²) v_k²)``, squares entrywise:
    how far the stored entries' errors move ``u_kᵀ ΔW v_k``. Good where the gaps to the neighbouring
    singular values are large against the noise; below its floor a value is also inflated, see
    ``noise_floors``.

    Parameters
    ----------
    svd : Svd
        Of the update, k triples.
    up : Tensor, shape (d_out, r)
    down : Tensor, shape (r, d_in)
        The factors.
    scale : float
        Of the update.
    eps : float
        Relative rms error of the stored entries.

    Returns
    -------
    Tensor, shape (k,)
        In units of the singular values, nonnegative; NaN if ``scale`` or ``eps`` is.

    Raises
    ------
    ValueError
        If shapes do not fit or ``eps`` is negative.

    Examples
    --------
    >>> up, down = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 1.0]])
    >>> svd = Svd(*torch.linalg.svd(up @ down, full_matrices=False)).top(1)
    >>> round(float(singular_value_sd(svd, up, down, scale=1.0, eps=0.01)), 6)
    0.028284
    """
    if (svd.U.shape[0], svd.Vh.shape[1]) != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"expected factors (d_out, r) and (r, d_in) of the decomposed update, got {tuple(up.shape)} and "
            f"{tuple(down.shape)} with vectors U {tuple(svd.U.shape)} and Vh {tuple(svd.Vh.shape)}."
        )
    if eps < 0:
        raise ValueError(f"eps: expected a relative error, nonnegative, got {eps}.")
    U, V = svd.U.double(), svd.V.double()
    b, a = up.double(), down.double()
    from_up = (b.square().mT @ U.square()) * (a @ V).square()
    from_down = (a.square() @ V.square()) * (b.mT @ U).square()
    return eps * abs(scale) * (from_up + from_down).sum(0).sqrt()


def _kept_share(factor: Tensor, k: int) -> Tensor | float:
    """Share of the errors of a factor (min(d, r), r) outside the first 0 .. k-1 singular vectors; 1 unless r > d."""
    d, r = factor.shape
    return 1.0 - torch.arange(k, device=factor.device) / d if r > d else 1.0


def _reverse_cumulative(values: Tensor) -> Tensor:
    """Sums of the rows from each one to the last, small terms first."""
    return values.flip(0).cumsum(0).flip(0)
