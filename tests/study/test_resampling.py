"""Intervals over seeds and groups: against closed forms, leave-one-out by hand, and what they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lora_analysis.study.resampling import (
    Estimate,
    crossed_mean,
    fieller,
    group_degrees_of_freedom,
    linearised_ratio,
)

SEEDS, GROUPS, STUDIES = 3, 100, 2000
BINOMIAL = 3 * math.sqrt(0.95 * 0.05 / STUDIES)  # three standard errors of a coverage of 0.95: 0.015


def unequal_items(rng, groups=GROUPS):
    """Sizes as folders have them: the largest group is some fifty times the median one."""
    return np.maximum(1, np.round(rng.lognormal(1.5, 1.2, groups)))


def study(rng, items, *, seed=0.0, group=0.0, both=0.0, item=0.0, skewed=False, seeds=SEEDS):
    """Sums of a study whose true mean is 0."""
    groups = rng.exponential(1, len(items)) - 1 if skewed else rng.normal(size=len(items))
    means = (
        rng.normal(0, 1, (seeds, 1)) * seed
        + group * groups
        + both * rng.normal(size=(seeds, len(items)))
        + item * rng.normal(size=(seeds, len(items))) / np.sqrt(items)
    )
    return means * items


def test_the_mean_weighs_items_alike():
    sums, items = np.array([[6.0, 1.0], [2.0, 5.0]]), np.array([3, 1])
    assert crossed_mean(sums, items).value == pytest.approx((6 + 1 + 2 + 5) / (2 * 4))


def test_variance_between_groups_is_that_of_leaving_each_out():
    rng = np.random.default_rng(0)
    items = unequal_items(rng, 12)
    sums = study(rng, items, seed=1, group=1, both=1)
    whole = sums.sum() / (SEEDS * items.sum())
    left_out = [np.delete(sums, g, 1).sum() / (SEEDS * np.delete(items, g).sum()) for g in range(12)]
    assert crossed_mean(sums, items).variances[1] == pytest.approx(11 / 12 * np.sum((np.array(left_out) - whole) ** 2))


def test_with_groups_of_equal_size_each_part_is_the_textbook_one():
    sums = study(np.random.default_rng(1), np.full(7, 4.0), seed=1, group=1)
    found = crossed_mean(sums, np.full(7, 4.0))
    seeds, groups = sums.sum(1) / 28, sums.mean(0) / 4
    assert found.variances == pytest.approx((seeds.var(ddof=1) / 3, groups.var(ddof=1) / 7))
    assert found.dfs == pytest.approx((2, 6))


def test_with_one_part_the_interval_is_student_s():
    low, high = Estimate(1.0, (0.04,), (5.0,)).interval(0.9)
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 5, loc=1, scale=0.2))


def test_the_interval_lies_between_those_of_the_parts_in_squares_and_widens_with_confidence():
    found = Estimate(0.0, (0.04, 0.09), (2.0, 30.0))
    parts = [stats.t.ppf(0.975, 2) * 0.2, stats.t.ppf(0.975, 30) * 0.3]
    assert found.half_width(0.95) == pytest.approx(math.hypot(*parts))
    assert found.half_width(0.99) > found.half_width(0.95) > found.half_width(0.9)


@pytest.mark.parametrize("value", [-0.9, -0.1, 0.3, 1.7])
@pytest.mark.parametrize("above", [True, False])
def test_p_is_the_level_at_which_the_interval_touches_the_threshold(value, above):
    found = Estimate(value, (0.04, 0.09), (2.0, 30.0))
    p = found.p(0.0, above=above)
    tail = min(p, 1 - p)
    assert found.half_width(1 - 2 * tail) == pytest.approx(abs(value), rel=1e-4)
    assert (p < 0.5) == ((value > 0) == above)


def test_p_of_a_mean_without_variance_is_all_or_nothing():
    assert Estimate(1.0, (0.0,), (2.0,)).p(0.0, above=True) == 1e-12
    assert Estimate(-1.0, (0.0,), (2.0,)).p(0.0, above=True) == 1.0
    assert Estimate(1.0, (0.0,), (2.0,)).mde(0.95) == 0.0


def test_degrees_of_freedom_are_one_less_than_groups_of_equal_size_and_fewer_with_unequal_ones():
    assert group_degrees_of_freedom(np.full(40, 7)) == pytest.approx(39)
    items = unequal_items(np.random.default_rng(2))
    assert 1 < group_degrees_of_freedom(items) < GROUPS - 1
    assert group_degrees_of_freedom([1000, 1, 1, 1]) < group_degrees_of_freedom([10, 1, 1, 1])


def test_degrees_of_freedom_are_twice_the_squared_mean_over_the_variance_of_the_estimated_variance():
    rng = np.random.default_rng(3)
    items = np.array([20.0, 5, 5, 5, 2, 2, 1, 1])
    found = []
    for options in ({"group": 1.0}, {"item": 1.0}):
        drawn = np.array([crossed_mean(study(rng, items, **options), items).variances[1] for _ in range(8000)])
        found.append(2 * drawn.mean() ** 2 / drawn.var())
    assert group_degrees_of_freedom(items) == pytest.approx(min(found), rel=0.1)


@pytest.mark.parametrize(("sums", "items"), [([[1.0, 2.0]], [1, 1]), ([[1.0], [2.0]], [1]), ([[1.0, 2.0]] * 2, [1])])
def test_fewer_than_two_seeds_or_groups_are_refused(sums, items):
    with pytest.raises(ValueError, match="expected at least two seeds x two groups"):
        crossed_mean(sums, items)


# What differs between runs: by seed, by group, by both, by item. Observed coverage of the nominal 0.95 with 3 seeds and
# 100 groups, 2000 studies: in this order 0.96, 0.98, 0.94, 1.00, 1.00, 0.98, 0.98, 0.98, 0.99.
REGIMES = {
    "seeds": {"seed": 1.0},
    "groups": {"group": 1.0},
    "skewed groups": {"group": 1.0, "skewed": True},
    "both at once": {"both": 1.0},
    "items": {"item": 1.0},
    "seeds and groups alike": {"seed": 0.14, "group": 1.0},
    "seeds and skewed groups alike": {"seed": 0.14, "group": 1.0, "skewed": True},
    "mostly seeds": {"seed": 0.4, "group": 1.0, "item": 1.0},
    "of everything": {"seed": 0.1, "group": 0.7, "both": 0.5, "item": 1.0},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_interval_covers_the_mean_as_often_as_stated_or_more(regime):
    rng = np.random.default_rng(4)
    items = unequal_items(rng)
    found = [crossed_mean(study(rng, items, **REGIMES[regime]), items) for _ in range(STUDIES)]
    covered = np.mean([abs(one.value) <= one.half_width(0.95) for one in found])
    print(f"{regime}: {covered:.3f}")
    # Skewed groups: Student's t itself is not exact, by no more than 2 points here.
    assert covered >= 0.95 - BINOMIAL - (0.02 if regime == "skewed groups" else 0)


def test_satterthwaite_and_the_bootstrap_cover_less_which_is_why_neither_is_used():
    rng = np.random.default_rng(5)
    items = np.full(GROUPS, 5.0)
    covered = {"bootstrap": [], "satterthwaite": [], "crossed": []}
    for _ in range(STUDIES):
        sums = study(rng, items, seed=0.5, group=1.0)
        found = crossed_mean(sums, items)
        variances, dfs = np.array(found.variances), np.array(found.dfs)
        pooled = variances.sum() ** 2 / np.sum(variances**2 / dfs)
        covered["crossed"].append(abs(found.value) <= found.half_width(0.95))
        covered["satterthwaite"].append(abs(found.value) <= stats.t.ppf(0.975, pooled) * found.se)
        if len(covered["bootstrap"]) < 300:
            seeds = rng.multinomial(SEEDS, np.full(SEEDS, 1 / SEEDS), 300)
            groups = rng.multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), 300)
            means = np.sum((seeds @ sums) * groups, 1) / (SEEDS * (groups @ items))
            low, high = np.quantile(means, [0.025, 0.975])
            covered["bootstrap"].append(low <= 0 <= high)
    rates = {name: float(np.mean(one)) for name, one in covered.items()}
    print(rates)  # 0.79, 0.92 and 0.96
    assert rates["bootstrap"] < 0.85
    assert rates["satterthwaite"] < 0.95 - BINOMIAL <= rates["crossed"]


def test_p_is_below_its_level_no_more_often_than_that_where_nothing_is():
    rng = np.random.default_rng(6)
    items = unequal_items(rng)
    p = np.array(
        [
            crossed_mean(study(rng, items, **REGIMES["of everything"]), items).p(0.0, above=True)
            for _ in range(STUDIES // 2)
        ]
    )
    for level in (0.025, 0.05, 0.2):
        assert np.mean(p <= level) <= level + 3 * math.sqrt(level * (1 - level) / len(p))


def test_at_the_minimum_detectable_effect_four_of_five_studies_find_it():
    rng = np.random.default_rng(7)
    truth = Estimate(0.0, (0.04, 0.09), (2.0, 30.0))
    effect = truth.mde(0.95)
    drawn = effect + truth.se * rng.normal(size=20000)
    estimated = 0.04 * rng.chisquare(2, 20000) / 2, 0.09 * rng.chisquare(30, 20000) / 30

    def halves(confidence):
        t = stats.t.ppf((1 + confidence) / 2, [2, 30])
        return np.sqrt(t[0] ** 2 * estimated[0] + t[1] ** 2 * estimated[1])

    assert np.mean(drawn > halves(0.95)) == pytest.approx(0.8, abs=0.015)
    margin = truth.equivalence_mde(0.9)
    assert np.mean(np.abs(drawn - effect) + halves(0.9) < margin) == pytest.approx(0.8, abs=0.015)


def ratio_study(rng, items, rho, *, seeds=SEEDS):
    """Gains of a reference around 0.5 nats and of another that is rho times it, with noise of its own."""
    reference = study(rng, items, seed=0.02, group=0.2, item=0.3, seeds=seeds) + 0.5 * items
    return rho * reference + study(rng, items, seed=0.02, item=0.2, seeds=seeds), reference


def test_the_limits_of_fieller_are_the_ratios_that_the_linear_test_just_leaves():
    rng = np.random.default_rng(8)
    items = unequal_items(rng)
    numerator, denominator = ratio_study(rng, items, 0.9)
    ratio, limits = fieller(numerator, denominator, items, confidence=0.95)
    assert limits[0] < ratio < limits[1]
    for limit in limits:
        contrast = crossed_mean(numerator - limit * denominator, items)
        assert abs(contrast.value) == pytest.approx(contrast.half_width(0.95))


def test_a_ratio_to_nothing_has_no_interval():
    rng = np.random.default_rng(9)
    items = unequal_items(rng)
    nothing = study(rng, items, seed=1, group=1)
    assert fieller(nothing, nothing[::-1], items, confidence=0.95)[1] == (-math.inf, math.inf)


def test_intervals_of_ratios_and_of_their_differences_cover_as_often_as_stated_or_more():
    rng = np.random.default_rng(10)
    items = unequal_items(rng)
    single, difference = [], []
    for _ in range(1500):
        a, b = ratio_study(rng, items, 0.9), ratio_study(rng, items, 0.6)
        low, high = fieller(*a, items, confidence=0.95)[1]
        single.append(low <= 0.9 <= high)
        (rho_a, sums_a), (rho_b, sums_b) = (linearised_ratio(*one, items) for one in (a, b))
        half = crossed_mean(sums_a - sums_b, items).half_width(0.95)
        difference.append(abs(rho_a - rho_b - 0.3) <= half)
    bound = 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1500)
    print(f"Fieller: {np.mean(single):.3f}, difference: {np.mean(difference):.3f}")
    assert min(np.mean(single), np.mean(difference)) >= bound
