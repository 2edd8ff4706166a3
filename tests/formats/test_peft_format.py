"""PEFT's LoRA: every ΔW equal to the one PEFT itself merges, every tensor accounted for."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import (
    CONFIG,
    KEY,
    OPTIONS,
    WEIGHTS,
    assert_accounts_for,
    assert_equals_peft,
    gpt2_model,
    lora_layers,
    merged_differences,
    saved,
    tensors_of,
    trained,
)
from safetensors.torch import load_file, save_file

from lora_analysis.base import load_base
from lora_analysis.errors import (
    AdapterFormatError,
    UndefinedUpdateError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.update import LowRankUpdate


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_delta_w_is_the_one_peft_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    adapter = load_adapter(saved(model, tmp_path))
    assert adapter.format == "peft"
    assert adapter.notes == ()
    assert {module.scale_source for module in adapter.modules.values()} == {"config"}
    assert_equals_peft(adapter, model)
    assert_accounts_for(adapter, load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("name", ["plain", "both patterns, rank-stabilised", "their own biases", "some layers"])
def test_every_delta_w_is_the_one_that_merging_adds(tmp_path: Path, name: str) -> None:
    model = trained(**OPTIONS[name])
    adapter = load_adapter(saved(model, tmp_path))
    differences = merged_differences(model)
    assert set(differences) == set(adapter)
    for module, update in adapter.items():
        # PEFT merges in float64 here, but its scaled product passes through no other route than ours.
        np.testing.assert_allclose(update.dense().numpy(), differences[module].numpy(), atol=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bias": "all"}, {"bias: a full bias": 8}),
        ({"bias": "lora_only"}, {"bias: a full bias": 7}),
        ({"lora_bias": True}, {"lora_bias: adds scale times it": 7}),
        ({"modules_to_save": ["classifier"]}, {"modules_to_save: a full tensor": 1, "bias: a full bias": 1}),
    ],
    ids=["all", "lora_only", "lora_bias", "modules_to_save"],
)
def test_tensors_beside_the_factors_are_listed_with_their_reason(
    tmp_path: Path, options: dict[str, Any], expected: dict[str, int]
) -> None:
    adapter = load_adapter(saved(trained(**options), tmp_path))
    counts = {reason: sum(u.reason.startswith(reason) for u in adapter.unused) for reason in expected}
    assert counts == expected
    assert len(adapter.unused) == sum(expected.values())


@pytest.mark.parametrize("stated", [True, False], ids=["flag given", "flag set by peft"])
def test_conv1d_updates_are_turned_against_their_weight(tmp_path: Path, stated: bool) -> None:
    base = load_base(gpt2_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        model = trained(
            gpt2_model(), target_modules=["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=stated
        )
    adapter = load_adapter(saved(model, tmp_path))
    assert len(adapter) == 8
    assert all(target.transposed for target in adapter.targets.values())
    assert_equals_peft(adapter, model)
    after = copy.deepcopy(model).double().merge_and_unload().state_dict()
    for name, update in adapter.items():
        weight = base.matrix(adapter.targets[name], update.shape)
        merged = after[f"{name}.weight"].T
        np.testing.assert_allclose(update.dense().numpy(), (merged - weight).numpy(), atol=1e-10)


def test_a_checkpoint_in_bin_reads_alike(tmp_path: Path) -> None:
    model = trained(bias="all")
    a = load_adapter(saved(model, tmp_path / "a"))
    b = load_adapter(saved(model, tmp_path / "b", safe_serialization=False))
    assert (tmp_path / "b" / "adapter_model.bin").is_file()
    assert a.modules.keys() == b.modules.keys()
    assert_equals_peft(b, model)
    assert {unused.tensor for unused in a.unused} == {unused.tensor for unused in b.unused}


def test_the_file_alone_finds_its_configuration(tmp_path: Path) -> None:
    model = trained()
    saved(model, tmp_path)
    assert_equals_peft(load_adapter(tmp_path / WEIGHTS), model)
    assert_equals_peft(load_adapter(str(tmp_path)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_factors_stay_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    adapter = load_adapter(saved(model, tmp_path))
    assert {update.up.dtype for update in adapter.values() if isinstance(update, LowRankUpdate)} == {dtype}
    for name, layer in lora_layers(model).items():
        a, b = (factor["default"].weight.detach().double().numpy() for factor in (layer.lora_A, layer.lora_B))
        oracle = layer.scaling["default"] * (b @ a)
        np.testing.assert_allclose(adapter[name].dense().numpy(), oracle, atol=1e-12)
        # PEFT itself rounds its result to the dtype.
        theirs = layer.get_delta_weight("default").detach().double().numpy()
        rounding = 2 * torch.finfo(dtype).eps
        np.testing.assert_allclose(adapter[name].dense().numpy(), theirs, atol=rounding * float(np.abs(oracle).max()))


@pytest.mark.parametrize(("lost", "kept"), [("A", "B"), ("B", "A")])
def test_a_factor_without_its_partner_is_named(tmp_path: Path, lost: str, kept: str) -> None:
    tensors = tensors_of(tmp_path)
    del tensors[KEY.format(lost)]
    save_file(tensors, tmp_path / WEIGHTS)
    match = f"'layers.0.q_proj': expected lora_A and lora_B, got only lora_{kept} .*; lora_{lost} is missing"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("side", "shape"), [("A", (3, 10)), ("B", (12, 5)), ("A", (4,)), ("B", ()), ("A", (0, 10))], ids=str
)
def test_factors_that_do_not_share_r_are_named(tmp_path: Path, side: str, shape: tuple[int, ...]) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format(side)] = torch.zeros(shape)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        AdapterFormatError, match=r"'layers\.0\.q_proj': expected lora_A .* to share r, got .*pass format="
    ):
        load_adapter(tmp_path)


@pytest.mark.parametrize("r", [0, 1])
def test_the_smallest_factors_are_read(tmp_path: Path, r: int) -> None:
    tensors = {KEY.format("A"): torch.ones(r, 10), KEY.format("B"): torch.ones(12, r)}
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path, alpha=3)
    assert adapter.modules["layers.0.q_proj"].r == r
    assert adapter["layers.0.q_proj"].norm() == pytest.approx(3 * r * math.sqrt(120))


@pytest.mark.parametrize("rslora", [False, True])
def test_factors_of_r_zero_are_an_update_of_zero_and_noted(tmp_path: Path, rslora: bool) -> None:
    save_file({KEY.format("A"): torch.ones(0, 10), KEY.format("B"): torch.ones(12, 0)}, tmp_path / WEIGHTS)
    assert load_adapter(tmp_path).modules["layers.0.q_proj"].scale_source == "unknown"
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16, "use_rslora": rslora}))
    adapter = load_adapter(tmp_path)
    module = adapter.modules["layers.0.q_proj"]
    assert (module.scale, module.scale_source) == (0.0, "config")
    assert adapter.notes == ("layers.0.q_proj: r=0, an update of zero whatever its scale; alpha / r is given as 0.",)
    assert not adapter["layers.0.q_proj"].dense().any()


def test_integer_factors_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format("A")] = tensors[KEY.format("A")].to(torch.int8)
    save_file(tensors, tmp_path / WEIGHTS)
    match = r"'layers.0.q_proj': expected floating-point factors, got torch.int8 in '.*lora_A.weight'"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


def test_nan_in_a_file_shows_only_in_its_own_numbers(tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path)
    tensors[KEY.format("A")][0, 0] = math.nan
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path)
    assert len(adapter) == 2
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        adapter["layers.0.q_proj"].svd()
    assert adapter["layers.1.q_proj"].norm() > 0


def test_a_configuration_without_factors_is_no_adapter(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    save_file({"base_model.model.classifier.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=r"expected LoRA factors, found none among its 1 tensors"):
        load_adapter(tmp_path)
