"""What rounding leaves of a merge, against the merged matrices themselves."""

from __future__ import annotations

import math

import pytest
import torch

from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError
from lora_analysis.measures.survival import merge_survival
from lora_analysis.update import DenseUpdate, LowRankUpdate


def update(size: float, *, d_out: int = 300, d_in: int = 40) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(d_out, 4, generator=generator), torch.randn(4, d_in, generator=generator)
    return LowRankUpdate(up, down, scale=size / 2)


def weight(*, d_out: int = 300, d_in: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_it_is_what_merging_and_rounding_does(dtype: torch.dtype, stored: torch.dtype, size: float) -> None:
    W, delta = weight(dtype=stored), update(size)
    change = (W.float() + delta.dense().float()).to(dtype).double() - W.to(dtype).double()
    found = merge_survival(delta, W, dtype=dtype)
    dense = delta.dense()
    assert found.kept == pytest.approx(float((change * dense).sum() / dense.square().sum()), abs=1e-9)
    assert found.error == pytest.approx(float((change - dense).norm() / dense.norm()), rel=1e-9)
    assert found.changed == pytest.approx(float((change != 0).double().mean()))


def test_the_error_is_what_the_signal_to_noise_foretells() -> None:
    # Both roundings count where the stored weight has more digits than the merged one.
    for size in (3e-3, 3e-2):
        found = merge_survival(update(size), weight())
        assert found.error * found.signal_to_noise == pytest.approx(math.sqrt(2), rel=0.1)
        assert found.kept == pytest.approx(1, abs=0.15)


def test_a_weight_on_the_grid_swallows_what_is_too_small() -> None:
    W = weight(dtype=torch.bfloat16)
    assert merge_survival(update(1e-5), W).kept < 0.2
    assert merge_survival(update(1e-5), W).changed < 0.2
    assert merge_survival(update(1.0), W).kept == pytest.approx(1, abs=1e-3)


def test_no_update_and_no_weight() -> None:
    found = merge_survival(DenseUpdate(torch.zeros(3, 2)), torch.ones(3, 2))
    assert math.isnan(found.kept)
    assert found.changed == 0
    assert merge_survival(update(1.0), torch.zeros(300, 40)).signal_to_noise == math.inf


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(BaseWeightsError, match=r"expected a base weight of the update's \(d_out, d_in\) = \(300, 40\)"):
        merge_survival(update(1.0), torch.ones(40, 300))
    with pytest.raises(BaseWeightsError, match="the base weight holds NaN or infinities"):
        merge_survival(update(1.0), torch.full((300, 40), math.nan))
    with pytest.raises(UndefinedUpdateError, match="unknown"):
        merge_survival(LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), scale=math.nan), torch.ones(2, 2))
