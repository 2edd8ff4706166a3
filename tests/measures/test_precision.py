"""Storage noise: error bars and floors against rounding experiments, explicit projectors and gauges."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import linalg
from torch import Tensor

from lora_analysis.measures.precision import noise_floors, resolved_rank, singular_value_sd
from lora_analysis.update import LowRankUpdate, rounding_error

# The core route and the formula on the full factors differ by the Gram route's certified error.
CORE = 1e-8

BF16 = rounding_error(torch.bfloat16)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def haar(d: int, k: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(gaussian(d, k, seed=seed)).Q
    return basis


def update_with(S: Tensor, d_out: int, d_in: int, gauge: str, seed: int) -> LowRankUpdate:
    """An update in float64 with the given spectrum, graded along the columns of its factors or mixed over them."""
    r = S.shape[0]
    U, V = haar(d_out, r, seed), haar(d_in, r, seed + 1)
    if gauge == "graded":
        return LowRankUpdate(U * S, V.mT, scale=1.0)
    mixing = torch.from_numpy(linalg.hadamard(r)).double() / math.sqrt(r)  # evenly
    return LowRankUpdate(U @ mixing, mixing.mT @ (S[:, None] * V.mT), scale=1.0)


def stored(update: LowRankUpdate, dtype: torch.dtype = torch.bfloat16) -> LowRankUpdate:
    return LowRankUpdate(update.up.to(dtype), update.down.to(dtype), scale=update.scale)


def floors_of(update: LowRankUpdate) -> Tensor:
    return noise_floors(*update.core(), scale=update.scale, eps=update.eps)


def explicit_floors(update: LowRankUpdate) -> Tensor:
    """The definition on the full-size factors, one projector at a time, for r <= min(d_out, d_in)."""
    up, down = update.up.double(), update.down.double()
    U, _, Vh = torch.linalg.svd(update.dense())
    floors = []
    for k in range(update.r):
        outside_up = up - U[:, :k] @ (U[:, :k].mT @ up)
        outside_down = down - (down @ Vh[:k].mT) @ Vh[:k]
        energy = sum(
            up[:, j].norm() ** 2 * outside_down[j].norm() ** 2 + outside_up[:, j].norm() ** 2 * down[j].norm() ** 2
            for j in range(update.r)
        )
        floors.append(update.eps * abs(update.scale) * math.sqrt(float(energy) / (update.r - k)))
    return torch.tensor(floors, dtype=torch.float64)


DECAY = torch.logspace(0, -5, 8, dtype=torch.float64)


@pytest.mark.parametrize("gauge", ["mixed", "graded"])
def test_floors_from_the_core_are_those_of_explicit_projectors(gauge: str) -> None:
    update = stored(update_with(DECAY, 30, 24, gauge, seed=0))
    torch.testing.assert_close(floors_of(update), explicit_floors(update), rtol=1e-6, atol=CORE * BF16)


def test_floors_are_those_of_explicit_projectors_for_plain_factors() -> None:
    update = LowRankUpdate(gaussian(40, 6, seed=1).half(), gaussian(6, 20, seed=2).half(), scale=-0.5)
    torch.testing.assert_close(floors_of(update), explicit_floors(update), rtol=CORE, atol=0)


def test_the_first_floor_is_the_expected_norm_of_the_whole_error() -> None:
    squares = []
    for seed in range(40):
        exact = LowRankUpdate(gaussian(50, 8, seed=seed), gaussian(8, 60, seed=seed + 100), scale=2.0)
        rounded = stored(exact)
        error = float((rounded.dense() - exact.dense()).norm() ** 2)
        up, down = exact.up, exact.down
        expected = 2 * BF16**2 * 4 * float((up.square().sum(0) * down.square().sum(1)).sum())
        assert float(floors_of(rounded)[0] ** 2) * 8 == pytest.approx(expected, rel=0.02)
        squares.append(error / expected)
    # Each ratio is a mean over thousands of roundings: some percent of spread, and 40 of them.
    assert sum(squares) / 40 == pytest.approx(1.0, abs=0.03)


def test_a_mixed_gauge_inflates_the_tail_to_its_floor() -> None:
    smallest, squares = [], []
    for seed in range(0, 60, 3):
        rounded = stored(update_with(DECAY, 96, 128, "mixed", seed))
        S, floors = rounded.singular_values(), floors_of(rounded)
        # Every column of up has length 1 and a share of 1/8 in each singular vector.
        expected = BF16 * math.sqrt(float(DECAY.square().sum()) / 8)
        assert float(floors[-1]) == pytest.approx(expected, rel=0.02)
        assert resolved_rank(S, floors) == 4  # down to 7e-3; the next, 1.4e-3, is just over two floors high
        # At three floors and more the noise adds a few percent in the mean, and moves by some ten.
        torch.testing.assert_close(S[:4], DECAY[:4], rtol=0.25, atol=0)
        smallest.append(float(S[-1] / DECAY[-1]))
        squares.append(float(S[5:].square().mean() / floors[5] ** 2))
    # A true 1e-5 reads tens of times too large, which would be false rank.
    assert min(smallest) > 10
    # The last three values are far below their floors: what is read is the noise the floor predicts.
    assert math.sqrt(sum(squares) / 20) == pytest.approx(1.0, abs=0.2)


def test_a_graded_gauge_keeps_the_tail_and_its_floors_say_so() -> None:
    for seed in range(0, 15, 3):
        rounded = stored(update_with(DECAY, 96, 128, "graded", seed))
        S, floors = rounded.singular_values(), floors_of(rounded)
        assert bool((floors < DECAY / 100).all())
        assert resolved_rank(S, floors) == 8
        torch.testing.assert_close(S, DECAY, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 64), (64, 6), (6, 8)])
def test_more_inner_dimensions_than_rows_give_one_floor_per_singular_value(d_out: int, d_in: int) -> None:
    r, k = 16, 6
    first, last = [], []
    for seed in range(60):
        U, V = haar(d_out, k, seed), haar(d_in, k, seed + 100)
        mixing = gaussian(k, r, seed=seed + 200)
        # Rows in the kernel of up cost storage noise and add nothing to the update.
        kernel = torch.eye(r, dtype=torch.float64) - torch.linalg.pinv(mixing) @ mixing
        S = torch.tensor([1.0, 1e-1, 1e-5, 1e-5, 1e-5, 1e-5], dtype=torch.float64)
        up = (U * S.sqrt()) @ mixing
        down = torch.linalg.pinv(mixing) @ (S.sqrt()[:, None] * V.mT) + kernel @ gaussian(r, d_in, seed=seed + 300)
        exact = LowRankUpdate(up, down, scale=1.0)
        rounded = stored(exact)
        floors = floors_of(rounded)
        assert floors.shape == (k,)
        observed = rounded.singular_values()
        first.append(float((rounded.dense() - exact.dense()).norm() ** 2 / (floors[0] ** 2 * k)))
        last.append(float(observed[2:].square().mean() / floors[2] ** 2))
    assert sum(first) / 60 == pytest.approx(1.0, abs=0.1)
    # Rows and columns of so few entries are not incoherent, and the leading directions mix in: within 30 %
    # of the root mean square.
    assert math.sqrt(sum(last) / 60) == pytest.approx(1.0, abs=0.3)


def test_floors_do_not_change_under_powers_of_two_between_the_factors() -> None:
    update = stored(update_with(DECAY, 30, 24, "mixed", seed=3))
    powers = torch.exp2(torch.tensor([0.0, 3.0, -5.0, 7.0, 1.0, -2.0, 4.0, 0.0], dtype=torch.bfloat16))
    moved = LowRankUpdate(update.up * powers, update.down / powers[:, None], scale=1.0)
    torch.testing.assert_close(floors_of(moved), floors_of(update), rtol=CORE, atol=0)
    # And not when the balancing of core() is left out.
    plain = noise_floors(
        torch.linalg.qr(moved.up.double()).R, torch.linalg.qr(moved.down.double().mT).R, scale=1.0, eps=BF16
    )
    torch.testing.assert_close(plain, floors_of(update), rtol=1e-6, atol=0)


def test_scale_and_precision_multiply_the_floors() -> None:
    r_up, r_down = gaussian(4, 4, seed=0), gaussian(4, 4, seed=1)
    floors = noise_floors(r_up, r_down, scale=1.0, eps=1e-3)
    torch.testing.assert_close(noise_floors(r_up, r_down, scale=-2.0, eps=3e-3), 6 * floors, rtol=1e-12, atol=0)
    assert bool(noise_floors(r_up, r_down, scale=1.0, eps=math.nan).isnan().all())
    assert bool(noise_floors(r_up, r_down, scale=math.nan, eps=1e-3).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_factors_and_zero_columns_are_not_resolved(dtype: torch.dtype) -> None:
    untrained = LowRankUpdate(torch.zeros(20, 4, dtype=dtype), gaussian(4, 30, seed=0).to(dtype), scale=1.0)
    assert floors_of(untrained).tolist() == [0.0] * 4
    assert resolved_rank(untrained.singular_values(), floors_of(untrained)) == 0
    up = torch.cat([gaussian(20, 3, seed=1).to(dtype), torch.zeros(20, 2, dtype=dtype)], dim=1)
    padded = LowRankUpdate(up, gaussian(5, 30, seed=2).to(dtype), scale=1.0)
    assert resolved_rank(padded.singular_values(), floors_of(padded)) == 3
    repeated = LowRankUpdate(up[:, [0, 0]], torch.ones(2, 30, dtype=dtype), scale=1.0)
    assert resolved_rank(repeated.singular_values(), floors_of(repeated)) == 1
    empty = LowRankUpdate(torch.zeros(20, 0, dtype=dtype), torch.zeros(0, 30, dtype=dtype), scale=1.0)
    assert floors_of(empty).shape == (0,)
    assert resolved_rank(empty.singular_values(), floors_of(empty)) == 0


def test_error_bars_agree_with_the_scatter_of_rounded_copies() -> None:
    S = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    copies, predicted = [], []
    for seed in range(150):
        # A fresh mixing each time gives fresh roundings of one update.
        exact = update_with(S, 40, 50, "graded", seed=0)
        mixing = haar(4, 4, seed=seed + 10)
        exact = LowRankUpdate(exact.up @ mixing, mixing.mT @ exact.down, scale=1.0)
        copies.append(stored(exact).singular_values() - S)
        predicted.append(singular_value_sd(exact.svd(), exact.up, exact.down, scale=1.0, eps=BF16).square())
    observed = torch.stack(copies).square().mean(0).sqrt()
    expected = torch.stack(predicted).mean(0).sqrt()
    # 150 copies give an sd to 6 %; entries are not log-uniform, which is worth a few percent more.
    torch.testing.assert_close(observed, expected, rtol=0.25, atol=0)


def test_error_bars_agree_with_the_sum_over_entries() -> None:
    update = LowRankUpdate(gaussian(7, 3, seed=0), gaussian(3, 9, seed=1), scale=-1.5)
    svd = update.svd(2)
    sd = singular_value_sd(svd, update.up, update.down, scale=update.scale, eps=0.01)
    for k in range(2):
        u, v = svd.U[:, k], svd.V[:, k]
        variance = 0.0
        for j in range(3):
            for i in range(7):
                variance += float(u[i] * update.up[i, j] * (update.down[j] @ v)) ** 2
            for i in range(9):
                variance += float((update.up[:, j] @ u) * update.down[j, i] * v[i]) ** 2
        assert float(sd[k]) == pytest.approx(0.01 * 1.5 * math.sqrt(variance), rel=1e-12)


def test_resolved_rank_counts_values_of_three_floors_and_more() -> None:
    S = torch.tensor([4.0, 3.0, 2.9, 0.0], dtype=torch.float64)
    assert resolved_rank(S, torch.ones(4, dtype=torch.float64)) == 2
    assert resolved_rank(S, torch.zeros(4, dtype=torch.float64)) == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices with r columns each, got shapes \(3, 3\) and \(4, 4\)"):
        noise_floors(torch.eye(3), torch.eye(4), scale=1.0, eps=1e-3)
    with pytest.raises(ValueError, match=r"eps: expected a relative error, nonnegative, got -1"):
        noise_floors(torch.eye(3), torch.eye(3), scale=1.0, eps=-1.0)
    with pytest.raises(ValueError, match=r"vectors of one length, got shapes \(3,\) and \(2,\)"):
        resolved_rank(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"floors: expected numbers, got NaN"):
        resolved_rank(torch.ones(2), torch.full((2,), math.nan))
    update = LowRankUpdate(torch.eye(4, 2), torch.eye(2, 5), scale=1.0)
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(2, 5\) with vectors U \(4, 2\) and Vh \(2, 5\)"):
        singular_value_sd(update.svd(), update.up.mT, update.down, scale=1.0, eps=1e-3)
    with pytest.raises(ValueError, match=r"eps: expected a relative error"):
        singular_value_sd(update.svd(), update.up, update.down, scale=1.0, eps=-1e-3)
