from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.training import LoraFactors, LoraLayer, merging

EXACT = {"rtol": 0.0, "atol": 0.0}
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}  # sums of tens of float64 terms of order one


def random_layer(
    base: nn.Module, d_in: int, d_out: int, *, r: int = 3, scale: float = 0.7, dropout: float = 0.0
) -> LoraLayer:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return adapted(base, A, B, scale=scale, dropout=dropout)


def adapted(base: nn.Module, A: torch.Tensor, B: torch.Tensor, *, scale: float, dropout: float = 0.0) -> LoraLayer:
    layer = LoraLayer(base)
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    factors = LoraFactors(A.to(dtype), B.to(dtype), d_out=len(B), alpha=scale * len(A), scale=scale, dropout=dropout)
    layer.add("default", factors)
    return layer


def random_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), Conv1D(4, 5)).to(dtype)
    training.inject(model, ["0", "2"], r=3, alpha=5.0, seed=0)
    for layer in training.lora_layers(model).values():
        nn.init.normal_(layer.factors.lora_B, std=0.3)
    return model


@given(d_in=st.integers(1, 9), d_out=st.integers(1, 9), r=st.integers(1, 12), scale=st.floats(-3, 3, width=32))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_layer_is_the_dense_equation(kind: str, d_in: int, d_out: int, r: int, scale: float) -> None:
    torch.manual_seed(r)
    base = (nn.Linear(d_in, d_out) if kind == "Linear" else Conv1D(d_out, d_in)).double()
    nn.init.normal_(base.bias)
    layer = random_layer(base, d_in, d_out, r=r, scale=scale)
    weight = base.weight if kind == "Linear" else base.weight.T
    x = torch.randn(2, 3, d_in, dtype=torch.float64)
    dense = weight + scale * layer.factors.lora_B @ layer.factors.lora_A
    torch.testing.assert_close(layer(x), F.linear(x, dense, base.bias), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.factors.delta_w(), (dense - weight).detach(), rtol=1e-11, atol=1e-11)


def test_attributes_of_the_base_are_passed_through() -> None:
    base = nn.Linear(6, 4, bias=False)
    layer = random_layer(base, 6, 4)
    assert layer.weight is base.weight
    assert layer.bias is None
    assert (layer.factors.d_out, layer.factors.r, layer.factors.scale) == (4, 3, 0.7)
    names = ["base_layer.weight", "adapters.default.lora_A", "adapters.default.lora_B"]
    assert list(layer.state_dict()) == names
    conv = random_layer(Conv1D(4, 6), 6, 4)
    assert (conv.storage.matrix_shape, conv.storage.transposed) == ((4, 6), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_16_bit_base_are_float32_and_the_output_keeps_its_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4).to(dtype)
    layer = random_layer(base, 6, 4)
    assert layer.factors.lora_A.dtype == layer.factors.lora_B.dtype == torch.float32
    x = torch.randn(5, 6).to(dtype)
    expected = base(x) + 0.7 * F.linear(F.linear(x.float(), layer.factors.lora_A), layer.factors.lora_B)
    assert layer(x).dtype == dtype
    # One rounding of the same float32 sum, up to its own last bits.
    torch.testing.assert_close(layer(x).float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_bf16_outputs_and_float32_gradients(base_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = random_layer(nn.Linear(6, 4).to(base_dtype).requires_grad_(False), 6, 4)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.factors.lora_A.grad is not None
    assert layer.factors.lora_A.grad.dtype == torch.float32


def test_dropout_acts_on_the_update_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4).double()
    layer = random_layer(base, 6, 4, dropout=0.5)
    x = torch.randn(8, 6, dtype=torch.float64)
    layer.train()
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    update = F.linear(F.dropout(x, 0.5), 0.7 * layer.factors.lora_B @ layer.factors.lora_A)
    torch.testing.assert_close(got, base(x) + update, **DOUBLE)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), **EXACT)
    torch.testing.assert_close(layer(x), base(x) + F.linear(x, layer.factors.delta_w()), **DOUBLE)


def test_factors_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_A \(r, d_in\) and lora_B \(4, r\).*got \(2, 4\) and \(6, 2\)"):
        LoraFactors(torch.ones(2, 4), torch.ones(6, 2), d_out=4, alpha=1.0, scale=1.0)


def test_the_initial_a_follows_the_model_and_is_not_saved() -> None:
    model = random_model()
    layer = training.lora_layers(model)["0"]
    before = layer.factors.lora_A.detach().clone()
    with torch.no_grad():
        layer.factors.lora_A += 1
    torch.testing.assert_close(layer.factors.lora_A0, before, **EXACT)
    assert not layer.factors.lora_A0.requires_grad
    assert not any("lora_A0" in name for name in model.state_dict())
    assert training.lora_layers(copy.deepcopy(model))["0"].factors.lora_A0 is not layer.factors.lora_A0


def test_a_merged_forward_is_the_unmerged_one_to_rounding() -> None:
    model = random_model()
    x = torch.randn(6, 7, dtype=torch.float64)
    before = model(x)
    training.merge(model)
    torch.testing.assert_close(model(x), before, **DOUBLE)


def test_a_merged_layer_is_exactly_its_base() -> None:
    model = random_model(torch.float32)
    training.merge(model)
    layer = training.lora_layers(model)["0"]
    x = torch.randn(6, 7)
    assert layer.merged
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_every_weight_bit_for_bit(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    before = copy.deepcopy(model.state_dict())
    training.merge(model)
    assert not torch.equal(model.state_dict()["0.base_layer.weight"], before["0.base_layer.weight"])
    training.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(layer.merged for layer in training.lora_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_the_float64_sum_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    model = random_model(dtype)
    layers = training.lora_layers(model)
    expected = {}
    for name, layer in layers.items():
        delta = (
            5.0 / 3 * layer.factors.lora_B.detach().double().numpy() @ layer.factors.lora_A.detach().double().numpy()
        )
        stored = layer.weight.detach().double().numpy()
        expected[name] = torch.from_numpy(stored + (delta.T if name == "2" else delta))
    training.merge(model)
    for name, layer in layers.items():
        # Not bit for bit: numpy sums in another order, and a sum beside a tie may round the other way.
        # One rounding is within half a spacing, which is at most eps/2 relative.
        error = (layer.weight.double() - expected[name]).abs()
        limit = torch.finfo(dtype).eps / 2 * (1 + 1e-4) * expected[name].abs()
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool((error <= limit + subnormal).all())


def test_a_small_update_survives_in_float64_where_adding_in_bf16_loses_it() -> None:
    base = nn.Linear(2, 1, bias=False).bfloat16()
    with torch.no_grad():
        base.weight.fill_(1.0)
    spacing = 2.0**-7  # of bfloat16 above 1
    model = nn.Sequential(adapted(base, torch.ones(2, 2), torch.full((1, 2), 0.3 * spacing), scale=1.0))
    training.merge(model)  # 0.3 + 0.3 spacings round up to one; each alone would round to none
    assert base.weight.tolist() == [[1 + spacing, 1 + spacing]]


def test_merging_is_in_place_for_whoever_holds_the_weight() -> None:
    model = random_model()
    weight = training.lora_layers(model)["0"].weight
    before, pointer = weight.detach().clone(), weight.data_ptr()
    training.merge(model)
    assert training.lora_layers(model)["0"].weight is weight
    assert weight.data_ptr() == pointer
    assert not torch.equal(weight, before)


def test_merging_twice_and_unmerging_twice_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="'0': expected a merged layer, got an unmerged one"):
        training.unmerge(model)
    training.merge(model)
    weight = training.lora_layers(model)["0"].weight.detach().clone()
    with pytest.raises(ValueError, match="'0': expected an unmerged layer, got a merged one"):
        training.merge(model)
    assert torch.equal(training.lora_layers(model)["0"].weight, weight)


def test_a_merge_that_overflows_leaves_every_layer_as_it_was() -> None:
    model = random_model(torch.float16)
    with torch.no_grad():
        training.lora_layers(model)["2"].factors.lora_B.fill_(1e6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UndefinedUpdateError, match=r"'2': expected a finite merged weight.*torch.float16"):
        training.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not training.lora_layers(model)["0"].merged


def test_a_weight_tied_to_another_module_is_not_merged() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    training.inject(model, ["head"], r=2)
    with pytest.raises(ValueError, match="'head': its weight is tied to that of 'embed'"):
        training.merge(model)


def test_a_model_without_lora_layers_is_not_merged() -> None:
    with pytest.raises(ValueError, match="Linear: expected a model with LoRA layers, got none"):
        training.merge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a model with LoRA layers, got none"):
        training.unmerge(nn.Linear(2, 2))


def test_a_forward_set_on_the_layer_itself_is_called() -> None:
    base = nn.Linear(3, 2)
    own = base.forward
    base.forward = lambda x: 10 * own(x)  # type: ignore[method-assign]
    expected = base(torch.ones(3))
    model = nn.Sequential(base)
    training.inject(model, ["0"], r=1)
    assert torch.equal(model(torch.ones(3)), expected)


def test_a_merge_that_is_interrupted_leaves_every_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done: list[object] = []

    def interrupted(*given: object) -> bool:
        done.append(given)
        if len(done) == 2:
            raise MemoryError
        return written(*given)  # type: ignore[arg-type]

    written = merging._write_merged
    monkeypatch.setattr(merging, "_write_merged", interrupted)
    with pytest.raises(MemoryError):
        training.merge(model)
    monkeypatch.undo()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    training.merge(model)


def test_the_state_of_a_merged_model_is_not_loaded_into_an_unmerged_one() -> None:
    # Its update would count twice.
    model, merged = random_model(), random_model()
    training.merge(merged)
    state = merged.state_dict()
    with pytest.raises(RuntimeError, match=r"'0': expected the state of unmerged layers, got that of merged ones"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"'2': expected the state of merged layers, got that of unmerged ones"):
        merged.load_state_dict(model.state_dict())
    merged.load_state_dict(state)
    training.unmerge(merged)
    copy.deepcopy(model).load_state_dict(merged.state_dict())
