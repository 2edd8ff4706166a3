"""Spectral measures: closed forms, the Rényi ordering, invariances, and what a spectrum must be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lora_analysis.measures.spectrum import (
    effective_rank,
    effective_rank_energy,
    energy_rank,
    nuclear_ratio,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lora_analysis.update import LowRankUpdate

REAL_VALUED = [stable_rank, participation_ratio, effective_rank_energy, nuclear_ratio, effective_rank]

# Sums of at most 64 terms and one exponential of an entropy: some hundred roundings.
ROUNDING = 1e-12

# The first call of a routine can take longer than hypothesis allows.
patient = settings(deadline=None)

magnitudes = st.floats(-300, 300).map(lambda exponent: 10.0**exponent)
spectra = st.lists(st.one_of(magnitudes, st.just(0.0)), min_size=1, max_size=64).filter(any)
ordinary_spectra = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=64)


def spectrum(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def test_the_worked_example_of_two_singular_values() -> None:
    up = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    S = LowRankUpdate(up, torch.eye(2, 3), scale=1.0).singular_values()
    assert S.tolist() == pytest.approx([4.0, 3.0], rel=ROUNDING)
    assert stable_rank(S) == pytest.approx(25 / 16, rel=ROUNDING)
    assert participation_ratio(S) == pytest.approx(625 / 337, rel=ROUNDING)
    assert nuclear_ratio(S) == pytest.approx(49 / 25, rel=ROUNDING)
    assert effective_rank(S) == pytest.approx(7 / (4**4 * 3**3) ** (1 / 7), rel=ROUNDING)
    assert effective_rank_energy(S) == pytest.approx(25 / (16**16 * 9**9) ** (1 / 25), rel=ROUNDING)
    assert (energy_rank(S, 0.6), energy_rank(S, 0.9)) == (1, 2)


@patient
@given(ordinary_spectra)
def test_measures_agree_with_their_formulas_in_numpy(values: list[float]) -> None:
    S = spectrum(values)
    s = S.numpy()
    assert stable_rank(S) == pytest.approx((s**2).sum() / s.max() ** 2, rel=ROUNDING)
    assert participation_ratio(S) == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=ROUNDING)
    assert nuclear_ratio(S) == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=ROUNDING)
    assert effective_rank(S) == pytest.approx(np.exp(stats.entropy(s)), rel=ROUNDING)
    assert effective_rank_energy(S) == pytest.approx(np.exp(stats.entropy(s**2)), rel=ROUNDING)


@patient
@given(spectra)
def test_measures_are_ordered_as_renyi_entropies_are(values: list[float]) -> None:
    S = spectrum(values)
    chain = [
        1.0,
        stable_rank(S),
        participation_ratio(S),
        effective_rank_energy(S),
        nuclear_ratio(S),
        float((S > 0).sum()),
    ]
    for lower, upper in itertools.pairwise(chain):
        assert lower <= upper * (1 + ROUNDING)
    assert effective_rank_energy(S) <= effective_rank(S) * (1 + ROUNDING)
    assert effective_rank(S) <= chain[-1] * (1 + ROUNDING)


@pytest.mark.parametrize("r", [1, 3, 64])
def test_equal_singular_values_make_every_measure_their_number(r: int) -> None:
    S = torch.full((r,), 0.37, dtype=torch.float64)
    for measure in REAL_VALUED:
        assert measure(S) == pytest.approx(r, rel=ROUNDING)
    assert numerical_rank(S, (100, 80)) == r
    assert energy_rank(S, 1.0) == r


@patient
@given(ordinary_spectra, st.integers(-900, 900))
def test_measures_do_not_depend_on_scale(values: list[float], exponent: int) -> None:
    S = spectrum(values)
    scaled = S * 2.0**exponent  # exact, and far past where squares overflow or underflow
    for measure in REAL_VALUED:
        assert measure(scaled) == pytest.approx(measure(S), rel=ROUNDING)
    assert energy_rank(scaled, 0.9) == energy_rank(S, 0.9)
    assert numerical_rank(scaled, (64, 32)) == numerical_rank(S, (64, 32))


@patient
@given(ordinary_spectra, st.integers(0, 8))
def test_zero_padding_and_order_change_nothing(values: list[float], zeros: int) -> None:
    S = spectrum(values)
    padded = torch.cat([S.new_zeros(zeros), S.flip(0)])
    for measure in REAL_VALUED:
        assert measure(padded) == pytest.approx(measure(S), rel=ROUNDING)
    assert energy_rank(padded, 0.95) == energy_rank(S, 0.95)
    assert numerical_rank(padded, (128, 128)) == numerical_rank(S, (128, 128))


@patient
@given(ordinary_spectra, st.floats(0.01, 0.999))
def test_energy_rank_is_the_smallest_truncation_that_keeps_the_share(values: list[float], tau: float) -> None:
    S = spectrum(values)
    k = energy_rank(S, tau)
    energy = S.square()
    # The slack covers the tie rule and the order of summation.
    assert float(energy[:k].sum()) >= tau * float(energy.sum()) * (1 - 1e-11)
    assert k == 1 or float(energy[: k - 1].sum()) < tau * float(energy.sum()) * (1 + 1e-11)


def test_energy_rank_counts_a_tie_as_reached() -> None:
    S = torch.tensor([0.9, 0.1], dtype=torch.float64).sqrt()
    assert energy_rank(S, 0.9) == 1
    assert energy_rank(S, 0.9 + 1e-9) == 2


def test_numerical_rank_drops_what_float64_cannot_tell_from_zero() -> None:
    S = torch.tensor([1.0, 2.0**-44, 2.0**-45, 1e-20], dtype=torch.float64)
    assert numerical_rank(S, (128, 16)) == 2  # 128 · 2⁻⁵² = 2⁻⁴⁵, and the comparison is strict


def test_numerical_rank_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 30))
    S = torch.linalg.svdvals(torch.from_numpy(matrix))
    assert numerical_rank(S, (40, 30)) == np.linalg.matrix_rank(matrix) == 5


def test_scaling_an_update_by_sqrt_r_leaves_its_shape_alone() -> None:
    # LoRA has scale alpha / r, rsLoRA alpha / sqrt(r); here r = alpha = 16.
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 16, generator=generator), torch.randn(16, 24, generator=generator)
    lora, rslora = LowRankUpdate(up, down, scale=1.0), LowRankUpdate(up, down, scale=4.0)
    assert rslora.norm() == pytest.approx(4 * lora.norm(), rel=ROUNDING)
    for measure in REAL_VALUED:
        assert measure(rslora.singular_values()) == pytest.approx(measure(lora.singular_values()), rel=ROUNDING)


@pytest.mark.parametrize("S", [torch.zeros(4), torch.zeros(0)], ids=["zero", "empty"])
def test_a_zero_update_has_rank_zero_and_no_shape(S: Tensor) -> None:
    assert all(math.isnan(measure(S)) for measure in REAL_VALUED)
    assert numerical_rank(S, (8, 8)) == 0
    assert energy_rank(S, 0.9) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_spectra_are_measured_in_float64(dtype: torch.dtype) -> None:
    S = torch.tensor([60000.0, 30000.0], dtype=dtype)  # whose squares overflow float16
    assert stable_rank(S) == pytest.approx(1 + float(S[1].double() / S[0].double()) ** 2, rel=ROUNDING)


@pytest.mark.parametrize("measure", [*REAL_VALUED, lambda S: energy_rank(S, 0.9)])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_values_that_are_no_singular_values_are_refused(measure, value: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=rf"finite, nonnegative singular values, got {value}"):
        measure(torch.tensor([2.0, value]))


def test_a_matrix_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a vector of singular values, got shape \(2, 2\)"):
        stable_rank(torch.eye(2))
    with pytest.raises(TypeError, match=r"floating-point numbers, got torch.int64"):
        numerical_rank(torch.tensor([2, 1]), (4, 4))


@pytest.mark.parametrize("tau", [0.0, -0.5, 1.5, math.nan])
def test_a_share_outside_zero_and_one_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau: expected a share of the energy in \(0, 1\], got {tau}"):
        energy_rank(torch.ones(2), tau)
