"""How an update changes the lengths and the directions of the rows, or columns, of the matrix it is added to.

Conventions
-----------
``W`` and ``ΔW`` are (d_out, d_in). With ``axis=1`` the vectors are the rows, one per output, which is what DoRA
is in PEFT; with ``axis=0`` the columns, one per input, which is what the paper calls it. Vector k is ``w_k`` before
and ``w'_k = w_k + d_k`` after, ``m_k`` and ``m'_k`` their lengths. A low-rank update is never formed: lengths and
inner products of its vectors follow from its singular vectors, in one pass over W.

Measures
--------
``magnitude_direction_change``.

References
----------
Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353, section 3.2, eq. 3 and 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.update import LowRankUpdate, Update

_BLOCK = 128
"""Rows or columns of W converted to float64 at a time."""

_CANCELLED = 1e-2
"""``m'² / (m² + ‖d‖²)`` below which the sums have lost digits and the vector is formed."""


class MagnitudeDirection(NamedTuple):
    """How far an update changes lengths and directions: the means, and each vector's own."""

    magnitude_change: float
    """Mean of ``|m'_k - m_k|``, in the unit of W."""
    direction_change: float
    """Mean of ``1 - cos(w_k, w'_k)`` over the vectors that have a direction before and after, dimensionless, in
    [0, 2]; NaN if none has."""
    magnitudes: Tensor
    """Shape (d_out,), or (d_in,) where ``axis`` is 0: ``m_k``."""
    magnitude_changes: Tensor
    """Likewise: ``m'_k - m_k``, positive where the vector grows."""
    direction_changes: Tensor
    """Likewise: ``1 - cos(w_k, w'_k)``, NaN where ``w_k`` or ``w'_k`` is 0 to rounding."""


def magnitude_direction_change(weight: Tensor, update: Update, *, axis: int = 1) -> MagnitudeDirection:
    """Change of the lengths and of the directions of W's rows or columns under ΔW.

    ``m' - m = (2 <w, d> + ‖d‖²) / (m' + m)`` and ``1 - cos = sin² / (1 + cos)`` with
    ``sin² = (‖d‖² - <w, d>² / m²) / m'²``, the part of d across w: neither subtracts what is nearly equal, so both
    are accurate for updates of any size.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
        W, in any floating dtype and memory layout.
    update : Update, shape (d_out, d_in)
        Other kinds than low-rank ones are formed as dense matrices.
    axis : int
        What the lengths run over: 1 gives rows, 0 columns.

    Returns
    -------
    MagnitudeDirection
        In float64, on the device of W. A zero vector of W has length 0 and no direction: its length may change,
        its direction cannot, and it does not count in the mean of directions.

    Raises
    ------
    BaseWeightsError
        If W does not have the update's shape, or holds NaN or infinities.
    UndefinedUpdateError
        If the scale is unknown, or the update holds NaN or infinities.
    ValueError, TypeError
        If ``axis`` is neither 0 nor 1, or W is no matrix of floating-point numbers.

    References
    ----------
    Liu et al. 2024, arXiv:2402.09353, eq. 3 and 4.

    Examples
    --------
    >>> update = LowRankUpdate(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0]]), scale=1.0)
    >>> found = magnitude_direction_change(torch.eye(2), update)
    >>> [round(value, 6) for value in found.magnitude_changes.tolist()]
    [0.0, 0.414214]
    >>> round(found.direction_change, 6)
    0.146447
    """
    _require(weight, update, axis)
    if isinstance(update, LowRankUpdate):
        svd = update.svd()
        left, right = (svd.U * svd.S, svd.Vh) if axis == 1 else (svd.V * svd.S, svd.U.mT)
    else:
        update.norm()  # raises what an unknown scale, NaN or infinities deserve
        left, right = update.dense() if axis == 1 else update.dense().mT, None
    vectors = weight.detach() if axis == 1 else weight.detach().mT
    left = left.to(weight.device)
    right = None if right is None else right.to(weight.device)
    squares, inner = _lengths_and_products(vectors, left, right)
    if not bool(squares.isfinite().all()):
        raise BaseWeightsError("the base weight holds NaN or infinities, so its rows have no lengths.")
    return _changes(vectors, left, right, squares, inner)


def _lengths_and_products(vectors: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """``‖w_k‖²`` and ``<w_k, d_k>`` of rows, with ``d = left @ right`` or ``left``, in one pass over W as it lies."""
    count = vectors.shape[0]
    squares = torch.zeros(count, dtype=torch.float64, device=vectors.device)
    inner = torch.zeros_like(squares)
    products = None if right is None else squares.new_zeros(count, right.shape[0])
    # A transposed view is read by blocks of its columns: gathering its rows takes several times as long.
    along = 0 if vectors.stride(0) >= vectors.stride(1) else 1
    for start in range(0, vectors.shape[along], _BLOCK):
        stop = min(start + _BLOCK, vectors.shape[along])
        part = slice(start, stop)
        block = vectors.narrow(along, start, stop - start).double()
        rows = part if along == 0 else slice(None)
        columns = part if along == 1 else slice(None)
        squares[rows] += block.square().sum(1)
        if products is None or right is None:
            inner[rows] += (block * left[rows, columns]).sum(1)
        else:
            products[rows] += block @ right[:, columns].mT
    return squares, inner if products is None else (left * products).sum(1)


def _changes(vectors: Tensor, left: Tensor, right: Tensor | None, squares: Tensor, inner: Tensor) -> MagnitudeDirection:
    """The changes, from lengths and inner products where these hold them, else from the vectors themselves."""
    added = left.square().sum(1)
    tuned_squares = (squares + 2 * inner + added).clamp(min=0.0)
    before, after = squares.sqrt(), tuned_squares.sqrt()
    magnitude_changes = torch.where(before + after > 0, (2 * inner + added) / (before + after), 0.0)
    cosine = ((squares + inner) / (before * after)).clamp(-1.0, 1.0)
    across = (added - (inner / before).square()).clamp(min=0.0) / tuned_squares
    direction_changes = torch.where(cosine > 0, across / (1 + cosine), 1 - cosine)
    # Where d nearly undoes w, what is left has to be formed to be known.
    undone = (tuned_squares < _CANCELLED * (squares + added)).nonzero().flatten()
    w = vectors[undone].double()
    tuned = w + (left[undone] if right is None else left[undone] @ right)
    after[undone] = tuned.norm(dim=1)
    magnitude_changes[undone] = after[undone] - before[undone]
    chords = w / before[undone, None] - tuned / after[undone, None]
    direction_changes[undone] = chords.square().sum(1) / 2
    # Lengths of this size are what rounding leaves of a zero.
    rounding = vectors.shape[1] * torch.finfo(torch.float64).eps * (before + added.sqrt())
    directed = (before > 0) & (after > rounding)
    direction_changes = torch.where(directed, direction_changes, math.nan)
    return MagnitudeDirection(
        float(magnitude_changes.abs().mean()),
        float(direction_changes.nanmean()),
        before,
        magnitude_changes,
        direction_changes,
    )


def _require(weight: Tensor, update: Update, axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(f"axis: expected 0 or 1, got {axis}.")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}.")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected floating-point numbers, got {weight.dtype}. Dequantise it first.")
    if tuple(weight.shape) != tuple(update.shape):
        raise BaseWeightsError(
            f"expected a base weight of the update's shape {tuple(update.shape)}, got {tuple(weight.shape)}. "
            "Check that it belongs to this module and is not stored transposed."
        )
