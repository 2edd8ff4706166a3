"""Do two adapters begin with the same A? Asked before any claim that what they learned is alike.

Conventions
-----------
A is (r, d_in). A row of the A of lower rank counts as shared if some row of the other is parallel to it, up to sign
and scale: ``|cos| >= 0.99``, as rounding leaves it, and more than independent random rows would give, ``cos² ~
Beta(1/2, (d - 1)/2)``, Bonferroni over the other's rows, at a level of 1e-6. So a draw that is a prefix of another, or
a permutation of a part of it, is seen as well as an equal one.

Where only the trained A is known, directions that both runs learned make every row a little parallel to every other.
A row then counts as shared if its cosine, beyond chance and however small, is twice any other of both rows. A learned
direction makes at most one such pair in a module, and so one is not counted; one row alone cannot be told.

Measures
--------
``shared_rows``, ``SHARED``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1 (A starts random, B at zero), figure 4 (two seeds).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special
from torch import Tensor

SHARED = 0.1
"""Share of rows, over all modules of a pair, from which two adapters count as sharing their start."""

_LEVEL = 1e-6
_PARALLEL = 0.99
_CONTRAST = 2.0


def shared_rows(A: Tensor, other: Tensor, *, trained: bool = False) -> float:
    """Share of the rows of the smaller A that the larger has too.

    Parameters
    ----------
    A, other : Tensor, shape (r, d_in) and (r', d_in)
        As training began, or as it ended.
    trained : bool
        Which of both.

    Returns
    -------
    float
        Dimensionless, in [0, 1]; NaN where a factor has no rows, or one column, and where a trained one has one row.

    Raises
    ------
    ValueError
        If the factors have different numbers of columns.

    Examples
    --------
    >>> import torch
    >>> A = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    >>> shared_rows(-2 * A[:4], A), shared_rows(A[:4], A[4:])
    (1.0, 0.0)
    """
    if A.shape[1] != other.shape[1]:
        raise ValueError(f"expected factors of one width, got {tuple(A.shape)} and {tuple(other.shape)}.")
    few, many = sorted((A.detach().double(), other.detach().double()), key=len)
    if len(few) <= trained or A.shape[1] < 2:
        return math.nan
    few, many = (rows.cpu() for rows in (few, many))
    few, many = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300) for rows in (few, many))
    cosines = np.minimum((few @ many.mT).abs().numpy(), 1.0)
    best = cosines.max(axis=1)
    p = len(many) * special.betaincc(0.5, (A.shape[1] - 1) / 2, best**2)
    if not trained:
        return float(((p < _LEVEL) & (best >= _PARALLEL)).mean())
    alike = best >= _PARALLEL
    if alike.all():
        return 1.0
    pairs = int(((p < _LEVEL) & (alike | _stands_out(cosines))).sum())
    return max(0, pairs - 1) / (len(few) - 1)


def _stands_out(cosines: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Of which rows the largest cosine is so many times any other in its row and in its column."""
    partner, rows = cosines.argmax(axis=1), np.arange(len(cosines))
    best, others = cosines[rows, partner], cosines.copy()
    others[rows, partner] = 0.0
    along = others.max(axis=1)
    across = np.array([np.delete(cosines[:, j], i).max(initial=0.0) for i, j in zip(rows, partner, strict=True)])
    stands: npt.NDArray[np.bool_] = best >= _CONTRAST * np.maximum(along, across)
    return stands
