"""Moments of inputs, against all inputs kept and multiplied out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_analysis as la
from lora_analysis.activations import PROBES, collect_activations
from lora_analysis.adapter import Target
from lora_analysis.errors import BaseWeightsError, LoraAnalysisError


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(d_out: int, d_in: int, seed: int, *, r: int = 3) -> la.LowRankUpdate:
    return la.LowRankUpdate(random(d_out, r, seed=seed), random(r, d_in, seed=seed + 1), 0.3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.query, self.out = nn.Linear(8, 6), Conv1D(5, 6)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.tanh(self.query(self.tokens(ids))))
        return y


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().double()


@pytest.fixture
def adapter() -> la.Adapter:
    return la.Adapter({"query": update(6, 8, 1), "out": update(5, 6, 3), "tokens": update(8, 11, 5)})


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "ids": torch.randint(11, (4, 7), generator=generator),
            "attention_mask": (torch.arange(7) < torch.randint(2, 8, (4, 1), generator=generator)).long(),
        }
        for _ in range(count)
    ]


def inputs_of(model: Model, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs of a module that the mask keeps, and its matrix, both as the update sees them."""
    rows = []
    for batch in batches():
        ids, keep = batch["ids"], batch["attention_mask"].bool()
        embedded = model.tokens(ids)
        found = {
            "tokens": nn.functional.one_hot(ids, 11).double(),
            "query": embedded,
            "out": torch.tanh(model.query(embedded)),
        }
        rows.append(found[name][keep].detach())
    weight = {"tokens": model.tokens.weight.mT, "query": model.query.weight, "out": model.out.weight.mT}[name]
    return torch.cat(rows), weight.detach()


@pytest.mark.parametrize("name", ["tokens", "query", "out"])
def test_moments_are_those_of_all_inputs(model: Model, adapter: la.Adapter, name: str) -> None:
    found = collect_activations(model, batches(), adapter).moments[0, name]
    X, W = inputs_of(model, name)
    delta = adapter[name].dense()
    assert found.count == len(X)
    assert found.update_square == pytest.approx(float((X @ delta.mT).square().sum() / len(X)), rel=1e-9)
    assert found.relative == pytest.approx(float((X @ delta.mT).norm() / (X @ W.mT).norm()), rel=1e-9)
    sigma = X.mT @ X / len(X)
    values, vectors = torch.linalg.eigh(sigma)
    half = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    torch.testing.assert_close(found.singular_values(), torch.linalg.svdvals(delta @ half)[:3], rtol=1e-7, atol=1e-9)
    chance = delta.square().sum() * X.square().sum() / len(X) / X.shape[1]
    assert found.gain == pytest.approx(math.sqrt(found.update_square / float(chance)), rel=1e-9)
    cosine = adapter[name].svd().V[:, 0] @ X.mean(0) / X.mean(0).norm()
    assert found.mean_cosine == pytest.approx(abs(float(cosine)), rel=1e-9)


def test_agreement_is_linear_cka_of_what_updates_add(model: Model, adapter: la.Adapter) -> None:
    other = la.Adapter({"query": update(6, 8, 20), "out": adapter["out"]})
    found = collect_activations(model, batches(), [adapter, other])
    X, _ = inputs_of(model, "query")
    centred = X - X.mean(0)
    one, two = (centred @ a["query"].dense().mT for a in (adapter, other))
    cka = (two.mT @ one).norm() ** 2 / ((one.mT @ one).norm() * (two.mT @ two).norm())
    assert found.agreement(0, 1, "query") == pytest.approx(float(cka), rel=1e-9)
    assert found.agreement(1, 0, "query") == pytest.approx(float(cka), rel=1e-9)
    assert found.agreement(0, 1, "out") == pytest.approx(1)


def test_convolutions_see_their_patches() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=1)).double()
    delta = update(4, 27, 7)
    x = random(2, 3, 9, 9, seed=8).double()
    found = collect_activations(conv, [(x,)], la.Adapter({"0": delta})).moments[0, "0"]
    kernel = delta.dense().reshape(4, 3, 3, 3)
    added = nn.functional.conv2d(x, kernel, stride=2, padding=1)
    assert found.update_square * found.count == pytest.approx(float(added.square().sum()), rel=1e-9)
    plain = nn.functional.conv2d(x, conv[0].weight.detach(), stride=2, padding=1)
    assert found.relative == pytest.approx(float(added.norm() / plain.norm()), rel=1e-9)


def test_rows_of_a_fused_weight_are_held_against_their_own_outputs() -> None:
    model = nn.Sequential(nn.Linear(8, 12)).double()
    target = Target("0.weight", rows=(4, 8))
    found = collect_activations(
        model, [random(20, 8, seed=1).double()], la.Adapter({"0.k": update(4, 8, 2)}, targets={"0.k": target})
    )
    X, W = random(20, 8, seed=1).double(), model[0].weight[4:8].detach()
    delta = update(4, 8, 2).dense()
    expected = (X @ delta.mT).norm() / (X @ W.mT).norm()
    assert found.moments[0, "0.k"].relative == pytest.approx(float(expected), rel=1e-9)


def test_the_gain_of_random_updates_lies_within_chance() -> None:
    # Inputs of very different strength by direction, as those of models are.
    scales = torch.logspace(0, -2, 96, dtype=torch.float64)
    X = random(400, 96, seed=0).double() * scales
    model = nn.Sequential(nn.Linear(96, 32)).double()
    adapters = [la.Adapter({"0": update(32, 96, seed, r=4)}) for seed in range(0, 400, 2)]
    found = collect_activations(model, [X], adapters)
    p = []
    for number in range(len(adapters)):
        moments = found.moments[number, "0"]
        chance = moments.chance_gains(draws=999, seed=number)
        p.append((1 + int((chance >= moments.gain).sum())) / 1000)
    # Approximate: the probes are a sample of directions themselves, here in all 96 dimensions.
    assert stats.kstest(p, "uniform").statistic < 0.15


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_few_random_updates_are_beyond_the_last_hundredth_of_chance(power: float) -> None:
    # Of more dimensions than there are probes, and with most of the inputs' energy in few of them.
    d = 2 * PROBES
    X = random(300, d, seed=0).double() * torch.arange(1, d + 1, dtype=torch.float64) ** -power
    model = nn.Sequential(nn.Linear(d, 16)).double()
    adapters = [la.Adapter({"0": update(16, d, seed, r=16)}) for seed in range(0, 400, 2)]
    found = collect_activations(model, [X], adapters)
    beyond = 0
    for number in range(len(adapters)):
        moments = found.moments[number, "0"]
        beyond += moments.gain > float(moments.chance_gains(seed=number).quantile(0.99))
    assert beyond <= 0.01 * 200 + 4 * (0.01 * 200) ** 0.5


def test_the_model_is_left_as_it_was_and_names_may_have_a_prefix(model: Model) -> None:
    outer = nn.ModuleDict({"model": model}).train()
    adapter = la.Adapter({"model.query": update(6, 8, 1)})
    found = collect_activations(model, batches(), adapter)
    assert found.moments[0, "model.query"].count > 0
    assert outer.training
    assert not model.query._forward_hooks


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ({"nowhere": update(6, 8, 1)}, "'nowhere.weight' is of no module of the model"),
        ({"query": update(6, 8, 1), "nowhere": update(6, 8, 1)}, None),
    ],
)
def test_modules_that_are_not_seen_are_named(model: Model, modules: dict[str, Any], why: str | None) -> None:
    adapter = la.Adapter(modules)
    if why:
        with pytest.raises(BaseWeightsError, match=f"expected modules that the adapter adapts, got none of 1. {why}"):
            collect_activations(model, batches(), adapter)
    else:
        found = collect_activations(model, batches(), adapter)
        assert found.unseen == {"nowhere": "'nowhere.weight' is of no module of the model"}


def test_updates_that_are_broken_or_nothing_stop_nothing(model: Model) -> None:
    broken = la.LowRankUpdate(torch.full((6, 1), math.nan), torch.ones(1, 8), 1.0)
    nothing = la.LowRankUpdate(torch.zeros(5, 2), torch.ones(2, 6), 1.0)
    found = collect_activations(model, batches(), la.Adapter({"query": broken, "out": nothing}))
    assert found.unseen == {"query": "its update holds NaN or infinities"}
    assert found.moments[0, "out"].update_square == 0
    assert math.isnan(found.moments[0, "out"].gain)
    table = la.strength_table(la.Adapter({"query": broken, "out": nothing}), activations=found).set_index("module")
    assert table.loc["query", "flags"] == "nonfinite"
    assert table.loc["out", "flags"] == "zero"


def test_no_batches_are_an_error(model: Model, adapter: la.Adapter) -> None:
    with pytest.raises(LoraAnalysisError, match="batches: expected at least one, got none"):
        collect_activations(model, [], adapter)
