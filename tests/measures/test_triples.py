import math

import pytest
import torch

import lora_analysis as la
from lora_analysis.measures.triples import coordinates, core_triples, leading_triples
from lora_analysis.update import Svd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(m, n, r, *, strength=1.0, seed=1):
    return la.LowRankUpdate(normal(m, r, seed=seed), normal(r, n, seed=seed + 1), strength / math.sqrt(m * n) ** 0.5)


def distances(a, b):
    """Between the columns of two bases, their signs chosen well."""
    return torch.minimum((a - b).norm(dim=0), (a + b).norm(dim=0))


@pytest.mark.parametrize(("m", "n"), [(300, 220), (220, 300), (240, 240)])
@pytest.mark.parametrize("added", [False, True])
def test_leading_triples_are_within_their_bounds_of_lapack(m, n, added):
    weight = normal(m, n) * torch.arange(1, n + 1) ** -0.3
    change = update(m, n, 4, strength=3) if added else None
    dense = weight + change.dense() if change else weight
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    found = leading_triples(weight.float(), 10, update=change.svd() if change else None, complete=False)
    # The float32 numbers are the matrix: its own SVD is the truth.
    U, S, Vh = torch.linalg.svd(weight.float().double() + (change.dense() if change else 0), full_matrices=False)
    assert not found.complete
    torch.testing.assert_close(found.svd.S, S[:10], rtol=1e-10, atol=0)
    rounding = 1e-10
    assert (distances(found.svd.U, U[:, :10]) <= found.errors + rounding).all()
    assert (distances(found.svd.V, Vh[:10].mT) <= found.errors + rounding).all()
    assert found.errors.max() < 0.02


def test_a_small_matrix_is_decomposed_whole_and_defines_its_vectors():
    weight = normal(30, 20)
    found = leading_triples(weight, 3)
    assert found.complete
    assert len(found.svd.S) == 20
    assert found.errors.tolist() == [0.0] * 20
    torch.testing.assert_close((found.svd.U * found.svd.S) @ found.svd.Vh, weight)


def test_vectors_of_equal_singular_values_are_said_to_be_undetermined():
    ones = torch.ones(3, dtype=torch.float64)
    none = torch.zeros(3, 0, dtype=torch.float64)
    errors = core_triples(torch.tensor([2.0, 1.0, 1.0]), none, torch.zeros(0), none, 3).errors
    assert errors[0] < 1e-12
    assert errors[1:].tolist() == ones[1:].tolist()


@pytest.mark.parametrize(
    ("m", "n", "r"), [(24, 16, 3), (16, 24, 3), (20, 20, 20), (17, 16, 4), (320, 260, 5), (260, 320, 5), (250, 250, 5)]
)
def test_the_core_has_the_triples_of_the_sum(m, n, r):
    weight, change = normal(m, n), update(m, n, r, strength=4)
    base = leading_triples(weight, min(m, n), complete=True).svd
    top = change.svd()
    left, right = coordinates(base, top)
    assert left.shape == (min(m, n) + min(r, m - min(m, n)), r)
    torch.testing.assert_close(left.mT @ left, torch.eye(r, dtype=torch.float64))
    torch.testing.assert_close(right.mT @ right, torch.eye(r, dtype=torch.float64))
    k = 6
    found = core_triples(base.S, left, top.S, right, k)
    U, S, Vh = torch.linalg.svd(weight + change.dense(), full_matrices=False)
    torch.testing.assert_close(found.svd.S, S[:k], rtol=1e-12, atol=0)
    p = min(m, n)
    torch.testing.assert_close(found.svd.U[:p].abs(), (base.U.mT @ U[:, :k]).abs(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.svd.V[:p].abs(), (base.V.mT @ Vh[:k].mT).abs(), rtol=0, atol=1e-9)
    assert found.errors.max() < 1e-8


def test_what_does_not_fit_is_refused():
    weight = normal(8, 6)
    with pytest.raises(ValueError, match=r"k: expected 1 to 6 singular triples for shape \(8, 6\), got 7"):
        leading_triples(weight, 7)
    wrong = Svd(torch.eye(8, 1), torch.ones(1), torch.eye(1, 7))
    with pytest.raises(la.BaseWeightsError, match=r"expected a base weight of the update's shape \(8, 7\)"):
        leading_triples(weight, 1, update=wrong)
    with pytest.raises(la.BaseWeightsError, match="NaN or infinities"):
        leading_triples(torch.full((4, 4), math.nan), 1)
    zero = leading_triples(torch.zeros(6, 6), 1, complete=False)
    assert zero.complete
    assert float(zero.svd.S.max()) == 0
