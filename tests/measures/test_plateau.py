"""Plateaus of noise: found where there is nothing else, rejected on spectra that fall, thresholds as published."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lora_analysis.measures.plateau import (
    marchenko_pastur_cdf,
    marchenko_pastur_median,
    noise_plateau,
    optimal_threshold,
)
from lora_analysis.measures.spectrum_null import triangular_factors


@pytest.mark.parametrize(
    ("beta", "omega"),
    [(1, 2.8584), (64 / 4096, 1.4495), (64 / 384, 1.7152), (8 / 384, 1.4607), (8 / 4096, 1.4188), (0.5, 2.1712)],
)
def test_thresholds_are_gavish_and_donohos(beta: float, omega: float) -> None:
    assert optimal_threshold(beta) == pytest.approx(omega, abs=1e-4)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0])
def test_the_law_is_the_integral_of_marchenko_and_pasturs_density(beta: float) -> None:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(value: float) -> float:
        return math.sqrt(max(0.0, (high - value) * (value - low))) / (2 * math.pi * beta * value)

    for x in np.linspace(math.sqrt(low), math.sqrt(high), 7)[1:-1]:
        expected, _ = integrate.quad(density, low, x**2, limit=200)
        assert float(marchenko_pastur_cdf(x, beta)) == pytest.approx(expected, abs=1e-5)
    assert float(marchenko_pastur_cdf(marchenko_pastur_median(beta), beta)) == pytest.approx(0.5, abs=1e-9)


def test_p_is_uniform_on_noise() -> None:
    noise = torch.linalg.svdvals(triangular_factors(np.random.default_rng(1), 500, 256, 24))
    p = [noise_plateau(3.0 * S, 256, draws=4000).p for S in noise]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_directions_above_a_plateau_are_counted() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(512, 48, generator=generator, dtype=torch.float64)
    matrix[:, :3] *= torch.tensor([9.0, 6.0, 4.0])
    found = noise_plateau(torch.linalg.svdvals(matrix), 512)
    assert (found.applicable, found.above_edge, found.above_threshold) == (True, 3, 3)
    assert found.edge == pytest.approx(math.sqrt(512) + math.sqrt(48), rel=0.05)
    assert found.threshold > found.edge


@pytest.mark.parametrize("decay", [0.9, 0.97])
def test_a_spectrum_that_falls_has_no_plateau(decay: float) -> None:
    found = noise_plateau(decay ** torch.arange(64.0), 4096)
    assert not found.applicable
    assert found.p < 0.01
    assert (found.above_edge, found.above_threshold) == (None, None)


@pytest.mark.parametrize("S", [torch.ones(8), torch.cat([torch.ones(4), torch.zeros(12)]), torch.zeros(0)])
def test_too_few_values_and_dead_ones_are_not_applicable(S: torch.Tensor) -> None:
    found = noise_plateau(S, 512)
    assert not found.applicable
    assert math.isnan(found.p)


def test_more_values_than_the_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="d: expected at least the 16 singular values, got 8"):
        noise_plateau(torch.ones(16), 8)
    with pytest.raises(ValueError, match=r"beta: expected in \(0, 1\], got 2"):
        marchenko_pastur_cdf(0.5, 2.0)
