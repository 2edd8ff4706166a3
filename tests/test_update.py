"""Updates: every number against the dense matrix, and against spectra that are known exactly."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.measures.spectrum import (
    effective_rank,
    effective_rank_energy,
    energy_rank,
    nuclear_ratio,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update, distance, factors, rounding_error, with_scale

# Against the dense matrix only sigma_1 sets the scale of errors: its own SVD is no better than that.
DENSE = 1e-13
# Values by Cholesky of Gram matrices that pass the certificate, relative to each sigma_k.
CERTIFIED = 1e-10
# Orthonormality of columns after two products of orthonormal matrices.
ORTHONORMAL = 1e-12

Array = NDArray[np.float64]


def dense_oracle(update: LowRankUpdate) -> Array:
    """scale · up @ down in numpy, after an exact cast."""
    product: Array = update.up.double().numpy() @ update.down.double().numpy()
    return update.scale * product


def random_update(d_out: int, d_in: int, r: int, scale: float = 2.0, seed: int = 0) -> LowRankUpdate:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((d_out, r)), rng.standard_normal((r, d_in))
    return LowRankUpdate(torch.from_numpy(up), torch.from_numpy(down), scale)


def assert_is_the_svd_of(update: LowRankUpdate, matrix: Array, tolerance: float = DENSE) -> None:
    """``svd``, ``singular_values``, ``norm`` and ``dense`` all describe ``matrix``.

    ``tolerance`` is relative to ``scale · ‖up‖ ‖down‖`` of the balanced factors, which for most updates is
    near ``sigma_1``.
    """
    k = min(update.r, *update.shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    size = tolerance * max(float(values[0]) if len(values) else 0.0, np.finfo(float).tiny)
    svd = update.svd()
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((update.shape[0], k), (k,), (k, update.shape[1]))
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == torch.float64
    identity = np.eye(k)
    np.testing.assert_allclose((svd.U.mT @ svd.U).numpy(), identity, atol=ORTHONORMAL)
    np.testing.assert_allclose((svd.Vh @ svd.Vh.mT).numpy(), identity, atol=ORTHONORMAL)
    np.testing.assert_allclose((svd.U * svd.S @ svd.Vh).numpy(), matrix, atol=10 * size)
    for S in (svd.S, update.singular_values()):
        assert S.dtype == torch.float64
        assert bool((S >= 0).all())
        assert bool((S[1:] <= S[:-1]).all())
        np.testing.assert_allclose(S.numpy(), values[:k], rtol=CERTIFIED, atol=size)
        assert float(values[k:].max(initial=0.0)) <= 10 * size
    assert update.norm() == pytest.approx(float(np.linalg.norm(matrix)), rel=CERTIFIED, abs=size)
    np.testing.assert_allclose(update.dense().numpy(), matrix, atol=size)


@pytest.mark.parametrize("scale", [2.0, -0.5, 1e-6])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r"),
    [(12, 12, 4), (30, 7, 4), (7, 30, 4), (1, 9, 1), (9, 1, 1), (5, 6, 9), (3, 20, 8), (6, 4, 4), (10, 8, 1)],
    ids=str,
)
def test_svd_norm_and_values_are_those_of_the_dense_matrix(d_out: int, d_in: int, r: int, scale: float) -> None:
    update = random_update(d_out, d_in, r, scale)
    assert (update.shape, update.r) == ((d_out, d_in), r)
    assert_is_the_svd_of(update, dense_oracle(update))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_stored_dtypes_are_computed_exactly_in_double(dtype: torch.dtype) -> None:
    made = random_update(20, 15, 6)
    update = LowRankUpdate(made.up.to(dtype), made.down.to(dtype), 0.25)
    assert update.up.dtype == dtype
    assert_is_the_svd_of(update, dense_oracle(update))


def test_factors_may_differ_in_dtype_and_be_transposed_views() -> None:
    up, down = torch.randn(4, 9).bfloat16().mT, torch.randn(11, 4).mT
    update = LowRankUpdate(up, down, 1.0)
    assert_is_the_svd_of(update, dense_oracle(update))
    assert update.eps == rounding_error(torch.bfloat16)


def test_dependent_columns_give_zero_singular_values() -> None:
    full = random_update(14, 10, 3)
    mix = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0], [0.0, 1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]])
    update = LowRankUpdate(full.up @ mix.double(), torch.randn(5, 10, dtype=torch.float64), 1.0)
    assert_is_the_svd_of(update, dense_oracle(update))
    S = update.singular_values()
    assert float(S[3:].max()) < DENSE * float(S[0])


def test_an_update_of_inner_dimension_zero_is_the_zero_matrix() -> None:
    update = LowRankUpdate(torch.zeros(4, 0), torch.zeros(0, 3), 1.0)
    svd = update.svd()
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((4, 0), (0,), (0, 3))
    assert update.singular_values().shape == (0,)
    assert update.norm() == 0.0
    assert update.dense().count_nonzero() == 0


@pytest.mark.parametrize("zeroed", ["up", "down", "both"])
def test_a_zero_factor_gives_zeros_and_no_warning(zeroed: str) -> None:
    up, down = torch.randn(8, 3), torch.randn(3, 5)
    update = LowRankUpdate(up * (zeroed == "down"), down * (zeroed == "up"), 4.0)
    assert update.norm() == 0.0
    assert update.singular_values().tolist() == [0.0, 0.0, 0.0]
    svd = update.svd()
    assert svd.S.tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose((svd.Vh @ svd.Vh.mT).numpy(), np.eye(3), atol=ORTHONORMAL)
    S = svd.S
    assert numerical_rank(S, update.shape) == 0
    assert energy_rank(S, 0.9) == 0
    assert math.isnan(stable_rank(S))


def test_some_zero_columns_leave_the_rest_exact() -> None:
    made = random_update(9, 7, 5)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    update = LowRankUpdate(made.up * keep, made.down.flip(0) * keep.roll(1)[:, None], 1.0)
    assert_is_the_svd_of(update, dense_oracle(update))


def test_a_badly_scaled_gauge_changes_nothing() -> None:
    made = random_update(30, 20, 8)
    gauge = torch.logspace(-8, 8, 8, dtype=torch.float64)
    update = LowRankUpdate(made.up * gauge, made.down / gauge[:, None], made.scale)
    assert_is_the_svd_of(update, dense_oracle(made))
    plain = made.singular_values()
    np.testing.assert_allclose(update.singular_values().numpy(), plain.numpy(), rtol=CERTIFIED)


def test_a_gauge_of_powers_of_two_changes_no_bit() -> None:
    made = random_update(30, 20, 4)
    gauge = torch.tensor([2.0**-40, 1.0, 2.0**10, 2.0**30], dtype=torch.float64)
    update = LowRankUpdate(made.up * gauge, made.down / gauge[:, None], made.scale)
    assert torch.equal(update.svd().S, made.svd().S)
    assert torch.equal(update.svd().U, made.svd().U)


def test_a_concatenation_that_cancels_leaves_only_rounding() -> None:
    made = random_update(16, 12, 3)
    up, down = torch.cat([made.up, -made.up], 1), torch.cat([made.down, made.down])
    size = made.norm()
    cancelled = LowRankUpdate(up, down, made.scale)
    assert cancelled.norm() < DENSE * size
    assert float(cancelled.singular_values()[0]) < DENSE * size
    assert float(cancelled.svd().S[0]) < DENSE * size


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_the_norm_keeps_its_digits_where_terms_nearly_cancel(rest: float) -> None:
    made = random_update(16, 12, 3)
    small = LowRankUpdate(torch.randn(16, 1, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64), rest)
    update = LowRankUpdate(
        torch.cat([made.up, -made.up, rest * small.up], 1), torch.cat([made.down, made.down, small.down]), 1.0
    )
    # QR's error is relative to the terms, whose sum is the small one: 1e-16 / rest.
    tolerance = 1e-14 / rest
    assert update.norm() == pytest.approx(small.norm(), rel=tolerance)
    assert float(update.svd().S[0]) == pytest.approx(small.norm(), rel=tolerance)
    assert float(update.singular_values()[0]) == pytest.approx(small.norm(), rel=tolerance)


def orthonormal_columns(d: int, r: int) -> Array:
    """Columns of a Sylvester-Hadamard matrix over sqrt(d), exact in binary for d a power of four."""
    columns: Array = hadamard(d)[:, 1 : r + 1] / math.sqrt(d)
    return columns


def known_spectrum(exponents: list[int], gauge: list[int]) -> tuple[LowRankUpdate, Array]:
    """An update whose singular values are 2**exponents *exactly*, in a triangular and badly scaled gauge.

    ``up = U Σ T D`` and ``down = D⁻¹ T⁻¹ Vᵀ`` with T of integers and everything else of powers of two, so
    that no entry is rounded.
    """
    r = len(exponents)
    U, V = orthonormal_columns(64, r), orthonormal_columns(16, r)
    sigma = np.exp2(np.array(exponents, dtype=float))
    mixing = np.eye(r) + np.triu(np.tile([1.0, -2.0, 3.0], (r, r))[:, :r], 1)
    inverse = np.round(np.linalg.inv(mixing))
    np.testing.assert_array_equal(mixing @ inverse, np.eye(r))
    scales = np.exp2(np.array(gauge, dtype=float))
    up = (U * sigma) @ mixing * scales
    down = (inverse @ V.T) / scales[:, None]
    np.testing.assert_array_equal(up / scales @ inverse, U * sigma)  # nothing was rounded
    return LowRankUpdate(torch.from_numpy(up), torch.from_numpy(down), 1.0), sigma


DECAY_TO_1E_9 = [0, -5, -10, -15, -20, -25, -30]
BAD_GAUGE = [26, -26, 13, -13, 0, 20, -20]


@pytest.mark.parametrize("gauge", [[0] * 7, BAD_GAUGE], ids=["plain", "bad"])
def test_values_down_to_1e_9_survive_a_bad_gauge(gauge: list[int]) -> None:
    update, sigma = known_spectrum(DECAY_TO_1E_9, gauge)
    # Householder QR keeps about 1e-16 of the largest value: 5e-8 at the smallest.
    for S in (update.svd().S, update.singular_values()):
        np.testing.assert_allclose(S.numpy(), sigma, rtol=5e-8)
    assert update.norm() == pytest.approx(float(np.linalg.norm(sigma)), rel=CERTIFIED)


def test_a_float32_gram_route_loses_values_below_3e_4_and_ours_does_not() -> None:
    update, sigma = known_spectrum(DECAY_TO_1E_9, [0] * 7)
    up, down = update.up.float(), update.down.float()
    squares = torch.linalg.eigvals(up.mT @ up @ (down @ down.mT)).real.clamp(min=0).sort(descending=True).values
    lost = np.abs(squares.sqrt().numpy() / sigma - 1)
    assert lost[sigma < 3e-4].max() > 0.5
    np.testing.assert_allclose(update.singular_values().numpy(), sigma, rtol=5e-8)


def condition_of_scaled_columns(factor: Tensor) -> float:
    return float(torch.linalg.cond(factor / factor.norm(dim=0)))


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6, 1e-9, 0.0])
def test_the_fast_route_keeps_ten_digits_whatever_the_condition(spread: float) -> None:
    """Columns that differ by ``spread`` only: their condition is about 2/spread, certified up to 1e3."""
    direction, offset = torch.randn(2, 40, 1, dtype=torch.float64)
    up = torch.cat([direction, direction + spread * offset, torch.randn(40, 2, dtype=torch.float64)], 1)
    down = torch.randn(4, 30, dtype=torch.float64)
    update = LowRankUpdate(up, down, 1.0)
    exact, fast = update.svd().S, update.singular_values()
    np.testing.assert_allclose(fast.numpy(), exact.numpy(), rtol=CERTIFIED, atol=1e-15 * float(exact[0]))
    r_up, r_down = update.core()
    for core, factor in ((r_up, up), (r_down, down.mT)):
        scales = core.norm(dim=0) / factor.norm(dim=0)  # powers of two: the balanced gauge
        np.testing.assert_allclose(scales.log2().numpy(), scales.log2().round().numpy(), atol=1e-9)
        gram = (core.mT @ core) / scales / scales[:, None]
        np.testing.assert_allclose(gram.numpy(), (factor.mT @ factor).numpy(), atol=1e-12 * float(gram.norm()))


@pytest.mark.parametrize("exponent", [6, 8, 9, 10, 12])
def test_values_stay_exact_where_large_directions_meet_small_ones(exponent: int) -> None:
    """σ_1 = 2e while ‖up‖‖down‖ = 1, on both sides of the certificate's limit of 1e3."""
    e = 2.0**-exponent
    U, V = orthonormal_columns(64, 2), orthonormal_columns(16, 2)
    mixing = np.array([[1.0, 1.0], [1.0, -1.0]])
    up, down = U * [1, e] @ mixing, (V * [e, 1] @ mixing).T
    update = LowRankUpdate(torch.from_numpy(up), torch.from_numpy(down), 1.0)
    for S in (update.singular_values(), update.svd().S):
        np.testing.assert_allclose(S.numpy(), [2 * e, 2 * e], rtol=CERTIFIED)


@pytest.mark.parametrize("gauge", [0, 26], ids=["plain", "bad"])
@pytest.mark.parametrize("r", [2, 8, 32])
@pytest.mark.parametrize("condition", [1.0, 5.0, 30.0, 90.0, 110.0, 500.0, 900.0, 2e3, 1e6, 1e12])
def test_singular_vectors_are_orthonormal_whatever_the_condition(condition: float, r: int, gauge: int) -> None:
    """On both sides of every limit at which the route may change."""
    rng = np.random.default_rng(r)

    def factor(d: int) -> Array:
        left, right = np.linalg.qr(rng.standard_normal((d, r))).Q, np.linalg.qr(rng.standard_normal((r, r))).Q
        columns: Array = left * np.geomspace(1, 1 / condition, r) @ right
        return columns

    scales = np.exp2(np.round(np.linspace(-gauge, gauge, r)))
    up, down = factor(150) * scales, (factor(90) / scales).T
    update = LowRankUpdate(torch.from_numpy(up), torch.from_numpy(down), 2.0)
    svd, matrix = update.svd(), dense_oracle(update)
    for basis in (svd.U, svd.V):
        np.testing.assert_allclose((basis.mT @ basis).numpy(), np.eye(r), rtol=0, atol=ORTHONORMAL)
    # Relative to the factors, whose largest directions need not meet: 1e-12 of their product, not of sigma_1.
    size = 2.0 * float(np.linalg.norm(up / scales, 2) * np.linalg.norm(down.T * scales, 2))
    np.testing.assert_allclose((svd.U * svd.S @ svd.Vh).numpy(), matrix, rtol=0, atol=1e-14 * size)
    oracle = np.linalg.svd(matrix, compute_uv=False)[:r]
    np.testing.assert_allclose(svd.S.numpy(), oracle, rtol=CERTIFIED, atol=1e-14 * size)


def test_the_fast_route_falls_back_to_qr_where_the_factors_are_ill_conditioned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factorised: list[float] = []
    qr = torch.linalg.qr

    def counting_qr(factor: Tensor, **options: Any) -> Any:
        factorised.append(condition_of_scaled_columns(factor))
        return qr(factor, **options)

    monkeypatch.setattr(torch.linalg, "qr", counting_qr)
    well = random_update(40, 30, 4)
    well.singular_values()
    assert not factorised
    near_copy = torch.cat([well.up, well.up[:, :1] + 1e-5 * torch.randn(40, 1)], 1)
    LowRankUpdate(near_copy, torch.randn(5, 30), 1.0).singular_values()
    assert [condition > 1e3 for condition in factorised] == [True]


@pytest.mark.parametrize("certified", [0, 1, 2])
def test_core_gives_the_values_by_either_route(certified: int) -> None:
    """No, one or both factors well conditioned."""
    made = random_update(24, 20, 5)
    near_copy = made.up[:, :1] + 1e-7 * torch.randn(24, 1, dtype=torch.float64)
    up = made.up if certified > 0 else torch.cat([made.up[:, :4], near_copy], 1)
    down = made.down if certified > 1 else torch.cat([made.down[:4], made.down[:1] * (1 + 1e-12)])
    update = LowRankUpdate(up, down, 3.0)
    r_up, r_down = update.core()
    values = 3.0 * torch.linalg.svdvals(r_up @ r_down.mT)
    np.testing.assert_allclose(values.numpy(), update.singular_values().numpy(), rtol=0, atol=0)
    oracle = np.linalg.svd(dense_oracle(update), compute_uv=False)[:5]
    np.testing.assert_allclose(values.numpy(), oracle, rtol=CERTIFIED, atol=DENSE * oracle[0])


seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14))


def assert_same_spectrum(a: Update, b: Update, tolerance: float = DENSE) -> None:
    """Equal singular values, the longer list ending in zeros, and equal norms."""
    size = tolerance * max(a.norm(), b.norm(), np.finfo(float).tiny)
    routes: list[Callable[[Update], Tensor]] = [lambda update: update.svd().S, lambda update: update.singular_values()]
    for of in routes:
        S_a, S_b = of(a), of(b)
        longest = max(len(S_a), len(S_b))
        S_a, S_b = (torch.nn.functional.pad(S, (0, longest - len(S))) for S in (S_a, S_b))
        np.testing.assert_allclose(S_a.numpy(), S_b.numpy(), rtol=CERTIFIED, atol=size)
    assert a.norm() == pytest.approx(b.norm(), rel=CERTIFIED, abs=size)


@given(sizes, seeds, st.one_of(st.floats(1e-3, 4), st.floats(-4, -1e-3)))
def test_random_updates_agree_with_their_dense_matrix(size: tuple[int, int, int], seed: int, scale: float) -> None:
    update = random_update(*size, scale=scale, seed=seed)
    if update.r == 0:
        assert update.norm() == 0.0
    else:
        assert_is_the_svd_of(update, dense_oracle(update))


@given(sizes, seeds, st.floats(0, 3))
def test_values_do_not_depend_on_the_gauge(size: tuple[int, int, int], seed: int, decades: float) -> None:
    update = random_update(*size, seed=seed)
    r = update.r
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((r, r))).Q for _ in range(2))
    stretch = np.logspace(0, decades, r) if r else np.ones(0)
    gauge = torch.from_numpy((left * stretch) @ right)
    inverse = torch.from_numpy((right.T / stretch) @ left.T)
    # The gauge itself is rounded: its condition multiplies 1e-16.
    assert_same_spectrum(update, LowRankUpdate(update.up @ gauge, inverse @ update.down, 2.0), DENSE * 10**decades)


@given(sizes, seeds, st.integers(1, 3), st.sampled_from(["up", "down", "both"]))
def test_zero_columns_or_rows_change_nothing(size: tuple[int, int, int], seed: int, extra: int, side: str) -> None:
    update = random_update(*size, seed=seed)
    d_out, d_in = update.shape
    rng = np.random.default_rng(seed)
    more_up = torch.from_numpy(rng.standard_normal((d_out, extra))) * (side == "down")
    more_down = torch.from_numpy(rng.standard_normal((extra, d_in))) * (side == "up")
    padded = LowRankUpdate(torch.cat([update.up, more_up], 1), torch.cat([update.down, more_down]), 2.0)
    assert_same_spectrum(update, padded)


@given(sizes, seeds)
def test_an_update_concatenated_with_itself_at_half_scale_is_itself(size: tuple[int, int, int], seed: int) -> None:
    update = random_update(*size, seed=seed)
    doubled = LowRankUpdate(torch.cat([update.up] * 2, 1), torch.cat([update.down] * 2), update.scale / 2)
    assert_same_spectrum(update, doubled)


@given(sizes, seeds)
def test_transposing_swaps_the_sides(size: tuple[int, int, int], seed: int) -> None:
    update = random_update(*size, seed=seed)
    turned = LowRankUpdate(update.down.mT, update.up.mT, update.scale)
    assert_same_spectrum(update, turned)
    np.testing.assert_allclose(turned.dense().numpy(), update.dense().mT.numpy(), rtol=0, atol=DENSE * update.norm())
    k = int(numerical_rank(update.svd().S, update.shape))
    overlap = (turned.svd(k).U.mT @ update.svd(k).V).abs()
    # Random spectra have gaps, so each vector is its own counterpart up to sign.
    np.testing.assert_allclose(overlap.numpy(), np.eye(k), atol=1e-6)


@given(sizes, seeds, st.floats(1e-6, 1e6), st.sampled_from([1.0, -1.0]))
def test_scaling_an_update_scales_its_values(size: tuple[int, int, int], seed: int, factor: float, sign: float) -> None:
    update = random_update(*size, scale=1.0, seed=seed)
    scaled = with_scale(update, sign * factor)
    assert scaled.up is update.up
    np.testing.assert_allclose(scaled.svd().S.numpy(), factor * update.svd().S.numpy(), rtol=1e-15)
    assert torch.equal(scaled.svd().U, sign * update.svd().U)
    assert torch.equal(scaled.svd().Vh, update.svd().Vh)
    assert scaled.norm() == pytest.approx(factor * update.norm(), rel=1e-15)


@given(sizes, seeds, st.integers(0, 14))
def test_the_first_triples_are_the_best_approximation(size: tuple[int, int, int], seed: int, k: int) -> None:
    update = random_update(*size, seed=seed)
    svd, first = update.svd(), update.svd(k)
    top = svd.top(k)
    for whole, some in zip(top, first, strict=True):
        np.testing.assert_allclose(some.numpy(), whole.numpy(), rtol=0, atol=1e-15)
    assert torch.equal(top.V, top.Vh.mT)
    rest = update.dense() - top.U * top.S @ top.Vh
    tail = float((svd.S[k:] ** 2).sum())
    assert float((rest**2).sum()) == pytest.approx(tail, rel=1e-9, abs=1e-20 * max(update.norm() ** 2, 1e-300))


def test_the_worked_example_of_two_orthogonal_terms() -> None:
    up = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    update = LowRankUpdate(up, torch.eye(2, 5), 1.0)
    assert update.singular_values().tolist() == pytest.approx([4.0, 3.0], rel=1e-15)
    assert update.svd().S.tolist() == pytest.approx([4.0, 3.0], rel=1e-15)
    assert update.norm() == pytest.approx(5.0, rel=1e-15)
    assert update.svd(1).U.abs().flatten().tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert update.svd(1).V.abs().flatten().tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0])


def test_rank_stabilised_scale_multiplies_the_norm_by_four_at_r_16_and_no_shape_statistic() -> None:
    plain = random_update(40, 30, 16, scale=16 / 16)
    stabilised = with_scale(plain, 16 / math.sqrt(16))
    assert stabilised.norm() == pytest.approx(4 * plain.norm(), rel=1e-15)
    S_plain, S = plain.singular_values(), stabilised.singular_values()
    measures: list[Callable[[Tensor], float]] = [
        stable_rank,
        participation_ratio,
        effective_rank,
        effective_rank_energy,
        nuclear_ratio,
    ]
    for measure in measures:
        assert measure(S) == pytest.approx(measure(S_plain), rel=1e-14)
    assert numerical_rank(S, plain.shape) == numerical_rank(S_plain, plain.shape) == 16


def test_orthonormal_factors_have_equal_values_and_every_rank_equal_to_r() -> None:
    update = LowRankUpdate(
        torch.from_numpy(orthonormal_columns(64, 5)), torch.from_numpy(orthonormal_columns(16, 5)).mT, 3.0
    )
    S = update.singular_values()
    np.testing.assert_allclose(S.numpy(), np.full(5, 3.0), rtol=1e-15)
    for measure in (stable_rank, participation_ratio, effective_rank, effective_rank_energy, nuclear_ratio):
        assert measure(S) == pytest.approx(5.0, rel=1e-12)


ASKED: dict[str, Callable[[Any], object]] = {
    "norm": lambda update: update.norm(),
    "singular_values": lambda update: update.singular_values(),
    "svd": lambda update: update.svd(),
    "svd of the first": lambda update: update.svd(1),
}


@pytest.mark.parametrize("ask", [*ASKED.values(), lambda update: update.dense()], ids=[*ASKED, "dense"])
@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_an_unknown_scale_defines_no_number(ask: Callable[[Any], object], kind: str) -> None:
    update: Update = LowRankUpdate(torch.eye(2), torch.eye(2), math.nan)
    if kind == "dense":
        update = DenseUpdate(torch.eye(2), scale=math.nan)
    with pytest.raises(UndefinedUpdateError, match=r"scale of this update is unknown.*Pass alpha="):
        ask(update)
    assert ask(with_scale(update, 1.0)) is not None


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["up", "down", "dense"])
def test_nan_and_infinities_have_no_spectrum(ask: Callable[[Any], object], value: float, where: str) -> None:
    up, down, matrix = torch.ones(3, 2), torch.ones(2, 4), torch.ones(3, 4)
    {"up": up, "down": down, "dense": matrix}[where][0, 1] = value
    update: DenseUpdate | LowRankUpdate = DenseUpdate(matrix) if where == "dense" else LowRankUpdate(up, down, 1.0)
    assert not update.finite
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        ask(update)


@pytest.mark.parametrize(("up_value", "down_value"), [(math.inf, 0.0), (math.nan, 0.0)])
def test_infinity_times_zero_is_not_taken_for_zero(up_value: float, down_value: float) -> None:
    update = LowRankUpdate(torch.full((3, 1), up_value), torch.full((1, 3), down_value), 1.0)
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        update.norm()


@pytest.mark.parametrize(
    ("dtype", "stated"), [(torch.bfloat16, 1.66e-3), (torch.float16, 2.07e-4)], ids=["bfloat16", "float16"]
)
def test_eps_is_the_error_that_rounding_makes(dtype: torch.dtype, stated: float) -> None:
    assert rounding_error(dtype) == pytest.approx(stated, rel=3e-3)
    # Log-uniform over many binades, the law of the formula; for 4e5 numbers the rms varies by 0.1 %.
    numbers = torch.exp2(torch.rand(400_000, dtype=torch.float64) * 8 - 4)
    errors = (numbers.to(dtype).double() - numbers) / numbers
    assert float(errors.square().mean().sqrt()) == pytest.approx(rounding_error(dtype), rel=5e-3)


def test_eps_of_normal_numbers_is_close_to_the_log_uniform_law() -> None:
    numbers = torch.randn(400_000, dtype=torch.float64)
    rms = float(((numbers.bfloat16().double() - numbers) / numbers).square().mean().sqrt())
    assert rms == pytest.approx(1.664e-3, rel=5e-3)
    assert rms == pytest.approx(rounding_error(torch.bfloat16), rel=5e-3)


def test_eps_is_of_the_coarser_factor_or_as_stated() -> None:
    up, down = torch.ones(2, 1), torch.ones(1, 2, dtype=torch.float16)
    assert LowRankUpdate(up, down, 1.0).eps == rounding_error(torch.float16)
    assert LowRankUpdate(up, down, 1.0, stored_eps=1e-3).eps == 1e-3
    assert math.isnan(LowRankUpdate(up, down, 1.0, stored_eps=math.nan).eps)
    assert DenseUpdate(torch.ones(2, 2)).eps == rounding_error(torch.float32)
    assert DenseUpdate(torch.ones(2, 2), stored_eps=1e-3).eps == 1e-3


def test_a_dense_update_has_the_values_of_its_matrix() -> None:
    matrix = torch.randn(5, 8, dtype=torch.float64)
    update = DenseUpdate(matrix, scale=-2.0)
    assert (update.shape, update.r, DenseUpdate(matrix, declared_r=3).r) == ((5, 8), 5, 3)
    oracle = np.linalg.svd(-2 * matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(update.singular_values().numpy(), oracle, rtol=1e-13)
    svd = update.svd()
    np.testing.assert_allclose((svd.U * svd.S @ svd.Vh).numpy(), -2 * matrix.numpy(), atol=1e-13)
    assert [part.shape for part in update.svd(2)] == [(5, 2), (2,), (2, 8)]
    assert update.norm() == pytest.approx(float(np.linalg.norm(oracle)), rel=1e-13)


def test_the_two_kinds_of_update_agree() -> None:
    update = random_update(9, 7, 4, scale=-3.0)
    assert_same_spectrum(update, DenseUpdate(update.up @ update.down, scale=-3.0))


@pytest.mark.parametrize(
    ("up", "down", "error", "match"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, r"share r, got \(3, 2\) and \(3, 4\)"),
        (torch.ones(3), torch.ones(1, 4), ValueError, r"up: expected a matrix, got shape \(3,\)"),
        (torch.ones(3, 1), torch.ones(1, 4, 1), ValueError, r"down: expected a matrix, got shape \(1, 4, 1\)"),
        (torch.ones(3, 1, dtype=torch.int64), torch.ones(1, 4), TypeError, "up: expected floating-point"),
        (torch.ones(3, 1), torch.ones(1, 4, dtype=torch.complex64), TypeError, "down: expected floating-point"),
    ],
    ids=["r", "vector", "tensor", "integers", "complex"],
)
def test_factors_that_are_no_product_are_refused(up: Tensor, down: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LowRankUpdate(up, down, 1.0)


def test_a_dense_update_must_be_a_matrix_of_floats() -> None:
    with pytest.raises(ValueError, match=r"matrix: expected a matrix, got shape \(2, 2, 2\)"):
        DenseUpdate(torch.ones(2, 2, 2))
    with pytest.raises(TypeError, match=r"matrix: expected floating-point numbers, got torch\.int8"):
        DenseUpdate(torch.ones(2, 2, dtype=torch.int8))


def test_factors_are_given_as_stored_and_only_by_products() -> None:
    up, down = torch.ones(3, 1).half(), torch.ones(1, 4)
    update = LowRankUpdate(up, down, 5.0)
    assert factors(update)[0] is up
    assert factors(update)[1] is down
    with pytest.raises(UnsupportedAdapterError, match=r"DenseUpdate\(2x2.*expected an update with factors A and B"):
        factors(DenseUpdate(torch.ones(2, 2)))


def test_updates_are_immutable_and_pickle() -> None:
    update = random_update(4, 3, 2)
    with pytest.raises(FrozenInstanceError, match="scale"):
        update.scale = 1.0  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(update))
    assert torch.equal(again.up, update.up)
    assert (again.scale, again.shape) == (update.scale, update.shape)
    assert repr(update) == "LowRankUpdate(4x3, r=2, scale=2, torch.float64)"
    assert repr(DenseUpdate(torch.ones(2, 2))) == "DenseUpdate(2x2, scale=1, torch.float32)"


def test_factors_that_ask_for_gradients_are_fine() -> None:
    up, down = torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    update = LowRankUpdate(up, down, 1.0)
    oracle = np.linalg.svd((up @ down).detach().numpy(), compute_uv=False)[:2]
    np.testing.assert_allclose(update.singular_values().numpy(), oracle, rtol=1e-6)
    assert not any(part.requires_grad for part in (*update.svd(), *update.core(), update.dense()))
    assert update.norm() == pytest.approx(float(np.linalg.norm(oracle)), rel=1e-6)


@pytest.mark.parametrize("kinds", ["low rank", "mixed"])
def test_the_distance_of_two_updates_is_the_norm_of_their_difference(kinds: str) -> None:
    a, b = random_update(9, 7, 3, 1.5), random_update(9, 7, 12, -0.3, seed=1)
    other: Update = b if kinds == "low rank" else DenseUpdate(torch.from_numpy(dense_oracle(b)))
    exact = float(np.linalg.norm(dense_oracle(a) - dense_oracle(b)))
    assert distance(a, other) == pytest.approx(exact, rel=1e-12)
    assert distance(other, a) == pytest.approx(exact, rel=1e-12)
    assert distance(a, a) < 1e-13 * a.norm()


def test_a_distance_needs_one_shape_and_known_scales() -> None:
    with pytest.raises(ValueError, match=r"expected two updates of one shape, got \(3, 4\) and \(4, 3\)"):
        distance(random_update(3, 4, 1), random_update(4, 3, 1))
    for scales in ((math.nan, 1.0), (1.0, math.nan)):
        with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
            distance(*(random_update(3, 4, 1, scale) for scale in scales))
