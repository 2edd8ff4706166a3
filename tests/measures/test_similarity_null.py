"""The null of similarity: moments, tails and calibration against direct Haar sampling, and its plumbing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lora_analysis.measures import null as null_module
from lora_analysis.measures.null import largest_cosine_null, similarity_null
from lora_analysis.measures.subspace import principal_angles, subspace_similarity

# Closed forms in float64, through incomplete Beta functions.
ROUNDING = 1e-12


def haar(d: int, k: int, count: int, generator: torch.Generator) -> Tensor:
    """Bases of random subspaces, (count, d, k), by QR of Gaussian matrices: no shared code with the null."""
    basis: Tensor = torch.linalg.qr(torch.randn(count, d, k, dtype=torch.float64, generator=generator)).Q
    return basis


def haar_similarities(d: int, m: int, n: int, count: int, seed: int) -> Tensor:
    """Phi grids of random pairs, (count, m, n)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = haar(d, m, count, generator), haar(d, n, count, generator)
    overlap = (a.mT @ b).square().cumsum(1).cumsum(2)
    smaller = torch.minimum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1))
    return (overlap / smaller).clamp(max=1.0)


SHAPES = [(1, 1, 1), (2, 2, 1), (3, 2, 2), (9, 5, 8), (10, 8, 8), (12, 3, 4), (16, 4, 15), (40, 6, 9)]


@pytest.mark.parametrize(("d", "m", "n"), SHAPES)
def test_moments_agree_with_direct_sampling(d: int, m: int, n: int) -> None:
    count = 4000
    null = similarity_null(d, m, n)
    phi = haar_similarities(d, m, n, count, seed=1)
    mean, sd = phi.mean(0), phi.std(0)
    # Five standard errors over up to 60 correlated cells; the fourth moment is the sample's own.
    mean_error = sd / math.sqrt(count)
    assert bool(((mean - null.mean).abs() <= 5 * mean_error + ROUNDING).all())
    fourth = (phi - mean).pow(4).mean(0)
    variance_error = ((fourth - sd.pow(4)).clamp(min=0) / count).sqrt()
    assert bool(((sd.square() - null.sd.square()).abs() <= 5 * variance_error + ROUNDING).all())


@pytest.mark.parametrize(("d", "m", "n"), SHAPES)
def test_quantiles_agree_with_direct_sampling(d: int, m: int, n: int) -> None:
    count, q = 4000, 0.9
    null = similarity_null(d, m, n, draws=4000, seed=7)
    below = (haar_similarities(d, m, n, count, seed=2) <= null.quantile(q) + ROUNDING).double().mean(0)
    # Error of the sample and of the null's own draws; five sd. Cells without spread are always below.
    slack = 5 * math.sqrt(2 * q * (1 - q) / count)
    assert bool(((below - q).abs()[null.sd > 0] <= slack).all())
    assert bool((below[null.sd == 0] == 1).all())


@pytest.mark.parametrize(
    ("d", "m", "n"),
    [(20, 4, 7), (9, 5, 8), (10, 8, 8), (6, 5, 5)],
    ids=["small", "complement", "overfull", "tight"],
)
def test_p_values_are_uniform_under_the_null(d: int, m: int, n: int) -> None:
    null = similarity_null(d, m, n, draws=4000, seed=3)
    grids = haar_similarities(d, m, n, 500, seed=4)
    p = torch.stack([null.p(phi) for phi in grids])
    for i in range(m):
        for j in range(n):
            # 500 against the closed form, or against 4000 draws; about 40 cells a case.
            assert stats.kstest(p[:, i, j].numpy(), "uniform").pvalue > 1e-4, (i + 1, j + 1)


def test_small_p_values_are_as_frequent_as_they_say() -> None:
    d, m, n, count, draws = 14, 4, 13, 5000, 20_000
    cells = [(1, 1), (1, 6), (1, 13), (2, 2), (3, 5), (4, 4), (4, 11), (4, 12), (4, 13)]
    null = similarity_null(d, m, n, draws=draws, seed=5)
    grids = haar_similarities(d, m, n, count, seed=6)
    at = (slice(None), [i - 1 for i, _ in cells], [j - 1 for _, j in cells])
    p = torch.stack([null.p(phi, cells=cells) for phi in grids[at]])
    for level in (0.05, 0.01, 0.002):
        frequency = (p <= level).double().mean(0)
        # Binomial error of the observations and of the draws that estimate the quantile; four sd.
        slack = 4 * math.sqrt(level * (1 - level) * (1 / count + 1 / draws))
        assert bool(((frequency - level).abs() <= slack).all()), level


def test_one_line_against_a_subspace_is_beta() -> None:
    d, n = 384, 64
    null = similarity_null(d, 1, n)
    phi = torch.linspace(0, 1, n, dtype=torch.float64)[None]
    j = np.arange(1, n + 1)
    expected = stats.beta.sf(phi.numpy(), j / 2, (d - j) / 2)
    np.testing.assert_allclose(null.p(phi).numpy(), expected, rtol=1e-9, atol=0)
    np.testing.assert_allclose(null.mean.numpy()[0], stats.beta.mean(j / 2, (d - j) / 2), rtol=ROUNDING)
    np.testing.assert_allclose(null.sd.numpy()[0], stats.beta.std(j / 2, (d - j) / 2), rtol=ROUNDING)
    np.testing.assert_allclose(null.quantile(0.999).numpy()[0], stats.beta.ppf(0.999, j / 2, (d - j) / 2), rtol=1e-9)


def test_closed_forms_agree_with_draws_of_the_sampler() -> None:
    d, m, n, draws = 7, 6, 7, 20_000
    null = similarity_null(d, m, n)
    overlaps = torch.cat(list(null_module.SimilarityNull(d, m, n, draws, 11)._sample()))
    i, j = torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1)
    phi = (overlaps / torch.minimum(i, j).flatten()).reshape(draws, m, n)
    exact = null.exact
    # The first row and column, the last two columns and the last row.
    assert int((~exact).sum()) == 4 * 4
    for q in (0.1, 0.5, 0.9, 0.99):
        below = (phi <= null.quantile(q) + ROUNDING).double().mean(0)
        slack = 5 * math.sqrt(q * (1 - q) / draws)
        assert bool(((below - q).abs()[exact & (null.sd > 0)] <= slack).all())


# Reference mean / sd / 99.9 % quantile of phi, in the digits they were given. The quantiles are simulated, with
# a number of draws that is not recorded.
PRINTED = {
    (128, 8, 64): {(1, 1): ".0078/.0109/.082", (1, 8): ".063/.030/.192", (1, 64): ".500/.062/.687",
                   (4, 4): ".031/.011/.072", (8, 8): ".063/.010/.098", (8, 64): ".500/.021/.568"},
    (384, 8, 64): {(1, 1): ".0026/.0037/.028", (1, 8): ".021/.010/.067", (1, 64): ".167/.027/.259",
                   (4, 4): ".010/.004/.026", (8, 8): ".021/.004/.033", (8, 64): ".167/.009/.195"},
    (4096, 8, 64): {(1, 1): ".0002/.0003/.0026", (1, 8): ".002/.001/.0064", (1, 64): ".016/.003/.025",
                    (4, 4): ".001/.0003/.0023", (8, 8): ".002/.0003/.0032", (8, 64): ".016/.001/.019"},
    (12288, 8, 64): {(1, 1): ".0001/.0001/.0009", (1, 8): ".0007/.0003/.0021", (1, 64): ".005/.0009/.0085",
                     (4, 4): ".0003/.0001/.0008", (8, 8): ".0007/.0001/.0010", (8, 64): ".005/.0003/.0063"},
}  # fmt: skip


@pytest.mark.parametrize("shape", list(PRINTED))
def test_the_reference_table_is_reproduced(shape: tuple[int, int, int]) -> None:
    null = similarity_null(*shape, draws=8000, seed=1)
    cells = list(PRINTED[shape])
    quantiles = null.quantile(0.999, cells=cells)
    for (i, j), quantile in zip(cells, quantiles.tolist(), strict=True):
        mean, sd, top = PRINTED[shape][i, j].split("/")
        exact_sd = float(null.sd[i - 1, j - 1])
        # Where the normal density is 0.0034 / sd, 8000 draws give the quantile to 0.1 sd. Half an sd is four
        # errors of the difference, if the reference took as many; it also allows for the skewed cells.
        for value, printed, error in (
            (float(null.mean[i - 1, j - 1]), mean, 0.0),
            (exact_sd, sd, 0.0),
            (quantile, top, 0.5 * exact_sd),
        ):
            # The printed digits, rounded either way at a half.
            assert abs(value - float(printed)) <= 0.501 * 10.0 ** (1 - len(printed)) + error, (i, j)


def test_a_planted_direction_is_found_and_the_rest_is_not() -> None:
    d, r, generator = 384, 8, torch.Generator().manual_seed(0)
    shared = torch.randn(d, 1, dtype=torch.float64, generator=generator)
    a, b = (
        torch.linalg.qr(torch.cat([shared, torch.randn(d, r - 1, dtype=torch.float64, generator=generator)], 1)).Q
        for _ in range(2)
    )
    null = similarity_null(d, r, r)
    p = null.p(subspace_similarity(a, b))
    assert float(p[0, 0]) < 1e-12
    assert float(p[7, 7]) == pytest.approx(1 / 2001, abs=ROUNDING)
    rest = similarity_null(d - 1, r - 1, r - 1)
    assert float(rest.p(subspace_similarity(a[:, 1:], b[:, 1:]))[-1, -1]) > 1e-3


def test_scores_are_standardised_and_absent_where_the_null_is_skewed_or_certain() -> None:
    null = similarity_null(6, 4, 6)
    phi = haar_similarities(6, 4, 6, 1, seed=0)[0]
    z = null.z(phi)
    torch.testing.assert_close(z[1:, 1:-1], ((phi - null.mean) / null.sd)[1:, 1:-1], rtol=ROUNDING, atol=0)
    assert bool(z[0].isnan().all())
    assert bool(z[:, 0].isnan().all())
    assert bool(z[:, -1].isnan().all())


def test_the_whole_space_contains_everything_by_chance() -> None:
    null = similarity_null(6, 4, 6)
    ones = torch.ones(4, 6, dtype=torch.float64)
    assert null.p(ones)[:, -1].tolist() == [1.0] * 4
    assert null.quantile(0.001)[:, -1].tolist() == [1.0] * 4
    assert null.mean[:, -1].tolist() == [1.0] * 4
    assert null.sd[:, -1].tolist() == [0.0] * 4


def test_a_cell_does_not_depend_on_the_others_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    d, m, n = 30, 5, 6
    phi = haar_similarities(d, m, n, 1, seed=0)[0]
    cells = [(5, 6), (1, 1), (3, 2), (3, 2), (2, 6)]
    at = ([i - 1 for i, _ in cells], [j - 1 for _, j in cells])
    whole, listed, warm = (similarity_null(d, m, n, draws=300) for _ in range(3))
    p, q = whole.p(phi), whole.quantile(0.95)
    warm.p(phi[[2], [1]], cells=[(3, 2)])
    for null in (whole, listed, warm):
        assert null.p(phi[at], cells=cells).tolist() == p[at].tolist()
        assert null.quantile(0.95, cells=cells).tolist() == q[at].tolist()
    assert listed.z(phi[at], cells=cells)[[0, 2]].tolist() == whole.z(phi)[at][[0, 2]].tolist()
    # A grid too large to keep is redrawn, block by block, with the same result.
    monkeypatch.setattr(null_module, "_KEPT", 7 * 300)
    large = similarity_null(d, m, n, draws=300)
    assert large.p(phi).tolist() == p.tolist()
    assert large.quantile(0.95).tolist() == q.tolist()


def test_nothing_is_drawn_for_closed_forms_and_moments() -> None:
    null = similarity_null(4096, 512, 512, draws=10**15)  # which no machine would finish
    assert null.mean.shape == null.sd.shape == (512, 512)
    assert float(null.p(torch.tensor([0.01]), cells=[(1, 512)])) == pytest.approx(1.0, abs=1e-6)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (similarity_null(64, 4, 4, seed=seed).quantile(0.9) for seed in (0, 0, 1))
    largest_cosine_null(64, 4, 4, draws=10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_similarities_have_unknown_p_values_and_scores() -> None:
    null = similarity_null(32, 3, 3, draws=50)
    phi = torch.full((3, 3), math.nan)
    phi[1, 1] = 0.1
    for figures in (null.p(phi), null.z(phi)):
        assert figures.isfinite().sum() == 1


def test_single_precision_similarities_of_one_are_within_range() -> None:
    null = similarity_null(32, 3, 3, draws=50)
    assert null.p(torch.ones(3, 3))[2, 2] == pytest.approx(1 / 51, rel=ROUNDING)


def test_an_empty_basis_has_an_empty_null() -> None:
    null = similarity_null(32, 0, 3)
    assert null.mean.shape == null.p(torch.empty(0, 3)).shape == null.quantile(0.5).shape == (0, 3)
    assert null.p(torch.empty(0), cells=[]).shape == (0,)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most d columns in dimension d >= 1, got d=4, m=5, n=2"):
        similarity_null(4, 5, 2)
    with pytest.raises(ValueError, match=r"draws: expected at least 1, got 0"):
        similarity_null(4, 2, 2, draws=0)
    null = similarity_null(8, 2, 3)
    with pytest.raises(ValueError, match=r"cells: expected 1 <= i <= 2 and 1 <= j <= 3, got \(0, 1\)"):
        null.quantile(0.5, cells=[(0, 1)])
    with pytest.raises(ValueError, match=r"phi: expected shape \(2, 3\), got \(3, 2\)"):
        null.p(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"phi: expected shape \(1,\), got \(2, 3\)"):
        null.z(torch.zeros(2, 3), cells=[(1, 1)])
    with pytest.raises(ValueError, match=r"phi: expected similarities in \[0, 1\], got 1.5"):
        null.p(torch.full((2, 3), 1.5))
    with pytest.raises(ValueError, match=r"q: expected a probability in \[0, 1\], got 99"):
        null.quantile(99)
    with pytest.raises(ValueError, match=r"dimension 1 at least, got 0 and 3"):
        largest_cosine_null(8, 0, 3)


def test_largest_cosines_agree_with_direct_sampling() -> None:
    d, m, n, count = 24, 3, 5, 2000
    sample = largest_cosine_null(d, m, n, draws=count, seed=1)
    generator = torch.Generator().manual_seed(2)
    products = haar(d, m, count, generator).mT @ haar(d, n, count, generator)
    direct = torch.linalg.matrix_norm(products, ord=2)
    assert stats.ks_2samp(sample.numpy(), direct.numpy()).pvalue > 1e-3
    assert torch.equal(sample, sample.sort().values)


@pytest.mark.parametrize(
    ("d", "m", "n", "mean", "top"),
    [(384, 8, 8, 0.2501, 0.3186), (384, 8, 64, 0.5100, 0.5626), (4096, 8, 64, 0.1595, 0.1772)],
)
def test_largest_cosines_agree_with_direct_sampling_in_high_dimension(
    d: int, m: int, n: int, mean: float, top: float
) -> None:
    sample = largest_cosine_null(d, m, n, draws=4000)
    # From QR of (d, 8) Gaussian matrices against n coordinate axes: 20 000 draws at d = 384, 4000 at 4096. The
    # sd is at most 0.03, so four errors of a difference of means are 0.003, and of 99 % quantiles, where the
    # normal density is 0.027 / sd, 0.01.
    assert float(sample.mean()) == pytest.approx(mean, abs=3e-3)
    assert float(sample.quantile(0.99)) == pytest.approx(top, abs=1e-2)


def test_subspaces_that_must_meet_have_a_cosine_of_one() -> None:
    assert largest_cosine_null(6, 3, 4, draws=20).tolist() == pytest.approx([1.0] * 20, abs=ROUNDING)


def test_shared_dimensions_are_counted_by_the_largest_cosine() -> None:
    d, r, generator = 200, 6, torch.Generator().manual_seed(0)
    shared = haar(d, 2, 1, generator)[0]
    a, b = (torch.linalg.qr(torch.cat([shared, haar(d, r - 2, 1, generator)[0]], dim=1)).Q for _ in range(2))
    cosines = principal_angles(a, b).cos()
    assert int((cosines > largest_cosine_null(d, r, r).quantile(0.99)).sum()) == 2
