"""Writing as PEFT: what PEFT reads back from our files, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_models import (
    CONFIG,
    FLOAT32,
    MODULES,
    OPTIONS,
    WEIGHTS,
    assert_equals_peft,
    fresh_model,
    gpt2_model,
    lora_layers,
    saved,
    trained,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import (
    UndefinedUpdateError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter, save_adapter
from lora_analysis.update import DenseUpdate, LowRankUpdate


def written_and_loaded(adapter: Adapter, folder: Path, model: nn.Module) -> Any:
    save_adapter(adapter, folder)
    with warnings.catch_warnings():
        # PEFT finds target modules by the ends of their names: 'lin' also matches layers.1.lin, which then
        # stays at zero where the adapter has nothing for it.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder)


def assert_same_logits(a: Any, b: Any) -> None:
    x = torch.randn(5, 10)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))
        assert not torch.allclose(a(x), fresh_model()(x), atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "both patterns, rank-stabilised", "regular expressions", "some layers"])
def test_peft_reads_our_writing_with_identical_logits(tmp_path: Path, name: str) -> None:
    model = trained(**OPTIONS[name]).eval()
    adapter = load_adapter(saved(model, tmp_path / "theirs"))
    again = written_and_loaded(adapter, tmp_path / "ours", fresh_model()).eval()
    theirs, ours = lora_layers(model), lora_layers(again)
    for module in adapter:
        assert ours[module].scaling["default"] == pytest.approx(theirs[module].scaling["default"], rel=1e-15)
    assert_same_logits(model, again)


def test_our_writing_reads_back_equal(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(**OPTIONS["both patterns, rank-stabilised"]), tmp_path / "theirs"))
    again = load_adapter(save_adapter(adapter, tmp_path / "ours"))
    assert again.notes == ()
    assert again.unused == ()
    assert again.targets == adapter.targets
    for name, module in adapter.modules.items():
        assert (again.modules[name].shape, again.modules[name].r) == (module.shape, module.r)
        assert again.modules[name].scale == pytest.approx(module.scale, rel=1e-15)
        # The scale comes back to the last digit or so: not every quotient by r is one.
        np.testing.assert_allclose(again[name].dense().numpy(), adapter[name].dense().numpy(), rtol=1e-15)


def mixed_adapter(modules: list[str]) -> Adapter:
    """Every module with its own r, scale and dtype."""
    shapes = {name: tuple(weight.shape) for name, weight in fresh_model().named_parameters() if weight.ndim == 2}
    updates = {}
    for i, module in enumerate(modules):
        d_out, d_in = shapes[f"{module}.weight"]
        r = i % 4 + 1
        updates[module] = LowRankUpdate(
            torch.randn(d_out, r), torch.randn(r, d_in), scale=[1 / 3, 2.0, -0.7, 0.0][i % 4]
        )
    return Adapter(updates, source="mixed")


@pytest.mark.parametrize(
    "modules",
    [MODULES, ["lin", "layers.0.lin"], ["layers.0.lin", "lin"], ["lin", "layers.0.proj", "layers.0.q_proj"]],
    ids=["all", "lin first", "lin last", "proj"],
)
def test_mixed_ranks_and_scales_reach_the_right_modules(tmp_path: Path, modules: list[str]) -> None:
    adapter = mixed_adapter(modules)
    model = written_and_loaded(adapter, tmp_path, fresh_model())
    layers = lora_layers(model)
    for name, update in adapter.items():
        assert layers[name].scaling["default"] == pytest.approx(update.scale, rel=1e-15)
        theirs = layers[name].get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(theirs, update.dense().numpy(), atol=FLOAT32 * max(update.norm(), 1.0))
    for name in layers.keys() - adapter.keys():
        assert not layers[name].get_delta_weight("default").any()
    again = load_adapter(tmp_path)
    assert again.notes == ()
    for name, update in adapter.items():
        assert again[name].scale == pytest.approx(update.scale, rel=1e-15)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 7, 11, 49, 64])
def test_ordinary_alphas_come_back_as_whole_numbers(tmp_path: Path, r: int) -> None:
    for alpha in (1, 2, 3, 5, 8, 16, 32, 49):
        update = LowRankUpdate(torch.ones(70, r), torch.ones(r, 70), alpha / r)
        folder = save_adapter(Adapter({"lin": update}), tmp_path)
        assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == alpha
        assert load_adapter(folder)["lin"].scale == alpha / r


def test_names_with_the_signs_of_regular_expressions_are_meant_literally(tmp_path: Path) -> None:
    names = ["a.b", "axb", "a+b", "(x)", "a-b_c.0"]
    updates = {name: LowRankUpdate(torch.ones(3, i + 1), torch.ones(i + 1, 4), i + 0.5) for i, name in enumerate(names)}
    again = load_adapter(save_adapter(Adapter(updates), tmp_path))
    assert {name: (module.r, module.scale) for name, module in again.modules.items()} == {
        name: (update.r, update.scale) for name, update in updates.items()
    }
    assert again.notes == ()


def test_pattern_keys_are_plain_names_where_these_are_enough(tmp_path: Path) -> None:
    """Which PEFT before its #2419 and some servers find, too: they know no anchors."""
    names = ["model.layers.1.q_proj", "model.layers.10.q_proj", "q_proj", "lin"]
    updates = {name: LowRankUpdate(torch.ones(3, i + 1), torch.ones(i + 1, 4), 1.0) for i, name in enumerate(names)}
    save_adapter(Adapter(updates), tmp_path)
    keys = {"model.layers.1.q_proj", "model.layers.10.q_proj", "^q_proj", "lin"}
    assert keys > json.loads((tmp_path / CONFIG).read_text())["rank_pattern"].keys()
    assert {name: module.r for name, module in load_adapter(tmp_path).modules.items()} == {
        name: update.r for name, update in updates.items()
    }


def test_conv1d_adapters_survive_writing(tmp_path: Path) -> None:
    model = trained(gpt2_model(), target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True).eval()
    adapter = load_adapter(saved(model, tmp_path / "theirs"))
    again = written_and_loaded(adapter, tmp_path / "ours", gpt2_model()).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], again(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    update = LowRankUpdate(torch.randn(3, 2).to(dtype), torch.randn(4, 2).to(dtype).mT, 1.5)
    again = load_adapter(save_adapter(Adapter({"lin": update}), tmp_path))["lin"]
    assert isinstance(again, LowRankUpdate)
    assert again.up.dtype == again.down.dtype == dtype
    assert torch.equal(again.dense(), update.dense())


def test_factors_that_share_memory_or_ask_for_gradients_are_written(tmp_path: Path) -> None:
    up, down = torch.randn(3, 2, requires_grad=True), torch.randn(2, 3)
    adapter = Adapter({"a": LowRankUpdate(up, down, 1.0), "b": LowRankUpdate(up, down, 2.0)})
    again = load_adapter(save_adapter(adapter, tmp_path))
    assert torch.equal(again["b"].dense(), 2 * again["a"].dense())


def test_what_was_there_is_overwritten_cleanly(tmp_path: Path) -> None:
    save_adapter(mixed_adapter(MODULES), tmp_path)
    small = mixed_adapter(["lin"])
    save_adapter(small, tmp_path)
    again = load_adapter(tmp_path)
    assert list(again) == ["lin"]
    assert torch.equal(again["lin"].dense(), small["lin"].dense())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_an_adapter_may_be_written_over_its_own_file(tmp_path: Path) -> None:
    model = trained()
    adapter = load_adapter(saved(model, tmp_path))
    save_adapter(adapter, tmp_path)
    assert_equals_peft(load_adapter(tmp_path), model)


def test_the_same_adapter_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path / "theirs"))
    for folder in ("a", "b"):
        save_adapter(adapter, tmp_path / folder)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def low_rank(scale: float = 1.0, r: int = 1) -> LowRankUpdate:
    return LowRankUpdate(torch.ones(3, r), torch.ones(r, 4), scale)


UNWRITABLE: dict[str, tuple[Adapter, type[Exception], str]] = {
    "unknown scale": (Adapter({"lin": low_rank(math.nan)}), UndefinedUpdateError, "'lin': expected a known scale"),
    "rows": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", rows=(0, 3))}),
        UnsupportedAdapterError,
        "'q': expected an update of a whole matrix to save, got 1 blocks of its rows. Pass base=",
    ),
    "columns": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", columns=(0, 4))}),
        UnsupportedAdapterError,
        "got one of a slice of 'q.weight'",
    ),
    "expert": (
        Adapter({"q": low_rank()}, targets={"q": Target("q.weight", expert=0)}),
        UnsupportedAdapterError,
        "got one of a slice of 'q.weight'",
    ),
    "another tensor": (
        Adapter({"q": low_rank()}, targets={"q": Target("attn.weight")}),
        UnsupportedAdapterError,
        "'q': expected an update of the whole of 'q.weight', got one of 'attn.weight'",
    ),
    "dense": (
        Adapter({"lin": DenseUpdate(torch.ones(3, 4))}),
        UnsupportedAdapterError,
        "expected a product of two factors to save",
    ),
    "r of zero": (
        Adapter({"lin": low_rank(r=0)}),
        ValueError,
        r"expected an adapter with modules to save, got none of r > 0",
    ),
    "nothing": (Adapter({}, source="mine"), ValueError, "mine: expected an adapter with modules"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    adapter, error, match = UNWRITABLE[name]
    with pytest.raises(error, match=match):
        save_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_no_update_are_left_out_with_a_warning(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(bias="all"), tmp_path / "theirs"))
    with pytest.warns(UserWarning, match=r"8 tensors not written \(0\.00 MB\): bias") as caught:
        save_adapter(adapter, tmp_path / "ours")
    assert caught[0].filename == __file__
    again = load_adapter(tmp_path / "ours")
    assert (len(again), again.unused) == (7, ())


def test_a_format_that_is_not_written_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format: expected one of peft, kohya, .*, got 'loralib'"):
        save_adapter(mixed_adapter(["lin"]), tmp_path, format="loralib")


class Layers(nn.Module):
    """Kinds of layers that PEFT's LoRA has a place for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(7, 5)
        self.embed = nn.Embedding(11, 6)
        self.square = nn.Embedding(6, 6)
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.conv2 = nn.Conv2d(3, 4, (2, 3))
        self.conv3 = nn.Conv3d(3, 4, (2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x


LAYERS = ["lin", "embed", "square", "conv1", "conv2", "conv3"]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_embeddings_convolutions_and_magnitudes_survive_writing(tmp_path: Path, dora: bool) -> None:
    model = trained(Layers(), target_modules=LAYERS, use_dora=dora, alpha_pattern={"conv2": 5})
    adapter = load_adapter(saved(model, tmp_path / "theirs"))
    again = load_adapter(save_adapter(adapter, tmp_path / "ours"))
    assert again.targets == adapter.targets
    theirs, ours = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    live = lora_layers(written_and_loaded(adapter, tmp_path / "loaded", Layers()))
    for name, layer in lora_layers(model).items():
        assert again.modules[name].scale == adapter.modules[name].scale
        assert again.modules[name].flags == adapter.modules[name].flags
        assert torch.equal(live[name].get_delta_weight("default"), layer.get_delta_weight("default"))
        if dora:
            magnitudes = [one.lora_magnitude_vector["default"].weight for one in (live[name], layer)]
            assert torch.equal(*magnitudes)


def test_magnitudes_of_some_modules_have_no_place(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(use_dora=True), tmp_path / "theirs"))
    plain = load_adapter(saved(trained(), tmp_path / "plain"))
    adapter.modules = {**adapter.modules, "lin": plain.modules["lin"]}
    match = "'lin': expected DoRA's magnitudes of every module or of none, as PEFT has one use_dora for all"
    with pytest.raises(UnsupportedAdapterError, match=match):
        save_adapter(adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_doras_true_update_is_no_product_to_write(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(use_dora=True), tmp_path / "theirs"), base=load_base(fresh_model()))
    with pytest.raises(UnsupportedAdapterError, match="expected a product of two factors to save"):
        save_adapter(adapter, tmp_path / "ours")


@pytest.mark.parametrize(
    "target",
    [Target("q.weight", transposed=True, kernel=(3,)), Target("q.weight", kernel=(1, 1, 1, 1))],
    ids=["turned", "four axes"],
)
def test_kernels_that_no_convolution_of_peft_has_are_refused(tmp_path: Path, target: Target) -> None:
    update = LowRankUpdate(torch.ones(3, 1), torch.ones(1, 6), 1.0)
    with pytest.raises(UnsupportedAdapterError, match="'q': expected "):
        save_adapter(Adapter({"q": update}, targets={"q": target}), tmp_path / "out")


def test_both_orientations_in_one_adapter_are_a_loss(tmp_path: Path) -> None:
    """PEFT has one fan_in_fan_out: it asks the model's layers, and whoever has the file alone cannot."""
    names = ("a", "b", "c")
    targets = {name: Target(f"{name}.weight", transposed=name != "c") for name in names}
    mixed = Adapter({name: low_rank() for name in names}, targets=targets)
    with pytest.warns(UserWarning, match=r"1 module of weights that are not stored turned, .*first: 'c'.*fan_in_fan"):
        save_adapter(mixed, tmp_path / "mixed")
    save_adapter(Adapter({name: low_rank() for name in "ab"}, targets={n: targets[n] for n in "ab"}), tmp_path / "one")
    assert {module.target.transposed for module in load_adapter(tmp_path / "one").modules.values()} == {True}


@pytest.mark.parametrize("name", ["_orig_mod.q", "a._fsdp_wrapped_module.q", "x.base_layer", "x.base_layer.out_proj"])
def test_names_that_are_other_ones_when_read_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UnsupportedAdapterError, match=f"'{name}': expected the base's own name of this module, got one"
    ):
        save_adapter(Adapter({name: low_rank(), "x": low_rank()}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
