"""What training put into A: calibrated on starts, seen where it was planted, and told apart from other starts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_analysis.measures.learned import Law, initial_spectrum_null, kaiming_sd, learned_directions


def start(r: int, d_in: int, seed: int, *, law: Law = "uniform", sd: float | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sd = kaiming_sd(d_in) if sd is None else sd
    if law == "normal":
        return sd * torch.randn(r, d_in, generator=generator)
    return sd * math.sqrt(3) * (2 * torch.rand(r, d_in, generator=generator) - 1)


def test_the_standard_deviation_is_that_of_torchs_initialisation() -> None:
    A = torch.empty(64, 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    assert float(A.std()) == pytest.approx(kaiming_sd(512), rel=0.02)
    assert float(A.abs().max()) == pytest.approx(1 / math.sqrt(512), rel=1e-3)


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize(("r", "d_in"), [(4, 64), (16, 8)])
def test_p_is_uniform_on_starts(law: Law, r: int, d_in: int) -> None:
    null = initial_spectrum_null(r, d_in, law=law, draws=4000, seed=1)
    found = [learned_directions(start(r, d_in, seed, law=law), null) for seed in range(500)]
    assert stats.kstest([one.p for one in found], "uniform").pvalue > 1e-3
    assert stats.kstest([one.bulk_p for one in found], "uniform").pvalue > 1e-3
    assert np.mean([one.learned > 0 for one in found]) < 0.03  # a hundredth, and chance
    assert np.mean([one.bulk for one in found]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("scale", [0.7, 1.1, 1.4])
def test_the_count_by_ratios_holds_for_a_start_of_any_variance(scale: float) -> None:
    null = initial_spectrum_null(16, 512, draws=999, seed=2)
    found = [learned_directions(scale * start(16, 512, seed), null) for seed in range(300)]
    assert stats.kstest([one.p_rescaled for one in found], "uniform").pvalue > 1e-3
    assert np.mean([one.learned_rescaled > 0 for one in found]) < 0.01 + 4 * (0.01 / 300) ** 0.5
    # The variance is off, which bulk tells; the count that takes it as known would find many, or none.
    assert np.mean([one.bulk for one in found]) == pytest.approx(scale, rel=0.02)
    assert max(one.bulk_p for one in found) < 0.01


def test_up_to_three_quarters_of_the_directions_may_be_learned() -> None:
    null = initial_spectrum_null(16, 512, draws=999, seed=2)
    basis = torch.linalg.qr(torch.randn(512, 16, generator=torch.Generator().manual_seed(1))).Q.mT
    for learned in (1, 6, 12):
        strength = torch.zeros(16)
        strength[:learned] = 2.0
        found = learned_directions(start(16, 512, 3) + strength[:, None] * basis, null)
        assert found.learned == found.learned_rescaled == learned
    assert learned_directions(start(1, 512, 3), initial_spectrum_null(1, 512)).p_rescaled == 1


def test_both_laws_agree_with_singular_values_of_drawn_matrices() -> None:
    direct = torch.stack([torch.linalg.svdvals(start(6, 50, seed).double() / kaiming_sd(50)) for seed in range(2000)])
    sampled = initial_spectrum_null(6, 50, draws=2000, seed=3)
    for k in range(6):
        assert stats.ks_2samp(direct[:, k].numpy(), sampled[:, k].numpy()).pvalue > 1e-4
    # Its edge is closer than that of normal entries, which vary more in length.
    assert sampled[:, 0].quantile(0.99) < initial_spectrum_null(6, 50, law="normal", draws=2000)[:, 0].quantile(0.99)


@pytest.mark.parametrize(("strength", "seen"), [(0.1, False), (0.3, True), (1.0, True)])
def test_a_planted_direction_is_seen_from_the_threshold_on(strength: float, seen: bool) -> None:
    # Visible from sd sqrt(d_in) (r / d_in)^(1/4) = 0.204 on, at this shape.
    r, d_in = 64, 4096
    generator = torch.Generator().manual_seed(5)
    u, v = torch.randn(r, generator=generator), torch.randn(d_in, generator=generator)
    A = start(r, d_in, 7) + strength * torch.outer(u / u.norm(), v / v.norm())
    null = initial_spectrum_null(r, d_in, law="normal", draws=300)
    found = learned_directions(A, null)
    assert (found.learned == 1) == seen
    assert (found.p < 0.01) == seen


def test_the_edge_scales_with_the_bulk_where_weight_decay_shrank_it() -> None:
    A = start(32, 512, 1) * 0.5
    A[0] *= 6
    null = initial_spectrum_null(32, 512)
    found = learned_directions(A, null)
    assert found.bulk == pytest.approx(0.5, rel=0.05)
    assert found.learned_rescaled == 1
    assert found.bulk_p < 0.01


def test_a_factor_without_anything_in_it_has_learned_nothing() -> None:
    found = learned_directions(torch.zeros(4, 32), initial_spectrum_null(4, 32, draws=99))
    assert (found.learned, found.learned_rescaled, found.p, found.bulk) == (0, 0, 1.0, 0.0)


def test_what_does_not_fit_is_refused() -> None:
    null = initial_spectrum_null(4, 32, draws=9)
    with pytest.raises(ValueError, match=r"null: expected \(draws, 3\) for A of \(3, 32\)"):
        learned_directions(torch.ones(3, 32), null)
    with pytest.raises(ValueError, match="down: expected finite numbers, got NaN"):
        learned_directions(torch.full((4, 32), math.nan), null)
    with pytest.raises(ValueError, match=r"sd: expected a positive number, got 0\.0"):
        learned_directions(torch.ones(4, 32), null, sd=0.0)
    with pytest.raises(ValueError, match="law: expected 'uniform' or 'normal', got 'cauchy'"):
        initial_spectrum_null(4, 32, law="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected r, d_in and draws of at least 1, got r=0"):
        initial_spectrum_null(0, 32)
