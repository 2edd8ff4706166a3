"""The spectrum null: its law against direct Gaussian factors, printed reference values, and its plumbing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lora_analysis.measures import spectrum_null as module
from lora_analysis.measures.spectrum_null import spectrum_null


def direct(shape: tuple[int, int], r: int, draws: int, seed: int) -> np.ndarray:
    """Singular values of dense products of Gaussian factors by numpy: the definition itself."""
    rng = np.random.default_rng(seed)
    products = [rng.standard_normal((shape[0], r)) @ rng.standard_normal((r, shape[1])) for _ in range(draws)]
    return np.linalg.svd(np.array(products), compute_uv=False)[:, : min(r, *shape)]


def stable_ranks(S: Tensor) -> Tensor:
    return S.square().sum(1) / S[:, 0].square()


def participation_ratios(S: Tensor) -> Tensor:
    return S.square().sum(1).square() / S.pow(4).sum(1)


def k90s(S: Tensor) -> Tensor:
    energy = S.square().cumsum(1)
    return (energy < 0.9 * energy[:, -1:]).sum(1) + 1


SHAPES = [
    ((20, 12), 4),
    ((5, 30), 5),  # r = d on one side
    ((6, 30), 9),  # r above d_out alone
    ((30, 6), 9),  # r above d_in alone
    ((6, 4), 9),  # r above both
    ((1, 7), 3),
    ((7, 5), 1),
]


@pytest.mark.parametrize(("shape", "r"), SHAPES)
def test_singular_values_are_distributed_as_those_of_gaussian_products(shape: tuple[int, int], r: int) -> None:
    S = spectrum_null(shape, r, draws=2000, seed=1).numpy()
    expected = direct(shape, r, 2000, seed=2)
    assert S.shape == expected.shape
    statistics = [S[:, k] for k in range(S.shape[1])] + [(S**2).sum(1), S[:, 0] / S[:, -1]]
    references = [expected[:, k] for k in range(S.shape[1])]
    references += [(expected**2).sum(1), expected[:, 0] / expected[:, -1]]
    for ours, theirs in zip(statistics, references, strict=True):
        # About fifty comparisons in all; a ratio of 1 for a single value is rounding on both sides.
        if S.shape[1] > 1 or ours is not statistics[-1]:
            assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


@pytest.mark.parametrize(("shape", "r"), SHAPES)
def test_mean_energy_is_the_number_of_products(shape: tuple[int, int], r: int) -> None:
    energy = spectrum_null(shape, r, draws=4000, seed=3).square().sum(1)
    # E ||up @ down||² = d_out d_in r; five standard errors.
    assert float(energy.mean()) == pytest.approx(
        shape[0] * shape[1] * r, abs=5 * float(energy.std()) / math.sqrt(len(energy))
    )


# Means (stable rank, participation ratio, k90) as documented for this null; they were estimated from a few hundred
# draws, which leaves 0.02 to 0.15 in the stable rank at these sizes.
@pytest.mark.parametrize(
    ("d", "r", "stable", "participation", "k90"),
    [(4096, 64, 46.6, 62.0, 56), (384, 64, 25.6, 47.8, 48), (4096, 8, 7.26, 7.97, None), (128, 8, 4.84, None, 7)],
)
def test_reference_values(d: int, r: int, stable: float, participation: float | None, k90: int | None) -> None:
    S = spectrum_null((d, d), r, draws=400)
    assert float(stable_ranks(S).mean()) == pytest.approx(stable, abs=0.2 if r == 64 else 0.07)
    if participation is not None:
        assert float(participation_ratios(S).mean()) == pytest.approx(participation, abs=0.06)
    if k90 is not None:
        assert float(k90s(S).double().median()) == k90


def test_stable_rank_at_rank_64_lies_in_the_documented_interval() -> None:
    ranks = stable_ranks(spectrum_null((4096, 4096), 64, draws=400))
    inside = float(((ranks > 45.2) & (ranks < 47.8)).double().mean())
    assert 0.95 < inside < 1.0
    assert float(ranks.min()) > 64 * 0.65  # noise that is far from using 64 directions evenly


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 15), st.integers(1, 5), st.integers(0, 9))
def test_draws_are_descending_finite_and_repeatable(d_out: int, d_in: int, r: int, draws: int, seed: int) -> None:
    S = spectrum_null((d_out, d_in), r, draws=draws, seed=seed)
    assert S.shape == (draws, min(r, d_out, d_in))
    assert S.dtype == torch.float64
    assert bool(S.isfinite().all())
    assert bool((S >= 0).all())
    assert bool((S.diff(dim=1) <= 0).all())
    assert torch.equal(S, spectrum_null((d_out, d_in), r, draws=draws, seed=seed))


def test_the_law_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spectrum_null((9, 7), 3, draws=1500)
    monkeypatch.setattr(module, "_CHUNK", 1)
    single = spectrum_null((9, 7), 3, draws=1500)
    assert single.shape == whole.shape
    assert stats.ks_2samp(stable_ranks(whole).numpy(), stable_ranks(single).numpy()).pvalue > 1e-3


def test_global_generators_are_left_alone() -> None:
    state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    spectrum_null((9, 7), 3, draws=3)
    assert torch.equal(state, torch.get_rng_state())
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002


@pytest.mark.parametrize(("shape", "r", "draws"), [((0, 4), 2, 5), ((4, 0), 2, 5), ((4, 4), -1, 5), ((4, 4), 2, 0)])
def test_impossible_sizes_are_refused(shape: tuple[int, int], r: int, draws: int) -> None:
    with pytest.raises(ValueError, match=r"spectrum_null: expected d_out, d_in and draws of at least 1"):
        spectrum_null(shape, r, draws=draws)
