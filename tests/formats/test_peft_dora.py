"""DoRA as PEFT writes it: the low-rank part without a base, what the merge adds with one, and its magnitudes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_models import CONFIG, WEIGHTS, assert_accounts_for, edited, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UndefinedUpdateError
from lora_analysis.formats import load_adapter
from lora_analysis.update import DenseUpdate, LowRankUpdate

FLAG = "dora-low-rank-part"


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(7, 5),
        nn.Embedding(9, 6),
        nn.Conv1d(3, 4, 2),
        nn.Conv2d(3, 4, (2, 3)),
        nn.Conv3d(3, 4, (2, 1, 3)),
        nn.Embedding(6, 6),
    )
    return made.double()


def trained(model: nn.Module | None = None, **options: Any) -> Any:
    given = {"r": 2, "lora_alpha": 3, "target_modules": [str(i) for i in range(6)], "use_dora": True} | options
    made = peft.get_peft_model(model or layers(), peft.LoraConfig(**given), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("rslora", [False, True])
def test_with_the_base_the_update_is_what_merging_adds(tmp_path: Path, rslora: bool) -> None:
    model = trained(use_rslora=rslora)
    base = load_base(layers())
    adapter = load_adapter(saved(model, tmp_path), base=base)
    merged = load_base(copy.deepcopy(model).merge_and_unload())
    assert len(adapter) == 6
    for name, module in adapter.modules.items():
        added = merged.matrix(module.target, module.shape) - base.matrix(module.target, module.shape)
        np.testing.assert_allclose(adapter[name].dense().numpy(), added.numpy(), atol=1e-12)
        assert isinstance(adapter[name], DenseUpdate)
        assert (adapter[name].r, module.flags) == (2, ())
    assert adapter.notes == ()
    assert_accounts_for(adapter, load_file(tmp_path / WEIGHTS))


def test_without_the_base_it_is_the_low_rank_part_and_says_so(tmp_path: Path) -> None:
    model = trained()
    adapter = load_adapter(saved(model, tmp_path))
    for name, module in adapter.modules.items():
        layer = model.base_model.model[int(name)]
        delta = layer.get_delta_weight("default").detach()
        oracle = (delta.T if module.target.transposed else delta.flatten(1)).numpy()
        np.testing.assert_allclose(adapter[name].dense().numpy(), oracle, atol=1e-12)
        assert isinstance(adapter[name], LowRankUpdate)
        assert module.flags == (FLAG,)
    assert len(adapter.notes) == 1
    assert "low-rank part" in adapter.notes[0]
    assert "Pass base=" in adapter.notes[0]


def test_a_turned_weight_has_its_magnitudes_along_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(Conv1D(5, 7), Conv1D(6, 6)).double()
    model = trained(copy.deepcopy(plain), target_modules=["0", "1"], fan_in_fan_out=True)
    adapter = load_adapter(saved(model, tmp_path), base=load_base(plain))
    after = copy.deepcopy(model).merge_and_unload()
    for name, update in adapter.items():
        added = (after[int(name)].weight - plain[int(name)].weight).detach().T
        np.testing.assert_allclose(update.dense().numpy(), added.numpy(), atol=1e-12)


def test_magnitudes_are_one_for_each_output(tmp_path: Path) -> None:
    model = trained()
    for adapter in (load_adapter(saved(model, tmp_path)), load_adapter(tmp_path, base=load_base(layers()))):
        for name, module in adapter.modules.items():
            live = model.base_model.model[int(name)].lora_magnitude_vector["default"].weight
            assert module.magnitude is not None
            assert module.magnitude_axis == 1
            assert torch.equal(module.magnitude(), live.detach().flatten())
            assert module.magnitude().shape == (module.shape[0],)
            assert any(key.endswith("lora_magnitude_vector") for key in module.tensors)


@pytest.mark.parametrize("ending", [".default.weight", ".default", ".weight"])
def test_magnitudes_of_other_versions_and_of_raw_dumps_are_found(tmp_path: Path, ending: str) -> None:
    """``.default`` is how PEFT called them as parameters, before they had a layer."""
    model = trained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    if ending == ".default":
        state = {
            name.removesuffix(".weight") if "magnitude" in name else name: tensor for name, tensor in state.items()
        }
    elif ending == ".weight":
        state = {name.replace(".default", ""): tensor for name, tensor in state.items()}
    assert sum(name.endswith(f"lora_magnitude_vector{ending}") for name in state) == 6
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path / WEIGHTS, alpha=3)
    assert all(module.magnitude is not None and module.flags == (FLAG,) for module in adapter.modules.values())
    assert_accounts_for(adapter, state)


def test_an_adapter_with_a_base_pickles(tmp_path: Path) -> None:
    torch.save(layers().state_dict(), tmp_path / "base.pt")
    adapter = load_adapter(saved(trained(), tmp_path / "adapter"), base=tmp_path / "base.pt")
    again = pickle.loads(pickle.dumps(adapter))
    for name, module in again.modules.items():
        assert torch.equal(again[name].dense(), adapter[name].dense())
        assert module.magnitude is not None


def test_without_a_scale_there_is_no_merged_weight(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    (tmp_path / CONFIG).unlink()
    adapter = load_adapter(tmp_path, base=load_base(layers()))
    assert {module.flags for module in adapter.modules.values()} == {(FLAG,)}
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        adapter["0"].dense()
    again = load_adapter(tmp_path, base=load_base(layers()), alpha=3)
    assert {module.flags for module in again.modules.values()} == {()}


def test_a_base_of_another_model_is_named(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path), base=load_base(nn.Sequential(nn.Linear(3, 5))))
    with pytest.raises(BaseWeightsError, match="expected 5x7, got 5x3"):
        adapter["0"].dense()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(saved(trained(target_modules=["0"]), folder) / WEIGHTS))


KEY = "base_model.model.0.lora_magnitude_vector"


@pytest.mark.parametrize("shape", [(4,), (7,), (0,), (), (5, 5)], ids=str)
def test_magnitudes_of_another_length_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file(tensors_of(tmp_path) | {KEY: torch.ones(shape)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"'0': expected 5 magnitudes, one for each output, got \("):
        load_adapter(tmp_path)


def test_magnitudes_that_are_missing_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    del tensors[KEY]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match="'0': use_dora is set: expected magnitudes"):
        load_adapter(tmp_path)
    save_file({KEY: torch.ones(5)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match="'0': expected lora_A and lora_B, got only lora_magnitude_vector"):
        load_adapter(tmp_path)


def test_magnitudes_win_over_a_configuration_that_does_not_mention_them(tmp_path: Path) -> None:
    adapter = load_adapter(edited(saved(trained(target_modules=["0"]), tmp_path), use_dora=False))
    assert adapter.modules["0"].flags == (FLAG,)
    assert "0: holds DoRA's magnitudes though use_dora is not set; read as DoRA." in adapter.notes


def test_nan_among_the_magnitudes_shows_in_the_true_update_only(tmp_path: Path) -> None:
    magnitude = torch.ones(5, dtype=torch.float64)
    magnitude[2] = torch.nan
    save_file(tensors_of(tmp_path) | {KEY: magnitude}, tmp_path / WEIGHTS)
    assert load_adapter(tmp_path)["0"].norm() > 0
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        load_adapter(tmp_path, base=load_base(layers()))["0"].norm()


def test_the_configuration_says_whether_in_words_of_json(tmp_path: Path) -> None:
    folder = edited(saved(trained(target_modules=["0"]), tmp_path), use_dora="yes")
    assert json.loads((folder / CONFIG).read_text())["use_dora"] == "yes"
    with pytest.raises(AdapterFormatError, match="use_dora: expected true or false, got 'yes'"):
        load_adapter(folder)
