"""Names in PEFT's files: wrappers, prefixes, several adapters, and tensors that are no factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import (
    CONFIG,
    KEY,
    WEIGHTS,
    assert_accounts_for,
    assert_equals_peft,
    lora_layers,
    randomise,
    saved,
    tensors_of,
    trained,
    with_tensor,
)
from safetensors.torch import load_file, save_file

from lora_analysis.errors import (
    AdapterFormatError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.update import LowRankUpdate


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_raw_dumps_keep_the_adapters_name(tmp_path: Path, prefix: str) -> None:
    model = trained(modules_to_save=["classifier"])
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / CONFIG).write_text(json.dumps(model.peft_config["default"].to_dict(), default=list))
    adapter = load_adapter(tmp_path)
    assert_equals_peft(adapter, model)
    assert_accounts_for(adapter, tensors)
    reasons = {unused.tensor.removeprefix(prefix): unused.reason for unused in adapter.unused}
    assert "modules_to_save" in reasons["base_model.model.classifier.modules_to_save.default.weight"]
    assert "the base's own" in reasons["base_model.model.classifier.original_module.weight"]
    assert "the base's own" in reasons["base_model.model.lin.base_layer.weight"]


def two_adapters(folder: Path) -> Any:
    model = trained(adapter="first")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    randomise(model)
    torch.save(model.state_dict(), folder / "both.bin")
    return model


def test_one_of_two_adapters_in_a_file_is_chosen_by_name(tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    for name, count, r in (("first", 7, 4), ("second", 2, 2)):
        adapter = load_adapter(tmp_path / "both.bin", name=name, alpha=8)
        assert (len(adapter), adapter.modules["layers.0.q_proj"].r) == (count, r)
        layer = lora_layers(model)["layers.0.q_proj"]
        update = adapter["layers.0.q_proj"]
        assert isinstance(update, LowRankUpdate)
        assert torch.equal(update.up, layer.lora_B[name].weight)
        assert_accounts_for(adapter, model.state_dict())
        others = [u for u in adapter.unused if "another adapter" in u.reason]
        assert len(others) == 2 * (9 - count)


def test_two_adapters_without_a_name_are_ambiguous(tmp_path: Path) -> None:
    two_adapters(tmp_path)
    for name in (None, "third"):
        with pytest.raises(AdapterFormatError, match=r"holds several adapters .*'first'.*'second'.*Pass name="):
            load_adapter(tmp_path / "both.bin", name=name)


def test_a_name_that_is_not_there_is_never_ignored(tmp_path: Path) -> None:
    model = trained()
    saved(model, tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "raw.bin")
    assert_equals_peft(load_adapter(tmp_path / "saved", name="default"), model)
    assert len(load_adapter(tmp_path / "raw.bin", name="default", alpha=1)) == 7
    for source in (tmp_path / "saved", tmp_path / "saved" / WEIGHTS, tmp_path / "raw.bin"):
        with pytest.raises(AdapterFormatError, match="expected an adapter named 'typo'"):
            load_adapter(source, name="typo", alpha=1)


def test_named_adapters_lie_in_folders(tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    saved(model, tmp_path / "shelf")
    with pytest.raises(AdapterFormatError, match=r"found a folder of 2 \(first, second\).*its name="):
        load_adapter(tmp_path / "shelf")
    second = load_adapter(tmp_path / "shelf", name="second")
    assert list(second) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert {module.scale for module in second.modules.values()} == {4.0}
    assert load_adapter(tmp_path / "shelf" / "first").modules["lin"].scale == 6 / 4


@pytest.mark.parametrize(
    "name",
    [
        "lora_A.weight",
        "lora_alpha",
        "base_model.model.lin.lora_A",
        "base_model.model.lin.lora_A.a.b.weight",
        "base_model.model.lin.lora_A.weight\n",
        "base_model.model.lin.lora_A.bias",
        "base_model.model.layers.0.q_proj.lora_scaling",
    ],
)
def test_tensors_of_lora_that_are_no_factor_fail_the_load(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFormatError, match="expected the tensors of LoRA to be factors of a module") as caught:
        load_adapter(with_tensor(tmp_path, name))
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["head.weight", "base_model.model.snake.alpha", "head.bias"])
def test_other_tensors_are_listed(tmp_path: Path, name: str) -> None:
    adapter = load_adapter(with_tensor(tmp_path, name))
    assert [unused.tensor for unused in adapter.unused] == [name]
    assert adapter.ledger.keys() == load_file(tmp_path / WEIGHTS).keys()


def test_a_name_of_two_lines_is_a_name(tmp_path: Path) -> None:
    save_file({f"a\nb.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 8}))
    adapter = load_adapter(tmp_path)
    assert adapter.modules["a\nb"].scale == 2
    assert adapter.notes == (r"'a\nb': the configuration says r=8, the tensors have r=2; they win.",)


def test_wrappers_are_whole_components_of_a_name(tmp_path: Path) -> None:
    names = {
        "my_orig_mod.lin": "my_orig_mod.lin",
        "not_fsdp_wrapped_module.lin": "not_fsdp_wrapped_module.lin",
        "_orig_mod.a._fsdp_wrapped_module.b": "a.b",
        "c._orig_mod": "c",
    }
    save_file({f"{n}.lora_{side}.weight": torch.ones(2, 2) for n in names for side in "AB"}, tmp_path / WEIGHTS)
    assert set(load_adapter(tmp_path)) == set(names.values())


def test_modules_are_in_natural_order_whatever_their_digits(tmp_path: Path) -> None:
    long = "9" * 5000
    names = ["layers.2.q", "layers.10.q", "layers.010.v", f"layers.{long}.q", "layers.x", "layers.5²", "layers.٣"]
    tensors = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for name in reversed(names) for side in "AB"}
    save_file(tensors, tmp_path / WEIGHTS)
    ordered = list(load_adapter(tmp_path))
    assert set(ordered) == set(names)
    assert [name for name in ordered if name.endswith((".q", ".v"))] == names[:4]


def test_one_factor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors["module." + KEY.format("A")] = tensors[KEY.format("A")].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"expected one lora_A for 'layers\.0\.q_proj', got "):
        load_adapter(tmp_path)


def test_names_without_pefts_prefix_are_the_modules_own(tmp_path: Path) -> None:
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors_of(tmp_path).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert list(load_adapter(tmp_path)) == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize(
    "key",
    [
        "model.base_model.model.layers.0.q.lora_{}.default.weight",
        "_forward_module.module.base_model.model.layers.0.q.lora_{}.default.weight",
        "module._orig_mod.base_model.model.layers.0.q.lora_{}.default.weight",
        "base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q.lora_{}.default.weight",
        "base_model.model.layers.0.q.lora_{}.default._fsdp_wrapped_module.weight",
        "base_model.model.layers.0._fsdp_wrapped_module.q.lora_{}.weight",
    ],
)
def test_what_trainers_put_round_a_model_is_no_part_of_its_names(tmp_path: Path, key: str) -> None:
    save_file({key.format(side): torch.ones(2, 2) for side in "AB"}, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path)
    assert list(adapter) == ["layers.0.q"]
    assert adapter.ledger.keys() == {key.format(side) for side in "AB"}


def test_an_adapter_may_be_called_weight(tmp_path: Path) -> None:
    tensors = {f"q.lora_{side}.weight.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors | {"q.lora_magnitude_vector.weight.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    assert load_adapter(tmp_path, name="weight").modules["q"].magnitude is not None
