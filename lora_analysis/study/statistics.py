"""Intervals for accuracies measured on texts that are not independent.

Conventions
-----------
Texts of one group (the folder they were cut from) share a topic and an author, so the group is the unit: the
interval is that of a cluster-robust mean, with Student's t on groups - 1 degrees of freedom.

References
----------
Cameron and Miller, *A practitioner's guide to cluster-robust inference*, Journal of Human Resources 50, 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats


class Difference(NamedTuple):
    """A mean paired difference with the half-width of its interval, in the unit of the data."""

    mean: float
    half_width: float


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, groups: Sequence[str], *, confidence: float = 0.95
) -> Difference:
    """Mean of a - b over paired observations, with a cluster-robust interval.

    ``half_width = t * sqrt(G / (G - 1) * sum_g (sum_{i in g} (d_i - mean))**2) / n`` over G groups.

    Parameters
    ----------
    a, b : array_like, shape (n,)
        Outcomes of the same observations, such as 0 and 1 for wrong and right.
    groups : sequence of str, length n
        The group of each observation.
    confidence : float
        In (0, 1).

    Returns
    -------
    Difference

    Raises
    ------
    ValueError
        If the lengths differ or there are fewer than two groups.

    Examples
    --------
    >>> paired_difference([1, 1, 0, 1], [0, 0, 0, 0], ["a", "a", "b", "b"]).mean
    0.75
    """
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if d.ndim != 1 or len(d) != len(groups):
        raise ValueError(f"expected one group per paired observation, got {d.shape} and {len(groups)} groups.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a probability in (0, 1), got {confidence}.")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    if count < 2:
        raise ValueError(f"groups: expected at least two, got {count}: there is no interval.")
    sums = np.bincount(index, weights=d - d.mean())
    sd = np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(d)
    t = stats.t.ppf((1 + confidence) / 2, count - 1)
    return Difference(float(d.mean()), float(t * sd))
