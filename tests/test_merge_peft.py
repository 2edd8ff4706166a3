"""Merged adapters against peft's own merging, and where that is known to say something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_analysis as la

SCALES = {"one": 2.0, "two": 0.5}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(20, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.q(x)
        return result


@pytest.fixture
def trained(tmp_path: Path) -> tuple[PeftModel, list[la.Adapter]]:
    """Two adapters of unequal scales in one peft model, in float64, and the same read from its files."""
    torch.manual_seed(0)
    model = Model().double()
    wrapped: PeftModel | None = None
    for name, scale in SCALES.items():
        config = LoraConfig(r=4, lora_alpha=int(4 * scale), target_modules=["q"], init_lora_weights=False)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    wrapped.double().save_pretrained(tmp_path)
    return wrapped, [la.load_adapter(tmp_path / name) for name in SCALES]


def pefts(model: PeftModel, how: str, weights: list[float]) -> Tensor:
    model.add_weighted_adapter([*SCALES], weights, combination_type=how, adapter_name=how)
    layer = model.base_model.model.q
    delta: Tensor = layer.get_delta_weight(how).detach()
    return delta


def test_a_weighted_sum_is_pefts_concatenation_and_its_svd(trained: tuple[PeftModel, list[la.Adapter]]) -> None:
    model, adapters = trained
    weights = [0.7, -0.3]
    exact = sum(weight * adapter["q"].dense() for weight, adapter in zip(weights, adapters, strict=True))
    ours = la.merge(adapters, weights=weights)["q"]
    assert torch.is_tensor(exact)
    torch.testing.assert_close(ours.dense(), exact, rtol=0, atol=1e-6 * float(exact.norm()))  # float32 factors
    torch.testing.assert_close(pefts(model, "cat", weights), exact, rtol=0, atol=1e-6 * float(exact.norm()))
    # The SVD has r of the largest adapter by default; the same cut of ours is the best there is of that rank.
    cut = la.merge(adapters, weights=weights, r=4)["q"]
    by_svd = pefts(model, "svd", weights)
    # Some versions scaled every update twice here; ours has to be the exact one whatever peft's is.
    twice = sum(
        weight * scale * adapter["q"].dense()
        for weight, scale, adapter in zip(weights, SCALES.values(), adapters, strict=True)
    )
    assert torch.is_tensor(twice)
    U, S, Vh = torch.linalg.svd(twice)
    scaled_twice = U[:, :4] * S[:4] @ Vh[:4]
    close = [float((by_svd - other).norm() / exact.norm()) < 1e-5 for other in (cut.dense(), scaled_twice)]
    assert any(close)
    assert float((cut.dense() - exact).norm()) == pytest.approx(float(torch.linalg.svdvals(exact)[4:].norm()), rel=1e-5)


def test_pefts_linear_combination_adds_the_products_of_unlike_factors(
    trained: tuple[PeftModel, list[la.Adapter]],
) -> None:
    model, adapters = trained
    exact = sum(0.5 * adapter["q"].dense() for adapter in adapters)
    crossed = sum(
        0.5 * (a.scale * b.scale) ** 0.5 * a.up.double() @ b.down.double()
        for a in (adapter["q"] for adapter in adapters)
        for b in (adapter["q"] for adapter in adapters)
        if isinstance(a, la.LowRankUpdate) and isinstance(b, la.LowRankUpdate)
    )
    assert torch.is_tensor(exact)
    assert torch.is_tensor(crossed)
    linear = pefts(model, "linear", [0.5, 0.5])
    torch.testing.assert_close(linear, crossed, rtol=0, atol=1e-6 * float(crossed.norm()))
    assert float((linear - exact).norm() / exact.norm()) > 0.3
    assert la.interference_table(adapters, draws=9)["averaging_error"].isna().all()  # of unequal scales
