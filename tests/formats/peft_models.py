"""Small models adapted by PEFT, saved, and compared with what the reader makes of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from lora_analysis.adapter import Adapter
from lora_analysis.update import LowRankUpdate

FLOAT32 = 1e-6


WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


class Block(nn.Module):
    """Names where one ends in another, and widths that are all different."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 12)
        self.proj = nn.Linear(12, 9)
        self.lin = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(torch.tanh(self.proj(torch.tanh(self.q_proj(x)))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lin = nn.Linear(10, 10)
        self.classifier = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.classifier(self.lin(x))
        return out


MODULES = [
    "layers.0.q_proj",
    "layers.0.proj",
    "layers.0.lin",
    "layers.1.q_proj",
    "layers.1.proj",
    "layers.1.lin",
    "lin",
]


TARGETS = ["q_proj", "proj", "lin"]


def fresh_model() -> Model:
    torch.manual_seed(0)
    return Model()


def trained(model: nn.Module | None = None, adapter: str = "default", **options: Any) -> Any:
    """A model of PEFT whose B is no longer zero."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        made = peft.get_peft_model(model or fresh_model(), peft.LoraConfig(**given), adapter_name=adapter)
    randomise(made)
    return made


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape).to(parameter.dtype))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def merged_differences(model: Any) -> dict[str, Tensor]:
    """Merged minus base of every weight, by PEFT's own ``merge_and_unload``, in float64."""
    before = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone().double()
        for name, tensor in model.state_dict().items()
    }
    after = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): tensor - before[name]
        for name, tensor in after.items()
        if name.endswith(".weight") and before[name].shape == tensor.shape and not torch.equal(tensor, before[name])
    }


def assert_equals_peft(adapter: Adapter, model: Any, active: str = "default") -> None:
    """Modules, scales and ΔW are those of a live PEFT model."""
    layers = lora_layers(model)
    assert set(adapter) == set(layers)
    for name, layer in layers.items():
        module, update = adapter.modules[name], adapter[name]
        assert module.scale == pytest.approx(layer.scaling[active], rel=1e-15)
        assert module.r == update.r == layer.r[active]
        assert isinstance(update, LowRankUpdate)
        assert torch.equal(update.up, layer.lora_B[active].weight)
        assert torch.equal(update.down, layer.lora_A[active].weight)
        delta = layer.get_delta_weight(active).detach()
        assert module.target.transposed == layer.fan_in_fan_out
        oracle = delta.T if layer.fan_in_fan_out else delta
        assert update.shape == module.shape == tuple(oracle.shape)
        np.testing.assert_allclose(update.dense().numpy(), oracle.double().numpy(), atol=FLOAT32 * float(oracle.norm()))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        # peft 0.21 takes the bias of its own lora_bias for a broken factor.
        warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape", UserWarning)
        model.save_pretrained(folder, **options)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """The configuration with some values replaced; None removes a key."""
    path = folder / CONFIG
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.0.lin": 11, "proj": 5, "q_proj": 7}},
    "both patterns, rank-stabilised": {
        "rank_pattern": {"layers.0.proj": 2, "proj": 3, "lin": 5},
        "alpha_pattern": {"proj": 2, "q_proj": 9},
        "use_rslora": True,
    },
    "regular expressions": {
        "rank_pattern": {r".*\.0\..*proj": 2, r"layers\.\d+\.proj": 3, "^lin": 6},
        "alpha_pattern": {r"layers.(0|1).lin": 3, "^layers.0.proj": 7, r"q_.*": 13},
    },
    "all biases": {"bias": "all"},
    "their own biases": {"bias": "lora_only"},
    "a bias of B": {"lora_bias": True},
    "full modules": {"modules_to_save": ["classifier"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression of targets": {"target_modules": r"layers\.\d\.(q_)?proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def assert_accounts_for(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    used = [name for module in adapter.modules.values() for name in module.tensors]
    listed = [unused.tensor for unused in adapter.unused]
    assert sorted(used + listed) == sorted(tensors)
    assert all(unused.reason for unused in adapter.unused)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    assert {unused.tensor: unused.nbytes for unused in adapter.unused} == {name: sizes[name] for name in listed}


def gpt2_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=32, bos_token_id=0, eos_token_id=0)
    return GPT2Model(config)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    saved(trained(target_modules=["q_proj"]), folder)
    return dict(load_file(folder / WEIGHTS))


KEY = "base_model.model.layers.0.q_proj.lora_{}.weight"


def with_tensor(folder: Path, name: str, tensor: Tensor | None = None) -> Path:
    """An adapter's file with one more tensor in it."""
    save_file({**tensors_of(folder), name: torch.ones(2) if tensor is None else tensor}, folder / WEIGHTS)
    return folder
