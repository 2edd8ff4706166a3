"""Files with a few bytes or shapes changed: they are read, or refused by name in one line; nothing else happens."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lora_analysis import LoraAnalysisError, load_adapter, load_base
from lora_analysis.adapter import Target

COUNT = 150
ODD = [0, 1, 2, 7, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(data: bytes, reach: int, choose: random.Random) -> bytes:
    """A few changes among the first ``reach`` bytes: bits, whole numbers, pieces lost, put in or repeated."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
        end = min(len(changed), reach)
        if not end:
            break
        at, other, count = choose.randrange(end), choose.randrange(end), choose.randrange(1, 30)
        match choose.randrange(7):
            case 0:
                changed[at] ^= 1 << choose.randrange(8)
            case 1:
                changed[at : at + 8] = struct.pack("<Q", choose.choice(ODD))
            case 2:
                changed[at : at + 4] = struct.pack("<I", choose.choice(ODD) % 2**32)
            case 3:
                del changed[at : at + count]
            case 4:
                changed[at:at] = choose.randbytes(count)
            case 5:
                del changed[at:]
            case _:
                changed[at : at + count] = changed[other : other + count]
    return bytes(changed)


def outcomes(attempt: Callable[[random.Random], None]) -> dict[str, int]:
    """How many attempts were read and how many refused; any other end fails the test."""
    counts = {"read": 0, "refused": 0}
    told: list[str] = []
    choose = random.Random(0)
    for _ in range(COUNT):
        try:
            attempt(choose)
        except LoraAnalysisError as error:
            told.append(str(error))
            counts["refused"] += 1
        else:
            counts["read"] += 1
    assert not [text for text in told if "\n" in text or len(text) > 1000]
    return counts


def use_adapter(source: str | Path, heads: tuple[int, int] | None = None) -> None:
    adapter = load_adapter(source, alpha=8, heads=heads)
    for name in adapter:
        adapter[name].dense()
    assert set(adapter.ledger) >= {tensor for module in adapter.modules.values() for tensor in module.tensors}


def use_base(source: str | Path) -> None:
    base = load_base(source)
    assert base.report().startswith("read ")
    for name in [
        *list(base)[:20],
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
    ]:
        with suppress(LoraAnalysisError):
            base.matrix(Target(name))
    assert base.heads is None or min(base.heads) > 0


def written(path: Path, tensors: dict[str, np.ndarray], *, adapter: bool) -> bytes:
    file = gguf.GGUFWriter(path, "llama")
    if adapter:
        file.add_type("adapter")
        file.add_string("adapter.type", "lora")
        file.add_float32("adapter.lora.alpha", 8.0)
    else:
        file.add_head_count(4)
        file.add_head_count_kv([2, 2])
        file.add_token_list([f"token {i}" for i in range(20)])
    for name, tensor in tensors.items():
        packed = "ffn_down" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        file.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind if packed else None)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path.read_bytes()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_gguf_adapters(tmp_path: Path) -> None:
    tensors = {
        f"blk.0.attn_{side}.weight.lora_{a}": normal(*shape)
        for side in "qv"
        for a, shape in (("a", (4, 32)), ("b", (16, 4)))
    }
    data = written(tmp_path / "whole.gguf", tensors, adapter=True)

    def attempt(choose: random.Random) -> None:
        (tmp_path / "x.gguf").write_bytes(mutated(data, choose.choice((600, len(data))), choose))
        use_adapter(tmp_path / "x.gguf", choose.choice((None, (2, 2))))

    counts = outcomes(attempt)
    assert min(counts.values()) > 10


def test_gguf_bases(tmp_path: Path) -> None:
    names = {"attn_q": (32, 32), "attn_k": (16, 32), "ffn_down": (32, 64), "ffn_up_exps": (3, 8, 32)}
    data = written(
        tmp_path / "whole.gguf", {f"blk.0.{n}.weight": normal(*shape) for n, shape in names.items()}, adapter=False
    )

    def attempt(choose: random.Random) -> None:
        (tmp_path / "x.gguf").write_bytes(mutated(data, choose.choice((1000, len(data))), choose))
        use_base(tmp_path / "x.gguf")

    counts = outcomes(attempt)
    assert min(counts.values()) > 10


def test_npz_adapters(tmp_path: Path) -> None:
    arrays = {"l.0.lora_a": normal(16, 4), "l.0.lora_b": normal(4, 8), "l.1.lora_a": np.asfortranarray(normal(16, 4))}
    arrays["l.1.lora_b"] = normal(4, 8).astype(">f8")
    archives = []
    for compressed in (False, True):
        archive = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(archive, **arrays)  # type: ignore[arg-type]
        archives.append(archive.getvalue())

    def attempt(choose: random.Random) -> None:
        data = choose.choice(archives)
        (tmp_path / "adapters.npz").write_bytes(mutated(data, len(data), choose))
        use_adapter(tmp_path / "adapters.npz")

    assert outcomes(attempt)["refused"] > 10


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_safetensors(tmp_path: Path, remote: bool) -> None:
    tensors = {
        f"base_model.model.l.{i}.lora_{side}.weight": torch.ones(shape)
        for i in range(2)
        for side, shape in (("A", (4, 16)), ("B", (8, 4)))
    }
    data = save(tensors, metadata={"format": "pt"})
    header = 8 + struct.unpack("<Q", data[:8])[0]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/mutated/adapter_model.safetensors", data)

    def attempt(choose: random.Random) -> None:
        changed = mutated(data, choose.choice((header, header, len(data))), choose)
        if remote:
            memory.pipe_file("/mutated/adapter_model.safetensors", changed)
        else:
            (tmp_path / "adapter_model.safetensors").write_bytes(changed)
        use_adapter("memory://mutated" if remote else tmp_path / "adapter_model.safetensors")

    try:
        assert outcomes(attempt)["refused"] > 10
    finally:
        memory.rm("/mutated", recursive=True)


def test_side_tensors_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    whole: dict[str, Tensor] = {"m.weight": torch.ones(8, 16, dtype=torch.int8), "m.SCB": torch.ones(8)}
    whole["m.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    for name, nested in (("a", True), ("b", False)):
        packed, state = functional.quantize_4bit(torch.randn(24, 64), quant_type="nf4", compress_statistics=nested)
        whole |= {f"{name}.weight": packed} | {f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    dtypes = [torch.uint8, torch.int8, torch.float16, torch.float32, torch.bool, torch.int64, torch.float8_e4m3fn]
    values = [None, -1, 0, 1, 2**31 - 1, 2**40, 10**400, 1.5, float("nan"), "x", [], [0], [2**30] * 5, {}, True]

    def attempt(choose: random.Random) -> None:
        tensors = dict(whole)
        for _ in range(choose.choice((1, 1, 2))):
            key = choose.choice(list(tensors))
            tensor = tensors[key]
            match choose.randrange(6):
                case 0:
                    shape = [choose.randrange(5) for _ in range(choose.randrange(5))]
                    tensors[key] = torch.zeros(shape, dtype=choose.choice(dtypes))
                case 1:
                    tensors[key] = tensor.reshape(-1)[: choose.randrange(tensor.numel() + 1)].clone()
                case 2:
                    tensors[key] = tensor.to(choose.choice(dtypes))
                case 3:
                    del tensors[key]
                case 4:
                    tensors[key] = tensor.reshape(-1).repeat(2)
                case _ if "quant_state" in key and tensor.dtype is torch.uint8:
                    text = bytes(whole[key].tolist())
                    content = json.loads(text)
                    content[choose.choice([*content, "nested_blocksize", "nested_offset"])] = choose.choice(values)
                    text = choose.choice((json.dumps(content).encode(), mutated(text, len(text), choose)))
                    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
        save_file(tensors, tmp_path / "model.safetensors")
        use_base(tmp_path)

    assert outcomes(attempt)["read"] > 10
