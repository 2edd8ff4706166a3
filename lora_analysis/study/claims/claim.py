"""A claim of the paper with what a study says of it, and the rules that turn an interval into a verdict.

Conventions
-----------
Rules and margins are fixed before the runs (``plan.Margins``). A claim is there whatever its outcome. *Reproduced* is
said only where the interval lies wholly on the claimed side of its threshold; *contradicted* where it lies wholly on
the other. In between, a study that could not have seen the effect the paper reports (its minimum detectable effect is
larger) is *consistent, underpowered* if the estimate has the claimed sign; else the claim is *not reproduced*.

Values
------
``Verdict``, ``Claim``, ``directional``, ``equivalent``, ``holm``.

References
----------
Holm 1979, Scandinavian Journal of Statistics 6; Schuirmann 1987 (two one-sided tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "reproduced",
    "consistent_underpowered",
    "not_reproduced",
    "contradicted",
    "not_testable_at_this_scale",
    "not_attempted",
]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim and its evidence.

    Parameters
    ----------
    id : str
        ``"C1"`` to ``"C17"``, with ``b`` for a part.
    text : str
        What the paper claims, with its place.
    statistic : str
        What is estimated, with its unit or "dimensionless".
    verdict : Verdict
    why : str
        One sentence with the numbers that decide.
    estimate : float, optional
    interval : (float, float), optional
        Of the plan's confidence.
    null_mean, null_sd : float, optional
        What chance gives.
    z, p, p_holm : float, optional
        ``p_holm`` is Holm's over the claims of the study that have a p.
    runs : int
        Training runs it rests on: the unit of replication.
    cells : int
        Modules, layers, grid cells or groups of held-out items: evidence within runs.
    mde : float, optional
        Minimum detectable effect, in the unit of the estimate's distance from its threshold, at 80 % power.
    """

    id: str
    text: str
    statistic: str
    verdict: Verdict
    why: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    null_mean: float | None = None
    null_sd: float | None = None
    z: float | None = None
    p: float | None = None
    p_holm: float | None = None
    runs: int = 0
    cells: int = 0
    mde: float | None = None


def directional(
    estimate: float, interval: tuple[float, float], *, threshold: float, above: bool, mde: float, effect: float
) -> Verdict:
    """The verdict on a claim that a quantity lies above (or below) a threshold.

    Parameters
    ----------
    estimate : float
    interval : (float, float)
    threshold : float
    above : bool
        Whether the paper claims that it lies above.
    mde : float
        Smallest distance from the threshold that the study would find in four of five cases.
    effect : float
        The distance that the paper reports, or that would matter.

    Examples
    --------
    >>> directional(0.3, (0.1, 0.5), threshold=0.0, above=True, mde=0.3, effect=0.2)
    'reproduced'
    >>> directional(0.1, (-0.2, 0.4), threshold=0.0, above=True, mde=0.4, effect=0.2)
    'consistent_underpowered'
    >>> directional(0.1, (-0.1, 0.3), threshold=0.0, above=True, mde=0.1, effect=0.2)
    'not_reproduced'
    """
    if not all(map(math.isfinite, (estimate, *interval))):
        return "not_testable_at_this_scale"
    low, high = interval if above else (-interval[1], -interval[0])
    edge, value = (threshold, estimate) if above else (-threshold, -estimate)
    if low > edge:
        return "reproduced"
    if high < edge:
        return "contradicted"
    return "consistent_underpowered" if value > edge and mde > effect else "not_reproduced"


def equivalent(interval: tuple[float, float], *, margin: float) -> Verdict:
    """The verdict on a claim that a difference is none: two one-sided tests against ``±margin``.

    Parameters
    ----------
    interval : (float, float)
        Of confidence ``1 - 2 alpha``, as two one-sided tests of level alpha ask for.
    margin : float
        Positive.

    Examples
    --------
    >>> equivalent((-0.1, 0.2), margin=0.3), equivalent((0.4, 0.9), margin=0.3), equivalent((-0.5, 0.2), margin=0.3)
    ('reproduced', 'contradicted', 'consistent_underpowered')
    """
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not_testable_at_this_scale"
    if -margin < low and high < margin:
        return "reproduced"
    if low > margin or high < -margin:
        return "contradicted"
    return "consistent_underpowered" if low <= 0 <= high else "not_reproduced"


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    Examples
    --------
    >>> [round(value, 2) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
