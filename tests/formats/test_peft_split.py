"""An ordinary LoRA on a fused weight, cut into q, k and v by ``split=``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft_models import CONFIG, WEIGHTS, gpt2_model, saved, trained
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter


def written(folder: Path, module: str, d_out: int, d_in: int = 8, **extra: Tensor) -> Path:
    tensors = {f"{module}.lora_A.weight": torch.randn(2, d_in), f"{module}.lora_B.weight": torch.randn(d_out, 2)}
    save_file(tensors | extra, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    return folder


def test_gpt2_comes_apart_into_thirds(tmp_path: Path) -> None:
    model = trained(gpt2_model(), target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    folder = saved(model, tmp_path)
    whole, parts = load_adapter(folder), load_adapter(folder, split="q,k,v")
    assert list(parts)[:4] == ["h.0.attn.c_attn.q", "h.0.attn.c_attn.k", "h.0.attn.c_attn.v", "h.0.mlp.c_proj"]
    base = load_base(gpt2_model())
    for i, slot in enumerate("qkv"):
        name = f"h.0.attn.c_attn.{slot}"
        rows = (16 * i, 16 * (i + 1))
        assert parts.targets[name] == Target("h.0.attn.c_attn.weight", transposed=True, rows=rows)
        assert torch.equal(parts[name].dense(), whole["h.0.attn.c_attn"].dense()[slice(*rows)])
        assert parts[name].shape == parts.modules[name].shape == (16, 16)
        whole_weight = base.matrix(whole.targets["h.0.attn.c_attn"], (48, 16))
        assert torch.equal(base.matrix(parts.targets[name], (16, 16)), whole_weight[slice(*rows)])
    again = pickle.loads(pickle.dumps(parts))
    assert all(torch.equal(again[name].dense(), parts[name].dense()) for name in parts)
    assert parts.ledger.keys() == whole.ledger.keys()


def test_fewer_heads_of_k_and_v_take_heads(tmp_path: Path) -> None:
    folder = written(tmp_path, "layers.0.qkv_proj", 4 * 2 + 2 * 2 * 2)
    adapter = load_adapter(folder, split="q,k,v", heads=(4, 2))
    assert {name: target.rows for name, target in adapter.targets.items()} == {
        "layers.0.qkv_proj.q": (0, 8),
        "layers.0.qkv_proj.k": (8, 12),
        "layers.0.qkv_proj.v": (12, 16),
    }
    with pytest.raises(AdapterFormatError, match=r"split=: expected 3·d_in = 24 rows, .* got 16\. Pass heads="):
        load_adapter(folder, split="q,k,v")
    with pytest.raises(AdapterFormatError, match=r"split=: expected rows in 5 \+ 2·1 heads, as heads= says, got 16"):
        load_adapter(folder, split="q,k,v", heads=(5, 1))


def test_slots_of_dora_take_their_magnitudes(tmp_path: Path) -> None:
    magnitude = torch.rand(24) + 0.5
    folder = written(tmp_path, "qkv", 24, **{"qkv.lora_magnitude_vector": magnitude})
    base = load_base({"qkv.weight": torch.randn(24, 8)})
    whole, parts = load_adapter(folder, base=base), load_adapter(folder, base=base, split="q,k,v")
    for i, slot in enumerate("qkv"):
        rows = slice(8 * i, 8 * (i + 1))
        read = parts.modules[f"qkv.{slot}"].magnitude
        assert read is not None
        assert torch.equal(read(), magnitude[rows])
        torch.testing.assert_close(parts[f"qkv.{slot}"].dense(), whole["qkv"].dense()[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", ["q,v", [True, False, True], [True, True]], ids=str)
def test_no_slot_of_an_ordinary_lora_is_dropped(tmp_path: Path, split: str | list[bool]) -> None:
    match = r"split=: an ordinary LoRA on a fused weight adapts q, k and v, got .*\. Pass split='q,k,v'"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(written(tmp_path, "c_attn", 24), split=split)


def test_a_weight_that_lies_head_by_head_has_no_rows_for_each(tmp_path: Path) -> None:
    folder = written(tmp_path, "h.0.query_key_value", 24)
    with pytest.raises(UnsupportedAdapterError, match=r"'h\.0\.query_key_value': split=: .* lie head by head"):
        load_adapter(folder, split="q,k,v")


def test_an_adapter_without_fused_weights_is_not_split(tmp_path: Path) -> None:
    match = r"split= names the slots of a fused weight, but no module of the file is known as one \(W_pack, .*c_attn"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(written(tmp_path, "q_proj", 24), split="q,k,v")


def test_heads_without_split_have_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="heads= says how split= cuts a fused weight"):
        load_adapter(written(tmp_path, "qkv", 24), heads=(2, 2))
