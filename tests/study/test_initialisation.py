import math

import pandas as pd
import pytest
import torch

from lora_analysis.measures.shared_start import SHARED, shared_rows
from lora_analysis.study.claims.initialisation import shared_starts
from lora_analysis.training.initial import initial_down

D = 64


def drawn(seed, r=8, d=D):
    return torch.randn(r, d, generator=torch.Generator().manual_seed(seed))


def trained(A, seed, *, moved=0.5, common=None):
    """A after training moved it in directions of its own, and in one that all runs learn."""
    step = torch.randn(A.shape, generator=torch.Generator().manual_seed(1000 + seed))
    learned = A + moved * step
    if common is not None:
        strength = torch.randn(len(A), 1, generator=torch.Generator().manual_seed(2000 + seed))
        learned = learned + strength * common
    return learned


def test_equal_draws_are_shared_up_to_sign_scale_and_order():
    A = drawn(0)
    signs = torch.tensor([1.0, -1.0, 2.0, 0.1, 1.0, -3.0, 1.0, 1.0])[:, None]
    assert shared_rows(A, (signs * A)[torch.randperm(8, generator=torch.Generator().manual_seed(1))]) == 1.0
    assert shared_rows(A, A.to(torch.bfloat16)) == 1.0


@pytest.mark.parametrize("r", [1, 4, 8])
def test_a_prefix_of_a_larger_draw_is_shared(r):
    large = drawn(3, r=32)
    assert shared_rows(large[:r], large) == shared_rows(large, large[:r]) == 1.0
    half = torch.cat([large[:r], drawn(4, r=r)])
    assert shared_rows(half, large) == 0.5


def test_independent_draws_are_never_taken_for_shared():
    shares = [shared_rows(drawn(seed, r=4), drawn(10_000 + seed, r=16)) for seed in range(500)]
    shares += [shared_rows(drawn(seed, r=16), drawn(10_000 + seed, r=16), trained=True) for seed in range(500)]
    assert max(shares) == 0.0


def test_the_projects_own_draws_are_shared_by_seed_and_never_across_ranks():
    names = [f"layer.{i}.query" for i in range(20)]
    first, again, other = ([initial_down(D, r=8, module=name, seed=seed) for name in names] for seed in (0, 0, 1))
    large = [initial_down(D, r=32, module=name, seed=0) for name in names]
    assert all(shared_rows(a, b) == 1.0 for a, b in zip(first, again, strict=True))
    assert all(shared_rows(a, b) == 0.0 for a, b in zip(first, other, strict=True))
    assert all(shared_rows(a, b) == 0.0 for a, b in zip(first, large, strict=True))


@pytest.mark.parametrize("common", [None, torch.ones(384) / 2])
def test_a_start_that_is_not_known_is_seen_in_what_became_of_it(common):
    """Also where both runs learned one direction, which is no sign of a shared start."""
    false_alarms, found = [], []
    for seed in range(100):
        A, B = drawn(seed, d=384), drawn(5000 + seed, d=384)
        one = trained(A, 3 * seed, common=common)
        found.append(shared_rows(one, trained(A, 3 * seed + 1, common=common), trained=True))
        false_alarms.append(shared_rows(one, trained(B, 3 * seed + 2, common=common), trained=True))
    # Over the modules of a pair, here four.
    pairs = [sum(found[i : i + 4]) / 4 for i in range(0, 100, 4)]
    assert min(pairs) > 2 * SHARED
    assert sum(found) / 100 > 0.5
    assert max(false_alarms) == 0  # one row that a learned direction made alike is not counted


@pytest.mark.parametrize("r", [2, 3, 4])
def test_what_both_have_learned_is_no_shared_start_however_few_the_rows(r):
    common = torch.ones(384) / 2
    shares = [
        shared_rows(
            trained(drawn(seed, r=r, d=384), 3 * seed, common=common),
            trained(drawn(7000 + seed, r=64, d=384), 3 * seed + 1, common=common),
            trained=True,
        )
        for seed in range(100)
    ]
    assert sum(shares) / 100 < SHARED / 4


def test_single_trained_rows_cannot_be_told():
    assert math.isnan(shared_rows(drawn(0, r=1), drawn(0, r=1), trained=True))
    with pytest.raises(ValueError, match="expected factors of one width"):
        shared_rows(drawn(0), drawn(0, d=32))


def test_only_pairs_that_should_differ_are_named():
    columns = ["kind", "run_a", "run_b", "module", "source", "r_a", "r_b", "rows_shared", "expected"]
    table = pd.DataFrame(
        [
            ("seeds", "a", "b", "q", "A0", 8, 8, 1.0, False),
            ("seeds", "a", "b", "v", "A0", 8, 8, 1.0, False),
            ("seeds", "a", "c", "q", "A0", 8, 8, 0.0, False),
            ("seeds", "b", "c", "q", "A", 1, 1, math.nan, False),
            ("same_init", "a", "d", "q", "A0", 8, 8, 1.0, True),
        ],
        columns=columns,
    )
    assert shared_starts(table, ("seeds", "same_init")) == ["a and b (100% of rows)"]
    assert shared_starts(table, ("ranks",)) == shared_starts(None, ("seeds",)) == []
