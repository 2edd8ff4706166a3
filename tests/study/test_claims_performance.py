"""Claims on performance, judged on simulated studies whose truth is known: none, planted, reversed, and incomplete."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lora_analysis.study.claims.budgets import pair_against_one
from lora_analysis.study.claims.gains import Config, extreme, held_out_gains
from lora_analysis.study.claims.performance import PERFORMANCE_CLAIMS, performance_claims
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.resampling import Estimate, crossed_mean

GROUPS = 60
PLAN = Plan(
    setting={},
    task="task",
    recipe=Recipe(steps=10, batch_size=8, lr={"lora": 0.01, "full": 0.001}, alpha=8.0),
    target_sets=(("q",), ("q", "v"), ("q", "k", "v", "o")),
    ranks=(1, 4, 8, 64),
    seeds=(0, 1, 2),
    budget=((("k",), 8), (("v",), 8), (("o",), 8)),
    controls=(),
    sizes=(100,),
)


def simulated(plan, gain, rng, *, shared=0.005, own=0.005, item=0.1, heterogeneity=0.3, accuracy=False):
    """Tables of a study in which a run gains ``gain(run)`` nats, more in some groups than in others.

    ``shared`` is what a seed does to all runs, ``own`` what it does to one, ``item`` the noise of one item.
    """
    items = np.maximum(1, np.round(rng.lognormal(1.5, 1.2, GROUPS)))
    before, slope = rng.normal(1.6, 0.4, GROUPS), 1 + heterogeneity * rng.normal(size=GROUPS)
    slope += 1 - np.average(slope, weights=items)  # the mean gain is the planted one
    seeds = {seed: rng.normal(0, shared) for seed in plan.seeds}
    rows, outcomes = [], []
    for run in plan.runs():
        losses = before.copy()
        if run.method != "frozen":
            noise = seeds[run.init_seed] + rng.normal(0, own) + item * rng.normal(size=GROUPS) / np.sqrt(items)
            losses += noise - gain(run) * slope
        rows.append(
            {
                "run": run.name,
                "task": run.task,
                "method": run.method,
                "targets": "+".join(run.targets),
                "r": run.r,
                "init_seed": run.init_seed,
                "data_seed": run.data_seed,
                "size": math.nan if run.size is None else run.size,
                "trainable_parameters": 1000 * len(run.targets) * run.r,
            }
        )
        outcomes.append(losses)
    found = np.concatenate(outcomes)
    every = np.tile(items, len(rows))
    columns = {
        "run": np.repeat([row["run"] for row in rows], GROUPS),
        "group": np.tile([f"g{g:03}" for g in range(GROUPS)], len(rows)),
        "items": every,
        "loss_sum": found * every,
        "correct_sum": (1 - found / 4) * every if accuracy else math.nan,
    }
    return pd.DataFrame(rows), pd.DataFrame(columns)


def verdicts(gain, *, studies, plan=PLAN, seed=0, **options):
    """How often each claim came out how, over simulated studies."""
    rng = np.random.default_rng(seed)
    found = {name: Counter() for name in PERFORMANCE_CLAIMS}
    for _ in range(studies):
        for claim in performance_claims(*simulated(plan, gain, rng, **options), plan):
            found[claim.id][claim.verdict] += 1
    return found


def as_claimed(run: Run) -> float:
    """A world in which all claims hold."""
    if run.targets in {("q",), ("k",)}:
        return 0.15 if run.r == 1 else 0.3
    return 0.4 if len(run.targets) == 1 else 0.6


def reversed_claims(run: Run) -> float:
    """A world in which all claims are wrong."""
    if run.method == "full":
        return 0.6
    if run.size is not None:
        return 0.1
    if run.targets == ("q", "v"):
        return {1: 0.05, 4: 0.2, 8: 0.3, 64: 0.5}[run.r]
    return 0.6


NOISE = {
    "of runs and items": {},
    # The hardest case: what a seed does looks like a gain, and like the same one, in all runs.
    "of seeds": {"shared": 0.02, "own": 0.002, "item": 0.01},
}


@pytest.fixture(scope="module", params=NOISE)
def nothing(request):
    return verdicts(lambda run: 0.0, studies=500, **NOISE[request.param])


@pytest.fixture(scope="module")
def claimed():
    rng = np.random.default_rng(1)
    return {claim.id: claim for claim in performance_claims(*simulated(PLAN, as_claimed, rng, accuracy=True), PLAN)}


@pytest.mark.parametrize("claim", PERFORMANCE_CLAIMS)
def test_where_nothing_is_gained_nothing_is_reproduced(nothing, claim):
    level, studies = 0.025, 500
    print(claim, dict(nothing[claim]))
    assert nothing[claim]["reproduced"] <= studies * level + 3 * math.sqrt(studies * level * (1 - level))
    assert nothing[claim]["not_testable_at_this_scale"] >= 0.9 * studies


def test_where_all_gain_alike_only_equality_is_reproduced():
    studies, level = 100, 0.025
    found = verdicts(lambda run: 0.5, studies=studies, seed=2)
    print({name: dict(one) for name, one in found.items()})
    bound = studies * level + 3 * math.sqrt(studies * level * (1 - level))
    for claim in ("C1", "C2", "C3b"):
        assert found[claim]["reproduced"] <= bound
        assert found[claim]["contradicted"] <= bound
    for claim in ("C3", "C16"):
        assert found[claim]["reproduced"] > 0.9 * studies
    for claim in ("C3", "C14", "C15", "C16"):
        assert found[claim]["contradicted"] == 0


def test_planted_effects_are_reproduced():
    found = verdicts(as_claimed, studies=20, seed=3)
    print({name: dict(one) for name, one in found.items()})
    for claim in ("C1", "C2", "C3", "C3b", "C16"):
        assert found[claim]["reproduced"] >= 18


def test_reversed_effects_are_contradicted():
    found = verdicts(reversed_claims, studies=20, seed=4, heterogeneity=0.15)
    print({name: dict(one) for name, one in found.items()})
    for claim in PERFORMANCE_CLAIMS:
        assert found[claim]["contradicted"] >= 18, claim


def test_a_plateau_is_reproduced_with_enough_seeds():
    plan = replace(PLAN, seeds=tuple(range(8)))
    found = verdicts(as_claimed, studies=20, plan=plan, seed=5, item=0.02, heterogeneity=0.02)
    assert min(found[claim]["reproduced"] for claim in ("C14", "C15")) >= 17


@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.01), (0.01, 0.01), (0.03, 0.01)])
def test_a_difference_as_large_as_the_margin_is_called_a_plateau_no_more_often_than_the_level(shared, own):
    plan = replace(PLAN, ranks=(1, 4, 64), budget=(), sizes=())
    margin = plan.margins.equivalence_sds * math.hypot(shared, own)
    studies, level = 200, 0.05
    found = verdicts(
        lambda run: 0.5 + (margin if run.r == 64 else 0.0),
        studies=studies,
        plan=plan,
        seed=6,
        shared=shared,
        own=own,
        item=0.0,
        heterogeneity=0.0,
    )
    print(shared, own, dict(found["C14"]))
    assert found["C14"]["reproduced"] <= studies * level + 3 * math.sqrt(studies * level * (1 - level))


def test_a_margin_as_large_as_the_gain_shows_no_plateau():
    plan = replace(PLAN, seeds=tuple(range(8)))
    noise = {"shared": 0.0, "own": 0.02, "item": 0.01}
    tables = simulated(plan, lambda run: 0.03, np.random.default_rng(15), **noise)
    found = {claim.id: claim for claim in performance_claims(*tables, plan)}
    for name in ("C14", "C15"):
        assert found[name].verdict == "not_testable_at_this_scale"
        assert "the margin is no smaller than the gain" in found[name].why


def test_every_claim_says_what_was_found_and_against_what(claimed):
    assert list(claimed) == list(PERFORMANCE_CLAIMS)
    for claim in claimed.values():
        assert claim.verdict not in {"not_attempted", "not_testable_at_this_scale"}, claim
        assert claim.estimate is not None
        assert claim.interval is not None
        assert claim.interval[0] < claim.estimate < claim.interval[1]
        assert claim.mde is not None
        assert claim.mde > 0
        assert claim.p is not None
        assert 0 < claim.p < 1
        assert claim.runs >= 6
        assert claim.cells == GROUPS
        assert "points" in claim.why, claim.why


def test_estimates_are_near_what_was_planted(claimed):
    planted = {"C1": 0.2, "C2": -0.3, "C3": 1.0, "C3b": -0.5, "C14": 0.0, "C15": 0.0, "C16": 0.06}
    for name, value in planted.items():
        assert claimed[name].estimate == pytest.approx(value, abs=0.06), name


def test_the_same_tables_give_the_same_claims_in_any_order_of_rows():
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(7))
    shuffled = runs.sample(frac=1, random_state=1), outcomes.sample(frac=1, random_state=2)
    for one, other in zip(performance_claims(runs, outcomes, PLAN), performance_claims(*shuffled, PLAN), strict=True):
        assert (one.id, one.verdict, one.runs) == (other.id, other.verdict, other.runs)
        assert one.estimate == pytest.approx(other.estimate)
        assert one.interval == pytest.approx(other.interval)
    assert performance_claims(runs, outcomes, PLAN) == performance_claims(runs, outcomes, PLAN)


@pytest.mark.parametrize("missing", ["frozen", "lora"])
def test_without_its_runs_a_claim_is_not_attempted_and_says_what_it_needs(missing):
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(8))
    left = runs[runs["method"] != missing]
    found = performance_claims(left, outcomes[outcomes["run"].isin(left["run"])], PLAN)
    assert [claim.id for claim in found] == list(PERFORMANCE_CLAIMS)
    assert {claim.verdict for claim in found} == {"not_attempted"}
    assert all(claim.why.startswith("Needs runs of") for claim in found)


def test_with_one_seed_nothing_can_be_tested():
    plan = replace(PLAN, seeds=(0,))
    found = performance_claims(*simulated(plan, as_claimed, np.random.default_rng(9)), plan)
    assert {claim.verdict for claim in found} == {"not_testable_at_this_scale"}
    assert all("two seeds" in claim.why for claim in found)


def test_seeds_that_some_runs_lack_are_left_out():
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(10))
    left = runs[~((runs["targets"] == "k") & (runs["init_seed"] == 2))]
    claim = PERFORMANCE_CLAIMS["C2"](held_out_gains(left, outcomes, PLAN), held_out_gains(left, outcomes, PLAN), PLAN)
    assert claim.verdict != "not_attempted"
    assert claim.runs == 3 + 3 + 2


def test_gains_are_the_frozen_loss_minus_the_run_s_and_leave_crossed_seeds_out():
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(11))
    gains = held_out_gains(runs, outcomes, PLAN)
    config = Config("lora", "q+v", 64)
    assert gains.seeds(config) == [0, 1, 2]
    total = outcomes.groupby("run")[["loss_sum", "items"]].sum()
    losses = total["loss_sum"] / total["items"]
    expected = losses["task-frozen"] - losses["task-q-v-r64-init1-data1"]
    assert gains.sums[config][1].sum() / gains.items.sum() == pytest.approx(expected)


def test_runs_measured_on_other_items_are_refused():
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(12))
    with pytest.raises(ValueError, match="same groups of items"):
        held_out_gains(runs, outcomes.iloc[:-1], PLAN)


def test_the_budget_judged_is_the_one_with_most_single_projections():
    runs, outcomes = simulated(PLAN, as_claimed, np.random.default_rng(13))
    gains = held_out_gains(runs, outcomes, PLAN)
    claim = pair_against_one(gains, held_out_gains(runs, outcomes, PLAN, metric="accuracy"), PLAN)
    assert "{q,v} r=4 minus {" in claim.why
    assert "8,000 parameters" in claim.why
    assert all(f"{{{name}}} r=8" in claim.why for name in "qkvo")


def test_the_interval_of_the_smallest_mean_holds_it_although_it_was_picked():
    rng = np.random.default_rng(14)
    items, covered = np.full(40, 5.0), []
    for _ in range(1000):
        parts = [crossed_mean(5 * (rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (3, 40))), items) for _ in range(4)]
        low, high = extreme(parts, 0.95).interval
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000)


def test_the_smallest_of_one_is_that_one():
    one = Estimate(0.3, (0.01,), (5.0,))
    found = extreme([one], 0.95)
    assert (found.which, found.value, found.interval) == (0, 0.3, pytest.approx(one.interval(0.95)))
