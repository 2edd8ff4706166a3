"""Fused weights trained block by block by kohya's ``split_qkv``: found by their zeros, and taken apart."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis.formats import load_adapter

D = 12
DOUBLE = "lora_unet_double_blocks_0_img_attn_qkv"
SINGLE = "lora_unet_single_blocks_3_linear1"
ALPHA = 4.0
R = 2


def fused(heights: list[int], r: int = R, d_in: int = D) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Factors of each block, and what kohya saves of them: one stack and one block-diagonal."""
    ups = [torch.randn(height, r) for height in heights]
    downs = [torch.randn(r, d_in) for _ in heights]
    parts = {
        "lora_up.weight": torch.block_diag(*ups),
        "lora_down.weight": torch.cat(downs),
        "alpha": torch.tensor(ALPHA),
    }
    return parts, ups, downs


def written(path: Path, modules: dict[str, dict[str, Tensor]], **metadata: str) -> Path:
    tensors = {f"{stem}.{key}": value for stem, parts in modules.items() for key, value in parts.items()}
    save_file(tensors, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize(
    ("stem", "heights", "names"),
    [
        (DOUBLE, [D] * 3, "q k v"),
        ("lora_unet_double_blocks_18_txt_attn_qkv", [D] * 3, "q k v"),
        (SINGLE, [D] * 3 + [4 * D], "q k v mlp"),
        ("lora_unet_layers_0_attention_qkv", [D, D // 3, D // 3], "q k v"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv", [D] * 3, "q k v"),
    ],
)
def test_each_block_is_its_own_product(tmp_path: Path, stem: str, heights: list[int], names: str) -> None:
    parts, ups, downs = fused(heights)
    header = {"ss_network_dim": str(R), "ss_network_alpha": str(ALPHA)}
    adapter = load_adapter(written(tmp_path / "x", {stem: parts}, **header))
    n = len(heights)
    assert list(adapter) == [f"{stem}.{name}" for name in names.split()]
    assert adapter.format == "kohya"
    start = 0
    for name, up, down in zip(adapter, ups, downs, strict=True):
        module, update = adapter.modules[name], adapter[name]
        assert module.r == update.r == R
        assert module.target.tensor == f"{stem}.weight"
        assert module.target.rows == (start, start + len(up))
        assert module.scale == ALPHA / (n * R)
        assert module.scale_source == "tensor"
        # By the consumers' rule; training had n times as much.
        torch.testing.assert_close(update.dense(), ALPHA / (n * R) * (up.double() @ down.double()))
        start += len(up)
    assert (
        f"{ALPHA / (n * R):g} for the first, as every consumer computes it; in training it was alpha / r, 2."
        in (adapter.notes[0])
    )
    assert len(adapter.notes) == 1


def test_the_blocks_together_are_the_whole_product(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3 + [4 * D])
    adapter = load_adapter(written(tmp_path / "x", {SINGLE: parts}))
    whole = parts["lora_up.weight"].double() @ parts["lora_down.weight"].double() * ALPHA / (4 * R)
    torch.testing.assert_close(torch.cat([update.dense() for update in adapter.values()]), whole)


def test_an_ordinary_lora_on_a_fused_weight_stays_one_module(tmp_path: Path) -> None:
    up, down = torch.randn(3 * D, 3 * R), torch.randn(3 * R, D)
    parts = {"lora_up.weight": up, "lora_down.weight": down}
    adapter = load_adapter(written(tmp_path / "x", {DOUBLE: parts}))
    assert list(adapter) == [DOUBLE]
    assert adapter.modules[DOUBLE].r == 3 * R
    assert not adapter.notes


def test_one_number_off_the_blocks_is_enough_to_stay_whole(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    parts["lora_up.weight"][0, -1] = 1e-6
    assert list(load_adapter(written(tmp_path / "x", {DOUBLE: parts}))) == [DOUBLE]


def test_magnitudes_of_the_whole_weight_keep_it_whole(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    magnitude = torch.rand(3 * D, 1)
    path = written(tmp_path / "x", {DOUBLE: parts | {"dora_scale": magnitude}})
    adapter = load_adapter(path)
    assert {name: module.flags for name, module in adapter.modules.items()} == {DOUBLE: ("dora-low-rank-part",)}
    weight = torch.randn(3 * D, D)
    (update,) = load_adapter(path, base={"double_blocks.0.img_attn.qkv.weight": weight}).values()
    merged = weight.double() + adapter[DOUBLE].dense()
    expected = magnitude.double() / merged.norm(dim=1, keepdim=True) * merged - weight.double()
    torch.testing.assert_close(update.dense(), expected)


def test_an_untrained_up_says_nothing_of_blocks(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    parts["lora_up.weight"].zero_()
    assert list(load_adapter(written(tmp_path / "x", {DOUBLE: parts}))) == [DOUBLE]


def test_a_block_that_was_never_trained_does_not_hide_the_others(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    parts["lora_up.weight"][D : 2 * D] = 0
    adapter = load_adapter(written(tmp_path / "x", {DOUBLE: parts}))
    assert [update.norm() > 0 for update in adapter.values()] == [True, False, True]


def test_zeros_in_other_layers_are_no_blocks(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    assert list(load_adapter(written(tmp_path / "x", {stem: parts}))) == [stem]


def test_blocks_name_rows_of_the_base_they_resolve_to(tmp_path: Path) -> None:
    parts, ups, downs = fused([D] * 3)
    path = written(tmp_path / "x", {DOUBLE: parts})
    weight = torch.randn(3 * D, D)
    adapter = load_adapter(path, base={"double_blocks.0.img_attn.qkv.weight": weight}, alpha=9)
    assert list(adapter) == [f"transformer.double_blocks.0.img_attn.qkv.{name}" for name in "qkv"]
    module = adapter.modules["transformer.double_blocks.0.img_attn.qkv.k"]
    assert module.target.tensor == "double_blocks.0.img_attn.qkv.weight"
    assert (module.scale, module.scale_source) == (9 / (3 * R), "caller")
    again = pickle.loads(pickle.dumps(adapter))
    torch.testing.assert_close(
        again["transformer.double_blocks.0.img_attn.qkv.k"].dense(), 1.5 * (ups[1].double() @ downs[1].double())
    )
    assert adapter.ledger[f"{DOUBLE}.lora_up.weight"].startswith("used by ")


def test_without_alpha_the_scale_is_1_as_it_is_for_any_module(tmp_path: Path) -> None:
    parts, _, _ = fused([D] * 3)
    del parts["alpha"]
    adapter = load_adapter(written(tmp_path / "x", {DOUBLE: parts}))
    assert {(module.scale, module.scale_source) for module in adapter.modules.values()} == {(1.0, "format default")}
