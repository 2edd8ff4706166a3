"""Directions in common: none by chance, all that were planted, and calibrated p."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from lora_analysis.measures.null import largest_cosine_null
from lora_analysis.measures.reproducible import shared_directions


def basis(d: int, k: int, seed: int, *, beginning: torch.Tensor | None = None) -> torch.Tensor:
    """A random basis, the first columns of it given."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(d, k, generator=generator, dtype=torch.float64)
    if beginning is not None:
        columns[:, : beginning.shape[1]] = beginning
    return torch.linalg.qr(columns).Q


def test_p_of_unrelated_subspaces_is_uniform_and_the_count_is_nearly_always_none() -> None:
    null = largest_cosine_null(60, 3, 5, draws=4000, seed=1)
    found = [shared_directions(basis(60, 3, 2 * i), basis(60, 5, 2 * i + 1), null) for i in range(500)]
    assert stats.kstest([one.p for one in found], "uniform").pvalue > 1e-3
    assert sum(one.shared > 0 for one in found) < 15


@pytest.mark.parametrize("planted", [0, 1, 3])
def test_planted_directions_are_counted(planted: int) -> None:
    common = basis(384, 3, 0)[:, :planted]
    null = largest_cosine_null(384, 8, 8, draws=500)
    # Seen through noise as trainings would see it: at a cosine of about 0.9.
    noisy = [common + 0.3 * basis(384, 3, seed)[:, :planted] for seed in (1, 2)]
    found = shared_directions(*(basis(384, 8, 10 + i, beginning=part) for i, part in enumerate(noisy)), null)
    assert found.shared == planted
    assert (found.p < 0.01) == (planted > 0)


def test_a_subspace_shares_all_of_itself() -> None:
    own = basis(50, 4, 3)
    turned = own @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    found = shared_directions(own, turned, largest_cosine_null(50, 4, 4, draws=99))
    assert (found.shared, found.p) == (4, 0.01)
    assert found.largest == pytest.approx(1)


def test_a_null_without_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="null: expected draws, got none"):
        shared_directions(basis(9, 2, 0), basis(9, 2, 1), torch.empty(0))
