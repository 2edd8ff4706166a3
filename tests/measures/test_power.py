"""Power: what is planted is found, the likelier the stronger, and without it a test finds no more than its level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_analysis.measures.amplification import sign_p
from lora_analysis.measures.deciles import part_null_draws, part_sizes, spectrum_overlap
from lora_analysis.measures.haar_frames import update_cosine_null
from lora_analysis.measures.interference import singular_task_interference, update_cosine
from lora_analysis.measures.null import similarity_null
from lora_analysis.measures.shared_basis import interference_null
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.measures.tokens import largest_token_cosine_null, nearest_tokens
from lora_analysis.update import LowRankUpdate, Svd

D_OUT, D_IN, R = 40, 30, 3
DRAWS = 199
LEVEL = 0.05
TRIALS = 120


def normal(*shape: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def pair(strength: float, rng: np.random.Generator) -> tuple[Svd, Svd]:
    """Two updates that share a direction of so many noise norms, on both sides."""
    shared_up, shared_down = normal(D_OUT, 1, rng=rng), normal(1, D_IN, rng=rng)
    found = []
    for _ in range(2):
        up, down = normal(D_OUT, R, rng=rng), normal(R, D_IN, rng=rng)
        up[:, :1] += strength * shared_up
        down[:1] += strength * shared_down
        found.append(LowRankUpdate(up, down, scale=1.0).svd())
    return found[0], found[1]


def upper(null: Tensor, value: float) -> float:
    return (1 + int((null >= value).sum())) / (len(null) + 1)


def cosine_p(strength: float, rng: np.random.Generator) -> float:
    a, b = pair(strength, rng)
    null = update_cosine_null(a.S, b.S, (D_OUT, D_IN), draws=DRAWS, seed=int(rng.integers(2**31)))
    updates = [LowRankUpdate(svd.U * svd.S, svd.Vh, scale=1.0) for svd in (a, b)]
    return upper(null.abs(), abs(update_cosine(*updates)))


def interference_p(strength: float, rng: np.random.Generator) -> float:
    svds = pair(strength, rng)
    null = interference_null([svd.S for svd in svds], (D_OUT, D_IN), draws=DRAWS, seed=int(rng.integers(2**31)))
    return upper(null, singular_task_interference(svds))


SIMILARITY = similarity_null(D_IN, R, R, draws=DRAWS, seed=1)


def similarity_p(strength: float, rng: np.random.Generator) -> float:
    a, b = pair(strength, rng)
    phi = subspace_similarity(a.V, b.V)[-1:, -1]
    return float(SIMILARITY.p(phi, cells=[(R, R)]))


PARTS = {n: part_null_draws(D_IN, n, 1, draws=DRAWS, seed=2) for n in part_sizes(D_IN, D_IN, 3)}


def overlap_p(strength: float, rng: np.random.Generator) -> float:
    basis = torch.linalg.qr(normal(D_IN, D_IN, rng=rng)).Q
    direction = normal(D_IN, 1, rng=rng)
    direction += 3 * strength * basis[:, :1]
    found = spectrum_overlap(direction / direction.norm(), torch.ones(1), basis, parts=3, null_draws=PARTS)
    return float(found.p[0])


EMBEDDING = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3))
TOKENS = largest_token_cosine_null(EMBEDDING, draws=DRAWS, seed=4)


def tokens_p(strength: float, rng: np.random.Generator) -> float:
    token = (EMBEDDING - EMBEDDING.mean(0))[int(rng.integers(50))].double()
    direction = normal(D_IN, 1, rng=rng) + strength * token[:, None]
    nearest = nearest_tokens(direction / direction.norm(), EMBEDDING, top=1)
    return upper(TOKENS, float(nearest.cosines[0, 0].abs()))


def signs_p(strength: float, rng: np.random.Generator) -> float:
    """Signs of u_l.T @ W @ v_l where W leans by so many standard deviations towards every one of them."""
    values = rng.standard_normal(12) + strength
    return sign_p(float((values > 0).mean()), 12)


TESTS = [cosine_p, interference_p, similarity_p, overlap_p, tokens_p, signs_p]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_the_level_is_kept_and_power_grows_with_what_is_planted(
    test: Callable[[float, np.random.Generator], float],
) -> None:
    rng = np.random.default_rng(0)
    found = [np.mean([test(strength, rng) <= LEVEL for _ in range(TRIALS)]) for strength in (0.0, 0.7, 2.0)]
    # Four standard errors of a share of 0.05 in so many trials.
    assert found[0] <= LEVEL + 4 * (LEVEL * (1 - LEVEL) / TRIALS) ** 0.5
    assert found[0] <= found[1] < found[2]
    assert found[2] > 0.9
