"""Rows of q and k in rotary order: which bases turn them, and what overlaps mean without it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis import subspace_similarity
from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint.rotary import half_split_order, interleaved_order
from lora_analysis.errors import AmbiguousAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.tables import similarity_table

HEADS, KV_HEADS, HEAD, R = 4, 2, 16, 4
D = HEADS * HEAD
Q, K, V = (f"layers.0.attn.{side}_proj" for side in "qkv")
ROWS = {Q: HEADS * HEAD, K: KV_HEADS * HEAD, V: KV_HEADS * HEAD}
THEIRS = {name: name.replace("layers.", "model.layers.").replace("attn", "self_attn") for name in ROWS}
LLAMA = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
TURNED = f"the rows of q and k are turned by the base's numbers of heads, {(HEADS, KV_HEADS)}."


def factors() -> dict[str, Tensor]:
    """A trained adapter as torchtune has it."""
    tensors = {}
    for name, rows in ROWS.items():
        tensors[f"{name}.lora_a.weight"] = torch.randn(R, D)
        tensors[f"{name}.lora_b.weight"] = torch.randn(rows, R)
    return tensors


def native(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, folder / "adapter_0.pt")
    return folder / "adapter_0.pt"


def converted_to_peft(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """What torchtune's tune_to_peft_adapter_weights writes: its axes, (heads, pairs, 2, r) -> (heads, 2, pairs, r)."""
    folder.mkdir(parents=True)
    written = {}
    for name in ROWS:
        up = tensors[f"{name}.lora_b.weight"]
        if name != V:
            n_heads = HEADS if name == Q else KV_HEADS
            up = up.view(n_heads, HEAD // 2, 2, R).transpose(1, 2).reshape(n_heads * HEAD, R)
        written[f"base_model.model.{THEIRS[name]}.lora_A.weight"] = tensors[f"{name}.lora_a.weight"]
        written[f"base_model.model.{THEIRS[name]}.lora_B.weight"] = up.contiguous()
    save_file(written, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base_in(folder: Path, config: dict[str, Any] | None) -> BaseWeights:
    folder.mkdir(exist_ok=True)
    save_file(
        {f"{THEIRS[name]}.weight": torch.randn(rows, D) for name, rows in ROWS.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return load_base(folder)


def whole_overlap(a: Adapter, b: Adapter, module_a: str, module_b: str, side: str) -> float:
    table = similarity_table(a, b, pairs=[(module_a, module_b)], draws=10)
    row = table[(table["side"] == side) & (table["i"] == R) & (table["j"] == R)]
    return float(row["phi"].iloc[0])


def test_overlaps_with_the_converted_adapter_are_one_with_heads_and_lower_without(tmp_path: Path) -> None:
    tensors = factors()
    path, peft = native(tmp_path, tensors), load_adapter(converted_to_peft(tmp_path / "peft", tensors))
    turned = load_adapter(path, alpha=R, heads=(HEADS, KV_HEADS))
    plain = load_adapter(path, alpha=R)
    for name in ROWS:
        assert whole_overlap(turned, peft, THEIRS[name], THEIRS[name], "out") == pytest.approx(1, abs=1e-9)
        assert whole_overlap(turned, peft, THEIRS[name], THEIRS[name], "in") == pytest.approx(1, abs=1e-9)
        assert whole_overlap(plain, peft, name, THEIRS[name], "in") == pytest.approx(1, abs=1e-9)
    assert whole_overlap(plain, peft, V, THEIRS[V], "out") == pytest.approx(1, abs=1e-9)
    for name in (Q, K):
        # Not at chance, R / rows: the first and the last row of each head stay where they are.
        assert whole_overlap(plain, peft, name, THEIRS[name], "out") < 0.5
        assert "ambiguous-layout" in plain.modules[name].flags


def test_the_order_moves_the_output_side_alone() -> None:
    up, order = torch.randn(ROWS[Q], R), half_split_order(ROWS[Q], HEADS)
    basis, moved = (torch.linalg.qr(rows).Q for rows in (up, up[order]))
    assert float(subspace_similarity(basis, moved)[-1, -1]) < 0.5
    torch.testing.assert_close(torch.linalg.svdvals(up), torch.linalg.svdvals(up[order]))
    assert torch.equal(up[order][interleaved_order(ROWS[Q], HEADS)], up)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma", "gemma2"])
def test_a_base_of_a_model_with_interleaved_rows_turns_them(tmp_path: Path, model_type: str) -> None:
    path = native(tmp_path, factors())
    oracle = load_adapter(path, alpha=R, heads=(HEADS, KV_HEADS))
    base = base_in(tmp_path / "base", LLAMA | {"model_type": model_type})
    assert base.heads == (HEADS, KV_HEADS)
    adapter = load_adapter(path, alpha=R, base=base)
    assert adapter.notes == (TURNED,)
    for again in (adapter, pickle.loads(pickle.dumps(adapter))):
        assert list(again) == list(oracle)
        for name, update in oracle.items():
            assert torch.equal(again[name].dense(), update.dense())
            assert again.modules[name].flags == ()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "phi3"])
def test_a_base_of_a_model_whose_rows_torchtune_keeps_leaves_them(tmp_path: Path, model_type: str) -> None:
    tensors = factors()
    path, base = native(tmp_path, tensors), base_in(tmp_path / "base", LLAMA | {"model_type": model_type})
    adapter = load_adapter(path, alpha=R, base=base)
    assert adapter.notes == ()
    for name in ROWS:
        product = tensors[f"{name}.lora_b.weight"].double() @ tensors[f"{name}.lora_a.weight"].double()
        torch.testing.assert_close(adapter[THEIRS[name]].dense(), product)
        assert adapter.modules[THEIRS[name]].flags == ()
    asked = load_adapter(path, alpha=R, base=base, heads=(HEADS, KV_HEADS))
    assert asked.notes == (
        f"heads= turns the rows of q and k, which torchtune has in the order of {model_type!r}, the base's.",
    )


SILENT: list[dict[str, Any] | None] = [
    None,
    {},
    LLAMA | {"model_type": "unheard-of"},
    {"model_type": "llama"},
    LLAMA | {"num_attention_heads": "4"},
]


@pytest.mark.parametrize("config", SILENT, ids=str)
def test_a_base_that_does_not_say_leaves_the_rows_marked(tmp_path: Path, config: dict[str, Any] | None) -> None:
    tensors = factors()
    base = base_in(tmp_path / "base", config)
    adapter = load_adapter(native(tmp_path, tensors), alpha=R, base=base)
    assert [adapter.modules[THEIRS[name]].flags for name in (Q, K, V)] == [("ambiguous-layout",)] * 2 + [()]
    assert "may be in interleaved rotary order" in adapter.notes[-1]
    # DoRA would mix rows of the update with other rows of the base.
    dora = tensors | {f"{Q}.magnitude": torch.rand(ROWS[Q])}
    with pytest.raises(AmbiguousAdapterError, match=r"whether these are in its order nothing says\. Pass heads="):
        load_adapter(native(tmp_path, dora), alpha=R, base=base)


def test_the_header_of_a_gguf_base_turns_rows_of_torchtune(tmp_path: Path) -> None:
    path = native(tmp_path, factors())
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((rows, D)).astype(np.float32) for name, rows in ROWS.items()}
    file = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    for name, side, n_heads in ((Q, "q", HEADS), (K, "k", KV_HEADS), (V, "v", None)):
        weight = weights[name]
        stored = weight if n_heads is None else weight[interleaved_order(len(weight), n_heads).numpy()]
        file.add_tensor(f"blk.0.attn_{side}.weight", stored)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    base = load_base(tmp_path / "model.gguf")
    adapter = load_adapter(path, alpha=R, base=base)
    oracle = load_adapter(path, alpha=R, heads=(HEADS, KV_HEADS))
    for name, weight in weights.items():
        assert torch.equal(adapter[THEIRS[name]].dense(), oracle[THEIRS[name]].dense())
        matrix = base.matrix(adapter.targets[THEIRS[name]], adapter[THEIRS[name]].shape)
        np.testing.assert_array_equal(matrix.numpy(), weight)


def test_a_live_model_says_its_heads() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 8}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    base = load_base(transformers.LlamaForCausalLM(config))
    assert base.heads == (4, 2)
    assert base.architecture.name == "llama"
    assert load_base(torch.nn.Linear(2, 2)).heads is None
    assert load_base({"w": torch.ones(2, 2)}).heads is None
