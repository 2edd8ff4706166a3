"""Intruders by the dense definition, by the core, and by brackets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_analysis as la
from lora_analysis.measures.adapted_directions import SIDES, adapted_directions, random_directions
from lora_analysis.measures.intruders import intruders, largest_cosine
from lora_analysis.measures.triples import Triples, leading_triples
from lora_analysis.update import Svd

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(m, n, r, *, strength, decay, seed, old=False):
    """A base matrix and an update; ``old`` turns one direction of the update to one that W has."""
    weight = normal(m, n, seed=seed) * torch.arange(1.0, n + 1) ** -decay
    up, down = normal(m, r, seed=seed + 1), normal(r, n, seed=seed + 2)
    if old:
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        number = min(m, n) // 2
        up[:, 0], down[0] = 3 * math.sqrt(m) * U[:, number], math.sqrt(n) * Vh[number]
    return weight, la.LowRankUpdate(up, down, strength / math.sqrt(r) / (m * n) ** 0.25)


def dense(weight, change, k):
    """The definition: full SVDs of both, and all vectors of W."""
    U0, _, V0 = torch.linalg.svd(weight, full_matrices=False)
    U, S, V = torch.linalg.svd(weight + change.dense(), full_matrices=False)
    return S[:k], {"out": largest_cosine(U[:, :k], U0), "in": largest_cosine(V[:k].mT, V0.mT)}


SHAPES = [(20, 16), (16, 20), (24, 24), (40, 33), (64, 64), (50, 90), (120, 100), (210, 260), (200, 200), (256, 230)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_counts_and_shares_equal_the_dense_definition(m, n, seed):
    r = (1, 2, 4, 8, 3)[seed]
    weight, change = case(
        m, n, r, strength=(0.3, 1, 2, 4, 8)[(seed + m) % 5], decay=(0, 0.3, 1)[seed % 3], seed=seed, old=seed > 2
    )
    k = min(10, m, n)
    S, cosines = dense(weight, change, k)
    found = adapted_directions(weight, leading_triples(weight, k), change.svd(), k)
    torch.testing.assert_close(found.S, S, rtol=1e-12, atol=0)
    for side in SIDES:
        bracket = found.cosines[side]
        assert (bracket.lower <= cosines[side] + 1e-9).all()
        assert (bracket.upper >= cosines[side] - 1e-9).all()
        assert (bracket.upper - bracket.lower).max() < 1e-8
        for threshold in THRESHOLDS:
            for top in {1, k // 2, k}:
                new = cosines[side][:top] < threshold
                counted = intruders(found, side, top, threshold)
                assert counted.intruders == int(new.sum())
                assert counted.undecided == 0
                energy = S[:top] ** 2
                assert counted.energy_share == pytest.approx(float(energy[new].sum() / energy.sum()), rel=1e-10)
                assert counted.max_cosine_min == pytest.approx(float(cosines[side][:top].min()), abs=1e-8)


def test_a_matrix_of_768_equals_the_dense_definition_whole_and_from_its_top():
    weight, change = case(768, 768, 8, strength=2, decay=0.5, seed=3, old=True)
    S, cosines = dense(weight, change, 10)
    whole = adapted_directions(weight, leading_triples(weight, 10), change.svd(), 10)
    part = adapted_directions(weight, leading_triples(weight, 64, complete=False), change.svd(), 10)
    torch.testing.assert_close(whole.S, S, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.S, S, rtol=1e-10, atol=0)
    for side in SIDES:
        torch.testing.assert_close(whole.cosines[side].lower, cosines[side], rtol=0, atol=1e-9)
        exact = intruders(whole, side, 10, 0.5)
        bracketed = intruders(part, side, 10, 0.5)
        assert exact.intruders == int((cosines[side] < 0.5).sum()) > 0
        assert bracketed.intruders == exact.intruders
        # The old direction, from the middle of W's spectrum, is the one that the top cannot tell.
        assert bracketed.undecided == 1


@settings(max_examples=40)
@given(
    m=st.integers(12, 90),
    n=st.integers(12, 90),
    r=st.integers(1, 6),
    strength=st.floats(0.01, 20),
    decay=st.sampled_from([0.0, 0.4, 1.5]),
    old=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_brackets_never_contradict_the_dense_definition(m, n, r, strength, decay, old, seed):
    weight, change = case(m, n, r, strength=strength, decay=decay, seed=seed, old=old)
    k = max(1, min(m, n) // 6)
    known = max(k, min(m, n) // 4)
    S, cosines = dense(weight, change, k)
    base = leading_triples(weight, known, complete=False)
    found = adapted_directions(weight, base, change.svd(), k, thresholds=THRESHOLDS)
    torch.testing.assert_close(found.S, S, rtol=1e-9, atol=0)
    for side in SIDES:
        assert (found.cosines[side].lower <= cosines[side] + 1e-8).all()
        assert (found.cosines[side].upper >= cosines[side] - 1e-8).all()
        for threshold in THRESHOLDS:
            counted = intruders(found, side, k, threshold)
            true = int((cosines[side] < threshold).sum())
            assert counted.intruders <= true <= counted.intruders + counted.undecided


def test_the_simple_bracket_decides_what_it_can_without_more_passes():
    weight = torch.diag(torch.arange(80.0, 0.0, -1.0, dtype=torch.float64))
    flat = torch.zeros(80, 1, dtype=torch.float64)
    flat[:10] = 10**-0.5
    change = Svd(flat, torch.tensor([1e6], dtype=torch.float64), flat.mT)
    base = leading_triples(weight, 20, complete=False)
    # 1/sqrt(10) with each of the first ten, and nothing beyond the top 20: both ends of the bracket know it.
    found = adapted_directions(weight, base, change, 1, steps=0)
    for side in SIDES:
        assert float(found.cosines[side].upper) == pytest.approx(10**-0.5, abs=1e-3)
        assert intruders(found, side, 1, 0.5).intruders == 1


@pytest.mark.parametrize(
    ("strength", "cosine"), [(1, 0.99572), (10, 0.49720), (40, 0.30076), (100, 0.26936), (1000, 0.25188)]
)
def test_a_growing_flat_direction_becomes_an_intruder_of_the_core_too(strength, cosine):
    weight = torch.diag(torch.arange(16, 0, -1, dtype=torch.float64))
    flat = torch.full((16, 1), 0.25, dtype=torch.float64)
    change = Svd(flat, torch.tensor([float(strength)]), flat.mT)
    found = adapted_directions(weight, leading_triples(weight, 1), change, 1)
    for side in SIDES:
        assert float(found.cosines[side].lower) == pytest.approx(cosine, abs=1e-5)
        assert intruders(found, side, 1, 0.5).intruders == (strength >= 10)


def test_an_old_direction_made_strong_is_undecided_from_the_top_and_no_intruder_from_all():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    fifth = torch.eye(5, dtype=torch.float64)[:, 4:]
    change = Svd(fifth, torch.tensor([10.0]), fifth.mT)
    whole = leading_triples(weight, 5)
    top = Triples(whole.svd.top(4), whole.errors[:4], complete=False)
    for base, (new, unsure) in {whole: (0, 0), top: (0, 1)}.items():
        found = adapted_directions(weight, base, change, 1)
        assert intruders(found, "out", 1, 0.5)[:2] == (new, unsure)


def test_turning_the_matrix_swaps_the_sides_and_scaling_both_changes_nothing():
    weight, change = case(40, 30, 3, strength=2, decay=0.3, seed=5)
    top = change.svd()
    found = adapted_directions(weight, leading_triples(weight, 8), top, 8)
    turned = adapted_directions(weight.mT, leading_triples(weight.mT, 8), Svd(top.V, top.S, top.U.mT), 8)
    scaled = adapted_directions(7 * weight, leading_triples(7 * weight, 8), Svd(top.U, 7 * top.S, top.Vh), 8)
    torch.testing.assert_close(found.cosines["out"], turned.cosines["in"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.cosines["in"], turned.cosines["out"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.cosines["in"], scaled.cosines["in"], rtol=0, atol=1e-9)
    torch.testing.assert_close(7 * found.S, scaled.S)


@pytest.mark.parametrize("shape", [(60, 60), (80, 50)])
def test_a_random_update_is_one_of_its_controls(shape):
    # The share of a random update and those of its controls come from one law: its rank among them is uniform.
    weight = normal(*shape) * torch.arange(1, shape[1] + 1) ** -0.3
    base, norm = leading_triples(weight, 6), float(weight.norm())
    S = torch.tensor([14.0, 13.0, 12.0], dtype=torch.float64)
    ranks = []
    for seed in range(60):
        U, V = (torch.linalg.qr(normal(d, 3, seed=1000 + 2 * seed + i)).Q for i, d in enumerate(shape))
        own = adapted_directions(weight, base, Svd(U, S, V.mT), 6)
        controls = random_directions(base, norm, shape, S, 6, draws=9, seed=seed)
        value = own.cosines["out"].lower.sum()
        ranks.append(sum(float(draw.cosines["out"].lower.sum()) < float(value) for draw in controls))
    mean = sum(ranks) / len(ranks)
    # Uniform on 0 … 9: mean 4.5, sd 2.87; four standard errors.
    assert abs(mean - 4.5) < 4 * 2.87 / math.sqrt(len(ranks))


def test_controls_add_to_leading_pairs_of_w_no_oftener_than_they_take_from_them():
    # W = diag(2, 0, …): ΔW along its pair makes σ_1 larger or smaller as u_1 v_1 is positive or negative.
    weight = torch.zeros(8, 8, dtype=torch.float64)
    weight[0, 0] = 2.0
    base = leading_triples(weight, 8, complete=True)
    S = torch.tensor([0.1], dtype=torch.float64)
    draws = random_directions(base, 2.0, (8, 8), S, 1, draws=400)
    larger = sum(float(draw.S[0]) > 2.0 for draw in draws)
    # Second order adds a little either way; a fair coin is within 200 ± 40.
    assert 160 < larger < 260


def test_the_control_from_the_top_of_w_agrees_with_that_from_all_of_it():
    weight, change = case(300, 280, 4, strength=1.1, decay=0.5, seed=7)
    norm, S = float(weight.norm()), change.svd().S
    shares = {}
    for complete in (True, False):
        base = leading_triples(weight, 64, complete=complete)
        draws = random_directions(base, norm, (300, 280), S, 10, draws=30, seed=1)
        shares[complete] = torch.tensor([intruders(draw, "out", 10, 0.5).energy_share for draw in draws])
    assert 0.05 < shares[True].mean() < 0.95
    assert float(shares[False].mean()) == pytest.approx(float(shares[True].mean()), abs=0.05)


def test_an_update_of_nothing_leaves_every_direction_old():
    weight = normal(30, 20)
    nothing = Svd(torch.zeros(30, 0), torch.zeros(0), torch.zeros(0, 20))
    found = adapted_directions(weight, leading_triples(weight, 5), nothing, 5)
    for side in SIDES:
        assert float(found.cosines[side].lower.min()) == pytest.approx(1, abs=1e-9)
    (draw,) = random_directions(leading_triples(weight, 5), float(weight.norm()), (30, 20), torch.zeros(2), 5, draws=1)
    assert intruders(draw, "in", 5, 0.9).energy_share == 0


def test_the_number_of_directions_and_the_threshold_are_checked():
    weight = normal(8, 6)
    found = adapted_directions(weight, leading_triples(weight, 2), Svd(*torch.linalg.svd(weight, False)), 2)
    with pytest.raises(ValueError, match="k: expected 1 to 2 of the directions computed, got 3"):
        intruders(found, "out", 3, 0.5)
    with pytest.raises(ValueError, match=r"threshold: expected a cosine above 0 and up to 1, got 0\."):
        intruders(found, "out", 1, 0.0)
