"""torchtune adapters: the forward of its layers, and the rotary orders against their definition."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.checkpoint.rotary import half_split_order, interleaved_order
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

# Products of float32 numbers in float64, added up in another order.
EXACT = 1e-12

HEADS, KV_HEADS, HEAD = 4, 2, 6
D, HIDDEN, VOCAB, R = HEADS * HEAD, 40, 32, 3
SIZES = {
    "layers.0.attn.q_proj": (D, D),
    "layers.0.attn.k_proj": (KV_HEADS * HEAD, D),
    "layers.0.attn.v_proj": (KV_HEADS * HEAD, D),
    "layers.0.attn.output_proj": (D, D),
    "layers.0.mlp.w1": (HIDDEN, D),
    "layers.0.mlp.w2": (D, HIDDEN),
    "layers.0.mlp.w3": (HIDDEN, D),
    "output": (VOCAB, D),
}
HUGGING_FACE = {
    "layers.0.attn.q_proj": "model.layers.0.self_attn.q_proj",
    "layers.0.attn.k_proj": "model.layers.0.self_attn.k_proj",
    "layers.0.attn.v_proj": "model.layers.0.self_attn.v_proj",
    "layers.0.attn.output_proj": "model.layers.0.self_attn.o_proj",
    "layers.0.mlp.w1": "model.layers.0.mlp.gate_proj",
    "layers.0.mlp.w2": "model.layers.0.mlp.down_proj",
    "layers.0.mlp.w3": "model.layers.0.mlp.up_proj",
    "output": "lm_head",
}
Q, K, V = list(SIZES)[:3]


def trained(*, dora: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for name, (d_out, d_in) in SIZES.items():
        tensors[f"{name}.lora_a.weight"] = torch.randn(R, d_in)
        tensors[f"{name}.lora_b.weight"] = torch.randn(d_out, R)
        if dora:
            tensors[f"{name}.magnitude"] = torch.rand(d_out) + 0.5
    return tensors


def saved(tensors: dict[str, Tensor], folder: Path, config: dict[str, Any] | None = None) -> Path:
    torch.save(tensors, folder / "adapter_model.pt")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.pt"


def product(tensors: dict[str, Tensor], name: str) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (
        tensors[f"{name}.lora_b.weight"].double().numpy() @ tensors[f"{name}.lora_a.weight"].double().numpy()
    )
    return result


def assert_close(update: Any, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(update.dense().numpy(), expected, rtol=0, atol=EXACT * np.abs(expected).max())


def rotated(x: NDArray[np.float64], position: int, *, interleaved: bool) -> NDArray[np.float64]:
    """Rotary embedding by its definition: pair i of each head turns by position · 10000^(-2i/d)."""
    x = x.reshape(-1, HEAD)
    angles = position * 10000.0 ** (-2 * np.arange(HEAD // 2) / HEAD)
    first, second = (x[:, 0::2], x[:, 1::2]) if interleaved else (x[:, : HEAD // 2], x[:, HEAD // 2 :])
    turned = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
    return np.stack(turned, -1).reshape(len(x), HEAD) if interleaved else np.concatenate(turned, -1)


def scores(q: NDArray[np.float64], k: NDArray[np.float64], *, interleaved: bool) -> NDArray[np.float64]:
    """Attention scores of a query at position 7 and a key at position 2, per query head."""
    queries = rotated(q, 7, interleaved=interleaved)
    keys = rotated(k, 2, interleaved=interleaved).repeat(HEADS // KV_HEADS, axis=0)
    result: NDArray[np.float64] = (queries * keys).sum(1)
    return result


def test_a_layer_adds_its_scaled_product_to_the_output(tmp_path: Path) -> None:
    tensors = trained()
    adapter = load_adapter(saved(tensors, tmp_path), alpha=6)
    assert (adapter.format, set(adapter)) == ("torchtune", set(SIZES))
    for name, (d_out, d_in) in SIZES.items():
        module = adapter.modules[name]
        assert (module.shape, module.r, module.scale, module.scale_source) == ((d_out, d_in), R, 2.0, "caller")
        assert module.target == Target(f"{name}.weight")
        assert_close(adapter[name], 2 * product(tensors, name))
    assert adapter.ledger.keys() == tensors.keys()


def test_alpha_is_in_the_configuration_beside_it_or_unknown(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    adapter = load_adapter(path)
    assert all(math.isnan(m.scale) and m.scale_source == "unknown" for m in adapter.modules.values())
    assert adapter.notes[0].startswith("torchtune keeps alpha in the recipe")
    # What torchtune writes for PEFT, beside its own file.
    config = {"r": R, "lora_alpha": 12, "target_modules": ["q_proj"], "peft_type": "LORA"}
    saved(trained(), tmp_path, config)
    for source in (path, tmp_path):
        adapter = load_adapter(source)
        assert {(m.scale, m.scale_source) for m in adapter.modules.values()} == {(4.0, "config")}
        assert len(adapter.notes) == 1
    assert load_adapter(path, alpha=3).modules[Q].scale == 1.0


def test_tensors_win_over_the_rank_of_the_configuration(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path, {"r": 16, "lora_alpha": 12, "peft_type": "LORA"}))
    assert adapter.modules[V].scale == 4.0
    assert f"{V!r}: the configuration says r=16, the tensors have r={R}; they win." in adapter.notes


def test_the_two_rotary_orders_give_the_same_attention_scores() -> None:
    generator = np.random.default_rng(0)
    wq, wk = generator.standard_normal((D, 5)), generator.standard_normal((KV_HEADS * HEAD, 5))
    x, y = generator.standard_normal((2, 5))
    turned_q, turned_k = wq[half_split_order(D, HEADS).numpy()], wk[half_split_order(len(wk), KV_HEADS).numpy()]
    expected = scores(wq @ x, wk @ y, interleaved=True)
    np.testing.assert_allclose(scores(turned_q @ x, turned_k @ y, interleaved=False), expected, rtol=1e-12)
    assert not np.allclose(scores(wq @ x, wk @ y, interleaved=False), expected)
    assert not np.allclose(scores(turned_q @ x, turned_k @ y, interleaved=True), expected)


def test_heads_turn_q_and_k_so_that_a_hugging_face_model_attends_the_same(tmp_path: Path) -> None:
    tensors = trained()
    path = saved(tensors, tmp_path)
    adapter = load_adapter(path, alpha=R, heads=(HEADS, KV_HEADS))
    assert set(adapter) == set(HUGGING_FACE.values())
    assert adapter.notes == ()
    q, k = (adapter[HUGGING_FACE[name]].dense().numpy() for name in (Q, K))
    x, y = np.random.default_rng(1).standard_normal((2, D))
    ours = scores(product(tensors, Q) @ x, product(tensors, K) @ y, interleaved=True)
    np.testing.assert_allclose(scores(q @ x, k @ y, interleaved=False), ours, rtol=1e-10)
    for name in set(SIZES) - {Q, K}:
        assert_close(adapter[HUGGING_FACE[name]], product(tensors, name))


def test_torchtune_own_conversion_gives_the_same_rows(tmp_path: Path) -> None:
    tensors = trained()
    adapter = load_adapter(saved(tensors, tmp_path), alpha=R, heads=(HEADS, KV_HEADS))
    for name, n_heads in ((Q, HEADS), (K, KV_HEADS)):
        # The axes of models/convert_weights.py, on the product: (heads, pairs, 2, d_in) -> (heads, 2, pairs, d_in).
        rows = product(tensors, name).reshape(n_heads, HEAD // 2, 2, D).swapaxes(1, 2).reshape(-1, D)
        assert_close(adapter[HUGGING_FACE[name]], rows)


def test_row_orders_are_inverse_permutations() -> None:
    for rows, n_heads in ((8, 1), (8, 4), (24, 3), (0, 2)):
        forth, back = half_split_order(rows, n_heads), interleaved_order(rows, n_heads)
        assert torch.equal(forth[back], torch.arange(rows))
        assert torch.equal(forth.sort().values, torch.arange(rows))
    with pytest.raises(ValueError, match="expected the rows of 3 heads of an even size, got 8 rows"):
        half_split_order(8, 3)


def test_without_heads_q_and_k_are_marked(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path), alpha=1)
    assert {name for name, module in adapter.modules.items() if module.flags} == {Q, K}
    assert adapter.modules[Q].flags == ("ambiguous-layout",)
    assert len(adapter.notes) == 1
    assert "Pass heads=(n_heads, n_kv_heads)" in adapter.notes[0]


def test_names_follow_the_base(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    theirs = load_base({f"{HUGGING_FACE[name]}.weight": torch.randn(shape) for name, shape in SIZES.items()})
    ours = load_base({f"{name}.weight": torch.randn(shape) for name, shape in SIZES.items()})
    assert set(load_adapter(path, base=theirs)) == set(HUGGING_FACE.values())
    assert set(load_adapter(path, base=ours)) == set(SIZES)
    for base in (theirs, ours):
        adapter = load_adapter(path, base=base)
        for name, target in adapter.targets.items():
            assert base.matrix(target, adapter[name].shape).shape == adapter[name].shape
    with pytest.raises(AdapterFormatError, match="the base is torchtune's own, whose order they have"):
        load_adapter(path, base=ours, heads=(HEADS, KV_HEADS))


@pytest.mark.parametrize("turned", [False, True])
def test_dora_rescales_the_rows_of_the_base(tmp_path: Path, turned: bool) -> None:
    tensors = trained(dora=True)
    path = saved(tensors, tmp_path)
    part = load_adapter(path, alpha=6)
    assert part.modules[V].flags == ("dora-low-rank-part",)
    assert part.modules[Q].flags == ("ambiguous-layout", "dora-low-rank-part")
    assert_close(part[V], 2 * product(tensors, V))
    assert part.ledger.keys() == tensors.keys()

    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SIZES.items()}
    orders = {name: slice(None) for name in SIZES} | (
        {Q: half_split_order(D, HEADS), K: half_split_order(SIZES[K][0], KV_HEADS)} if turned else {}
    )
    names = HUGGING_FACE if turned else dict(zip(SIZES, SIZES, strict=True))
    base = load_base({f"{names[name]}.weight": weights[name][orders[name]] for name in SIZES})
    whole = load_adapter(path, alpha=6, base=base, heads=(HEADS, KV_HEADS) if turned else None)
    for name, weight in weights.items():
        # DoRALinear: (m / ‖W + s·BA‖ - 1) · W + m / ‖…‖ · s·BA, row by row, in torchtune's own order.
        change = 2 * product(tensors, name)
        factor = tensors[f"{name}.magnitude"].double().numpy() / np.linalg.norm(weight.numpy() + change, axis=1)
        expected = (factor[:, None] - 1) * weight.numpy() + factor[:, None] * change
        assert_close(whole[names[name]], expected[orders[name]])
        assert "dora-low-rank-part" not in whole.modules[names[name]].flags


def test_vision_encoders_and_cross_attention_have_no_rotary_rows(tmp_path: Path) -> None:
    turned, kept = "decoder.layers.1.layer.attn.q_proj", "decoder.layers.3.fusion_layer.attn.q_proj"
    tensors = {}
    for name in (turned, kept):
        tensors[f"{name}.lora_a.weight"], tensors[f"{name}.lora_b.weight"] = torch.randn(R, D), torch.randn(D, R)
    adapter = load_adapter(saved(tensors, tmp_path), alpha=R, heads=(HEADS, KV_HEADS))
    assert_close(adapter[kept], product(tensors, kept))
    assert_close(adapter[turned], product(tensors, turned)[half_split_order(D, HEADS).numpy()])


@pytest.mark.parametrize("heads", [(5, KV_HEADS), (HEADS, 5)], ids=str)
def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path, heads: Any) -> None:
    with pytest.raises(
        AdapterFormatError, match=r"'layers.0.attn.[qk]_proj': taken for 5 heads: .*Pass heads=\(n_heads"
    ):
        load_adapter(saved(trained(), tmp_path), heads=heads)


A, B = f"{V}.lora_a.weight", f"{V}.lora_b.weight"
BAD: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "without b": ({A: torch.ones(2, 5)}, AdapterFormatError, rf"expected lora_a and lora_b, '{B}' is missing"),
    "without a": ({B: torch.ones(5, 2)}, AdapterFormatError, rf"expected lora_a and lora_b, '{A}' is missing"),
    "transposed": (
        {A: torch.ones(5, 2), B: torch.ones(2, 7)},
        AdapterFormatError,
        r"lora_b \(d_out, r\) to share r, got \(5, 2\) and \(2, 7\)\. The file was read as 'torchtune'",
    ),
    "empty": ({A: torch.ones(0, 5), B: torch.ones(7, 0)}, AdapterFormatError, r"got \(0, 5\) and \(7, 0\)"),
    "stacks": ({A: torch.ones(2, 2, 5), B: torch.ones(2, 7, 2)}, AdapterFormatError, r"got \(2, 2, 5\)"),
    "magnitude": (
        {A: torch.ones(2, 5), B: torch.ones(7, 2), f"{V}.magnitude": torch.ones(5)},
        AdapterFormatError,
        r"expected a magnitude for each of 7 rows, got shape \(5,\)",
    ),
    "alpha": (
        {A: torch.ones(2, 5), B: torch.ones(7, 2), f"{V}.alpha": torch.tensor(2.0)},
        UnsupportedAdapterError,
        "per-module alpha tensors",
    ),
    "integers": ({A: torch.ones(2, 5).int(), B: torch.ones(7, 2).int()}, AdapterFormatError, "floating-point factors"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_break_the_format_are_named(tmp_path: Path, case: str) -> None:
    tensors, error, match = BAD[case]
    with pytest.raises(error, match=match):
        load_adapter(saved(tensors, tmp_path))


@pytest.mark.parametrize("alpha", ["16", True, math.nan, [8]], ids=str)
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(AdapterFormatError, match="lora_alpha: expected a finite number, got"):
        load_adapter(saved(trained(), tmp_path, {"lora_alpha": alpha, "peft_type": "LORA"}))


def test_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    with pytest.raises(AdapterFormatError, match="torchtune's have no names"):
        load_adapter(path, name="x")
    with pytest.raises(UnsupportedAdapterError, match="Leave split= out"):
        load_adapter(path, split="q,v")


def test_other_tensors_are_listed(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained() | {"norm.scale": torch.ones(3)}, tmp_path))
    assert [(u.tensor, u.reason) for u in adapter.unused] == [
        ("norm.scale", "a full tensor trained beside LoRA, no part of any update")
    ]


def test_an_adapter_reads_the_same_after_pickling(tmp_path: Path) -> None:
    adapter = load_adapter(saved(trained(), tmp_path), alpha=4, heads=(HEADS, KV_HEADS))
    again: Adapter = pickle.loads(pickle.dumps(adapter))
    for name, update in adapter.items():
        assert torch.equal(again[name].dense(), update.dense())
