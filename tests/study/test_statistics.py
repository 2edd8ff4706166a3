import numpy as np
import pytest

from lora_analysis.study.statistics import paired_difference


def test_one_observation_per_group_gives_students_interval():
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40))
    found = paired_difference(a, b, [str(i) for i in range(40)])
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_copies_of_an_observation_in_its_group_add_no_precision():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30))
    groups = [str(i) for i in range(30)]
    once = paired_difference(a, b, groups)
    thrice = paired_difference(np.tile(a, 3), np.tile(b, 3), groups * 3)
    assert thrice == pytest.approx(once)


def test_intervals_of_clustered_data_cover_the_truth():
    rng = np.random.default_rng(2)
    groups = [str(i // 20) for i in range(800)]
    covered = 0
    for _ in range(400):
        shared = np.repeat(rng.normal(size=40), 20)  # what texts of one group have in common
        d = shared + rng.normal(size=800)
        found = paired_difference(d, np.zeros(800), groups)
        covered += abs(found.mean) <= found.half_width
    # Three standard errors of a proportion of 0.95 over 400 trials.
    assert covered / 400 == pytest.approx(0.95, abs=0.033)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="expected one group per paired observation"):
        paired_difference([1, 0], [0, 0], ["a"])
    with pytest.raises(ValueError, match="expected at least two"):
        paired_difference([1, 0], [0, 0], ["a", "a"])
    with pytest.raises(ValueError, match="confidence"):
        paired_difference([1, 0], [0, 0], ["a", "b"], confidence=95)
