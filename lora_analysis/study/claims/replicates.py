"""What runs say together, where each is a replicate and the modules within it are not.

Conventions
-----------
A *replicate* is a run or a pair of runs; its *cells* are modules (and sides). P-values of cells are adjusted by Holm
within a replicate, and the replicate's own p is the one that more than half of its cells reach: the (n//2 + 1)-th
smallest adjusted value, a valid p for "fewer than that many cells show it", however cells depend on each other. A claim
holds if it holds in every replicate, so its p is the largest of theirs (an intersection-union test: valid, and
conservative). Nothing is multiplied.

The interval is that of the median over replicates from order statistics, of the plan's confidence from six replicates
on; with fewer it is their range, which covers the median of n independent replicates with probability
``1 - 2**(1 - n)``: 75 % for three. Pairs of three runs share runs, so that theirs is nominal.

Values
------
``Replicate``, ``replicate``, ``interval``, ``majority_p``, ``sign_test``, ``in_every``.

References
----------
Holm 1979; Benjamini and Heller 2008, *Screening for partial conjunction hypotheses*, Biometrics 64; Berger 1982,
*Multiparameter hypothesis testing and acceptance sampling*, Technometrics 24 (intersection-union).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from lora_analysis.study.claims.claim import Claim, Verdict, holm

FEWEST = 2
"""Replicates below which nothing is said to be reproduced."""


class Replicate(NamedTuple):
    """A run or a pair of runs."""

    runs: tuple[str, ...]
    effect: float
    """Median over cells."""
    p: float
    """That more than half of the cells reach."""
    share: float
    """Share of cells whose adjusted p is below the level."""
    cells: int


def replicate(runs: Iterable[str], effects: npt.ArrayLike, p: npt.ArrayLike, *, level: float) -> Replicate:
    """A replicate of its cells' effects and p-values; cells without a p are left out."""
    values, tails = np.asarray(effects, dtype=float), np.asarray(p, dtype=float)
    known = np.isfinite(tails)
    adjusted = holm(tails[known].tolist())
    share = float(np.mean([value < level for value in adjusted])) if adjusted else math.nan
    effect = float(np.median(values[known])) if known.any() else math.nan
    return Replicate(tuple(runs), effect, majority_p(tails[known].tolist()), share, int(known.sum()))


def majority_p(p: Sequence[float]) -> float:
    """The adjusted p that more than half of the cells reach; NaN without any.

    Examples
    --------
    >>> majority_p([0.001, 0.002, 0.9]), majority_p([0.001, 0.8, 0.9])
    (0.004, 1.0)
    """
    return sorted(holm(p))[len(p) // 2] if len(p) else math.nan


def interval(effects: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Interval of the median over replicates; their range where there are few.

    Examples
    --------
    >>> interval([3.0, 1.0, 2.0], 0.95), interval([float(i) for i in range(12)], 0.95)
    ((1.0, 3.0), (2.0, 9.0))
    """
    ordered = sorted(effects)
    if not ordered or not all(map(math.isfinite, ordered)):
        return None
    below = 0
    while 2 * stats.binom.cdf(below, len(ordered), 0.5) <= 1 - confidence:
        below += 1
    below = max(below - 1, 0)
    return ordered[below], ordered[len(ordered) - 1 - below]


def extent(count: int, one: str, many: str, confidence: float) -> str:
    """What ``interval`` of so many replicates is, in words.

    Examples
    --------
    >>> extent(1, "run", "runs", 0.95), extent(3, "run", "runs", 0.95)
    ('range over 1 run', 'range over 3 runs')
    >>> extent(10, "run", "runs", 0.95)
    '95 % interval of the median over 10 runs'
    """
    whole = 2 * stats.binom.cdf(1, count, 0.5) > 1 - confidence
    what = "range" if whole else f"{100 * confidence:g} % interval of the median"
    return f"{what} over {count} {one if count == 1 else many}"


def sign_test(differences: npt.ArrayLike) -> tuple[float, float]:
    """One-sided p of more positive than negative differences, and of fewer; zeros are left out.

    Differences are taken as independent, which modules of one run need not be: the claims that rest on it say so.

    Examples
    --------
    >>> sign_test([1, 1, 1, 1, 1, 1])
    (0.015625, 1.0)
    """
    values = np.asarray(differences, dtype=float)
    up, down = int((values > 0).sum()), int((values < 0).sum())
    if up + down == 0:
        return 1.0, 1.0
    return float(stats.binom.sf(up - 1, up + down, 0.5)), float(stats.binom.sf(down - 1, up + down, 0.5))


def in_every(above: Sequence[float], below: Sequence[float], *, level: float) -> Verdict:
    """The verdict on a claim by the p-values of its replicates, for its direction and for the other.

    Examples
    --------
    >>> in_every([0.01, 0.02], [1.0, 1.0], level=0.05), in_every([0.01], [1.0], level=0.05)
    ('reproduced', 'consistent_underpowered')
    >>> in_every([0.01, 0.3], [1.0, 0.9], level=0.05), in_every([1.0, 1.0], [0.01, 0.02], level=0.05)
    ('not_reproduced', 'contradicted')
    """
    if not len(above) or not all(map(math.isfinite, above)):
        return "not_testable_at_this_scale"
    if max(above) < level:
        return "reproduced" if len(above) >= FEWEST else "consistent_underpowered"
    if len(below) >= FEWEST and max(below) < level:
        return "contradicted"
    return "not_reproduced"


def limited_by_seeds(verdict: Verdict, seeds: int, *, level: float) -> Verdict:
    """The verdict of a sign test over modules, lowered where too few seeds agree for a sign test over seeds.

    What is common to all modules of a run moves them together, and then it is seeds that count: with 3 of them chance
    alone makes all agree in one of eight cases.

    Examples
    --------
    >>> limited_by_seeds("reproduced", 3, level=0.05), limited_by_seeds("reproduced", 5, level=0.05)
    ('consistent_underpowered', 'reproduced')
    """
    lowered: dict[Verdict, Verdict] = {"reproduced": "consistent_underpowered", "contradicted": "not_reproduced"}
    return verdict if 0.5**seeds < level else lowered.get(verdict, verdict)


def distinct_runs(replicates: Iterable[Replicate]) -> int:
    """How many runs the replicates are made of."""
    return len({run for item in replicates for run in item.runs})


def summary(replicates: Sequence[Replicate], confidence: float) -> dict[str, Any]:
    """Estimate, interval, p and counts of a claim over its replicates."""
    effects = [item.effect for item in replicates]
    return {
        "estimate": float(np.median(effects)),
        "interval": interval(effects, confidence),
        "p": max(item.p for item in replicates),
        "runs": distinct_runs(replicates),
        "cells": max(item.cells for item in replicates),
    }


def span(bounds: tuple[float, float] | None, form: str = ".3g") -> str:
    """An interval in words."""
    return "not finite" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def unattempted(identifier: str, text: str, statistic: str, needed: str) -> Claim:
    """A claim that no run of the study speaks to."""
    return Claim(identifier, text, statistic, "not_attempted", f"No finished runs to tell by: it needs {needed}.")
