from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.update import DenseUpdate, LowRankUpdate, factors


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), Conv1D(4, 5), nn.Embedding(3, 3, max_norm=1.0))


def trained_model() -> nn.Module:
    model = base_model()
    training.inject(model, ["0", "2"], r=3, alpha=5.0)
    for layer in training.lora_layers(model).values():
        nn.init.normal_(layer.factors.lora_B)
    return model


def update(d_out: int = 5, d_in: int = 7, *, r: int = 2, scale: float = 0.1) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(d_out)
    up = torch.randn(d_out, r, generator=generator)
    return LowRankUpdate(up, torch.randn(r, d_in, generator=generator), scale=scale)


def test_extracted_updates_are_the_change_that_merging_makes() -> None:
    model = trained_model().double()
    adapter = training.extract(model, source="run 1")
    assert list(adapter) == ["0", "2"]
    assert (adapter.source, adapter.format) == ("run 1", "memory")
    before = {name: layer.weight.detach().clone() for name, layer in training.lora_layers(model).items()}
    training.merge(model)
    for name, layer in training.lora_layers(model).items():
        change = (layer.weight - before[name]).detach()
        expected = change.T if adapter.targets[name].transposed else change
        torch.testing.assert_close(adapter[name].dense(), expected, rtol=1e-12, atol=1e-12)


def test_names_and_targets_are_those_of_the_plain_model() -> None:
    adapter = training.extract(trained_model())
    assert adapter.targets == {"0": Target("0.weight"), "2": Target("2.weight", transposed=True)}
    plain = base_model().state_dict()
    assert all(target.tensor in plain for target in adapter.targets.values())
    assert adapter.modules["0"].scale_source == "caller"


def test_a_merged_model_gives_the_same_updates() -> None:
    model = trained_model()
    before = training.extract(model)
    training.merge(model)
    after = training.extract(model)
    assert all(torch.equal(before[name].dense(), after[name].dense()) for name in before)


def test_extracted_factors_do_not_move_with_the_model() -> None:
    model = trained_model()
    adapter = training.extract(model)
    up, _ = factors(adapter["0"])
    before = up.clone()
    nn.init.zeros_(training.lora_layers(model)["0"].factors.lora_B)
    assert torch.equal(factors(adapter["0"])[0], before)
    assert not up.requires_grad


def test_a_model_without_lora_layers_has_nothing_to_extract() -> None:
    with pytest.raises(ValueError, match="model: expected a model with LoRA layers, got none"):
        training.extract(base_model())


def test_initial_factors_are_for_models_of_peft_and_names_for_adapters_there_are() -> None:
    with pytest.raises(ValueError, match="initial= is for models of peft"):
        training.extract(trained_model(), initial=Adapter({}))
    with pytest.raises(ValueError, match="expected an adapter named 'other', got 'default'"):
        training.extract(trained_model(), name="other")


def test_attach_puts_back_what_extract_took() -> None:
    model = trained_model()
    adapter = pickle.loads(pickle.dumps(training.extract(model)))
    again = base_model()
    assert training.attach(again, adapter) == ["0", "2"]
    x = torch.randn(4, 7)
    assert torch.equal(again[:3](x), model[:3](x))
    back = training.extract(again)
    for name in adapter:
        assert all(torch.equal(a, b) for a, b in zip(factors(back[name]), factors(adapter[name]), strict=True))
        assert back[name].scale == adapter[name].scale
    assert back.targets == adapter.targets


def test_an_attached_model_goes_on_training_from_the_adapters_a() -> None:
    model = base_model().eval()
    training.attach(model, Adapter({"0": update()}), dropout=0.2)
    layer = training.lora_layers(model)["0"].factors
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"0.adapters.default.lora_{f}" for f in "AB"]
    assert torch.equal(layer.lora_A0, update().down)
    assert (layer.scale, layer.r, layer.dropout, layer.training) == (0.1, 2, 0.2, False)


def test_attached_factors_are_copies_in_the_dtype_of_the_layer() -> None:
    adapter = Adapter({"0": LowRankUpdate(torch.ones(5, 2).half(), torch.ones(2, 7).double(), scale=1.0)})
    model = base_model().bfloat16()
    training.attach(model, adapter)
    layer = training.lora_layers(model)["0"]
    assert layer.factors.lora_A.dtype == layer.factors.lora_B.dtype == torch.float32
    with torch.no_grad():
        layer.factors.lora_A.zero_()
    assert bool((factors(adapter["0"])[1] == 1).all())


@pytest.mark.parametrize("scale", [1 / 3, 0.1, 2 / math.sqrt(3), -1.0, 0.0])
@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_scale_comes_back_bit_for_bit(scale: float, r: int) -> None:
    model = base_model()
    training.attach(model, Adapter({"0": update(r=r, scale=scale)}))
    assert training.extract(model)["0"].scale == scale


def test_the_model_says_how_a_weight_is_stored_whatever_the_adapter_says() -> None:
    update_2 = update(4, 5)
    model = base_model()
    training.attach(model, Adapter({"2": update_2}, targets={"2": Target("2.weight", transposed=False)}))
    torch.testing.assert_close(training.lora_layers(model)["2"].factors.delta_w(), update_2.dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (Adapter({}), ValueError, "memory: expected an adapter with modules, got none"),
        (
            Adapter({"0": update(), "q": update(), "v": update()}),
            BaseWeightsError,
            "expected a module 'q' and 1 more in Sequential, got none",
        ),
        (
            Adapter({"2": update(4, 5), "0": update(7, 5)}),
            BaseWeightsError,
            r"'0': expected the update's \(d_out, d_in\) = \(7, 5\), got \(5, 7\) in the model",
        ),
        (
            Adapter({"0": update(scale=math.nan)}),
            UndefinedUpdateError,
            "'0': expected a known scale.*Pass alpha=",
        ),
        (
            Adapter({"0": update(scale=math.inf)}),
            UndefinedUpdateError,
            "'0': expected finite factors and scale",
        ),
        (
            Adapter({"0": LowRankUpdate(torch.full((5, 1), math.nan), torch.ones(1, 7), scale=1.0)}),
            UndefinedUpdateError,
            "'0': expected finite factors",
        ),
        (
            Adapter({"0": DenseUpdate(torch.ones(5, 7))}),
            UnsupportedAdapterError,
            "'0': expected an update with factors A and B, got DenseUpdate",
        ),
        (Adapter({"3": update(3, 3)}), UnsupportedAdapterError, "'3': expected an embedding without max_norm"),
        (
            Adapter({"0.q": update(2, 7)}, targets={"0.q": Target("0.weight", columns=(0, 7))}),
            UnsupportedAdapterError,
            "'0.q': an update of a slice of columns cannot be attached",
        ),
        (
            Adapter(
                {"0.q": update(2, 7), "0.v": update(2, 7)},
                targets={"0.q": Target("0.weight", rows=(0, 2)), "0.v": Target("0.weight", rows=(1, 3))},
            ),
            UnsupportedAdapterError,
            "expected one update for each part of a weight of the model, got '0.q' and '0.v' for '0'",
        ),
        (
            Adapter({"0.1": update()}, targets={"0.1": Target("0.weight", expert=1)}),
            UnsupportedAdapterError,
            "'0.1': expected stacked experts in '0'",
        ),
        (
            Adapter({"0": update(), "x": update()}, targets={"x": Target("0.weight")}),
            UnsupportedAdapterError,
            "expected one update for each part of a weight of the model, got '0' and 'x' for '0'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_alone(
    adapter: Adapter, error: type[Exception], message: str
) -> None:
    model = base_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        training.attach(model, adapter)
    assert not training.lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(before)


def test_magnitudes_that_are_not_finite_are_refused() -> None:
    model = base_model()
    training.inject(model, ["0"], r=2, dora=True)
    with torch.no_grad():
        training.lora_layers(model)["0"].factors.lora_magnitude[1] = math.nan  # type: ignore[index]
    with pytest.raises(UndefinedUpdateError, match="'0': expected finite magnitudes, got NaN or infinities"):
        training.attach(base_model(), training.extract(model, dora="factors"))


def test_a_model_takes_no_other_adapter_of_a_name_it_has() -> None:
    with pytest.raises(ValueError, match="'0': expected a model without an adapter named 'default'"):
        training.attach(trained_model(), Adapter({"0": update()}))


def test_two_modules_that_share_a_weight_take_an_update_each() -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        model["head"].weight = model["tokens"].weight
        return model

    model = tied()
    training.inject(model, ["tokens", "head"], r=2)
    again = tied()
    assert sorted(training.attach(again, training.extract(model))) == ["head", "tokens"]
