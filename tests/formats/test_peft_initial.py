"""Initialisations that move the base: PiSSA and its like, less the factors that training began with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_models import CONFIG, WEIGHTS, edited, randomise, saved
from safetensors.torch import load_file
from torch import nn

from lora_analysis.adapter import Adapter
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.update import DenseUpdate, LowRankUpdate

# PEFT takes its product off the base in float32: weights near 1, products of tens.
FLOAT32 = 2e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]


def published() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16))


def adapted(kind: Any, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": ["0", "1"]} | options))
    config.init_lora_weights = kind
    return peft.get_peft_model(published(), config)


def change_of_the_published_base(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    merged = copy.deepcopy(model).double().merge_and_unload()
    return {str(i): (merged[i].weight - published()[i].weight).detach().numpy() for i in range(2)}


def trained(folder: Path, kind: Any, *, renamed: bool, **options: Any) -> Any:
    """A trained model, saved as ``trained``, and what it began with, as ``initial``."""
    model = adapted(kind, **options)
    config = model.peft_config["default"]
    if renamed:  # PEFT's documented way, so that loading the initial factors does not move the base again
        config.init_lora_weights = True
    saved(model, folder / "initial")
    randomise(model)
    config.init_lora_weights = kind
    saved(model, folder / "trained")
    return model


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("renamed", [True, False], ids=["initial called LoRA", "initial called by its name"])
def test_with_the_initial_factors_the_update_is_the_change_of_the_published_base(
    tmp_path: Path, kind: str, renamed: bool
) -> None:
    model = trained(tmp_path, kind, renamed=renamed, use_rslora=kind == "olora")
    adapter = load_adapter(tmp_path / "trained", initial=tmp_path / "initial")
    for name, change in change_of_the_published_base(model).items():
        np.testing.assert_allclose(adapter[name].dense().numpy(), change, atol=FLOAT32 * np.abs(change).max())
        assert isinstance(adapter[name], LowRankUpdate)
        assert adapter.modules[name].r == adapter[name].r == 6
        assert adapter.modules[name].scale == adapter[name].scale
        # Stored numbers, some with another sign.
        assert adapter[name].eps == pytest.approx(2.5e-8, rel=0.1)
    assert len(adapter.notes) == 1
    assert "initial: ΔW = s·B·A - s0·B0·A0, of rank r + r0." in adapter.notes[0]


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "PiSSA"])
def test_without_them_it_is_refused_and_says_what_helps(tmp_path: Path, kind: str) -> None:
    folder = edited(saved(adapted(True), tmp_path), init_lora_weights=kind)
    match = f"initialised by '{kind}', which moved the base.*Pass initial=.*path_initial_model_for_weight_conversion"
    with pytest.raises(UnsupportedAdapterError, match=match) as caught:
        load_adapter(folder)
    assert str(caught.value).startswith(str(folder))


def test_an_initialisation_that_is_not_known_may_have_moved_the_base(tmp_path: Path) -> None:
    saved(adapted(True), tmp_path / "initial")
    folder = edited(saved(adapted(True), tmp_path / "new"), init_lora_weights="brand_new")
    with pytest.raises(UnsupportedAdapterError, match="initialised by 'brand_new', which is not known here"):
        load_adapter(folder)
    assert len(load_adapter(folder, initial=tmp_path / "initial")) == 2


def test_mica_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted("mica")
    with pytest.raises(UnsupportedAdapterError, match="initialised by 'mica': MiCA, which is not read yet"):
        load_adapter(saved(model, tmp_path))


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "eva", True, False])
def test_the_others_start_from_what_stays_in_the_file(tmp_path: Path, kind: Any) -> None:
    folder = edited(saved(adapted(True), tmp_path), init_lora_weights=kind)
    assert load_adapter(folder).notes == ()


def test_asked_for_initial_factors_come_off_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = trained(tmp_path, "pissa", renamed=True)
    adapter = load_adapter(
        edited(tmp_path / "trained", init_lora_weights=True), initial=load_adapter(tmp_path / "initial")
    )
    for name, change in change_of_the_published_base(model).items():
        np.testing.assert_allclose(adapter[name].dense().numpy(), change, atol=FLOAT32 * np.abs(change).max())
    assert "The configuration's own initialisation, True, does not ask for it." in adapter.notes[0]


def test_an_empty_adapter_takes_nothing_off(tmp_path: Path) -> None:
    trained(tmp_path, "pissa", renamed=False)
    adapter = load_adapter(tmp_path / "initial", initial=Adapter({}))
    tensors = load_file(tmp_path / "initial" / WEIGHTS)
    a, b = (tensors[f"base_model.model.0.lora_{side}.weight"].double().numpy() for side in "AB")
    np.testing.assert_allclose(adapter["0"].dense().numpy(), 2 * b @ a, rtol=1e-12)


def test_other_scales_and_dtypes_are_brought_together_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(adapted(True).bfloat16(), tmp_path)
    initial = Adapter(
        {
            str(i): LowRankUpdate(torch.randn(d_out, 2), torch.randn(2, d_in), 0.3)
            for i, (d_out, d_in) in enumerate([(12, 16), (16, 12)])
        }
    )
    plain, adapter = load_adapter(tmp_path), load_adapter(tmp_path, initial=initial)
    for name in initial:
        oracle = plain[name].dense() - initial[name].dense()
        torch.testing.assert_close(adapter[name].dense(), oracle, rtol=1e-12, atol=1e-12)
        # The coarser of the two files.
        assert adapter[name].eps == plain[name].eps
        assert (adapter[name].r, adapter[name].scale) == (5, 2.0)
    note = "0: the scale is 2, that of the initial factors 0.3; each keeps its own. The same of 1 other."
    assert note in adapter.notes
    with pytest.raises(UnsupportedAdapterError, match=r"'0': expected a scale other than 0 .* 0\.3, got 0"):
        load_adapter(tmp_path, initial=initial, alpha=0)


def test_unknown_scales_are_the_same_ones(tmp_path: Path) -> None:
    """One training has one scale, whatever it is."""
    trained(tmp_path, "pissa", renamed=True)
    for folder in ("trained", "initial"):
        (tmp_path / folder / CONFIG).unlink()
    adapter = load_adapter(tmp_path / "trained", initial=tmp_path / "initial")
    assert {module.scale_source for module in adapter.modules.values()} == {"unknown"}
    known = load_adapter(tmp_path / "trained", initial=tmp_path / "initial", alpha=6)
    products = []
    for folder in ("trained", "initial"):
        tensors = load_file(tmp_path / folder / WEIGHTS)
        a, b = (tensors[f"base_model.model.0.lora_{side}.weight"].double() for side in "AB")
        products.append(b @ a)
    torch.testing.assert_close(known["0"].dense(), 2 * (products[0] - products[1]), rtol=1e-10, atol=1e-10)


def test_initial_factors_must_be_those_of_the_same_modules(tmp_path: Path) -> None:
    saved(adapted(True), tmp_path)

    def update(d_out: int, d_in: int) -> LowRankUpdate:
        return LowRankUpdate(torch.ones(d_out, 1), torch.ones(1, d_in), 1.0)

    both = {"0": update(12, 16), "1": update(16, 12)}
    for updates, match in (
        ({"0": update(12, 16)}, "'1': expected initial factors of this module, first has none"),
        (both | {"1": update(16, 13)}, r"'1': expected initial factors of shape \(16, 12\), got \(16, 13\) in first"),
        (both | {"2": update(2, 2)}, "expected the modules of the initial factors, '2' of first is not among the 2"),
    ):
        with pytest.raises(AdapterFormatError, match=match):
            load_adapter(tmp_path, initial=Adapter(updates, source="first"))
    dense = load_adapter(tmp_path, initial=Adapter(both | {"1": DenseUpdate(torch.ones(16, 12))}, source="first"))
    with pytest.raises(UnsupportedAdapterError, match=r"'1': expected initial factors, got DenseUpdate.* from first"):
        dense["1"].dense()


CONVERTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"0": 2}, "alpha_pattern": {"1": 5}},
}


@pytest.mark.parametrize("options", CONVERTED.values(), ids=CONVERTED)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_peft_converts_to_lora_reads_as_the_change_of_the_published_base(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model = trained(tmp_path, kind, renamed=True, **options)
    before = {name: dict(layer.r) for name, layer in model.named_modules() if hasattr(layer, "scaling")}
    saved(model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    config = json.loads((tmp_path / "converted" / CONFIG).read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 6)
    adapter = load_adapter(tmp_path / "converted")
    assert adapter.notes == ()
    for name, change in change_of_the_published_base(model).items():
        assert adapter.modules[name].r == 2 * before[f"base_model.model.{name}"]["default"]
        np.testing.assert_allclose(adapter[name].dense().numpy(), change, atol=FLOAT32 * np.abs(change).max())
