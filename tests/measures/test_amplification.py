import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.measures.amplification import (
    Amplification,
    amplification,
    amplification_factor,
    amplification_null,
    ceiling_fraction,
    gain,
    gain_split,
    projected_null_rms,
)
from lora_analysis.measures.projection_null import projection_null_draws
from lora_analysis.measures.weight import WeightSpectrum, projected_weight, weight_spectrum
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update

EXACT = 1e-12
"""Float64 rounding over a few dozen operations."""

W4 = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5], dtype=torch.float64))
"""The base weight of the closed-form cases."""


def outer(scale: float, i: int, j: int) -> Tensor:
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[i - 1, j - 1] = scale
    return matrix


def figures(weight: Tensor, update: Update, *ks: int, draws: int = 0) -> Amplification:
    svd = update.svd()
    shape = (weight.shape[0], weight.shape[1])
    spectrum = weight_spectrum(weight, len(svd.S))
    null = projection_null_draws(spectrum, shape, len(svd.S), draws=draws) if draws else None
    return amplification(projected_weight(weight, svd), svd.S, spectrum, shape, ks, null_draws=null)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d: int, seed: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(gaussian(d, d, seed=seed)).Q
    return Q


def random_update(d_out: int, d_in: int, r: int, seed: int) -> LowRankUpdate:
    return LowRankUpdate(gaussian(d_out, r, seed=seed), gaussian(r, d_in, seed=seed + 1), 0.5)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, equal_nan=True)


# -- closed forms ---------------------------------------------------------------------------------------


def test_an_update_of_one_weak_direction_has_its_closed_form() -> None:
    row = figures(W4, DenseUpdate(outer(2.0, 3, 3)), 1)
    norm = math.sqrt(126.25)
    expected = {
        "norm_update": 2.0,
        "norm_base": norm,
        "projected": 1.0,
        "projected_top": 10.0,
        "projected_null_rms": norm / 4,
        "amplification": 2.0,
        "gain": 4 / norm,
        "ceiling_fraction": 0.1,
        "signed_positive": 1.0,
        "cosine": 1 / norm,
    }
    for name, value in expected.items():
        assert getattr(row, name).item() == pytest.approx(value, rel=EXACT), name
    assert row.projected_null_rms.item() == pytest.approx(2.8090256, rel=1e-7)
    assert row.gain.item() == pytest.approx(0.3559953, rel=1e-6)


def test_an_update_outside_the_weight_amplifies_infinitely() -> None:
    row = figures(W4, DenseUpdate(outer(2.0, 1, 2)), 1, draws=200)
    assert row.projected.item() == 0
    assert row.amplification.item() == math.inf
    assert row.gain.item() == 0
    assert row.p.item() == 1


def test_every_figure_at_k_is_that_of_the_best_rank_k_part() -> None:
    row = figures(W4, DenseUpdate(outer(3.0, 1, 1) + outer(4.0, 4, 4)), 1, 2)
    assert row.amplification.tolist() == pytest.approx([8.0, 5 / math.sqrt(100.25)], rel=EXACT)
    assert row.amplification[1].item() == pytest.approx(0.4993762, rel=1e-6)
    weight, update = gaussian(9, 7), random_update(9, 7, 4, seed=5)
    full = figures(weight, update, 1, 2, 3, 4)
    for k in range(1, 5):
        svd = update.svd(k)
        truncated = figures(weight, DenseUpdate(svd.U * svd.S @ svd.Vh), k)
        for name in Amplification._fields:
            close(getattr(full, name)[k - 1 : k], getattr(truncated, name))


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_multiple_of_the_weights_own_top_has_its_inverse_projection_and_full_ceiling(factor: float) -> None:
    weight = gaussian(8, 6)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    row = figures(weight, DenseUpdate(factor * (U[:, :3] * S[:3] @ Vh[:3])), 1, 2, 3)
    ones = torch.ones(3, dtype=torch.float64)
    close(row.amplification, abs(factor) * ones)
    close(row.ceiling_fraction, ones)
    close(row.signed_positive, ones if factor > 0 else 0 * ones)
    assert bool((row.cosine.sign() == math.copysign(1, factor)).all())


@pytest.mark.parametrize(
    ("r", "update", "projected", "top", "null", "amp", "amp_null", "gained", "fraction"),
    [
        (4, 6.91, 0.32, 21.67, 0.0202, 21.59, 342.7, 15.9, 0.0148),
        (64, 3.57, 1.90, 37.71, 0.3227, 1.88, 11.06, 5.9, 0.0504),
    ],
)
def test_the_numbers_printed_for_gpt3_give_their_null_and_gain(
    r: int,
    update: float,
    projected: float,
    top: float,
    null: float,
    amp: float,
    amp_null: float,
    gained: float,
    fraction: float,
) -> None:
    # Table 7 of arXiv:2106.09685. Tolerances: half a unit in the last digit quoted.
    shape, base = (12288, 12288), 61.95
    assert projected_null_rms(base, r, shape) == pytest.approx(null, abs=5e-5)
    assert amplification_factor(update, projected) == pytest.approx(amp, abs=5e-3)
    assert amplification_null(update, base, r, shape) == pytest.approx(amp_null, rel=5e-4)
    assert gain(projected, base, r, shape) == pytest.approx(gained, abs=0.05)
    assert ceiling_fraction(projected, top) == pytest.approx(fraction, abs=5e-5)


def test_a_zero_weight_leaves_norms_and_nothing_else() -> None:
    update = random_update(6, 5, 2, seed=1)
    row = figures(torch.zeros(6, 5), update, 1, 2, draws=10)
    assert row.norm_update[1].item() == pytest.approx(update.norm())
    for name in ("norm_base", "projected", "projected_top", "projected_null_rms"):
        assert getattr(row, name).tolist() == [0, 0], name
    undefined = ("amplification", "amplification_null", "gain", "z", "p", "ceiling_fraction")
    for name in (*undefined, "signed_positive", "cosine"):
        assert bool(getattr(row, name).isnan().all()), name


def test_a_zero_update_has_no_cosine_and_no_amplification() -> None:
    row = figures(W4, LowRankUpdate(torch.zeros(4, 1), torch.ones(1, 4), 1.0), 1)
    assert row.norm_update.item() == 0
    assert math.isnan(row.cosine.item())
    assert math.isnan(amplification_factor(0.0, 0.0))


def test_z_is_left_out_where_the_null_is_skewed_or_a_point() -> None:
    # At k = d_out = d_in every frame sees all of W, so chance always does as well.
    row = figures(gaussian(3, 3), DenseUpdate(gaussian(3, 3, seed=1)), 1, 2, 3, draws=50)
    assert row.z.isnan().tolist() == [True, False, True]
    assert row.p[2].item() == 1
    assert row.gain[2].item() == pytest.approx(1)


def test_p_needs_draws() -> None:
    assert math.isnan(figures(W4, DenseUpdate(outer(2.0, 3, 3)), 1).p.item())


def test_the_figures_are_the_columns_of_the_table() -> None:
    columns = (
        "norm_update norm_base projected projected_top projected_null_rms amplification "
        "amplification_null gain z p ceiling_fraction signed_positive cosine"
    )
    assert " ".join(Amplification._fields) == columns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_half_precision_weight_gives_what_its_float64_copy_gives(dtype: torch.dtype) -> None:
    weight, update = gaussian(150, 140).to(dtype), random_update(150, 140, 4, seed=3)
    low, high = figures(weight, update, 1, 4), figures(weight.double(), update, 1, 4)
    for name in Amplification._fields:
        close(getattr(low, name), getattr(high, name), rtol=0)


# -- metamorphic ----------------------------------------------------------------------------------------

SCALE_FREE = ("gain", "z", "p", "ceiling_fraction")
sizes = st.integers(2, 9)
factors = st.floats(0.01, 100).flatmap(lambda c: st.sampled_from([c, -c]))


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, factors, st.integers(0, 1000))
def test_scaling_the_update_scales_its_norm_and_amplification_alone(m: int, n: int, c: float, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, 2, seed + 1)
    before = figures(weight, update, 1, 2, draws=20)
    after = figures(weight, LowRankUpdate(update.up, update.down, c * update.scale), 1, 2, draws=20)
    for name in (*SCALE_FREE, "norm_base", "projected", "projected_top", "projected_null_rms"):
        close(getattr(after, name), getattr(before, name))
    for name in ("norm_update", "amplification", "amplification_null"):
        close(getattr(after, name), abs(c) * getattr(before, name))
    close(after.cosine, math.copysign(1, c) * before.cosine)


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, factors, st.integers(0, 1000))
def test_scaling_the_weight_divides_the_amplification_alone(m: int, n: int, c: float, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, 2, seed + 1)
    before, after = figures(weight, update, 1, 2, draws=20), figures(c * weight, update, 1, 2, draws=20)
    # p is left out: the draws scale with W only to rounding, and a tie at k = d may fall either way.
    for name in ("gain", "z", "ceiling_fraction", "norm_update"):
        close(getattr(after, name), getattr(before, name), rtol=1e-7)
    for name in ("amplification", "amplification_null"):
        close(getattr(after, name), getattr(before, name) / abs(c))
    close(after.cosine, math.copysign(1, c) * before.cosine)


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(0, 1000))
def test_rotating_weight_and_update_alike_changes_nothing(m: int, n: int, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, 2, seed + 1)
    P, Q = orthogonal(m, seed + 3), orthogonal(n, seed + 4)
    before = figures(weight, update, 1, 2)
    after = figures(P @ weight @ Q.mT, LowRankUpdate(P @ update.up, update.down @ Q.mT, update.scale), 1, 2)
    for name in Amplification._fields:
        close(getattr(after, name), getattr(before, name), rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(0, 1000))
def test_transposing_weight_and_update_changes_nothing(m: int, n: int, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, 2, seed + 1)
    before = figures(weight, update, 1, 2)
    after = figures(weight.mT, LowRankUpdate(update.down.mT, update.up.mT, update.scale), 1, 2)
    for name in Amplification._fields:
        close(getattr(after, name), getattr(before, name), rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(0, 1000))
def test_the_projection_stays_below_its_ceiling_and_the_null_too(m: int, n: int, r: int, seed: int) -> None:
    ks = range(1, min(m, n, r) + 1)
    row = figures(gaussian(m, n, seed=seed), random_update(m, n, r, seed + 1), *ks)
    ceiling = torch.minimum(row.projected_top, row.norm_base) * (1 + EXACT)
    assert bool((row.projected <= ceiling).all())
    assert bool((row.projected_null_rms <= ceiling).all())
    assert bool(((row.signed_positive >= 0) & (row.signed_positive <= 1)).all())
    assert bool((row.cosine.abs() <= 1 + EXACT).all())
    for figure in (row.norm_update, row.projected, row.projected_top, row.projected_null_rms):
        assert all(a <= b * (1 + EXACT) for a, b in pairwise(figure.tolist()))


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(0, 1000))
def test_the_gain_is_the_product_of_its_two_sides(m: int, n: int, r: int, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, r, seed + 1)
    k = min(m, n, r)
    gain_out, gain_in = gain_split(weight, update.svd())
    assert gain_out * gain_in == pytest.approx(figures(weight, update, k).gain.item(), rel=1e-9)
    # All of one side: nothing is gained there.
    if k == m:
        assert gain_out == pytest.approx(1, rel=1e-9)


def test_gain_is_the_null_of_the_amplification_over_the_amplification() -> None:
    row = figures(gaussian(9, 7), random_update(9, 7, 3, seed=2), 1, 2, 3)
    close(row.gain, row.amplification_null / row.amplification)


def test_the_cosine_at_full_rank_is_that_of_the_dense_matrices() -> None:
    weight, update = gaussian(9, 7), random_update(9, 7, 3, seed=2)
    dense = update.dense()
    expected = float((dense * weight).sum() / (dense.norm() * weight.norm()))
    assert figures(weight, update, 3).cosine.item() == pytest.approx(expected, rel=1e-10)


# -- refusals -------------------------------------------------------------------------------------------


def test_a_weight_that_cannot_be_split_is_refused() -> None:
    weight, svd = gaussian(6, 5), random_update(6, 5, 2, seed=1).svd()
    with pytest.raises(BaseWeightsError, match=r"update's shape \(6, 5\), got \(5, 6\)"):
        gain_split(weight.mT, svd)
    for bad in (math.nan, math.inf):
        weight[3, 2] = bad
        with pytest.raises(BaseWeightsError, match="the base weight holds NaN or infinities"):
            gain_split(weight, svd)


def test_a_truncation_without_numbers_is_refused() -> None:
    weight, svd = gaussian(6, 5), random_update(6, 5, 3, seed=1).svd()
    G, whole = projected_weight(weight, svd), weight_spectrum(weight, 3)
    top = WeightSpectrum(whole.S[:2], 0.0, whole.norm, whole.fourth_moment, complete=False)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"ks: expected truncations from 1 to 3, got {k}"):
            amplification(G, svd.S, whole, (6, 5), [k])
    with pytest.raises(ValueError, match=r"ks: expected at most 2, .* got 3\. Pass a larger k"):
        amplification(G, svd.S, top, (6, 5), [3])
    with pytest.raises(ValueError, match="null_draws: expected at least 3 columns, got 2"):
        amplification(G, svd.S, whole, (6, 5), [3], null_draws=torch.ones(10, 2))
    with pytest.raises(ValueError, match=r"expected G \(r, r\) and S \(r,\), got \(3, 3\) and \(2,\)"):
        amplification(G, svd.S[:2], whole, (6, 5), [1])
