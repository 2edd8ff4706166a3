"""Nearest tokens by brute force, and the null that many tokens make."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from lora_analysis.measures.tokens import largest_token_cosine_null, nearest_tokens


def embedding(vocabulary: int = 300, d: int = 24, *, common: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vocabulary, d, generator=generator) + common


def test_they_are_those_of_all_cosines() -> None:
    E, directions = embedding().double(), torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    centred = E - E.mean(0)
    cosines = torch.nn.functional.cosine_similarity(centred[:, None], directions.double().T[None], dim=2)
    found = nearest_tokens(directions, E, top=4)
    for k in range(3):
        order = cosines[:, k].abs().argsort(descending=True)[:4]
        assert found.ids[k].tolist() == order.tolist()
        torch.testing.assert_close(found.cosines[k], cosines[order, k], rtol=1e-5, atol=1e-6)


def test_turning_a_direction_round_turns_the_signs_alone() -> None:
    direction = torch.randn(24, 1, generator=torch.Generator().manual_seed(2))
    one, other = nearest_tokens(direction, embedding()), nearest_tokens(-3 * direction, embedding())
    assert one.ids.tolist() == other.ids.tolist()
    torch.testing.assert_close(one.cosines, -other.cosines)


def test_p_of_random_directions_is_uniform() -> None:
    E = embedding()
    null = largest_token_cosine_null(E, draws=4000, seed=7)
    directions = torch.randn(24, 500, generator=torch.Generator().manual_seed(3))
    largest = nearest_tokens(directions, E, top=1).cosines[:, 0].abs()
    p = [(1 + int((null >= value).sum())) / 4001 for value in largest]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_a_tokens_own_direction_is_found() -> None:
    E = embedding()
    found = nearest_tokens((E - E.mean(0))[17][:, None], E)
    assert found.ids[0, 0] == 17
    assert float(found.cosines[0, 0]) == pytest.approx(1, abs=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"directions: expected \(24, k\) for an embedding of that width, got \(9, 1\)"
    ):
        nearest_tokens(torch.ones(9, 1), embedding())
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        nearest_tokens(torch.ones(24, 1), embedding(), top=0)
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        largest_token_cosine_null(embedding(), draws=0)
    with pytest.raises(ValueError, match="embedding: expected finite numbers"):
        nearest_tokens(torch.ones(24, 1), embedding() * float("nan"))
