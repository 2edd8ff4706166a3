"""GGUF adapters, written by gguf's own writer as llama.cpp's converter does, against products in numpy."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import save_file

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.tables import spectrum_table

# Products of stored numbers in float64, added up in another order.
EXACT = 1e-12

HEADS, KV_HEADS, HEAD, R = 4, 2, 8, 32
D, HIDDEN, VOCAB, EXPERTS = HEADS * HEAD, 64, 96, 3

Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def factors(d_out: int, d_in: int, *stack: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A (r, d_in) and B (d_out, r), PEFT's; or stacks of them."""
    return random(*stack, R, d_in), random(*stack, d_out, R)


def converted(
    path: Path,
    pairs: Factors,
    *,
    architecture: str | None = "llama",
    alpha: float | None = 8.0,
    kind: Kind = Kind.F32,
    general: str = "adapter",
    adapter: str = "lora",
    more: dict[str, NDArray[Any]] | None = None,
) -> Path:
    """What convert_lora_to_gguf.py writes: names of GGUF, and token_embd's A transposed."""
    file = gguf.GGUFWriter(path, architecture or "x")
    if architecture is None:
        del file.kv_data[0]["general.architecture"]
    file.add_type(general)
    file.add_string("adapter.type", adapter)
    if alpha is not None:
        file.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        for side, array in (("a", a.T if name == "token_embd.weight" else a), ("b", b)):
            data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
            native = kind in (Kind.F32, Kind.F16)
            file.add_tensor(f"{name}.lora_{side}", data, raw_dtype=None if native else kind)
    for name, array in (more or {}).items():
        file.add_tensor(name, array)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def interleaved(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """llama.cpp's permute: the halves of a head become pairs of rows."""
    return weight.reshape(n_heads, 2, len(weight) // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


Q, K, V = (f"blk.3.attn_{side}.weight" for side in "qkv")
PAIRS: Factors = {
    Q: factors(D, D),
    K: factors(KV_HEADS * HEAD, D),
    V: factors(KV_HEADS * HEAD, D),
    "blk.3.ffn_down.weight": factors(D, HIDDEN),
    "output.weight": factors(VOCAB, D),
}
PERMUTED: Factors = PAIRS | {
    Q: (PAIRS[Q][0], interleaved(PAIRS[Q][1], HEADS)),
    K: (PAIRS[K][0], interleaved(PAIRS[K][1], KV_HEADS)),
}
HUGGING_FACE = {
    Q: "model.layers.3.self_attn.q_proj.weight",
    K: "model.layers.3.self_attn.k_proj.weight",
    V: "model.layers.3.self_attn.v_proj.weight",
    "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
    "output.weight": "lm_head.weight",
}


def product(pair: tuple[NDArray[np.float32], NDArray[np.float32]]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = pair[1].astype(np.float64) @ pair[0].astype(np.float64)
    return result


def assert_close(update: Any, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(update.dense().numpy(), expected, rtol=0, atol=EXACT * np.abs(expected).max())


def test_an_adapter_is_the_product_of_its_factors(tmp_path: Path) -> None:
    adapter = load_adapter(converted(tmp_path / "x.gguf", PERMUTED))
    assert (adapter.format, adapter.metadata["adapter.lora.alpha"]) == ("gguf", "8.0")
    assert set(adapter) == {name.removesuffix(".weight") for name in PAIRS}
    for name, pair in PERMUTED.items():
        module = adapter.modules[name.removesuffix(".weight")]
        assert module.shape == (pair[1].shape[0], pair[0].shape[1])
        assert (module.r, module.scale, module.scale_source) == (R, 8 / R, "header")
        assert module.target == Target(name)
        assert_close(adapter[name.removesuffix(".weight")], 8 / R * product(pair))
    assert len(adapter.ledger) == 2 * len(PAIRS)


@pytest.mark.parametrize(
    ("alpha", "scale", "source"),
    [(16.0, 16 / R, "header"), (-4.0, -4 / R, "header"), (0.0, 1.0, "format default"), (None, 1.0, "format default")],
)
def test_an_alpha_of_zero_or_none_is_a_scale_of_one(
    tmp_path: Path, alpha: float | None, scale: float, source: str
) -> None:
    path = converted(tmp_path / "x.gguf", {V: PAIRS[V]}, alpha=alpha)
    module = load_adapter(path).modules["blk.3.attn_v"]
    assert (module.scale, module.scale_source) == (scale, source)
    given = load_adapter(path, alpha=64).modules["blk.3.attn_v"]
    assert (given.scale, given.scale_source) == (64 / R, "caller")


@pytest.mark.parametrize("alpha", [math.nan, math.inf], ids=str)
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(AdapterFormatError, match=r"adapter.lora.alpha: expected a finite number, got '(nan|inf)'"):
        load_adapter(converted(tmp_path / "x.gguf", PAIRS, alpha=alpha))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0], ids=lambda kind: kind.name)
def test_every_type_that_the_converter_writes_is_read(tmp_path: Path, kind: Kind) -> None:
    adapter = load_adapter(converted(tmp_path / "x.gguf", {V: PAIRS[V]}, kind=kind))
    stored = tuple(gguf.quants.dequantize(gguf.quants.quantize(factor, kind), kind) for factor in PAIRS[V])
    assert_close(adapter["blk.3.attn_v"], 8 / R * product((stored[0], stored[1])))


def test_a_quantised_file_claims_no_noise_floor(tmp_path: Path) -> None:
    adapter = load_adapter(converted(tmp_path / "x.gguf", {V: PAIRS[V]}, kind=Kind.Q8_0))
    assert math.isnan(adapter["blk.3.attn_v"].eps)
    assert adapter.notes == ("factors are stored quantised (Q8_0): their noise floor is unknown.",)
    assert spectrum_table(adapter)["resolved_rank"].isna().all()
    exact = load_adapter(converted(tmp_path / "y.gguf", {V: PAIRS[V]}, kind=Kind.BF16))
    assert exact["blk.3.attn_v"].eps == pytest.approx(1.66e-3, rel=0.01)
    assert exact.notes == ()


def test_heads_undo_the_permutation_of_llama(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED)
    plain = load_adapter(path)
    assert len(plain.notes) == 1
    assert "q and k of 'llama' in interleaved rotary order" in plain.notes[0]
    adapter = load_adapter(path, heads=(HEADS, KV_HEADS))
    assert adapter.notes == ()
    for name, pair in PAIRS.items():
        assert_close(adapter[name.removesuffix(".weight")], 8 / R * product(pair))


def test_architectures_that_are_not_permuted_stay_as_they_are(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PAIRS, architecture="qwen2")
    assert load_adapter(path).notes == ()
    adapter = load_adapter(path, heads=(HEADS, KV_HEADS))
    assert adapter.notes == ("heads= has no effect: GGUF does not permute the rows of q and k of 'qwen2'.",)
    assert_close(adapter["blk.3.attn_q"], 8 / R * product(PAIRS[Q]))


def test_names_follow_the_base(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED)
    base = load_base({HUGGING_FACE[name]: torch.randn(len(b), a.shape[1]) for name, (a, b) in PAIRS.items()})
    adapter = load_adapter(path, base=base, heads=(HEADS, KV_HEADS))
    assert set(adapter) == {name.removesuffix(".weight") for name in HUGGING_FACE.values()}
    for name, pair in PAIRS.items():
        module = HUGGING_FACE[name].removesuffix(".weight")
        assert_close(adapter[module], 8 / R * product(pair))
        assert base.matrix(adapter.targets[module], adapter[module].shape).shape == adapter[module].shape
    with pytest.raises(
        AdapterFormatError, match=r"its rows are in another order than the base gives them.*Pass heads="
    ):
        load_adapter(path, base=base)


def test_a_base_of_gguf_names_keeps_them(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED)
    base = load_base({name: torch.randn(len(b), a.shape[1]) for name, (a, b) in PAIRS.items()})
    assert set(load_adapter(path, base=base)) == {name.removesuffix(".weight") for name in PAIRS}
    with pytest.raises(AdapterFormatError, match=r"heads= turns its rows .* and the base has GGUF's"):
        load_adapter(path, base=base, heads=(HEADS, KV_HEADS))


def model(path: Path, weights: dict[str, NDArray[np.float32]], *, heads: bool = True) -> Path:
    """A Llama in GGUF: rows of q and k permuted as llama.cpp's converter does."""
    file = gguf.GGUFWriter(path, "llama")
    if heads:
        file.add_head_count(HEADS)
        file.add_head_count_kv(KV_HEADS)
    for name, weight in weights.items():
        file.add_tensor(name, interleaved(weight, {Q: HEADS, K: KV_HEADS}[name]) if name in (Q, K) else weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_gguf_file_is_a_base_whose_rows_are_turned_and_whose_header_turns_the_adapters(tmp_path: Path) -> None:
    weights = {name: random(len(b), a.shape[1]) for name, (a, b) in PAIRS.items()}
    path, base = converted(tmp_path / "x.gguf", PERMUTED), load_base(model(tmp_path / "model.gguf", weights))
    assert base.heads == (HEADS, KV_HEADS)
    for heads in ((HEADS, KV_HEADS), None):
        adapter = load_adapter(path, base=base, heads=heads)
        for name, pair in PAIRS.items():
            module = name.removesuffix(".weight")
            assert_close(adapter[module], 8 / R * product(pair))
            np.testing.assert_array_equal(base.matrix(adapter.targets[module]).numpy(), weights[name])
        said = () if heads else ("the rows of q and k are turned by the base's numbers of heads, (4, 2).",)
        assert adapter.notes == said
    silent = load_base(model(tmp_path / "silent.gguf", weights, heads=False))
    assert silent.heads is None
    with pytest.raises(AdapterFormatError, match=r"its rows are in another order than the base gives them"):
        load_adapter(path, base=silent)


def test_the_configuration_of_a_hugging_face_base_turns_rows(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED)
    save_file(
        {HUGGING_FACE[name]: torch.randn(len(b), a.shape[1]) for name, (a, b) in PAIRS.items()},
        tmp_path / "model.safetensors",
    )
    config = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = load_base(tmp_path / "model.safetensors")
    adapter = load_adapter(path, base=base)
    again = pickle.loads(pickle.dumps(adapter))
    for name, pair in PAIRS.items():
        module = HUGGING_FACE[name].removesuffix(".weight")
        assert_close(adapter[module], 8 / R * product(pair))
        assert torch.equal(again[module].dense(), adapter[module].dense())
    # Twice as many heads of half the size fit the rows, too.
    other = load_adapter(path, base=base, heads=(2 * HEADS, 2 * KV_HEADS))
    assert other.notes == ("heads= gives (8, 4), the base says (4, 2); the former are taken.",)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseWeightsError, match=r"config\.json: expected JSON"):
        load_adapter(path, base=load_base(tmp_path / "model.safetensors"))


def test_heads_in_an_order_of_ggufs_own_do_not_meet_the_base(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", {"blk.0.attn_qkv.weight": factors(3 * D, D)}, architecture="bloom")
    assert list(load_adapter(path)) == ["blk.0.attn_qkv"]
    base = load_base({"transformer.h.0.self_attention.query_key_value.weight": torch.randn(3 * D, D)})
    with pytest.raises(AdapterFormatError, match="GGUF has the heads of 'bloom' in an order of its own"):
        load_adapter(path, base=base)


def test_token_embeddings_are_flipped(tmp_path: Path) -> None:
    # PEFT: lora_embedding_A (r, vocab), lora_embedding_B (dim, r), ΔE = (B·A)ᵀ.
    pair = factors(D, VOCAB)
    path = converted(tmp_path / "x.gguf", {"token_embd.weight": pair})
    adapter = load_adapter(path)
    assert adapter.targets["token_embd"] == Target("token_embd.weight", transposed=True)
    assert_close(adapter["token_embd"], 8 / R * product(pair))
    base = load_base({"model.embed_tokens.weight": torch.randn(VOCAB, D)})
    adapter = load_adapter(path, base=base)
    assert base.matrix(adapter.targets["model.embed_tokens"], (D, VOCAB)).shape == (D, VOCAB)


def test_experts_come_apart(tmp_path: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    a, b = factors(HIDDEN, D, EXPERTS)
    path = converted(tmp_path / "x.gguf", {name: (a, b)}, architecture="qwen2moe")
    adapter = load_adapter(path)
    assert list(adapter) == [f"blk.1.ffn_up_exps.{i}" for i in range(EXPERTS)]
    for expert in range(EXPERTS):
        module = adapter.modules[f"blk.1.ffn_up_exps.{expert}"]
        assert (module.shape, module.r, module.target) == ((HIDDEN, D), R, Target(name, expert=expert))
        assert_close(adapter[f"blk.1.ffn_up_exps.{expert}"], 8 / R * product((a[expert], b[expert])))
    assert adapter.ledger[f"{name}.lora_a"] == "used by " + ", ".join(adapter)

    apart = [f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(EXPERTS)]
    base = load_base({f"{module}.weight": torch.randn(HIDDEN, D) for module in apart})
    adapter = load_adapter(path, base=base)
    assert list(adapter.targets.items()) == [(module, Target(f"{module}.weight")) for module in apart]
    assert_close(adapter[apart[2]], 8 / R * product((a[2], b[2])))


def test_full_norms_are_listed(tmp_path: Path) -> None:
    more = {"blk.0.attn_norm.weight": random(D), "blk.0.attn_q.bias": random(D), "other.weight": random(3, 3)}
    adapter = load_adapter(converted(tmp_path / "x.gguf", {V: PAIRS[V]}, more=more))
    assert {unused.tensor: unused.reason for unused in adapter.unused} == {
        "blk.0.attn_norm.weight": "a full norm, which llama.cpp skips",
        "blk.0.attn_q.bias": "bias: a full bias in place of the base's",
        "other.weight": "a full tensor, no part of any update",
    }
    assert len(adapter.ledger) == 5


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"general": "model"},
            AdapterFormatError,
            "general.type = 'adapter', got 'model'. The file was read as 'gguf'",
        ),
        ({"adapter": "control"}, AdapterFormatError, "a GGUF header with adapter.type = 'lora', got 'control'"),
        ({"architecture": None}, AdapterFormatError, "expected general.architecture in the header, it is missing"),
        (
            {"pairs": {}},
            AdapterFormatError,
            r"expected LoRA factors, found none among its 0 tensors \(read as 'gguf'\)",
        ),
    ],
    ids=str,
)
def test_headers_that_llama_cpp_would_refuse_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load_adapter(converted(tmp_path / "x.gguf", **({"pairs": PAIRS} | changes)))


def test_activated_lora_is_refused(tmp_path: Path) -> None:
    file = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    file.add_type("adapter")
    file.add_string("adapter.type", "lora")
    file.add_array("adapter.alora.invocation_tokens", list(range(5000)))
    file.add_tensor(f"{V}.lora_a", random(2, 4))
    file.add_tensor(f"{V}.lora_b", random(4, 2))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(UnsupportedAdapterError, match="activated LoRA, which acts from its invocation tokens on"):
        load_adapter(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ({V: (random(3, 4), random(4, 2))}, r"lora_a \(r, d_in\) and lora_b \(d_out, r\), .*got \(3, 4\) and \(4, 2\)"),
        ({V: (random(2, 3, 4), random(3, 4, 3))}, r"got \(2, 3, 4\) and \(3, 4, 3\)"),
        ({V: (random(1, 3, 4), random(4, 3))}, r"got \(1, 3, 4\) and \(4, 3\)"),
        ({V: (random(0, 4), random(4, 0))}, r"got \(0, 4\) and \(4, 0\)"),
        ({V: (random(4), random(4))}, r"got \(4,\) and \(4,\)"),
        ({"token_embd.weight": (random(3, 9), random(4, 2))}, r"lora_a \(vocab, r\) .* got \(9, 3\) and \(4, 2\)"),
    ],
    ids=["r", "experts", "one stack", "empty", "vectors", "embedding"],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, pairs: Factors, match: str) -> None:
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(converted(tmp_path / "x.gguf", pairs))


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_factor_without_its_partner_is_named(tmp_path: Path, lost: str) -> None:
    kept = "b" if lost == "a" else "a"
    path = converted(tmp_path / "x.gguf", {}, more={f"{V}.lora_{kept}": random(3, 4)})
    with pytest.raises(AdapterFormatError, match=f"expected lora_a and lora_b, '{V}.lora_{lost}' is missing"):
        load_adapter(path)


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED)
    for heads in ((HEADS, 5), (3, KV_HEADS)):
        with pytest.raises(AdapterFormatError, match=r"taken for \d heads: .*Pass heads=\(n_heads, n_kv_heads\)"):
            load_adapter(path, heads=heads)


def test_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PAIRS)
    with pytest.raises(AdapterFormatError, match="gguf's have no names"):
        load_adapter(path, name="x")
    with pytest.raises(UnsupportedAdapterError, match="Leave split= out"):
        load_adapter(path, split="q,v")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", {}, general="model", more={V: random(4, 4)})
    with pytest.raises(AdapterFormatError, match="no known format matches its 1 tensors"):
        load_adapter(path)


def test_names_of_gguf_in_another_container_lack_its_header(tmp_path: Path) -> None:
    save_file({f"{V}.lora_{side}": torch.ones(2, 2) for side in "ab"}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFormatError, match=r"expected a GGUF header with general\.type = 'adapter', got 'None'"):
        load_adapter(tmp_path / "x.safetensors")


def test_a_folder_with_one_gguf_file_is_an_adapter(tmp_path: Path) -> None:
    converted(tmp_path / "x.gguf", {V: PAIRS[V]})
    assert load_adapter(tmp_path).format == "gguf"


def test_a_damaged_file_is_an_error_of_its_format(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PAIRS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterFormatError, match="truncated"):
        load_adapter(path)


def test_factors_keep_their_dtype_and_lie_on_the_device(tmp_path: Path) -> None:
    path = converted(tmp_path / "x.gguf", PERMUTED, kind=Kind.F16)
    update = load_adapter(path, device="meta")["blk.3.attn_v"]
    assert (update.up.dtype, update.up.device.type) == (torch.float16, "meta")  # type: ignore[attr-defined]


def test_an_adapter_reads_the_same_after_pickling(tmp_path: Path) -> None:
    adapter = load_adapter(converted(tmp_path / "x.gguf", PERMUTED, kind=Kind.Q8_0), heads=(HEADS, KV_HEADS))
    data = pickle.dumps(adapter)
    again: Adapter = pickle.loads(data)
    assert len(data) < 1000
    for name, update in adapter.items():
        assert torch.equal(again[name].dense(), update.dense())
