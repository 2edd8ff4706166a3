"""Live models of peft: the same updates as from what they save, and what only the live layers know."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.errors import BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.update import DenseUpdate


class Net(nn.Module):
    """Layers of several kinds, some square, and experts of which two have one shape."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(7, 5)
        self.square = nn.Linear(6, 6)
        self.turned = Conv1D(6, 6)
        self.embed = nn.Embedding(6, 6)
        self.conv = nn.Conv2d(3, 4, (2, 3))
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        if transposed:
            self.mlp.experts.is_transposed = True
        for name in ("gate", "up"):
            self.mlp.experts.register_parameter(name, nn.Parameter(torch.randn(3, 6, 6)))

    def forward(self, x: Tensor) -> Tensor:
        return x


MODULES = ["lin", "square", "embed", "conv"]


def adapted(model: nn.Module | None = None, adapter: str = "default", **options: Any) -> Any:
    given = {"r": 2, "lora_alpha": 3, "target_modules": MODULES} | options
    base = (model or Net()).double()
    made = peft.get_peft_model(base, peft.LoraConfig(**given), adapter_name=adapter, autocast_adapter_dtype=False)
    randomise(made)
    return made


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))


def assert_is_what_merging_adds(adapter: Adapter, model: Any, **merge: Any) -> None:
    after = load_base(copy.deepcopy(model).merge_and_unload(**merge))
    before = load_base(copy.deepcopy(model).unload())
    assert len(adapter) > 0
    for name, module in adapter.modules.items():
        added = after.matrix(module.target, module.shape) - before.matrix(module.target, module.shape)
        np.testing.assert_allclose(adapter[name].dense().numpy(), added.numpy(), atol=1e-11)


def test_a_live_model_gives_what_it_saves(tmp_path: Path) -> None:
    model = adapted(alpha_pattern={"lin": 9}, rank_pattern={"conv": 3})
    adapter = training.extract(model, source="live")
    model.save_pretrained(tmp_path)
    saved = load_adapter(tmp_path)
    assert (adapter.source, adapter.format) == ("live", "peft")
    assert set(adapter) == set(saved) == set(MODULES)
    for name in saved:
        assert torch.equal(adapter[name].dense(), saved[name].dense())
        assert adapter.modules[name].scale == saved.modules[name].scale
    assert adapter.targets == saved.targets
    assert adapter.notes == saved.notes == ()
    assert_is_what_merging_adds(adapter, model)


def test_extracted_factors_do_not_move_with_the_model_and_pickle() -> None:
    model = adapted()
    adapter = training.extract(model)
    before = {name: update.dense() for name, update in adapter.items()}
    again = pickle.loads(pickle.dumps(adapter))
    randomise(model)
    for name, dense in before.items():
        assert torch.equal(adapter[name].dense(), dense)
        assert torch.equal(again[name].dense(), dense)


def test_the_layers_own_scale_wins_and_is_noted() -> None:
    model = adapted()
    model.base_model.model.lin.set_scale("default", 4.0)
    model.base_model.model.conv.scaling["default"] = 0.25
    adapter = training.extract(model)
    assert {name: module.scale for name, module in adapter.modules.items()} == {
        "lin": 6.0,
        "square": 1.5,
        "embed": 1.5,
        "conv": 0.25,
    }
    assert adapter.notes == (
        "lin: the layer's own scale, 6, wins over the configuration's 1.5.",
        "conv: the layer's own scale, 0.25, wins over the configuration's 1.5.",
    )
    assert_is_what_merging_adds(adapter, model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning")
@pytest.mark.parametrize("names", [["square", "turned"], ["turned", "square"]], ids=str)
def test_each_layer_says_how_its_weight_is_stored(names: list[str]) -> None:
    """One configuration holds one ``fan_in_fan_out``, the last layer's, and square weights tell nothing."""
    adapter = training.extract(adapted(target_modules=names))
    assert {name: adapter.targets[name].transposed for name in names} == {"square": False, "turned": True}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parameters", [["gate", "up"], ["up", "gate"]], ids=str)
def test_wrappers_of_parameters_say_which_and_how(parameters: list[str], transposed: bool) -> None:
    """All square and of one shape: of this a file says nothing."""
    model = adapted(Net(transposed), target_modules=[], target_parameters=[f"experts.{name}" for name in parameters])
    adapter = training.extract(model)
    assert set(adapter) == {f"mlp.experts.{name}.{e}" for name in parameters for e in range(3)}
    assert {target.transposed for target in adapter.targets.values()} == {transposed}
    assert adapter.notes == ()
    assert {module.flags for module in adapter.modules.values()} == {()}
    assert_is_what_merging_adds(adapter, model)


def test_dora_takes_the_live_base(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    adapter = training.extract(model)
    assert all(isinstance(update, DenseUpdate) for update in adapter.values())
    assert {module.flags for module in adapter.modules.values()} == {()}
    assert_is_what_merging_adds(adapter, model)
    again = pickle.loads(pickle.dumps(adapter))
    before = {name: update.dense() for name, update in adapter.items()}
    model.merge_adapter()
    for name, dense in before.items():
        assert torch.equal(adapter[name].dense(), dense)
        assert torch.equal(again[name].dense(), dense)


def test_a_merged_model_gives_the_same_updates_but_no_base_for_dora() -> None:
    model = adapted()
    before = training.extract(model)
    model.merge_adapter()
    after = training.extract(model)
    assert all(torch.equal(before[name].dense(), after[name].dense()) for name in before)
    dora = adapted(use_dora=True)
    dora.merge_adapter()
    with pytest.raises(BaseWeightsError, match=r"'lin': expected the base's own weights, .*Call unmerge_adapter\(\)"):
        training.extract(dora)
    dora.unmerge_adapter()
    assert len(training.extract(dora)) == 4


def test_one_of_several_adapters_is_chosen_by_name() -> None:
    model = adapted(adapter="first")
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=12, target_modules=["lin"]))
    randomise(model)
    second = training.extract(model, name="second")
    assert {name: (module.r, module.scale) for name, module in second.modules.items()} == {"lin": (3, 4.0)}
    assert len(training.extract(model, name="first")) == 4
    with pytest.raises(ValueError, match=r"expected one adapter of peft, got 'first', 'second'. Pass name="):
        training.extract(model)
    with pytest.raises(ValueError, match="expected an adapter named 'third', found 'first', 'second'"):
        training.extract(model, name="third")


def test_a_model_with_injected_layers_is_no_model_of_peft_and_reads_alike() -> None:
    model = Net().double()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lin", "conv"]), model)
    randomise(model)
    adapter = training.extract(model)
    assert list(adapter) == ["conv", "lin"]
    for name in adapter:
        delta = getattr(model, name).get_delta_weight("default").detach().flatten(1)
        np.testing.assert_allclose(adapter[name].dense().numpy(), delta.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_takes_the_factors_it_began_with() -> None:
    published = Net()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lin", "square"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(published), config)
    with pytest.raises(UnsupportedAdapterError, match=r"initialised by 'pissa', which moved the base.*Pass initial="):
        training.extract(model)
    initial = training.extract(model, initial=Adapter({}))
    randomise(model)
    adapter = training.extract(model, initial=initial)
    merged = copy.deepcopy(model).double().merge_and_unload()
    for name in adapter:
        change = (getattr(merged, name).weight - getattr(published, name).weight).detach().numpy()
        np.testing.assert_allclose(adapter[name].dense().numpy(), change, atol=1e-5)


def test_other_kinds_of_peft_are_named() -> None:
    model = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["lin"], feedforward_modules=[]))
    with pytest.raises(UnsupportedAdapterError, match=r"expected LoRA, got the adapter 'default' of kind 'IA3'"):
        training.extract(model)


def test_what_is_trained_beside_the_factors_is_listed() -> None:
    adapter = training.extract(adapted(target_modules=["lin"], modules_to_save=["square"], lora_bias=True))
    assert sorted((unused.tensor, unused.reason.split(":")[0]) for unused in adapter.unused) == [
        ("base_model.model.lin.lora_B.default.bias", "lora_bias"),
        ("base_model.model.square.modules_to_save.default.bias", "modules_to_save"),
        ("base_model.model.square.modules_to_save.default.weight", "modules_to_save"),
    ]


def test_a_number_called_scaling_in_the_base_is_no_scale() -> None:
    """As the attention of transformers' Llama has it."""
    net = Net()
    net.mlp.scaling = 0.125
    assert list(training.extract(adapted(net))) == list(training.extract(adapted()))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_a_live_layer_leaves_no_doubt_about_its_scale(tmp_path: Path) -> None:
    """A file does: PEFT sorts the keys of a pattern when it saves."""
    model = adapted(target_modules=["square"], alpha_pattern={"square": 5, "squar.": 7})
    adapter = training.extract(model)
    assert adapter.modules["square"].scale == 5 / 2
    assert adapter.notes == ()
    model.save_pretrained(tmp_path)
    (note,) = load_adapter(tmp_path).notes
    assert "2 keys of alpha_pattern match" in note
