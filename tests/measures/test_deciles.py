"""Shares of an update along the whole spectrum of W."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_analysis.measures.deciles import part_null, part_null_draws, part_sizes, spectrum_overlap
from lora_analysis.measures.null import similarity_null


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def haar(d, k, seed):
    return torch.linalg.qr(normal(d, k, seed=seed)).Q


def test_shares_equal_a_naive_sum_over_all_pairs():
    U, S = haar(30, 4, 1), torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    basis = haar(30, 23, 2)
    found = spectrum_overlap(U, S, basis, parts=5)
    assert found.size.tolist() == [5, 5, 5, 4, 4, 7]
    start = 0
    for part, size in enumerate([5, 5, 5, 4, 4]):
        cosines = [[float(basis[:, j] @ U[:, i]) ** 2 for i in range(4)] for j in range(start, start + size)]
        assert float(found.overlap[part]) == pytest.approx(sum(map(sum, cosines)) / 4)
        weighted = sum(row[i] * (16, 9, 4, 1)[i] for row in cosines for i in range(4)) / 30
        assert float(found.energy_share[part]) == pytest.approx(weighted)
        start += size
    assert float(found.overlap.sum()) == pytest.approx(1)
    assert float(found.energy_share.sum()) == pytest.approx(1)
    assert float(found.null_mean.sum()) == pytest.approx(1)


def test_an_update_along_the_top_of_w_lies_in_its_first_parts():
    # O13: ΔW = c W_k.
    weight = normal(40, 40)
    U, S, Vh = torch.linalg.svd(weight)
    for vectors, basis in ((U, U), (Vh.mT, Vh.mT)):
        found = spectrum_overlap(vectors[:, :6], 0.1 * S[:6], basis)
        torch.testing.assert_close(found.overlap, torch.tensor([4.0, 2.0, *[0.0] * 8], dtype=torch.float64) / 6)
        energy = S[:6].square()
        expected = [float(energy[:4].sum() / energy.sum()), float(energy[4:].sum() / energy.sum())]
        assert found.energy_share[:2].tolist() == pytest.approx(expected)


def test_an_update_in_the_smallest_directions_lies_in_the_last_part_and_chance_does_not_put_it_there():
    U = torch.linalg.svd(normal(100, 100)).U
    draws = {10: part_null_draws(100, 10, 3)}
    found = spectrum_overlap(U[:, -3:], torch.ones(3), U, null_draws=draws)
    assert float(found.overlap[-1]) == pytest.approx(1)
    assert float(found.p[-1]) == 0.001
    assert float(found.p[0]) == 1
    assert float(found.z[-1]) > 10


def test_on_the_longer_side_what_w_does_not_reach_is_a_part_of_its_own():
    U, _, _ = torch.linalg.svd(normal(12, 6))
    found = spectrum_overlap(U[:, 6:8], torch.ones(2), U[:, :6], parts=3)
    torch.testing.assert_close(found.overlap, torch.tensor([0, 0, 0, 1.0], dtype=torch.float64))
    assert found.size.tolist() == [2, 2, 2, 6]


def test_mean_and_variance_over_random_frames_are_the_nulls():
    d, k, count = 24, 3, 4000
    S = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    basis = haar(d, d, 0)
    overlaps, energies = [], []
    frames = torch.linalg.qr(normal(count, d, k, seed=5)).Q
    for frame in frames:
        found = spectrum_overlap(frame, S, basis, parts=4)
        overlaps.append(found.overlap)
        energies.append(found.energy_share)
    for values, sd in ((torch.stack(overlaps), found.null_sd), (torch.stack(energies), found.energy_null_sd)):
        error = sd / math.sqrt(count)
        assert ((values.mean(dim=0) - found.null_mean).abs() < 4 * error).all()
        # The relative error of a standard deviation from this many draws is about 1 / sqrt(2 count) = 1%.
        torch.testing.assert_close(values.std(dim=0), sd, rtol=0.06, atol=0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("part", [0, 3])
def test_p_is_uniform_for_random_updates(k, part):
    # p-values on a grid of 2000 are close to continuous.
    d, S = 30, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:k]
    basis = haar(d, 20, 1)
    draws = {n: part_null_draws(d, n, k, draws=1999, seed=n) for n in part_sizes(d, 20, 3)}
    found = [
        spectrum_overlap(frame, S, basis, parts=3, null_draws=draws)
        for frame in torch.linalg.qr(normal(500, d, k, seed=9)).Q
    ]
    for column in ("p", "energy_p"):
        values = [float(getattr(item, column)[part]) for item in found]
        assert stats.kstest(values, "uniform").pvalue > 0.001
        assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.035)


def test_one_direction_has_the_beta_law_exactly():
    found = spectrum_overlap(haar(20, 1, 3), torch.ones(1), haar(20, 20, 4), parts=5)
    expected = stats.beta(2, 8).sf(found.overlap.numpy())
    np.testing.assert_allclose(found.p.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found.energy_p.numpy(), expected, rtol=1e-12)
    assert found.z.isnan().all()


def test_the_null_of_overlap_is_that_of_subspace_similarity():
    d, n, k = 40, 7, 5
    mean, sd = part_null(d, n, torch.full((k,), 1 / k))
    null = similarity_null(d, n, k)
    assert mean == pytest.approx(float(null.mean[n - 1, k - 1]) * min(n, k) / k)
    assert sd == pytest.approx(float(null.sd[n - 1, k - 1]) * min(n, k) / k)
    draws = part_null_draws(d, n, k, draws=4000, seed=1).mean(dim=1)
    p = null.p(torch.quantile(draws, 0.9)[None] * k / min(n, k), cells=[(n, k)])
    assert float(p) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("d", "n", "k"), [(10, 2, 5), (10, 9, 5), (10, 10, 3), (10, 0, 3), (6, 3, 6)])
def test_draws_have_the_exact_moments_also_where_frames_are_larger_than_parts(d, n, k):
    draws = part_null_draws(d, n, k, draws=4000, seed=2)
    weights = torch.arange(k, 0.0, -1.0, dtype=torch.float64)
    weights /= weights.sum()
    mean, sd = part_null(d, n, weights)
    values = draws @ weights
    assert float(values.mean()) == pytest.approx(mean, abs=4 * sd / math.sqrt(4000) + 1e-12)
    assert float(values.std()) == pytest.approx(sd, rel=0.06, abs=1e-7)


def test_the_whole_spectrum_as_one_part_has_p_one():
    found = spectrum_overlap(haar(8, 2, 0), torch.ones(2), haar(8, 8, 1), parts=1, null_draws={})
    assert found.p.tolist() == [1.0]
    assert found.null_sd.tolist() == [0.0]
    assert found.z.isnan().all()


def test_an_update_without_energy_has_no_energy_share():
    found = spectrum_overlap(haar(8, 2, 0), torch.zeros(2), haar(8, 8, 1), parts=2)
    assert found.energy_share.isnan().all()
    assert not found.overlap.isnan().any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got \(4, 1\), 2 and \(4, 4\)"):
        spectrum_overlap(torch.eye(4, 1), torch.ones(2), torch.eye(4))
    with pytest.raises(ValueError, match="vectors: expected at least one direction"):
        spectrum_overlap(torch.eye(4, 0), torch.ones(0), torch.eye(4))
    with pytest.raises(ValueError, match=r"parts: expected 1 to 4, .* got 5"):
        spectrum_overlap(torch.eye(4, 1), torch.ones(1), torch.eye(4), parts=5)
    with pytest.raises(ValueError, match="got d = 4, n = 5, k = 1"):
        part_null_draws(4, 5, 1)
