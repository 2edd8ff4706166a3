import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lora_analysis.measures.amplification import amplification, projected_null_rms
from lora_analysis.measures.projection_null import projection_null, projection_null_draws
from lora_analysis.measures.weight import WeightSpectrum, weight_spectrum

P_MIN = 1e-3
"""Smallest acceptable p-value of a seeded test of a true hypothesis."""

SE = 4
"""Standard errors within which a Monte Carlo estimate must meet its exact value."""


def haar_frames(draws: int, d: int, k: int, generator: torch.Generator) -> Tensor:
    """Independent uniformly distributed frames, (draws, d, k), by QR with positive diagonal."""
    Q, R = torch.linalg.qr(torch.randn(draws, d, k, generator=generator, dtype=torch.float64))
    frames: Tensor = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return frames


def projections(weight: Tensor, r: int, s: int, draws: int, seed: int) -> Tensor:
    """``U.T @ W @ V`` over independent Haar frames, (draws, r, s): the definition."""
    generator = torch.Generator().manual_seed(seed)
    U = haar_frames(draws, weight.shape[0], r, generator)
    V = haar_frames(draws, weight.shape[1], s, generator)
    return U.mT @ weight @ V


def nested_squares(G: Tensor) -> Tensor:
    return torch.stack([G[:, :j, :j].square().sum(dim=(1, 2)) for j in range(1, G.shape[1] + 1)], dim=1)


def weight_with(values: Tensor, m: int, n: int) -> Tensor:
    weight = torch.zeros(m, n, dtype=torch.float64)
    weight.diagonal()[: len(values)] = values
    return weight


def power_law(p: int, power: float) -> Tensor:
    return torch.arange(1, p + 1, dtype=torch.float64) ** -power


def spectrum_of(values: Tensor, known: int | None = None) -> WeightSpectrum:
    """The exact spectrum, or its first ``known`` values with the exact moments."""
    return WeightSpectrum(
        S=values[:known],
        bound=0.0,
        norm=float(values.norm()),
        fourth_moment=float((values**4).sum()),
        complete=known is None,
    )


def assert_moments(sample: Tensor, mean: float, variance: float) -> None:
    """Mean and variance within SE standard errors, those estimated from the sample itself."""
    x = sample.numpy()
    centred = (x - x.mean()) ** 2
    assert abs(x.mean() - mean) < SE * x.std() / math.sqrt(len(x))
    assert abs(centred.mean() - variance) < SE * centred.std() / math.sqrt(len(x))


# -- exact moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "r", "s"),
    [(12, 12, 3, 3), (16, 9, 4, 2), (7, 15, 2, 5), (10, 8, 1, 1), (6, 6, 5, 6), (2, 2, 1, 1), (5, 1, 2, 1)],
)
def test_the_exact_moments_are_those_of_random_frames(m: int, n: int, r: int, s: int) -> None:
    values = power_law(min(m, n), 0.7)
    G = projections(weight_with(values, m, n), r, s, draws=20_000, seed=m * n)
    mean, variance = projection_null((m, n), r, s, float(values.square().sum()), float((values**4).sum()))
    assert_moments(G.square().sum(dim=(1, 2)), mean, variance)


@pytest.mark.parametrize(("m", "n", "r", "s"), [(12, 12, 3, 3), (16, 9, 4, 2), (4096, 1024, 64, 8)])
def test_the_variance_is_the_second_moment_less_the_squared_mean(m: int, n: int, r: int, s: int) -> None:
    # The textbook arrangement: E[P⊗P] of a random projection has two coefficients, a and b.
    def coefficients(r: int, m: int) -> tuple[float, float]:
        scale = m * (m - 1) * (m + 2)
        return (r**2 * (m + 1) - 2 * r) / scale, r * (m - r) / scale

    square, fourth = 3.0, 1.5
    (a, b), (c, d) = coefficients(r, m), coefficients(s, n)
    second = (a * c + 2 * b * d) * square**2 + 2 * (a * d + b * c + b * d) * fourth
    mean, variance = projection_null((m, n), r, s, square, fourth)
    assert mean == pytest.approx(r * s / (m * n) * square, rel=1e-14)
    assert variance == pytest.approx(second - mean**2, rel=1e-8)


def test_a_frame_that_is_everything_leaves_no_variance() -> None:
    assert projection_null((5, 4), 5, 4, 2.0, 1.0) == (2.0, 0.0)
    assert projection_null((1, 1), 1, 1, 2.0, 4.0) == (2.0, 0.0)
    assert projection_null((5, 4), 0, 2, 2.0, 1.0)[0] == 0


def test_the_root_of_the_exact_mean_is_the_closed_form() -> None:
    mean, _ = projection_null((768, 3072), 8, 8, 5.0**2, 5.0**4 / 100)
    assert math.sqrt(mean) == pytest.approx(projected_null_rms(5.0, 8, (768, 3072)), rel=1e-14)


def test_more_columns_than_the_space_has_are_refused() -> None:
    with pytest.raises(ValueError, match="expected r <= 5 and s <= 4 orthonormal columns, got 6 and 1"):
        projection_null((5, 4), 6, 1, 1.0, 1.0)


# -- the sampler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "power"),
    [
        (24, 20, 4, 1.0),
        (20, 24, 4, 0.0),
        (10, 40, 8, 0.5),  # 2k > min(m, n)
        (9, 9, 9, 0.5),  # whole frames: ||G|| is ||W|| in every draw
        (11, 9, 9, 1.0),  # fewer further rows than columns: no Bartlett factor
        (6, 1, 1, 0.0),
    ],
)
def test_draws_follow_the_law_of_random_frames(m: int, n: int, k: int, power: float) -> None:
    values = power_law(min(m, n), power)
    direct = nested_squares(projections(weight_with(values, m, n), k, k, draws=8000, seed=1))
    drawn = projection_null_draws(spectrum_of(values), (m, n), k, draws=8000, seed=2)
    assert drawn.shape == (8000, k)
    for j in range(k):
        # Where W is a multiple of an isometry or the frame is everything, the law is a point.
        if direct[:, j].std() < 1e-9 * direct[:, j].mean():
            # A square Gaussian is now and then ill-conditioned, and its draw loses half its digits.
            torch.testing.assert_close(drawn[:, j], direct[:, j], rtol=1e-3, atol=0)
        else:
            assert stats.ks_2samp(direct[:, j].numpy(), drawn[:, j].numpy()).pvalue > P_MIN, j


@pytest.mark.parametrize(("m", "n", "k"), [(24, 20, 4), (384, 384, 64), (64, 500, 16)])
def test_draws_have_the_exact_moments(m: int, n: int, k: int) -> None:
    spectrum = spectrum_of(power_law(min(m, n), 0.5))
    drawn = projection_null_draws(spectrum, (m, n), k, draws=2000, seed=3)
    for j in (1, k // 2, k):
        mean, variance = projection_null((m, n), j, j, spectrum.norm**2, spectrum.fourth_moment)
        assert_moments(drawn[:, j - 1], mean, variance)


def test_draws_of_a_weight_of_low_rank_follow_the_law_too() -> None:
    values = torch.cat([torch.tensor([3.0, 1.0], dtype=torch.float64), torch.zeros(10, dtype=torch.float64)])
    direct = nested_squares(projections(weight_with(values, 14, 12), 5, 5, draws=8000, seed=1))
    drawn = projection_null_draws(spectrum_of(values), (14, 12), 5, draws=8000, seed=2)
    for j in range(5):
        assert stats.ks_2samp(direct[:, j].numpy(), drawn[:, j].numpy()).pvalue > P_MIN, j


def test_draws_are_nested_and_below_the_ceiling() -> None:
    values = power_law(20, 1.0)
    drawn = projection_null_draws(spectrum_of(values), (24, 20), 12, draws=500)
    assert bool((drawn.diff(dim=1) >= 0).all())
    assert bool((drawn <= values.square().cumsum(0)[:12] * (1 + 1e-9)).all())


def test_draws_depend_on_the_seed_and_on_nothing_global() -> None:
    spectrum = spectrum_of(power_law(20, 1.0))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = projection_null_draws(spectrum, (24, 20), 4, draws=50, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(projection_null_draws(spectrum, (24, 20), 4, draws=50, seed=5), first)
    assert not torch.equal(projection_null_draws(spectrum, (24, 20), 4, draws=50, seed=6), first)


def test_draws_of_a_zero_weight_are_zero() -> None:
    spectrum = weight_spectrum(torch.zeros(6, 5), 2)
    assert projection_null_draws(spectrum, (6, 5), 2, draws=3).tolist() == [[0, 0]] * 3


def test_a_spectrum_or_k_that_does_not_fit_is_refused() -> None:
    spectrum = spectrum_of(power_law(5, 1.0))
    with pytest.raises(ValueError, match=r"k: expected 1 to 5 directions for shape \(6, 5\), got 6"):
        projection_null_draws(spectrum, (6, 5), 6)
    with pytest.raises(ValueError, match=r"spectrum: expected 6 singular values for shape \(6, 7\), got 5"):
        projection_null_draws(spectrum, (6, 7), 2)


# -- p-values -------------------------------------------------------------------------------------------

KS = (1, 2, 4)


def p_values(G: Tensor, spectrum: WeightSpectrum, shape: tuple[int, int], null: Tensor) -> np.ndarray:
    """p of every projection, (draws, len(KS)), by the measure itself."""
    S = torch.ones(G.shape[1], dtype=torch.float64)
    return np.array([amplification(g, S, spectrum, shape, KS, null_draws=null).p.numpy() for g in G])


@pytest.mark.parametrize(("m", "n"), [(24, 20), (20, 20)])
def test_p_is_uniform_under_the_null(m: int, n: int) -> None:
    values = power_law(min(m, n), 1.0)
    spectrum = spectrum_of(values)
    null = projection_null_draws(spectrum, (m, n), 4, draws=20_000, seed=1)
    p = p_values(projections(weight_with(values, m, n), 4, 4, draws=500, seed=2), spectrum, (m, n), null)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > P_MIN


def test_small_p_are_as_rare_as_they_say() -> None:
    # Where the moment-matched chi-square is wrong by a factor of 1.5: see the tail, not the bulk.
    values = power_law(20, 1.0)
    spectrum, count = spectrum_of(values), 6000
    null = projection_null_draws(spectrum, (24, 20), 4, draws=60_000, seed=3)
    p = p_values(projections(weight_with(values, 24, 20), 4, 4, draws=count, seed=4), spectrum, (24, 20), null)
    for level in (0.01, 0.05):
        low, high = stats.binom.interval(0.999, count, level)
        for rare in (p < level).sum(axis=0):
            assert low <= rare <= high, level


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_p_holds_where_only_the_top_of_the_spectrum_is_known(power: float) -> None:
    values = power_law(120, power)
    spectrum, count = spectrum_of(values, known=8), 6000
    null = projection_null_draws(spectrum, (160, 120), 4, draws=60_000, seed=5)
    G = projections(weight_with(values, 160, 120), 4, 4, draws=count, seed=6)
    p = p_values(G, spectrum, (160, 120), null)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > P_MIN
    low, high = stats.binom.interval(0.999, count, 0.01)
    for rare in (p < 0.01).sum(axis=0):
        assert low <= rare <= high


@pytest.mark.parametrize("known", [1, 4, 16])
def test_an_unknown_rest_keeps_mean_and_variance(known: int) -> None:
    spectrum = spectrum_of(power_law(300, 0.3), known=known)
    drawn = projection_null_draws(spectrum, (400, 300), 16, draws=4000, seed=7)
    for j in (1, 4, 16):
        mean, variance = projection_null((400, 300), j, j, spectrum.norm**2, spectrum.fourth_moment)
        assert_moments(drawn[:, j - 1], mean, variance)


def test_an_unknown_rest_of_no_energy_changes_nothing() -> None:
    values = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    direct = projection_null_draws(spectrum_of(values), (8, 6), 3, draws=8000, seed=1)
    drawn = projection_null_draws(spectrum_of(values, known=2), (8, 6), 3, draws=8000, seed=2)
    for j in range(3):
        assert stats.ks_2samp(direct[:, j].numpy(), drawn[:, j].numpy()).pvalue > P_MIN, j


def test_the_spectrum_of_a_large_weight_gives_its_null() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1200, 1050, generator=generator)
    weight += 3 * torch.outer(torch.randn(1200, generator=generator), torch.randn(1050, generator=generator))
    spectrum = weight_spectrum(weight, 8)
    assert not spectrum.complete
    true = torch.linalg.svdvals(weight.double())
    drawn = projection_null_draws(spectrum, (1200, 1050), 8, draws=4000, seed=1)
    for j in (1, 4, 8):
        mean, variance = projection_null((1200, 1050), j, j, float(true.square().sum()), float((true**4).sum()))
        assert_moments(drawn[:, j - 1], mean, variance)


def test_z_is_the_standard_score_of_the_squared_projection() -> None:
    values = power_law(20, 0.5)
    G = projections(weight_with(values, 24, 20), 4, 4, draws=2000, seed=8)
    spectrum, S = spectrum_of(values), torch.ones(4, dtype=torch.float64)
    z = np.array([amplification(g, S, spectrum, (24, 20), [4]).z.item() for g in G])
    assert abs(z.mean()) < SE / math.sqrt(2000)
    assert z.std() == pytest.approx(1, abs=0.1)
