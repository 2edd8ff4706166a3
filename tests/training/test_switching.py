"""Several adapters on one model: which act, in what sum, merged or not, and what is left when they go."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.training.switching import trained_in_full

# Sums of tens of float64 products of order one.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """Layers of several kinds, and a matrix that the model reads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.turned = Conv1D(8, 6)
        self.mix = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm(5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        out: Tensor = self.norm(torch.tanh(self.turned(x)) @ self.mix.mT)
        return out


IDS = torch.arange(9).reshape(1, 9)
WEIGHTS = ["embed.weight", "conv.weight", "turned.weight", "mix"]


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def with_two(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Adapters ``a`` and ``b`` that share the convolution and the parameter."""
    model = mixed(dtype)
    training.inject(model, ["embed", "conv"], parameters=["mix"], r=2, alpha=3.0, seed=1, adapter="a")
    training.inject(model, ["conv", "turned"], parameters=["mix"], r=3, alpha=5.0, seed=2, adapter="b")
    with torch.no_grad():
        for site in training.sites(model).values():
            for factors in site.adapters.named().values():
                factors.lora_A.normal_(std=0.3)
                factors.lora_B.normal_(std=0.3)
    return model


def dense(model: nn.Module, weights: Mapping[str, float]) -> nn.Module:
    """A plain model with the weighted updates in its weights, from the extracted matrices."""
    plain = mixed()
    state = plain.state_dict()
    for name, weight in weights.items():
        adapter = training.extract(model, name=name)
        for module, update in adapter.items():
            target = adapter.targets[module]
            change = update.dense().mT if target.transposed else update.dense()
            tensor = target.tensor if target.tensor in state else module
            state[tensor] += weight * change.reshape(state[tensor].shape)
    return plain


SUMS: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": -0.3}, {"a": 2.5, "b": 0.0}, {}]


@pytest.mark.parametrize("weights", SUMS, ids=str)
def test_the_active_adapters_add_their_weighted_dense_updates(weights: dict[str, float]) -> None:
    model = with_two()
    training.activate(model, weights or None)
    torch.testing.assert_close(model(IDS), dense(model, weights)(IDS), **CLOSE)


@pytest.mark.parametrize("weights", SUMS, ids=str)
def test_merged_is_the_weighted_sum(weights: dict[str, float]) -> None:
    model = with_two()
    training.activate(model, weights)
    unmerged = model(IDS)
    expected = dense(model, weights).state_dict()
    training.merge(model)
    torch.testing.assert_close(model(IDS), unmerged, **CLOSE)
    training.merge_and_unload(model)
    for name in WEIGHTS:
        torch.testing.assert_close(model.state_dict()[name], expected[name], **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_a_weighted_sum_bit_for_bit(dtype: torch.dtype) -> None:
    model = with_two(dtype)
    training.activate(model, {"a": 0.7, "b": -0.3})
    before = copy.deepcopy(model.state_dict())
    output = model(IDS)
    training.merge(model)
    changed = [name for name in before if not torch.equal(before[name], model.state_dict()[name])]
    assert len(changed) == len(WEIGHTS)
    training.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(IDS), output)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_weight_is_the_float64_sum_rounded_once(dtype: torch.dtype) -> None:
    model = with_two(dtype)
    weights = {"a": 0.7, "b": -0.3}
    training.activate(model, weights)
    site = training.sites(model)["mix"]
    weight = mixed(dtype).state_dict()["mix"].double()
    for name, share in weights.items():
        factors = site.adapters.named()[name]
        weight += share * factors.scale * (factors.lora_B.double() @ factors.lora_A.double()).detach()
    training.merge_and_unload(model)
    # One rounding, within half a spacing; the float64 sums are of another order.
    limit = torch.finfo(dtype).eps / 2 * (1 + 1e-4) * weight.abs() + 1e-14
    assert bool(((model.state_dict()["mix"].double() - weight).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_no_adapter_active_the_model_is_its_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = with_two(dtype)
    training.activate(model, None)
    assert torch.equal(model(IDS), mixed(dtype)(IDS))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    training.merge(model)
    assert torch.equal(model(IDS), mixed(dtype)(IDS))


def test_switching_back_and_forth_changes_nothing() -> None:
    model = with_two()
    outputs = {}
    for which in ("a", "b"):
        training.activate(model, which)
        outputs[which] = model(IDS)
    assert not torch.allclose(outputs["a"], outputs["b"])
    training.activate(model, "a")
    assert torch.equal(model(IDS), outputs["a"])


def test_those_that_act_alone_take_gradients() -> None:
    model = with_two()
    for which, expected in (("a", {"a"}), ("b", {"b"}), ({"a": 0.5, "b": 0.0}, {"a", "b"}), (None, set())):
        training.activate(model, which)  # type: ignore[arg-type]
        taking = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in taking} == expected
    training.activate(model, {"a": 0.5, "b": 2.0})
    model(IDS).square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_a_new_adapter_acts_alone_and_begins_as_the_base() -> None:
    model = with_two()
    assert training.adapters(model) == {"a": ["embed", "conv", "mix"], "b": ["conv", "turned", "mix"]}
    training.inject(model, ["conv", "embed"], r=4, adapter="c")
    assert torch.equal(model(IDS), mixed()(IDS))
    assert training.sites(model)["conv"].adapters.active == {"c": 1.0}
    assert training.sites(model)["mix"].adapters.active == {}


def plain_form(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_removing_the_adapters_leaves_the_plain_model(dtype: torch.dtype) -> None:
    plain = mixed(dtype)
    model = with_two(dtype)
    training.activate(model, "a")
    assert training.remove(model, "a") == ["embed", "conv", "mix"]
    assert training.adapters(model) == {"b": ["conv", "turned", "mix"]}
    assert torch.equal(model(IDS), plain(IDS))  # b is there, and at rest
    training.activate(model, "b")
    assert not torch.equal(model(IDS), plain(IDS))
    assert training.remove(model) == ["conv", "turned", "mix"]
    assert plain_form(model) == plain_form(plain)
    state, expected = model.state_dict(), plain.state_dict()
    assert sorted(state) == sorted(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(model(IDS), plain(IDS))
    assert isinstance(model.get_parameter("mix"), nn.Parameter)


@pytest.mark.parametrize("merged_before", [False, True])
def test_merging_and_unloading_leaves_no_trace(merged_before: bool) -> None:
    model, plain = with_two(), mixed()
    training.activate(model, {"a": 0.7, "b": -0.3})
    if merged_before:
        training.merge(model)
    merged = copy.deepcopy(model)
    if not merged_before:
        training.merge(merged)
    expected = merged(IDS)
    assert sorted(training.merge_and_unload(model)) == ["conv", "embed", "mix", "turned"]
    assert plain_form(model) == plain_form(plain)
    assert sorted(model.state_dict()) == sorted(plain.state_dict())
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert torch.equal(model(IDS), expected)
    training.inject(model, ["conv"], parameters=["mix"])  # as if it had never been adapted
    assert torch.equal(model(IDS), expected)


def test_adapters_attach_beside_each_other_on_layers_and_parameters() -> None:
    model, attached = with_two(), mixed()
    for name in ("a", "b"):
        training.attach(attached, training.extract(model, name=name), name=name)
    for weights in SUMS:
        training.activate(model, weights)
        training.activate(attached, weights)
        assert torch.equal(attached(IDS), model(IDS))


def test_a_layer_under_two_names_is_taken_out_under_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "c": shared})
    training.inject(model, ["c"], r=1)
    training.merge_and_unload(model)
    assert model["a"][0] is model["c"] is shared


def test_dora_acts_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    training.inject(model, ["0"], dora=True, adapter="d")
    training.inject(model, ["0"], adapter="a")
    for weights in ({"d": 1.0, "a": 1.0}, {"d": 0.5}):
        with pytest.raises(ValueError, match="'0': 'd' is DoRA, whose magnitudes rescale the base: it acts alone"):
            training.activate(model, weights)
        assert training.sites(model)["0"].adapters.active == {"a": 1.0}
    training.activate(model, "d")
    training.activate(model, {"a": 0.5})


def test_dora_shares_a_model_where_it_shares_no_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    training.inject(model, ["0"], dora=True, adapter="d")
    training.inject(model, ["1"], adapter="a")
    training.activate(model, {"d": 1.0, "a": 0.5})
    with torch.no_grad():
        for name in "01":
            for factors in training.sites(model)[name].adapters.named().values():
                factors.lora_B.normal_()
    x = torch.randn(3, 4)
    before = model(x)
    training.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_what_trains_in_full_belongs_to_its_adapter() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(3, 3), "other": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    training.inject(model, ["lin"], bias="all", modules_to_save=["head"], adapter="a")
    training.inject(model, ["other"], bias="lora_only", adapter="b")
    assert sorted(trained_in_full(model, "a")) == ["head.bias", "head.weight", "lin.bias", "other.bias"]
    assert list(trained_in_full(model, "b")) == ["other.bias"]

    def full() -> list[str]:
        return sorted(name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)

    assert full() == ["other.base_layer.bias"]
    training.activate(model, "a")
    assert full() == ["head.bias", "head.weight", "lin.base_layer.bias", "other.base_layer.bias"]
    training.activate(model, None)
    assert full() == []
    training.activate(model, {"a": 0.5, "b": 0.5})
    assert full() == ["head.bias", "head.weight", "lin.base_layer.bias", "other.base_layer.bias"]


def test_what_cannot_be_switched_is_refused() -> None:
    model = with_two()
    with pytest.raises(ValueError, match="expected an adapter named 'c', got 'a', 'b'"):
        training.activate(model, "c")
    with pytest.raises(ValueError, match="'a': expected a finite weight, got nan"):
        training.activate(model, {"a": float("nan")})
    with pytest.raises(ValueError, match="expected an adapter named 'c', got 'a', 'b'"):
        training.remove(model, "c")
    with pytest.raises(ValueError, match="expected a model with LoRA layers, got none"):
        training.activate(mixed(), "a")
    with pytest.raises(ValueError, match="expected a model with LoRA layers, got none"):
        training.remove(mixed())
    with pytest.raises(ValueError, match=r"model: expected one adapter, got 'a', 'b'. Pass name="):
        training.extract(model)
    with pytest.raises(ValueError, match=r"expected one adapter, got 2: a, b. Choose by adapters"):
        training.lora_layers(model)["conv"].factors  # noqa: B018
    training.merge(model)
    for act in (
        lambda: training.activate(model, "a"),
        lambda: training.remove(model, "a"),
        lambda: training.inject(model, ["turned"], adapter="c"),
    ):
        with pytest.raises(ValueError, match=r"expected an unmerged layer, got a merged one. Call unmerge first"):
            act()


def test_what_trained_in_full_is_frozen_when_its_adapter_is_removed() -> None:
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    training.inject(model, ["query"], bias="lora_only", modules_to_save=["head"])
    assert model["head"].weight.requires_grad
    training.remove(model)
    assert not any(p.requires_grad for p in model.parameters())
