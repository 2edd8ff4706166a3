"""Random frames drawn in few coordinates have the law of frames drawn in all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_analysis.measures.haar_frames import haar_frames, update_cosine_null


def direct(d: int, sizes: list[int], draws: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(draws, d, size, generator=generator, dtype=torch.float64)).Q for size in sizes]


@pytest.mark.parametrize(("d", "sizes"), [(40, [2, 3, 4]), (6, [4, 4]), (5, [5, 1]), (9, [1, 1, 1, 1])])
def test_inner_products_have_the_law_of_frames_in_full(d: int, sizes: list[int]) -> None:
    drawn, full = haar_frames(d, sizes, draws=3000, seed=1), direct(d, sizes, 3000, 2)
    for frame in drawn:
        identity = torch.eye(frame.shape[2], dtype=torch.float64).expand(3000, -1, -1)
        torch.testing.assert_close(frame.mT @ frame, identity, rtol=0, atol=1e-12)
    for i in range(len(sizes)):
        for j in range(i):
            one, other = ((f[j].mT @ f[i]).square().sum((1, 2)).numpy() for f in (drawn, full))
            if other.std() > 1e-9:  # one frame may be the whole space
                assert stats.ks_2samp(one, other).pvalue > 1e-4
    # Jointly too: a triple product, which pairs alone do not fix.
    if len(sizes) > 2:
        one, other = (
            (f[0].mT @ f[1] @ f[1].mT @ f[2] @ f[2].mT @ f[0]).diagonal(dim1=1, dim2=2).sum(1) for f in (drawn, full)
        )
        assert stats.ks_2samp(one.numpy(), other.numpy()).pvalue > 1e-4


def test_first_columns_are_fair_in_sign() -> None:
    a, b = haar_frames(30, [2, 2], draws=4000, seed=3)
    products = (a.mT @ b).flatten(1)
    assert products.mean(0).abs().max() < 5 / math.sqrt(30 * 4000)


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
        haar_frames(3, [4], draws=1)
    with pytest.raises(ValueError, match="expected spectra that are not zero"):
        update_cosine_null(torch.zeros(2), torch.ones(2), (5, 5))
