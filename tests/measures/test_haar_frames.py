"""Random frames drawn in few coordinates have the law of frames drawn in all of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_analysis.measures.haar_frames import frame_products, update_cosine_null


def direct(d: int, sizes: list[int], draws: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(draws, d, size, generator=generator, dtype=torch.float64)).Q for size in sizes]


def products(d: int, sizes: list[int], draws: int, seed: int) -> dict[tuple[int, int], torch.Tensor]:
    chunks = list(frame_products(d, sizes, draws=draws, seed=seed))
    return {pair: torch.cat([chunk[pair] for chunk in chunks]) for pair in chunks[0]}


@pytest.mark.parametrize(("d", "sizes"), [(40, [2, 3, 4]), (6, [4, 4]), (5, [5, 1]), (9, [1, 1, 1, 1])])
def test_inner_products_have_the_law_of_frames_in_full(d: int, sizes: list[int]) -> None:
    drawn, frames = products(d, sizes, 3000, 1), direct(d, sizes, 3000, 2)
    full = {(s, t): frames[s].mT @ frames[t] for s, t in drawn}
    assert set(drawn) == set(itertools.combinations(range(len(sizes)), 2))
    for pair in drawn:
        assert drawn[pair].shape == full[pair].shape
        assert torch.linalg.svdvals(drawn[pair]).max() <= 1 + 1e-9
        one, other = (found[pair].square().sum((1, 2)).numpy() for found in (drawn, full))
        if other.std() > 1e-9:  # one frame may be the whole space
            assert stats.ks_2samp(one, other).pvalue > 1e-4
    # Jointly too: a triple product, which pairs alone do not fix.
    if len(sizes) > 2:
        one, other = (
            (found[0, 1] @ found[1, 2] @ found[0, 2].mT).diagonal(dim1=1, dim2=2).sum(1).numpy()
            for found in (drawn, full)
        )
        assert stats.ks_2samp(one, other).pvalue > 1e-4


def test_entries_are_fair_in_sign() -> None:
    found = products(30, [2, 2], 4000, 3)[0, 1].flatten(1)
    assert found.mean(0).abs().max() < 5 / math.sqrt(30 * 4000)


def test_draws_in_chunks_are_those_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once = products(20, [3, 2], 50, 4)[0, 1]
    assert products(20, [3, 2], 50, 4)[0, 1] is not once
    monkeypatch.setattr("lora_analysis.measures.haar_frames._KEPT", 0)
    assert torch.equal(products(20, [3, 2], 50, 4)[0, 1], once)


@pytest.mark.parametrize(("r", "shape"), [(1, (12, 9)), (4, (40, 30)), (9, (9, 9))])
def test_the_null_of_cosines_has_its_exact_variance(r: int, shape: tuple[int, int]) -> None:
    S = torch.logspace(0, -1, r)
    null = update_cosine_null(S, torch.ones(2), shape, draws=20_000)
    assert float(null.var()) * shape[0] * shape[1] == pytest.approx(1, rel=0.06)
    assert abs(float(null.mean())) < 5 / math.sqrt(shape[0] * shape[1] * 20_000)


def test_p_of_turned_updates_is_uniform() -> None:
    S_a, S_b, shape = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0, 0.5]), (20, 16)
    null = update_cosine_null(S_a, S_b, shape, draws=4000, seed=5)
    rng = torch.Generator().manual_seed(0)

    def turned(S: torch.Tensor) -> torch.Tensor:
        U, V = (torch.linalg.qr(torch.randn(d, len(S), generator=rng, dtype=torch.float64)).Q for d in shape)
        return (U * S) @ V.mT

    cosines = np.array([float((turned(S_a) * turned(S_b)).sum() / S_a.norm() / S_b.norm()) for _ in range(500)])
    p = [(1 + int((null >= value).sum())) / 4001 for value in cosines]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="frames of 0 to 3 columns, got 1 and \\[4\\]"):
        frame_products(3, [4], draws=1)
    with pytest.raises(ValueError, match="expected spectra that are not zero"):
        update_cosine_null(torch.zeros(2), torch.ones(2), (5, 5))
