import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.measures.spectral_measure import largest_cosine_bound, reached_part


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(vectors):
    return vectors / vectors.norm(dim=0)


@given(
    m=st.integers(2, 60),
    n=st.integers(2, 60),
    steps=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_the_bound_is_never_below_the_truth(m, n, steps, seed, decay):
    weight = normal(m, n, seed=seed) * torch.arange(1.0, n + 1) ** -decay
    U = torch.linalg.svd(weight, full_matrices=False).U
    # Random directions, a singular vector, and mixtures of both kinds.
    vectors = unit(
        torch.hstack([normal(m, 2, seed=seed + 1), U[:, :1], U[:, :2] + 0.5 * unit(normal(m, 2, seed=seed))])
    )
    bound = largest_cosine_bound(weight, vectors, steps=steps)
    assert (bound >= (U.mT @ vectors).abs().amax(dim=0) - 1e-12).all()
    assert (bound <= 1 + 1e-12).all()


def test_a_random_direction_is_certified_without_the_singular_vectors():
    d = 300
    weight = normal(d, d) * torch.arange(1, d + 1) ** -0.3
    vectors = unit(normal(d, 3, seed=1))
    bound = largest_cosine_bound(weight, vectors, enough=0.5)
    assert (bound < 0.5).all()
    tighter = largest_cosine_bound(weight, vectors, steps=128)
    truth = (torch.linalg.svd(weight).U.mT @ vectors).abs().amax(dim=0)
    assert (tighter < bound).all()
    assert (tighter > truth).all()


def test_what_counts_are_the_directions_and_not_how_often_a_value_is_repeated():
    # Equal singular values are one point of the measure: the bound speaks of their whole plane.
    weight = torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    flat = torch.full((4, 1), 0.5, dtype=torch.float64)
    assert float(largest_cosine_bound(weight, flat)) >= 0.5**0.5


def test_an_invariant_subspace_ends_the_iteration_and_the_bound_stays_valid():
    weight = torch.diag(torch.arange(40.0, 0.0, -1.0, dtype=torch.float64))
    vectors = torch.zeros(40, 2, dtype=torch.float64)
    vectors[3, 0] = 1.0
    vectors[:10, 1] = 10**-0.5
    bound = largest_cosine_bound(weight, vectors, steps=40)
    assert float(bound[0]) == 1
    assert 10**-0.5 <= float(bound[1]) < 0.5


def test_vectors_of_the_other_side_are_refused():
    with pytest.raises(ValueError, match=r"expected vectors of 5 rows, the output side of W, got \(4, 1\)"):
        largest_cosine_bound(torch.ones(5, 4), torch.ones(4, 1))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        largest_cosine_bound(torch.ones(5, 4), torch.ones(5, 1), steps=0)


def test_what_a_tall_matrix_does_not_reach_is_taken_off():
    weight = normal(90, 40) * torch.arange(1.0, 41) ** -1.0
    vectors = unit(normal(90, 4, seed=1))
    U, S, _ = torch.linalg.svd(weight, full_matrices=False)
    reached, slack = reached_part(weight, vectors, float(S[0]))
    torch.testing.assert_close(reached, U @ (U.mT @ vectors), rtol=0, atol=1e-12)
    assert slack.max() < 1e-9
    truth = (U.mT @ vectors).abs().amax(dim=0)
    whole, part = (largest_cosine_bound(weight, y, steps=40) for y in (vectors, reached))
    # The unreached part counts as one direction until it is taken off.
    assert (whole >= (vectors - reached).norm(dim=0) - 1e-9).all()
    assert (part < whole).all()
    assert (part >= truth).all()


def test_the_reach_of_a_matrix_that_lacks_rank_is_not_guessed():
    weight = normal(30, 8)
    weight[:, 0] = weight[:, 1] + 1e-6 * weight[:, 2]
    assert reached_part(weight, normal(30, 1), float(torch.linalg.svdvals(weight)[0])) is None
