"""What PEFT makes of resized adapters: every r, every scale and every ΔW, where names end in one another."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

import lora_analysis as la

FLOAT32 = 1e-6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.xq, self.v = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(self.xq(self.q(x)))
        return out


class Model(nn.Module):
    """Names that end in others, and of which others would match as regular expressions: 1 and 11, ``a.q``, ``a_q``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention() for _ in range(12)])
        self.add_module("self", Attention())
        self.a = nn.ModuleDict({"q": nn.Linear(6, 6)})
        self.a_q = nn.Linear(6, 6)
        self.q = nn.Linear(6, 6)
        self.v = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.get_submodule("self"), self.a["q"], self.a_q, self.q):
            x = layer(x)
        out: Tensor = self.v(x)
        return out


MODULES = [
    *(f"{stem}.{name}" for stem in ("layers.1", "layers.11", "self") for name in ("q", "xq", "v")),
    "a.q",
    "a_q",
    "q",
    "v",
]


def adapter(scale: float = 0.75) -> la.Adapter:
    """Spectra that fall off at different rates, so that every criterion gives many different r."""
    shapes = {
        name: tuple(layer.weight.shape) for name, layer in Model().named_modules() if isinstance(layer, nn.Linear)
    }
    updates = {}
    for i, name in enumerate(MODULES):
        d_out, d_in = shapes[name]
        S = torch.exp(-torch.arange(5.0) * (i % 5) / 4) * 3
        U, V = (torch.linalg.qr(torch.randn(d, 5)).Q for d in (d_out, d_in))
        updates[name] = la.LowRankUpdate(U * S, V.mT.contiguous(), scale * (1 + i % 3))
    return la.Adapter(updates, source="made")


def loaded(folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT finds targets by the ends of their names, so 'q' also finds layers.0.q, which stays at zero.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(Model(), folder, is_trainable=True)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("criterion", [{"energy": 0.8}, {"threshold": 0.4}, {"budget": 300}, {"r": 7}], ids=str)
def test_peft_gives_every_module_its_own_r_scale_and_update(tmp_path: Path, criterion: dict[str, Any]) -> None:
    resized = la.resize(adapter(), **criterion)
    kept = {name: update for name, update in resized.items() if update.r}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* of r = 0 not written", UserWarning)
        la.save_adapter(resized, tmp_path)
    if "r" not in criterion:
        assert len({update.r for update in kept.values()}) >= 3
    assert (len(kept) < len(resized)) == ("budget" in criterion)
    layers = layers_of(loaded(tmp_path))
    assert kept.keys() <= layers.keys()
    for name, update in kept.items():
        layer = layers[name]
        assert layer.r["default"] == update.r, name
        assert layer.scaling["default"] == pytest.approx(update.scale, rel=1e-15), name
        theirs = layer.get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(theirs, update.dense().numpy(), rtol=0, atol=FLOAT32 * update.norm())
    for name in layers.keys() - kept.keys():
        assert not layers[name].get_delta_weight("default").any(), name


def test_keys_of_patterns_are_found_for_their_module_and_no_other(tmp_path: Path) -> None:
    resized = la.resize(adapter(), energy=0.8)
    la.save_adapter(resized, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        pattern = config[field]
        assert len(pattern) >= 5
        found = {name: get_pattern_key(pattern, name) for name in MODULES}
        for name, module in resized.modules.items():
            expected = module.r if field == "rank_pattern" else module.scale * module.r
            assert pattern.get(found[name], default) == pytest.approx(expected, rel=1e-15), name
        for key in pattern:
            assert sum(re.match(rf"(.*\.)?({key})$", name) is not None for name in MODULES) == 1, key


def test_training_goes_on_in_the_columns_that_were_added(tmp_path: Path) -> None:
    before = la.resize(adapter(), r=2)
    la.save_adapter(la.resize(before, r=4), tmp_path)
    model = loaded(tmp_path)
    x = torch.randn(3, 6)
    base = la.Adapter({name: before[name] for name in ("q", "v")})
    for name, update in base.items():
        theirs = layers_of(model)[name].get_delta_weight("default").detach().double()
        assert torch.allclose(theirs, update.dense(), atol=1e-5)
    model(x).square().sum().backward()
    for name in MODULES:
        if not name.startswith("layers.0"):
            factor = layers_of(model)[name].lora_B["default"].weight
            assert not factor[:, 2:].any(), name
            assert bool(factor.grad[:, 2:].any()), name
