"""What the claims say of studies whose truth is known: nothing there, something planted, its reverse."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.study import subspace_evidence
from lora_analysis.study.chance import Nulls
from lora_analysis.study.claims.calibration import random_factors
from lora_analysis.study.claims.replicates import in_every, interval, majority_p, replicate
from lora_analysis.study.claims.seeds import task_directions
from lora_analysis.study.claims.subspaces import subspace_claims
from lora_analysis.study.compared import amplified_ranks, compared_pairs, rank_pair, top_directions_shape
from lora_analysis.study.plan import Plan, Recipe
from lora_analysis.study.subspace_evidence import OVERLAPS, subspace_tables
from lora_analysis.update import LowRankUpdate

IDS = ["C4", "C4b", "C5", "C6", "C6b", "C7", "C8", "C9", "C10", "C11", "C11b", "C12", "C13", "C17"]
D = 64
PLAN = Plan(
    {},
    "main",
    Recipe(1, 1, {"lora": 1e-3}, 8.0),
    target_sets=(("q", "v"),),
    ranks=(4, 8),
    other_tasks=("second", "third"),
)
ALONE = replace(PLAN, other_tasks=())
FIVE = replace(ALONE, seeds=(0, 1, 2, 3, 4))
"""As many seeds as a sign test over seeds asks for."""
MODULES = [f"layer.{i}.{part}" for i in range(6) for part in ("query", "value")]
NULLS = Nulls(draws=999)
STUDIES = 20


def orthonormal(generator, d, k):
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q


def base_weights():
    """Matrices with a decaying spectrum, and their singular vectors."""
    generator = torch.Generator().manual_seed(99)
    found = {}
    for name in MODULES:
        U, V = orthonormal(generator, D, D), orthonormal(generator, D, D)
        S = 4.0 / torch.arange(1, D + 1, dtype=torch.float64).sqrt()
        found[name] = (U, S, V)
    return found


WEIGHTS = base_weights()
BASE = load_base({f"{name}.weight": (U * S) @ V.mT for name, (U, S, V) in WEIGHTS.items()})


class Planted:
    """A study in memory: Gaussian factors, and beside them what ``plant`` gives for a run and a module.

    ``plant(run, module, generator)`` returns (left, right), as many columns each, which become strong directions.
    """

    def __init__(self, seed, plant=None, *, plan=PLAN, start=None, missing=()):
        self.plan, self.base = plan, BASE
        generator = torch.Generator().manual_seed(seed)
        self.adapters, self.starts = {}, {}
        for run in plan.runs():
            if run.method != "lora" or run.name in missing:
                continue
            updates, starts = {}, {}
            for name in MODULES:
                up = torch.randn(D, run.r, generator=generator, dtype=torch.float64) / math.sqrt(D)
                down = torch.randn(run.r, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
                starts[name] = torch.randn(run.r, D, generator=generator, dtype=torch.float64)
                if plant is not None and (planted := plant(run, name, generator)) is not None:
                    left, right = planted
                    size = torch.linspace(6.0, 5.0, left.shape[1], dtype=torch.float64)
                    up[:, : left.shape[1]] = left * size
                    down[: left.shape[1]] = right.mT * size[:, None]
                if start is not None:
                    starts[name] = start(run, name)
                updates[name] = LowRankUpdate(up, down, 1.0)
            self.adapters[run.name] = Adapter(updates, source=run.name)
            self.starts[run.name] = starts

    def find(self, **columns):
        return list(self.adapters)

    def adapter(self, run):
        return self.adapters[run]

    def initial(self, run):
        return self.starts[run]

    def claims(self):
        return {claim.id: claim for claim in subspace_claims(subspace_tables(self, NULLS), self.plan)}


def fixed(key, k=1):
    """The same k directions on both sides whenever the key is the same."""
    generator = torch.Generator().manual_seed(abs(hash(key)) % 2**31 if not isinstance(key, int) else key)
    return orthonormal(generator, D, k), orthonormal(generator, D, k)


def of_module(module, offset=0):
    return 1000 * offset + MODULES.index(module)


@pytest.fixture(scope="module")
def null_studies():
    """Tables and claims of studies in which nothing is shared or aligned: what has a test of its own is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace_evidence, "GAUSSIAN_PAIRS", 0)
        patch.setattr(subspace_evidence, "WITH_FACTORS", ())
        tables = [subspace_tables(Planted(seed, plan=ALONE), NULLS) for seed in range(STUDIES)]
    return tables, [{claim.id: claim for claim in subspace_claims(table, ALONE)} for table in tables]


def test_nothing_is_reproduced_where_there_is_nothing(null_studies):
    _, found = null_studies
    for identifier in IDS:
        verdicts = [claims[identifier].verdict for claims in found]
        assert "reproduced" not in verdicts, identifier
        # Chance itself does not lie on the wrong side either.
        assert verdicts.count("contradicted") <= 1, identifier
        attempted = identifier not in ("C7", "C17")
        assert verdicts.count("not_attempted") == (0 if attempted else STUDIES)


def test_p_values_of_claims_are_valid_under_the_null(null_studies):
    _, found = null_studies
    for identifier in IDS:
        p = [claims[identifier].p for claims in found if claims[identifier].p is not None]
        # Three standard errors of a proportion over so many studies.
        assert not p or np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES), identifier


def test_p_values_of_modules_are_uniform_under_the_null(null_studies):
    tables, _ = null_studies
    overlaps = pd.concat(tables and [table["overlaps"] for table in tables])
    # One pair of each study: pairs that share a run are not independent.
    one = overlaps[(overlaps["kind"] == "ranks") & overlaps["run_a"].str.endswith("init0-data0")]
    one = one[one["target"] == "update"]
    assert len(one) == STUDIES * 2 * len(MODULES)
    for column in ("p_11", "p_1n", "p_m1"):
        assert stats.kstest(one[column], "uniform").pvalue > 1e-3, column
    # All Monte Carlo p share one set of draws, whose own error is 1/2 / sqrt(999) at most.
    for column in ("p_mn", "p_tail", "p_largest"):
        assert stats.kstest(one[column], "uniform").statistic < 0.03 + 1.63 / math.sqrt(len(one)), column
    amplified = pd.concat([table["amplification"] for table in tables])
    own = amplified[amplified["run"].str.endswith("r8-init0-data0") & (amplified["k"] == 8)]
    assert stats.kstest(own["p"], "uniform").statistic < 0.03 + 1.63 / math.sqrt(len(own))
    assert own["signed_positive"].mean() == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(8 * len(own)))


def test_tables_are_tidy_and_small_and_say_the_same_from_files(tmp_path):
    table = subspace_tables(Planted(0), NULLS)
    assert list(table) == ["overlaps", "initialisation", "amplification", "top_directions"]
    assert list(table["overlaps"]) == list(OVERLAPS)
    for name, rows in table.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
        assert (tmp_path / f"{name}.parquet").stat().st_size < 500_000
        assert not rows.duplicated().any()
    stored = {name: pd.read_parquet(tmp_path / f"{name}.parquet") for name in table}
    assert repr(subspace_claims(stored, PLAN)) == repr(subspace_claims(table, PLAN))


def test_a_shared_top_direction_is_found_and_its_tail_is_not():
    claims = Planted(1, lambda run, module, g: fixed(of_module(module))).claims()
    for identifier in ("C4", "C4b", "C5", "C6", "C8", "C7"):
        assert claims[identifier].verdict == "reproduced", claims[identifier]
    assert claims["C4"].estimate > 0.5
    assert claims["C4b"].estimate == pytest.approx(1.0, abs=0.3)
    assert claims["C6"].estimate == 1
    # q and v share alike, and so do tasks.
    assert claims["C6b"].verdict == claims["C17"].verdict == "not_reproduced"
    assert claims["C9"].verdict != "reproduced"
    assert "Holm" in claims["C4"].why


def test_a_shared_tail_contradicts_that_others_are_not_shared():
    claims = Planted(2, lambda run, module, g: fixed(of_module(module), 4)).claims()
    assert claims["C4b"].verdict == "contradicted"
    assert claims["C4b"].estimate > 2


@pytest.mark.parametrize(
    ("more", "less", "verdict"), [("query", "value", "reproduced"), ("value", "query", "contradicted")]
)
def test_projections_that_share_more_are_told(more, less, verdict):
    sizes = {more: 4, less: 1}

    def plant(run, module, generator):
        return fixed(of_module(module), sizes[module.rpartition(".")[2]])

    assert Planted(3, plant, plan=FIVE).claims()["C6b"].verdict == verdict
    # What all modules of a run have in common could make three seeds agree by chance.
    limited = {"reproduced": "consistent_underpowered", "contradicted": "not_reproduced"}
    assert Planted(3, plant).claims()["C6b"].verdict == limited[verdict]
    few = replace(PLAN, ranks=(4, 8))
    tables = subspace_tables(Planted(3, lambda run, module, g: fixed(of_module(module), 1), plan=few), NULLS)
    three = tables["overlaps"][tables["overlaps"]["layer"] < 3]
    found = {claim.id: claim for claim in subspace_claims({**tables, "overlaps": three}, PLAN)}
    assert found["C6b"].verdict == "not_testable_at_this_scale"
    assert "at best 0.12" in found["C6b"].why


def test_sharing_in_a_minority_of_modules_does_not_pass_for_all():
    def plant(run, module, generator):
        return fixed(of_module(module)) if of_module(module) < 4 else None

    claims = Planted(4, plant).claims()
    assert claims["C4"].verdict == claims["C6"].verdict == claims["C8"].verdict == "not_reproduced"
    assert "33%" in claims["C4"].why


def aligned(share_of_top, *, sign=1.0, columns=4, among=(4, 20)):
    """Directions that mix W's own pairs with others, or its bottom ones."""

    def plant(run, module, generator):
        U, _, V = WEIGHTS[module]
        chosen = torch.randperm(among[1] - among[0], generator=generator)[:columns] + among[0]
        left = math.sqrt(share_of_top) * U[:, chosen]
        right = math.sqrt(share_of_top) * V[:, chosen]
        rest = math.sqrt(1 - share_of_top)
        left = left + rest * orthonormal(generator, D, columns)
        right = right + rest * orthonormal(generator, D, columns)
        return torch.linalg.qr(left).Q * sign_of(left), torch.linalg.qr(right).Q * sign_of(right) * sign

    return plant


def sign_of(matrix):
    return torch.linalg.qr(matrix).R.diagonal().sign()


def test_alignment_outside_the_top_is_amplification_of_what_w_does_not_emphasise():
    claims = Planted(5, aligned(0.8)).claims()
    for identifier in ("C9", "C10", "C11b"):
        assert claims[identifier].verdict == "reproduced", claims[identifier]
    assert claims["C9"].estimate > 1.1
    assert claims["C11"].verdict == "not_testable_at_this_scale"
    assert claims["C11"].null_mean > claims["C11"].estimate
    # No two runs chose alike.
    assert claims["C4"].verdict != "reproduced"


def test_suppression_is_not_amplification():
    claims = Planted(6, aligned(0.9, sign=-1.0)).claims()
    assert claims["C9"].verdict == "reproduced"
    assert claims["C11b"].verdict == "contradicted"


def test_an_update_in_the_top_directions_of_w_contradicts_that_it_avoids_them():
    plan = replace(PLAN, ranks=(4, 5))
    claims = Planted(7, aligned(1.0, among=(0, 4)), plan=plan).claims()
    assert claims["C10"].verdict == "contradicted"
    assert claims["C10"].estimate > 0.9
    assert claims["C13"].verdict == "contradicted"  # contained in W's top share


def test_an_update_away_from_w_contradicts_alignment():
    def unpaired(run, module, generator):
        U, _, V = WEIGHTS[module]
        return U[:, 56:60], V[:, 60:64]

    claims = Planted(8, unpaired, plan=replace(PLAN, ranks=(4, 5))).claims()
    assert claims["C9"].verdict == "contradicted"
    assert claims["C9"].estimate < 1


@pytest.mark.parametrize(("aligned_rank", "verdict"), [(8, "reproduced"), (4, "contradicted")])
def test_ranks_are_compared_at_equal_truncation(aligned_rank, verdict):
    strong = aligned(0.95, among=(1, 5))

    def plant(run, module, generator):
        return strong(run, module, generator) if run.r == aligned_rank else None

    assert Planted(9, plant, plan=FIVE).claims()["C12"].verdict == verdict
    assert Planted(9, plant).claims()["C12"].verdict not in ("reproduced", "contradicted")


def test_larger_ranks_that_pick_up_more_of_the_top_are_seen():
    weak, strong = aligned(0.25, among=(0, 5)), aligned(0.42, among=(0, 5))
    rising = Planted(10, lambda run, module, g: (weak if run.r == 4 else strong)(run, module, g), plan=FIVE)
    assert rising.claims()["C13"].verdict == "reproduced"
    falling = Planted(10, lambda run, module, g: (strong if run.r == 4 else weak)(run, module, g), plan=FIVE)
    assert falling.claims()["C13"].verdict == "contradicted"


def test_tasks_with_directions_of_their_own_are_told_from_seeds():
    tasks = {"main": 1, "second": 2, "third": 3}
    claims = Planted(11, lambda run, module, g: fixed(of_module(module, tasks[run.task]), 2)).claims()
    assert claims["C17"].verdict == "reproduced", claims["C17"]
    assert claims["C17"].p == pytest.approx(1 / 36)
    one = replace(PLAN, other_tasks=("second",))
    claims = Planted(11, lambda run, module, g: fixed(of_module(module, tasks[run.task]), 2), plan=one).claims()
    assert claims["C17"].verdict == "consistent_underpowered"
    assert "at best 0.25" in claims["C17"].why


def test_relabelling_of_tasks_is_valid_where_runs_and_seeds_have_effects_of_their_own():
    rng = np.random.default_rng(0)
    names = {
        (run.task, run.init_seed): run.name for run in PLAN.runs() if run.r == 8 and run.data_seed == run.init_seed
    }
    pairs = [
        (a, b) for a, b in itertools.combinations(sorted(names), 2) if a[1] != b[1]
    ]  # runs of one seed are not compared
    p = []
    for number in range(300):
        shared = number % 3 > 0  # else two seeds of a task have nothing in common
        own = {key: rng.normal(0, 0.1) for key in names}
        seed = {pair: rng.normal(0, 0.1) for pair in itertools.combinations(PLAN.seeds, 2)}
        rows = [
            {
                "kind": "tasks" if a[0] != b[0] else "task_seeds",
                "run_a": names[a],
                "run_b": names[b],
                "target": "update",
                "side": "in",
                "d": D,
                "m": 8,
                "n": 8,
                "p_mn": 1e-9 if shared else rng.uniform(),
                "phi_mn": 0.5 + own[a] + own[b] + seed[tuple(sorted((a[1], b[1])))] + rng.normal(0, 0.02),
            }
            for a, b in pairs
        ]
        claim = task_directions({"overlaps": pd.DataFrame(rows)}, PLAN)
        assert shared or claim.verdict == "not_reproduced"
        p.append(claim.p)
    # In steps of 1/36; three standard errors of a proportion of 0.05 over 300 studies.
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 0.038
    assert stats.kstest(p, "uniform").statistic < 1 / 36 + 0.1


def test_a_shared_start_makes_likeness_untestable():
    """The seeds' A0 planted equal; or the small rank's a prefix of the large one's."""

    def equal(run, module):
        generator = torch.Generator().manual_seed(of_module(module) + 7 * run.r)
        return torch.randn(run.r, D, generator=generator, dtype=torch.float64)

    claims = Planted(12, lambda run, module, g: fixed(of_module(module)), start=equal).claims()
    for identifier in ("C6", "C6b", "C8", "C17"):
        assert claims[identifier].verdict == "not_testable_at_this_scale"
        assert "share their initial A" in claims[identifier].why
    assert claims["C4"].verdict == "reproduced"

    def prefix(run, module):
        generator = torch.Generator().manual_seed(of_module(module) + 100 * run.init_seed)
        return torch.randn(8, D, generator=generator, dtype=torch.float64)[: run.r]

    claims = Planted(12, lambda run, module, g: fixed(of_module(module)), start=prefix).claims()
    for identifier in ("C4", "C4b", "C5", "C8"):
        assert claims[identifier].verdict == "not_testable_at_this_scale"
    assert claims["C6"].verdict == "reproduced"


def test_missing_runs_are_named_and_claims_never_dropped():
    names = {run.name for run in PLAN.runs()}
    empty = subspace_tables(Planted(0, missing=names), NULLS)
    claims = subspace_claims(empty, PLAN)
    assert [claim.id for claim in claims] == IDS
    assert {claim.verdict for claim in claims} == {"not_attempted"}
    assert all(claim.why.startswith("No finished runs to tell by: it needs") for claim in claims)
    one_seed = {name for name in names if "init0-data0" not in name}
    found = Planted(13, lambda run, module, g: fixed(of_module(module)), missing=one_seed).claims()
    assert found["C4"].verdict == "consistent_underpowered"  # one pair is no replication
    assert found["C6"].verdict == found["C17"].verdict == "not_attempted"
    assert found["C7"].verdict == "reproduced"


def test_ranks_of_one_seed_are_one_replication():
    later = {run.name for run in ALONE.runs() if run.init_seed or run.data_seed}
    claims = Planted(5, aligned(0.8), plan=ALONE, missing=later).claims()
    for identifier in ("C9", "C10", "C11b"):
        assert claims[identifier].verdict == "consistent_underpowered", claims[identifier]
        assert claims[identifier].runs == len(ALONE.ranks)


def test_all_layers_need_two_pairs_of_seeds_and_draws_enough():
    study = Planted(1, lambda run, module, g: fixed(of_module(module)), plan=replace(ALONE, seeds=(0, 1)))
    found = {claim.id: claim for claim in subspace_claims(subspace_tables(study, NULLS), study.plan)}
    assert found["C8"].verdict == found["C6"].verdict == "consistent_underpowered"
    few = {claim.id: claim for claim in subspace_claims(subspace_tables(study, Nulls(draws=99)), study.plan)}
    assert few["C8"].verdict == few["C6"].verdict == "not_testable_at_this_scale"


def test_calibration_says_no_score_where_rank_one_has_none():
    claim = Planted(1, plan=replace(ALONE, ranks=(1,))).claims()["C7"]
    assert claim.verdict == "not_testable_at_this_scale"
    assert claim.estimate is None
    assert "no standard scores" in claim.why


def test_what_is_printed_of_an_interval_is_what_it_is():
    shared = Planted(1, lambda run, module, g: fixed(of_module(module)), plan=replace(ALONE, seeds=(0, 1, 2, 3, 4)))
    claims = shared.claims()
    assert "95 % interval of the median over 10 pairs of runs" in claims["C6"].why
    assert "range over 5 pairs of runs" in claims["C4"].why
    assert "if modules are independent; were they not, 5 seeds agree by chance in 0.031" in claims["C12"].why


def test_both_sides_of_a_module_are_one_sign():
    claims = Planted(10, aligned(0.42, among=(0, 5))).claims()
    assert f"sign tests of 3 seeds over {len(MODULES)} modules" in claims["C13"].why
    assert "3 tasks (main, second, third)" in claims["C17"].why


def test_a_sound_tool_is_calibrated_whatever_the_draw():
    names = {run.name for run in PLAN.runs()}
    alone = Planted(0, missing=names - {"main-q-v-r8-init0-data0"})
    for seed in range(10):
        claim = random_factors(subspace_tables(alone, Nulls(draws=999, seed=seed)), PLAN)
        assert claim.verdict == "reproduced", claim
        assert claim.cells == 2 * 3 * 2 * len(MODULES)  # shapes, pairs, sides


def test_a_tool_that_is_not_calibrated_says_stop():
    tables = subspace_tables(Planted(0), NULLS)
    wrong = tables["overlaps"].copy()
    wrong["p_11"] = wrong["p_11"] ** 2
    claim = random_factors({"overlaps": wrong}, PLAN)
    assert claim.verdict == "contradicted"
    assert "stop" in claim.why


def test_what_is_compared_follows_the_plan():
    plan = replace(PLAN, ranks=(1, 2, 4, 8, 64))
    assert (rank_pair(plan), amplified_ranks(plan), top_directions_shape(plan)) == ((8, 64), (4, 64), 4)
    assert rank_pair(replace(PLAN, ranks=(1, 4, 16))) == (4, 16)
    assert rank_pair(replace(PLAN, ranks=(4,))) is None
    assert top_directions_shape(replace(PLAN, ranks=(1, 2, 16))) == 2
    planned = {run.name for run in plan.runs()}
    for kind, a, b in compared_pairs(plan):
        assert {a.name, b.name} <= planned
        assert (a.init_seed == b.init_seed and a.r == b.r) == (kind == "same_init")


def test_replicates_are_combined_without_multiplying():
    assert majority_p([0.01] * 4) == 0.04
    assert math.isnan(majority_p([]))
    found = replicate(["a", "b"], [1.0, 2.0, math.nan], [0.01, 0.02, math.nan], level=0.05)
    assert (found.effect, found.p, found.share, found.cells) == (1.5, 0.02, 1.0, 2)
    assert in_every([], [], level=0.05) == "not_testable_at_this_scale"
    assert interval([1.0, math.inf], 0.95) is None
    rng = np.random.default_rng(0)
    p = [majority_p(rng.uniform(size=12).tolist()) for _ in range(500)]
    assert np.mean(np.array(p) < 0.05) <= 0.05
    # Five of twelve that are there are not more than half.
    p = [majority_p([1e-9] * 6 + rng.uniform(size=6).tolist()) for _ in range(500)]
    assert np.mean(np.array(p) < 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)
