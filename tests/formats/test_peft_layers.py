"""PEFT's LoRA on embeddings, convolutions and attentions: names, orientation, kernels, and what has no ΔW."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_models import CONFIG, WEIGHTS, assert_accounts_for, randomise, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter


class Layers(nn.Module):
    """One layer of each kind, and an embedding whose sides are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)
        self.embed = nn.Embedding(11, 6)
        self.square = nn.Embedding(6, 6)
        self.conv1 = nn.Conv1d(3, 4, 5)
        self.conv2 = nn.Conv2d(3, 4, (2, 3))
        self.conv3 = nn.Conv3d(3, 4, (2, 1, 3))
        self.point = nn.Conv2d(3, 4, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x


SHAPES = {
    "attention.in_proj_weight": (24, 8),
    "attention.out_proj": (8, 8),
    "conv1": (4, 15),
    "conv2": (4, 18),
    "conv3": (4, 18),
    "embed": (6, 11),
    "lin": (5, 7),
    "point": (4, 3),
    "square": (6, 6),
}


def adapted(**options: Any) -> Any:
    names = ["lin", "embed", "square", "conv1", "conv2", "conv3", "point", "attention"]
    made = peft.get_peft_model(Layers(), peft.LoraConfig(**({"target_modules": names, "r": 2} | options)))
    randomise(made)
    return made


def test_every_kind_of_layer_has_its_place_on_the_base(tmp_path: Path) -> None:
    adapter = load_adapter(saved(adapted(), tmp_path))
    assert {name: module.shape for name, module in adapter.modules.items()} == SHAPES
    assert adapter.targets == {
        "attention.in_proj_weight": Target("attention.in_proj_weight"),
        "attention.out_proj": Target("attention.out_proj.weight"),
        "conv1": Target("conv1.weight", kernel=(5,)),
        "conv2": Target("conv2.weight", kernel=(2, 3)),
        "conv3": Target("conv3.weight", kernel=(2, 1, 3)),
        "embed": Target("embed.weight", transposed=True),
        "lin": Target("lin.weight"),
        "point": Target("point.weight", kernel=(1, 1)),
        "square": Target("square.weight", transposed=True),
    }
    base = load_base(Layers())
    for name, module in adapter.modules.items():
        assert base.matrix(module.target, module.shape).shape == SHAPES[name]
        assert adapter[name].shape == SHAPES[name]
    assert_accounts_for(adapter, load_file(tmp_path / WEIGHTS))
    again = pickle.loads(pickle.dumps(adapter))
    assert all(torch.equal(again[name].dense(), adapter[name].dense()) for name in adapter)


def test_an_embedding_adds_what_peft_adds_to_its_rows(tmp_path: Path) -> None:
    model = adapted(lora_alpha=3)
    adapter = load_adapter(saved(model, tmp_path))
    tokens = torch.arange(6)
    for name in ("embed", "square"):
        layer = getattr(model.base_model.model, name)
        added = (layer(tokens) - layer.base_layer(tokens)).detach().double()
        one_hot = torch.eye(adapter[name].shape[1], dtype=torch.float64)[tokens]
        np.testing.assert_allclose((one_hot @ adapter[name].dense().T).numpy(), added.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "point"])
def test_a_convolution_adds_what_peft_adds_to_its_output(tmp_path: Path, name: str) -> None:
    model = adapted()
    adapter = load_adapter(saved(model, tmp_path))
    layer = getattr(model.base_model.model, name)
    x = torch.randn(2, 3, *(4 + i for i in range(layer.base_layer.weight.ndim - 2)))
    x = torch.cat([x, x], dim=2)
    added = (layer(x) - layer.base_layer(x)).detach()
    kernel = adapter[name].dense().float().reshape(layer.base_layer.weight.shape)
    np.testing.assert_allclose(layer.conv_fn(x, kernel).numpy(), added.numpy(), atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_an_attention_is_a_fused_weight_and_an_output(tmp_path: Path) -> None:
    """Both take r and alpha of the attention's name, whatever pattern names ``out_proj``."""
    model = adapted(alpha_pattern={"attention": 6, "out_proj": 100}, rank_pattern={"attention": 3, "out_proj": 7})
    adapter = load_adapter(saved(model, tmp_path))
    layer = model.base_model.model.attention
    for name, live in (("attention.in_proj_weight", layer), ("attention.out_proj", layer.base_layer.out_proj)):
        module = adapter.modules[name]
        assert (module.r, module.scale) == (live.r["default"], live.scaling["default"]) == (3, 2.0)
        oracle = live.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(adapter[name].dense().numpy(), oracle, atol=1e-5)


def test_pefts_attention_applies_the_update_of_its_output_twice_and_a_note_says_so(tmp_path: Path) -> None:
    model = adapted(target_modules=["attention"])
    adapter = load_adapter(saved(model, tmp_path))
    assert adapter.notes == (
        "attention.out_proj: in a MultiheadAttention, whose layer in PEFT merges this update twice, in its forward "
        "pass too: what acts there is 2·s·B·A. ΔW is given as s·B·A.",
    )
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        theirs = model.base_model.model.attention(x, x, x)[0]
        plain = Layers().attention
        plain.load_state_dict(adapted_state(model))
        plain.in_proj_weight += adapter["attention.in_proj_weight"].dense().float()
        plain.out_proj.weight += 2 * adapter["attention.out_proj"].dense().float()
        torch.testing.assert_close(plain(x, x, x)[0], theirs, rtol=1e-4, atol=1e-4)


def adapted_state(model: Any) -> dict[str, Tensor]:
    """What the attention was before it was adapted."""
    prefix = "base_model.model.attention.base_layer."
    return {
        name.removeprefix(prefix).replace("base_layer.", ""): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and "lora_" not in name
    }


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_has_no_update_in_the_shape_of_its_kernel(tmp_path: Path, groups: int) -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
    match = f"'0': LoRA on a convolution with {groups} groups .*there is no ΔW in the shape of the grouped kernel"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(saved(model, tmp_path))


def written(folder: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3, 3, 3), (4, 2, 2, 1)),
        ((2, 3, 3, 3), (4, 3, 1, 1)),
        ((2, 3, 3, 3), (4, 0, 1, 1)),
        ((2, 3, 3), (4, 2, 1, 1)),
        ((2, 3, 3, 3), (4, 2)),
        ((2, 3, 1, 1, 1, 1), (4, 2, 1, 1, 1, 1)),
    ],
    ids=str,
)
def test_factors_of_a_convolution_that_do_not_fit_are_named(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    folder = written(tmp_path, {"c.lora_A.weight": a, "c.lora_B.weight": b})
    with pytest.raises(AdapterFormatError, match=r"'c': expected .*lora_A .*lora_B .*to share r, got .*pass format="):
        load_adapter(folder)


def test_factors_of_an_embedding_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 3)})
    with pytest.raises(AdapterFormatError, match=r"'e': expected lora_embedding_A \(r, d_in\) .* to share r, got"):
        load_adapter(folder)


def test_a_layer_is_an_embedding_or_none(tmp_path: Path) -> None:
    shapes = {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2), "e.lora_A.weight": (2, 9)}
    with pytest.raises(AdapterFormatError, match="'e': expected the factors of a layer or of an embedding, got lora_A"):
        load_adapter(written(tmp_path, shapes))
    with pytest.raises(AdapterFormatError, match="'e': expected lora_embedding_A and lora_embedding_B, got only"):
        load_adapter(written(tmp_path, {"e.lora_embedding_A": (2, 9)}))


def test_embeddings_in_raw_dumps_keep_the_adapters_name(tmp_path: Path) -> None:
    model = adapted(target_modules=["embed", "conv2"])
    torch.save(model.state_dict(), tmp_path / "raw.bin")
    adapter = load_adapter(tmp_path / "raw.bin", name="default", alpha=8)
    assert list(adapter) == ["conv2", "embed"]
    again = load_adapter(saved(model, tmp_path / "saved"))
    assert all(torch.equal(adapter[name].dense(), again[name].dense()) for name in again)
    assert adapter.targets == again.targets
    assert_accounts_for(adapter, model.state_dict())


@pytest.mark.filterwarnings(
    "ignore:.*embedding layer:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning"
)
def test_what_is_saved_beside_an_embeddings_factors_is_listed(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        Layers(), peft.LoraConfig(r=2, target_modules=["lin"], trainable_token_indices={"embed": [1, 3]})
    )
    adapter = load_adapter(saved(model, tmp_path))
    assert list(adapter) == ["lin"]
    assert [unused.reason for unused in adapter.unused] == ["trainable tokens: rows in place of the embedding's"]
