"""Intervals for means over training runs and groups of held-out items, both of which are samples.

A loss is a mean over seeds and over items; seeds are few, and items of a group (a folder, a file) are not independent.
Runs that are compared share seeds and items, so the interval is that of their paired contrast.

Conventions
-----------
Data are sums over the items of a group, shape (S, G): seed x group. The variance of the mean has two parts, estimated
apart: between seeds, with S - 1 degrees of freedom, and between groups, the jackknife that leaves out one group at a
time. With s and g for the parts, the half-width is Banerjee's ``sqrt(t_s**2 V_s + t_g**2 V_g)``, each part with the
Student quantile of its own degrees of freedom.

Why not others: a percentile bootstrap over three seeds has a seed variance that is a third too small and no Student
quantile: where seeds matter, its 95 % cover 79 % (in the tests). Satterthwaite's degrees of freedom are too many
whenever three seeds happen to agree: 92 %. Banerjee's interval cannot be too narrow with normal parts: with
``F(u) = P(Z**2 <= u)``, ``v`` the true shares of the variance and ``q_k`` chi-squared over its degrees of freedom, the
coverage is ``E F(sum_k v_k t_k**2 q_k) >= sum_k v_k E F(t_k**2 q_k) = confidence``, as F is concave. What differs by
seed and group at once is in both parts, which errs to the same side.

Values
------
``Estimate``, ``crossed_mean``, ``linearised_ratio``, ``fieller``, ``group_degrees_of_freedom``.

References
----------
Banerjee 1960, Sankhyā 22. Bell and McCaffrey 2002, Survey Methodology 28 (degrees of freedom of groups).
Fieller 1954, Journal of the Royal Statistical Society B 16. Owen 2007, Annals of Applied Statistics 1
(the bootstrap over two crossed factors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Array = npt.NDArray[np.float64]

_NODES = (np.arange(32) + 0.5) / 32  # of the distribution of an estimated variance, for power


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the independent parts of its variance, and the degrees of freedom of each.

    Parameters
    ----------
    value : float
    variances : tuple of float
        Estimated; their sum is the variance of ``value``.
    dfs : tuple of float

    Examples
    --------
    >>> one = Estimate(1.0, (0.01,), (2.0,))
    >>> [round(limit, 3) for limit in one.interval(0.95)]
    [0.57, 1.43]
    >>> round(one.p(0.0, above=True), 4)
    0.0049
    """

    value: float
    variances: tuple[float, ...]
    dfs: tuple[float, ...]

    @property
    def se(self) -> float:
        """Standard error."""
        return math.sqrt(sum(self.variances))

    def half_width(self, confidence: float) -> float:
        """``sqrt(sum_k t_k**2 V_k)``, of the two-sided interval."""
        t = special.stdtrit(np.asarray(self.dfs), (1 + confidence) / 2)
        return math.sqrt(float(np.sum(t**2 * np.asarray(self.variances))))

    def interval(self, confidence: float) -> tuple[float, float]:
        """The two-sided interval."""
        half = self.half_width(confidence)
        return self.value - half, self.value + half

    def p(self, threshold: float, *, above: bool) -> float:
        """One-sided p of the hypothesis that the mean is not above (or below) a threshold, at least 1e-12.

        The level at which the interval touches the threshold.
        """
        distance = (self.value - threshold) * (1 if above else -1)
        if self.se == 0:
            return 1e-12 if distance > 0 else 1.0
        if distance == 0:
            return 0.5
        tail = _tail(self, abs(distance))
        return tail if distance > 0 else 1 - tail

    def mde(self, confidence: float, *, power: float = 0.8) -> float:
        """Minimum detectable effect: the distance from a threshold at which the interval leaves it out with that power.

        The estimated variances are taken as the true ones; that the next study estimates its own is accounted for.
        """
        half = self._half_widths(confidence)
        return _solved(lambda distance: float(np.mean(special.ndtr((distance - half) / self.se))), power, self.se)

    def equivalence_mde(self, confidence: float, *, power: float = 0.8) -> float:
        """The margin within which the interval of a difference that is none would lie with that power."""
        half = self._half_widths(confidence)

        def shown(margin: float) -> float:
            return float(np.mean(np.clip(2 * special.ndtr((margin - half) / self.se) - 1, 0, 1)))

        return _solved(shown, power, self.se)

    def __neg__(self) -> Estimate:
        return replace(self, value=-self.value)

    def _half_widths(self, confidence: float) -> Array:
        """Half-widths that studies of this size would find, each as likely: over the product of quantiles."""
        squares: Array = np.zeros(1)
        for variance, df in zip(self.variances, self.dfs, strict=True):
            t = special.stdtrit(df, (1 + confidence) / 2)
            drawn = special.chdtri(df, 1 - _NODES) / df
            squares = (squares[:, None] + t**2 * variance * drawn).ravel()
        return np.sqrt(squares)


def crossed_mean(sums: npt.ArrayLike, items: npt.ArrayLike) -> Estimate:
    """The mean per item over seeds and groups, with its variance between seeds and between groups.

    With ``w_g = n_g / n`` and group means ``d_g`` over seeds: ``V_s = var(d_s) / S`` and
    ``V_g = (G - 1) / G * sum_g (w_g (d_g - d) / (1 - w_g))**2``, the jackknife over
    groups: exact with groups of equal size, else too large rather than too small.

    Parameters
    ----------
    sums : array_like, shape (S, G)
        Sums over the items of a group, of each seed.
    items : array_like, shape (G,)
        Numbers of items.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        If there are fewer than two seeds or groups, or shapes differ.

    Examples
    --------
    >>> crossed_mean([[2.0, 1.0], [4.0, 3.0]], [2, 1]).value
    1.6666666666666667
    """
    x, n = np.asarray(sums, dtype=np.float64), np.asarray(items, dtype=np.float64)
    if x.ndim != 2 or x.shape[1:] != n.shape or min(x.shape) < 2:
        raise ValueError(f"sums: expected at least two seeds x two groups, got {x.shape} and items {n.shape}.")
    w = n / n.sum()
    seeds = x.sum(1) / n.sum()
    value = float(seeds.mean())
    left_out = (x.mean(0) / n.sum() - w * value) / (1 - w)
    return Estimate(
        value,
        (float(seeds.var(ddof=1)) / len(seeds), (len(w) - 1) / len(w) * float(left_out @ left_out)),
        (len(seeds) - 1.0, group_degrees_of_freedom(n)),
    )


def group_degrees_of_freedom(items: npt.ArrayLike) -> float:
    """Degrees of freedom of the jackknife variance over groups of unequal size.

    Satterthwaite's ``tr(B)**2 / tr(B**2)`` of the quadratic form B that the variance is, under two working models, and
    the smaller: means of groups differ alike whatever their size; items are independent.

    Parameters
    ----------
    items : array_like, shape (G,)

    Returns
    -------
    float
        In (0, G - 1]: G - 1 with groups of equal size.

    Examples
    --------
    >>> round(group_degrees_of_freedom([5, 5, 5, 5]), 6), round(group_degrees_of_freedom([100, 5, 5, 5]), 2)
    (3.0, 1.01)
    """
    return _group_degrees_of_freedom(tuple(np.asarray(items, dtype=np.float64).tolist()))


def linearised_ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike, items: npt.ArrayLike) -> tuple[float, Array]:
    """A ratio of two means over the same seeds and groups, and the sums whose mean varies as it does to first order.

    ``rho = N / D`` and ``(numerator - rho * denominator) / D``: sums whose mean per item is 0. For differences of
    ratios, which Fieller's interval does not give.

    Parameters
    ----------
    numerator, denominator : array_like, shape (S, G)
    items : array_like, shape (G,)

    Returns
    -------
    float, ndarray of shape (S, G)

    Examples
    --------
    >>> linearised_ratio([[1.0, 2.0], [2.0, 3.0]], [[2.0, 4.0], [4.0, 6.0]], [1, 1])[0]
    0.5
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    ratio = float(a.sum() / b.sum())
    mean = b.sum() / (len(b) * np.asarray(items, dtype=np.float64).sum())
    return ratio, (a - ratio * b) / mean


def fieller(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, items: npt.ArrayLike, *, confidence: float
) -> tuple[float, tuple[float, float]]:
    """A ratio of two means over the same seeds and groups, with Fieller's interval.

    All rho with ``(N - rho D)**2 <= sum_k t_k**2 V_k(N - rho D)``: exactly those that the test of the linear contrast
    leaves, so that it holds also where the denominator is not many standard errors from 0.

    Parameters
    ----------
    numerator, denominator : array_like, shape (S, G)
    items : array_like, shape (G,)
    confidence : float

    Returns
    -------
    float, (float, float)
        Dimensionless. Infinite limits where the denominator's own interval holds 0.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    means = [crossed_mean(x, items) for x in (a, b, a - b)]
    # The squared half-width is a quadratic form of the contrast: three contrasts give its three coefficients.
    c_aa, c_bb, c_difference = (mean.half_width(confidence) ** 2 for mean in means)
    c_ab = (c_aa + c_bb - c_difference) / 2
    n, d = means[0].value, means[1].value
    leading, middle, last = d * d - c_bb, n * d - c_ab, n * n - c_aa
    root = middle * middle - leading * last
    ratio = n / d if d else math.nan
    if leading <= 0 or root < 0:
        return ratio, (-math.inf, math.inf)
    return ratio, ((middle - math.sqrt(root)) / leading, (middle + math.sqrt(root)) / leading)


@lru_cache(maxsize=64)
def _group_degrees_of_freedom(items: tuple[float, ...]) -> float:
    n = np.asarray(items)
    w = n / n.sum()
    deviations = np.eye(len(w)) - w  # rows: what d_g - d is made of
    found = []
    for scale in (np.ones_like(w), 1 / np.sqrt(n)):
        root = (w / (1 - w))[:, None] * deviations * scale
        form = root @ root.T
        found.append(float(np.trace(form) ** 2 / np.sum(form**2)))
    return min(found)


def _tail(estimate: Estimate, distance: float) -> float:
    """The one-sided level at which the half-width equals a distance."""

    def beyond(log_p: float) -> float:
        return estimate.half_width(1 - 2 * math.exp(log_p)) - distance

    least, most = math.log(1e-12), math.log(0.5 - 1e-9)
    if beyond(least) <= 0:
        return 1e-12
    if beyond(most) >= 0:
        return 0.5
    return math.exp(float(optimize.brentq(beyond, least, most, xtol=1e-6)))


def _solved(power_at: Callable[[float], float], power: float, unit: float) -> float:
    """Where an increasing power reaches its goal."""
    if unit == 0:
        return 0.0
    high = unit
    while power_at(high) < power:
        high *= 2
    return float(optimize.brentq(lambda x: power_at(x) - power, 0.0, high, xtol=1e-6 * unit))
