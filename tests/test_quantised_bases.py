"""Quantised bases: bitsandbytes' own numbers, matrix by matrix; other quantisations named and refused."""

from __future__ import annotations

import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis import load_base
from lora_analysis.adapter import Target
from lora_analysis.errors import BaseWeightsError

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional
_dequantize_4bit_compute = pytest.importorskip("bitsandbytes.backends.default.ops")._dequantize_4bit_compute

SHAPES = [(64, 128), (33, 100), (7, 5), (1, 1), (256, 256)]


def four_bits(weight: Tensor, kind: str, *, nested: bool, blocksize: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as bitsandbytes saves it, and as bitsandbytes gives it back."""
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    saved = {"lin.weight": packed} | {f"lin.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return saved, given_back(packed, state)


def given_back(packed: Tensor, state: Any) -> Tensor:
    """bitsandbytes' numbers.

    Its own kernel for CPUs (0.50) is wrong where rows are no whole number of blocks: there the generic
    implementation is taken, which runs where no kernel does.
    """
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    generic: Tensor = _dequantize_4bit_compute(
        packed.reshape(-1).view(torch.uint8), absmax.float(), state.code, state.blocksize, state.shape, state.dtype
    )
    if state.shape[-1] % state.blocksize == 0:
        assert torch.equal(generic, functional.dequantize_4bit(packed, state))
    return generic


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_come_back_as_bitsandbytes_gives_them(kind: str, dtype: torch.dtype, nested: bool) -> None:
    for shape in SHAPES:
        for blocksize in (64, 256):
            saved, oracle = four_bits(torch.randn(shape).to(dtype), kind, nested=nested, blocksize=blocksize)
            base = load_base(saved)
            weight = base.matrix(Target("lin.weight"), shape)
            assert weight.dtype == oracle.dtype == dtype
            assert torch.equal(weight, oracle), (shape, blocksize)
            assert base.shape("lin.weight") == shape
            assert list(base) == ["lin.weight"]
            assert base.notes == (
                f"1 tensors are bitsandbytes 4-bit ({kind}), dequantised when read: the rounded weights, not the "
                "original ones.",
            )


@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(64, 128, 64), (64, 96, 64), (33, 100, 256), (7, 5, 64)])
def test_the_error_is_that_of_rounding_to_the_nearest_code(rows: int, columns: int, blocksize: int) -> None:
    """Without any of bitsandbytes' own dequantisation: no number is farther off than half the widest gap of nf4."""
    weight = torch.randn(rows, columns)
    saved, _ = four_bits(weight, "nf4", nested=False, blocksize=blocksize)
    numbers = load_base(saved).matrix(Target("lin.weight"), (rows, columns)).reshape(-1)
    widest = saved["lin.weight.quant_map"].sort().values.diff().max() / 2
    for start in range(0, rows * columns, blocksize):
        block = weight.reshape(-1)[start : start + blocksize]
        error = (numbers[start : start + blocksize] - block).abs().max()
        assert error <= widest * block.abs().max() * 1.0001


def test_four_bits_stored_under_another_dtype_are_the_same_bytes() -> None:
    saved, oracle = four_bits(torch.randn(64, 32), "nf4", nested=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        posing = saved | {"lin.weight": saved["lin.weight"].reshape(-1).view(dtype).reshape(-1, 1)}
        assert torch.equal(load_base(posing).matrix(Target("lin.weight"), (64, 32)), oracle)


def test_a_live_four_bit_model_is_a_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 48, compress_statistics=True, quant_type="nf4"), nn.ReLU())
    original = model[0].weight.detach().clone()
    model = model.to("cpu")
    layer = model[0]
    if layer.weight.quant_state is None:
        pytest.skip("this bitsandbytes does not quantise on the CPU")
    oracle = given_back(layer.weight.data, layer.weight.quant_state)
    weight = load_base(model).matrix(Target("0.weight"), (48, 64))
    assert torch.equal(weight, oracle)
    error = (weight - original).norm() / original.norm()
    assert 0.01 < error < 0.15  # nf4 of a uniform matrix


def test_a_quantised_file_is_read_from_disk_with_its_shapes(tmp_path: Path) -> None:
    saved, oracle = four_bits(torch.randn(64, 32).half(), "nf4", nested=True)
    plain = torch.randn(4, 4)
    save_file(saved | {"head.weight": plain}, tmp_path / "model.safetensors")
    base = load_base(tmp_path)
    assert set(base) == {"lin.weight", "head.weight"}
    assert base.shape("lin.weight") == (64, 32)
    for again in (base, pickle.loads(pickle.dumps(base))):
        assert torch.equal(again.matrix(Target("lin.weight"), (64, 32)), oracle)
        assert torch.equal(again.matrix(Target("head.weight"), (4, 4)), plain)
    stored = sum(tensor.nbytes for name, tensor in saved.items())
    assert base.bytes_read == stored + plain.nbytes
    assert base.bytes_total == stored + plain.nbytes


def test_a_column_slice_and_a_turned_weight_work_on_dequantised_weights() -> None:
    saved, oracle = four_bits(torch.randn(48, 32), "nf4", nested=False)
    base = load_base(saved)
    assert torch.equal(base.matrix(Target("lin.weight", rows=(16, 32)), (16, 32)), oracle[16:32])
    assert torch.equal(base.matrix(Target("lin.weight", transposed=True), (32, 48)), oracle.T)


def edited(state: Tensor, **changes: Any) -> Tensor:
    content = json.loads(bytes(state.tolist())) | changes
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def test_damaged_four_bit_weights_are_named() -> None:
    saved, _ = four_bits(torch.randn(64, 32), "nf4", nested=True)
    key = "lin.weight.quant_state.bitsandbytes__nf4"
    state = saved[key]
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({key: torch.tensor([1, 2, 3], dtype=torch.uint8)}, "expected JSON of a quantisation"),
        ({key: torch.zeros(20_000, dtype=torch.uint8)}, "expected some hundred bytes of JSON"),
        ({key: torch.zeros(20)}, "expected some hundred bytes of JSON"),
        ({key: torch.tensor(list(b"[" * 9000), dtype=torch.uint8)}, "expected JSON of a quantisation"),
        ({key: edited(state, shape=None)}, "expected a shape and sizes of blocks"),
        ({key: edited(state, shape=[64, -1])}, "expected a shape and sizes of blocks"),
        ({key: edited(state, shape=[64, 0])}, "expected a shape and sizes of blocks"),
        ({key: edited(state, blocksize=0)}, "expected a shape and sizes of blocks"),
        ({key: edited(state, blocksize=True)}, "expected a shape and sizes of blocks"),
        ({key: edited(state, nested_offset="x")}, "expected a finite nested_offset, got 'x'"),
        ({key: edited(state, nested_offset=math.nan)}, "expected a finite nested_offset, got 'nan'"),
        ({key: edited(state, nested_offset=10**400)}, "expected a finite nested_offset, got '1000"),
        ({key: edited(state, nested_offset=True)}, "expected a finite nested_offset"),
        ({key: edited(state, dtype="complex64")}, "expected a dtype of float16"),
        ({key: edited(state, dtype=["x"])}, "expected a dtype of float16"),
        ({key: edited(state, shape=[64, 64])}, r"expected 2,048 bytes of codes, got 1,024"),
        ({key: edited(state, blocksize=128)}, r"absmax': expected 16 codes of one byte, got torch.uint8 \(32,\)"),
        ({key: edited(state, shape=[64, 16])}, r"expected 512 bytes of codes, got 1,024"),
        ({"lin.weight.absmax": torch.zeros(32)}, r"absmax': expected 32 codes of one byte, got torch.float32"),
        ({"lin.weight.quant_state.bitsandbytes__fp4": state}, "expected one kind of 4-bit weight, got two"),
        ({"lin.weight.quant_map": torch.zeros(15)}, r"quant_map': expected 16 floating-point numbers"),
        ({"lin.weight.nested_absmax": torch.zeros(9)}, r"nested_absmax': expected 1 floating-point numbers"),
        ({"lin.weight.nested_quant_map": torch.zeros(2, dtype=torch.int8)}, "expected 256 floating-point"),
    ]
    for change, match in cases:
        with pytest.raises(BaseWeightsError, match=match) as caught:
            load_base(saved | change).matrix(Target("lin.weight"))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("state dict: 'lin.weight")
        assert len(str(caught.value)) < 400
    for part in ("quant_map", "absmax", "nested_absmax"):
        without = {name: tensor for name, tensor in saved.items() if name != f"lin.weight.{part}"}
        with pytest.raises(BaseWeightsError, match="expected it beside the quantised weight, found none"):
            load_base(without).matrix(Target("lin.weight"))


def test_a_block_that_claims_to_be_huge_costs_no_memory() -> None:
    saved, oracle = four_bits(torch.randn(64, 32), "nf4", nested=True)
    key = "lin.weight.quant_state.bitsandbytes__nf4"
    claimed = saved | {key: edited(saved[key], nested_blocksize=2**31 - 1)}
    # 32 scales of blocks lie in one nested block of 256, as well as in one of any larger size.
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.equal(load_base(claimed).matrix(Target("lin.weight"), (64, 32)), oracle)
    unit = 1 if sys.platform == "darwin" else 2**10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 2**30


@pytest.mark.parametrize("layout", [None, 0])
def test_eight_bits_come_back_as_bitsandbytes_gives_them(layout: int | None) -> None:
    weight = torch.randn(48, 64).half()
    weight[:, 7] *= 30  # an outlier feature
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    saved = {"m.lin.weight": codes, "m.lin.SCB": scales}
    if layout is not None:
        saved["m.lin.weight_format"] = torch.tensor(layout, dtype=torch.uint8)
    base = load_base(saved)
    oracle = functional.int8_vectorwise_dequant(codes, scales)
    numbers = base.matrix(Target("m.lin.weight"), (48, 64))
    assert numbers.dtype == torch.float32
    # One rounding of the scale's quotient and one of the product, each of half an ulp.
    torch.testing.assert_close(numbers, oracle, rtol=3e-7, atol=0)
    assert set(base) == {"m.lin.weight"}
    assert base.shape("m.lin.weight") == (48, 64)
    assert "bitsandbytes 8-bit" in base.notes[0]
    step = scales[:, None] / 127
    assert ((numbers - weight.float()).abs() <= step * 0.51).all()


def test_the_state_dict_of_a_live_eight_bit_layer_is_a_base() -> None:
    layer = bnb.nn.Linear8bitLt(64, 48, bias=True, has_fp16_weights=False)
    codes, scales, _ = functional.int8_vectorwise_quant(layer.weight.detach().half())
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    state = layer.state_dict()
    if "SCB" not in state:
        pytest.skip("this bitsandbytes saves no scales on the CPU")
    numbers = load_base(state).matrix(Target("weight"), (48, 64))
    torch.testing.assert_close(numbers, functional.int8_vectorwise_dequant(codes, scales), rtol=3e-7, atol=0)


def test_damaged_eight_bit_weights_are_named() -> None:
    codes = torch.ones(4, 3, dtype=torch.int8)
    for saved, match in (
        ({"a.weight": codes, "a.SCB": torch.ones(3)}, "'a.SCB': expected 4 floating-point numbers"),
        ({"a.weight": codes, "a.SCB": torch.ones(4, dtype=torch.int32)}, "'a.SCB': expected 4 floating-point numbers"),
        ({"a.weight": torch.ones(2, 2, 3, dtype=torch.int8), "a.SCB": torch.ones(2)}, "expected a matrix of codes"),
        (
            {"a.weight": codes, "a.SCB": torch.ones(4), "a.weight_format": torch.tensor(2, dtype=torch.uint8)},
            "expected 8-bit codes in rows, got a layout of older bitsandbytes",
        ),
        (
            {"a.weight": codes, "a.SCB": torch.ones(4), "a.weight_format": torch.zeros(3, dtype=torch.uint8)},
            "expected 8-bit codes in rows, got a layout of older bitsandbytes",
        ),
        ({"a.weight": codes}, "got torch.int8: a quantised base. Give the original weights"),
    ):
        with pytest.raises(BaseWeightsError, match=match) as caught:
            load_base(saved).matrix(Target("a.weight"))
        assert "\n" not in str(caught.value)


INT = torch.int32
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("GPTQ", {"a.qweight": (8, 32, INT), "a.qzeros": (1, 4, INT), "a.scales": (1, 32, None), "a.g_idx": (64, INT)}),
        ("GPTQ", {"a.qweight": (8, 32, INT), "a.qzeros": (1, 4, INT), "a.scales": (1, 32, None)}),
        ("AWQ", {"a.qweight": (64, 4, INT), "a.qzeros": (1, 4, INT), "a.scales": (1, 32, None)}),
        ("HQQ", {"a.W_q": (8, 32, torch.uint8), "a.meta": (3, None)}),
        ("compressed-tensors", {"a.weight_packed": (32, 8, INT), "a.weight_scale": (32, 1, None)}),
        ("torchao", {"a._weight_qdata": (32, 64, torch.int8), "a._weight_scale": (32, None)}),
        ("quanto", {"a.weight._data": (32, 64, torch.int8), "a.weight._scale": (32, 1, None)}),
        ("AQLM", {"a.codebooks": (1, 4, 1, 8, None), "a.codes": (32, 8, 1, torch.int16)}),
        ("fp8", {"a.weight": (32, 64, FP8), "a.weight_scale": (1, None)}),
        ("fp8 in blocks", {"a.weight": (32, 64, FP8), "a.weight_scale_inv": (1, 1, None)}),
        ("EETQ", {"a.weight": (64, 32, torch.int8), "a.weight_scales": (32, None)}),
    ],
)
def test_other_quantisations_are_named_and_refused(kind: str, tensors: dict[str, tuple[Any, ...]]) -> None:
    saved = {
        name: torch.zeros(shape).to(dtype) if dtype is not None else torch.ones(shape)
        for name, (*shape, dtype) in tensors.items()
    }
    base = load_base(saved | {"b.weight": torch.eye(3)})
    assert base.find("a.weight") == "a.weight"
    with pytest.raises(BaseWeightsError, match=rf"'a.weight': expected .* a quantised base \({kind}") as caught:
        base.matrix(Target("a.weight"), (32, 64))
    assert str(caught.value).endswith("Give the original weights.")
    assert torch.equal(base.matrix(Target("b.weight")), torch.eye(3))


def test_mxfp4_experts_are_named_and_refused() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    saved = {
        f"{name}_blocks": torch.zeros(2, 8, 2, 16, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(2, 8, 2, dtype=torch.uint8),
        "model.transformer_blocks": torch.eye(2),
    }
    base = load_base(saved)
    with pytest.raises(BaseWeightsError, match=r"a quantised base \(MXFP4\). Give the original weights"):
        base.matrix(Target(name, expert=1), (8, 64))
    assert torch.equal(base.matrix(Target("model.transformer_blocks")), torch.eye(2))


def test_ordinary_weights_are_not_taken_for_quantised_ones() -> None:
    weights = {
        "logit_scale": torch.tensor(1.0),
        "norm.scale": torch.ones(3),
        "a.weight": torch.eye(3),
        "blocks": torch.eye(2),
    }
    base = load_base(weights)
    assert set(base) == set(weights)
    assert torch.equal(base.matrix(Target("a.weight")), torch.eye(3))
    assert base.notes == ()


def test_transformers_saves_what_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    original = transformers.LlamaForCausalLM(config)
    original.save_pretrained(tmp_path / "original")
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=quantisation, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "quantised")
    base = load_base(tmp_path / "quantised")
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    oracle = given_back(layer.weight.data, layer.weight.quant_state)
    assert base.shape(f"{name}.weight") == (64, 96)
    assert torch.equal(base.matrix(Target(f"{name}.weight"), (64, 96)), oracle)
    whole = original.get_submodule(name).weight.detach()
    assert 0 < float((oracle - whole).norm() / whole.norm()) < 0.2
    assert math.isfinite(float(oracle.norm()))
