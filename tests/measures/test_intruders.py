import math

import pytest
import torch

from lora_analysis.measures.intruders import largest_cosine


@pytest.mark.parametrize(
    ("strength", "cosine"), [(1, 0.99572), (10, 0.49720), (40, 0.30076), (100, 0.26936), (1000, 0.25188)]
)
def test_a_growing_flat_direction_becomes_an_intruder(strength: float, cosine: float) -> None:
    # W = diag(16, …, 1) has the unit vectors as singular vectors; ΔW pulls towards (1, …, 1) / 4.
    weight = torch.diag(torch.arange(16, 0, -1, dtype=torch.float64))
    flat = torch.full((16, 1), 0.25, dtype=torch.float64)
    top = torch.linalg.svd(weight + strength * flat @ flat.mT).U[:, :1]
    basis = torch.linalg.svd(weight).U
    assert largest_cosine(top, basis).item() == pytest.approx(cosine, abs=1e-5)
    assert largest_cosine(top, basis).item() > 0.25


def test_an_old_direction_made_strong_is_no_intruder_but_looks_like_one_against_the_top() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    fifth = torch.eye(5, dtype=torch.float64)[:, 4:]
    top = torch.linalg.svd(weight + 10 * fifth @ fifth.mT).U[:, :1]
    basis = torch.linalg.svd(weight).U
    assert largest_cosine(top, basis).item() == pytest.approx(1, abs=1e-12)
    assert largest_cosine(top, basis[:, :4]).item() == pytest.approx(0, abs=1e-12)


def test_signs_do_not_matter_and_each_vector_stands_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    vectors = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
    expected = [max(abs(float(v @ u)) for u in basis.mT) for v in vectors.mT]
    assert largest_cosine(vectors, basis).tolist() == pytest.approx(expected, rel=1e-12)
    assert largest_cosine(-vectors, basis.flip(1)).tolist() == pytest.approx(expected, rel=1e-12)
    assert min(expected) >= 1 / math.sqrt(8)


def test_random_directions_are_far_from_every_basis() -> None:
    d = 1024
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(d, 200, generator=generator), dim=0)
    mean = largest_cosine(vectors, torch.eye(d)).mean().item()
    # The leading term, sqrt(2 ln d / d) = 0.116, is approached slowly and from below.
    assert mean == pytest.approx(math.sqrt(2 * math.log(d) / d), rel=0.15)


def test_bases_of_another_space_or_without_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(4, 4\)"):
        largest_cosine(torch.ones(3, 1), torch.eye(4))
    with pytest.raises(ValueError, match=r"got \(4, 1\) and \(4, 0\)"):
        largest_cosine(torch.ones(4, 1), torch.eye(4)[:, :0])
