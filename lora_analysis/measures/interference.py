"""Whether updates get in each other's way when they are added to one model.

Conventions
-----------
Updates of one shape (d_out, d_in), ``ΔW_t``; ``<a, b> = sum(a * b)`` is the Frobenius inner product. Low-rank
updates are compared through their factors, in r x r, whatever their gauge (``up @ R`` and ``inv(R) @ down``
are the same update). An update of unknown scale raises ``UndefinedUpdateError``; ``with_scale(update, 1.0)``
gives its cosine and sign conflict. No number here decides whether a merge will work: compare them.

Measures
--------
``update_inner``, ``update_cosine`` and its null ``update_cosine_null_sd``; ``singular_task_interference``;
``sign_conflict``.

References
----------
Ilharco et al. 2022, *Editing Models with Task Arithmetic*, arXiv:2212.04089 (cosines of updates).
Gargiulo et al. 2024, *Task Singular Vectors*, arXiv:2412.00081 (singular task interference).
Yadav et al. 2023, *TIES-Merging*, arXiv:2306.01708 (sign conflicts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from lora_analysis.update import LowRankUpdate, Svd, Update, rows_of

_CANCELLATION = 1e-5
"""‖a‖‖b‖ / (Σ‖rank-one terms of a‖ Σ‖those of b‖) below which the sum over factors has lost five digits or
more to its gauge, and singular vectors take over."""


def update_inner(a: Update, b: Update) -> float:
    """Frobenius inner product of two updates, ``sum(ΔW_a * ΔW_b)``.

    ``scale_a scale_b sum((up_a.T @ up_b) * (down_a @ down_b.T))`` for low-rank updates, without forming
    either; through their singular vectors where their gauges would make that sum cancel.

    Parameters
    ----------
    a, b : Update
        Of one shape.

    Returns
    -------
    float
        In the unit of the weights squared.

    Raises
    ------
    ValueError
        If the shapes differ.
    UndefinedUpdateError
        If a scale is unknown, or a low-rank update holds NaN or infinities.

    Examples
    --------
    >>> a = LowRankUpdate(torch.eye(3, 2), torch.eye(2, 3), scale=2.0)
    >>> b = LowRankUpdate(torch.eye(3, 1), torch.ones(1, 3), scale=-1.0)
    >>> update_inner(a, b)
    -2.0
    """
    _require_one_shape([a, b])
    if not (isinstance(a, LowRankUpdate) and isinstance(b, LowRankUpdate)):
        return float((a.dense() * b.dense()).sum())
    if a.norm() * b.norm() < _CANCELLATION * _sum_of_terms(a) * _sum_of_terms(b):
        left, right = a.svd(), b.svd()
        return float(((left.U * left.S).mT @ (right.U * right.S) * (left.Vh @ right.Vh.mT)).sum())
    outputs = a.up.double().mT @ b.up.double()
    inputs = a.down.double() @ b.down.double().mT
    return a.scale * b.scale * float((outputs * inputs).sum())


def update_cosine(a: Update, b: Update) -> float:
    """Cosine of the angle between two updates as vectors, ``<a, b> / (||a||_F ||b||_F)``.

    Parameters
    ----------
    a, b : Update
        Of one shape.

    Returns
    -------
    float
        Dimensionless, in [-1, 1]; NaN where an update is 0. By chance 0 on average, with standard deviation
        ``update_cosine_null_sd(shape)``.

    Raises
    ------
    ValueError
        If the shapes differ.
    UndefinedUpdateError
        If a scale is unknown, or a low-rank update holds NaN or infinities.

    References
    ----------
    Ilharco et al. 2022, arXiv:2212.04089.

    Examples
    --------
    >>> a = LowRankUpdate(torch.eye(3, 1), torch.eye(1, 3), scale=2.0)
    >>> round(update_cosine(a, LowRankUpdate(torch.eye(3, 1), torch.ones(1, 3), scale=-1.0)), 12)
    -0.57735026919
    """
    inner, norms = update_inner(a, b), a.norm() * b.norm()
    # Rounding alone can leave [-1, 1], by a few units in the last place.
    return min(max(inner / norms, -1.0), 1.0) if norms > 0 else math.nan


def update_cosine_null_sd(shape: tuple[int, int]) -> float:
    """Standard deviation of the cosine of two updates, one of which is randomly rotated on both sides.

    Exactly ``1 / sqrt(d_out * d_in)``, whatever the spectra. At low rank the tails are heavier than a
    normal distribution's: take five of these, not two, for a finding.

    Parameters
    ----------
    shape : (int, int)
        (d_out, d_in).

    Returns
    -------
    float
        Dimensionless.

    Examples
    --------
    >>> f"{update_cosine_null_sd((4096, 4096)):.1e}"
    '2.4e-04'
    """
    return 1 / math.sqrt(shape[0] * shape[1])


def singular_task_interference(
    svds: Sequence[Svd], *, norm: Literal["entrywise", "nuclear", "induced-1"] = "entrywise"
) -> float:
    """How far the singular vectors of several updates are from mutually orthogonal, weighted by strength.

    ``STI = || (U.T @ U - I) @ Sigma @ (V.T @ V - I) ||``, the singular vectors and values of all updates side
    by side, column-wise: ``U = [U_1 … U_T]``. It is 0 where the updates share neither inputs nor outputs,
    and also where they share only one of the two. Divide by ``sum(S)`` over all updates for a relative figure.

    Parameters
    ----------
    svds : sequence of Svd
        One per update, all of one shape (d_out, d_in).
    norm : {"entrywise", "nuclear", "induced-1"}
        The paper's ``||·||_1`` is read as the sum of absolute entries; also the sum of singular values, and
        the largest column sum.

    Returns
    -------
    float
        >= 0, in the unit of the weights.

    Raises
    ------
    ValueError
        If there are no updates, their shapes differ, or the norm is not one of the three.

    References
    ----------
    Gargiulo et al. 2024, arXiv:2412.00081, the definition of singular task interference.

    Examples
    --------
    >>> first = torch.eye(4, 1)
    >>> svd = Svd(first, torch.tensor([3.0]), first.mT)
    >>> singular_task_interference([svd, svd])
    6.0
    """
    if norm not in ("entrywise", "nuclear", "induced-1"):
        raise ValueError(f"norm: expected 'entrywise', 'nuclear' or 'induced-1', got {norm!r}.")
    shapes = [(svd.U.shape[0], svd.Vh.shape[1]) for svd in svds]
    if len(set(shapes)) != 1:
        raise ValueError(f"svds: expected at least one update and all of one shape, got {shapes}.")
    U = torch.hstack([svd.U.double() for svd in svds])
    V = torch.hstack([svd.V.double() for svd in svds])
    S = torch.cat([svd.S.double() for svd in svds])
    identity = torch.eye(len(S), dtype=torch.float64, device=U.device)
    interference = (U.mT @ U - identity) @ (S[:, None] * (V.mT @ V - identity))
    if norm == "entrywise":
        return float(interference.abs().sum())
    if norm == "nuclear":
        return float(torch.linalg.svdvals(interference).sum())
    return float(interference.abs().sum(dim=0).amax()) if len(S) else 0.0


def sign_conflict(updates: Sequence[Update], *, block_rows: int = 256) -> float:
    """Share of entries on which the updates disagree about the sign.

    ``#{some ΔW_t[i, j] > 0 and some < 0} / #{some ΔW_t[i, j] != 0}`` over the entries (i, j). Low-rank
    updates are multiplied out ``block_rows`` rows at a time, so that no d_out x d_in matrix is held.

    Parameters
    ----------
    updates : sequence of Update
        Of one shape.
    block_rows : int
        Does not change the result.

    Returns
    -------
    float
        Dimensionless, in [0, 1]; NaN where every update is 0. T unrelated updates with symmetric entries give
        ``1 - 2**(1 - T)``: 1/2 for a pair. It depends on the basis: rotating all updates alike changes it.

    Raises
    ------
    ValueError
        If there are no updates, or their shapes differ, or block_rows < 1.
    UndefinedUpdateError
        If a scale is unknown, or an update holds NaN or infinities.

    References
    ----------
    Yadav et al. 2023, arXiv:2306.01708, section 3; there after trimming small entries, here on all.

    Examples
    --------
    >>> a = LowRankUpdate(torch.eye(3, 1), torch.ones(1, 3), scale=1.0)
    >>> b = LowRankUpdate(torch.ones(3, 1), torch.tensor([[1.0, 0.0, -1.0]]), scale=1.0)
    >>> sign_conflict([a, b])  # one of the entries (0, 0) … (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)
    0.14285714285714285
    """
    if block_rows < 1:
        raise ValueError(f"block_rows: expected at least 1, got {block_rows}.")
    _require_one_shape(updates)
    for update in updates:
        update.norm()  # raises what an unknown scale or a NaN, which has no sign, deserves
    d_out = updates[0].shape[0]
    conflicts = counted = 0
    for start in range(0, d_out, block_rows):
        rows = slice(start, start + block_rows)
        blocks = [rows_of(update, rows) for update in updates]
        positive = torch.stack([block > 0 for block in blocks]).any(dim=0)
        negative = torch.stack([block < 0 for block in blocks]).any(dim=0)
        conflicts += int((positive & negative).sum())
        counted += int((positive | negative).sum())
    return conflicts / counted if counted else math.nan


def _sum_of_terms(update: LowRankUpdate) -> float:
    """``|scale| sum(||up[:, l]|| ||down[l]||)``, >= ||ΔW||_F: how much the rank-one terms may cancel."""
    lengths = update.up.double().norm(dim=0) * update.down.double().norm(dim=1)
    return abs(update.scale) * float(lengths.sum())


def _require_one_shape(updates: Sequence[Update]) -> None:
    shapes = [tuple(update.shape) for update in updates]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"expected at least one update and all of one shape (d_out, d_in), got {shapes}. "
            "Compare updates of the same module."
        )
