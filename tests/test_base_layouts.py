"""Bases that store a matrix fused, in a stack of experts, under GGUF's names, or with another vocabulary."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lora_analysis import BaseWeights, amplification_table, load_adapter, load_base
from lora_analysis.adapter import Target
from lora_analysis.errors import BaseWeightsError

D, KV, INNER, VOCAB = 32, 16, 48, 40
COMMON: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def matrix(base: BaseWeights, module: str, shape: tuple[int, int], **place: Any) -> Tensor:
    return base.matrix(Target(f"{module}.weight", **place), shape)


@pytest.mark.parametrize("named", ["model.", ""])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "equal"])
def test_a_llama_made_of_the_blocks_of_phi3_is_that_phi3(tmp_path: Path, heads: int, named: str) -> None:
    """transformers' own forward is the oracle: Phi-3 is Llama with q, k, v and gate, up fused."""
    torch.manual_seed(1)
    config = COMMON | {"num_key_value_heads": heads}
    phi = Phi3ForCausalLM(Phi3Config(**config)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    source = phi if named else phi.model
    source.save_pretrained(tmp_path)
    kv = heads * D // 4
    shapes = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, D)}
    shapes |= {"gate_proj": (INNER, D), "up_proj": (INNER, D), "down_proj": (D, INNER)}
    for base in (load_base(tmp_path), load_base(source)):
        state = llama.state_dict()
        blocks = {
            name: matrix(base, name.removesuffix(".weight"), shapes[name.split(".")[-2]])
            for name in state
            if name.split(".")[-2] in shapes
        }
        assert len(blocks) == 14
        rest = {name: tensor for name, tensor in phi.state_dict().items() if name in state}
        llama.load_state_dict(rest | blocks)
        tokens = torch.randint(VOCAB, (2, 9))
        with torch.no_grad():
            torch.testing.assert_close(llama(tokens).logits, phi(tokens).logits, rtol=1e-4, atol=1e-5)


def test_other_layouts_of_a_fused_attention_are_refused_by_name() -> None:
    lonely = load_base({"model.layers.0.self_attn.qkv_proj.weight": torch.randn(64, 32)})
    bloom = load_base({"h.0.self_attention.query_key_value.weight": torch.randn(96, 32)})
    gpt2 = load_base({"h.0.attn.c_attn.weight": torch.randn(32, 96)})
    for base, tensor in (
        (lonely, "model.layers.0.self_attn.q_proj.weight"),
        (bloom, "h.0.self_attention.q_proj.weight"),
        (gpt2, "h.0.attn.q_proj.weight"),
    ):
        match = r"may be part of the fused '.*', whose layout differs between models.*Give a base that stores it apart"
        with pytest.raises(BaseWeightsError, match=match):
            base.matrix(Target(tensor), (32, 32))


def test_blocks_that_cannot_be_in_a_fused_weight_are_named() -> None:
    prefix = "model.layers.0"
    base = load_base(
        {
            f"{prefix}.self_attn.qkv_proj.weight": torch.randn(64, 32),
            f"{prefix}.mlp.gate_up_proj.weight": torch.randn(50, 32),
        }
    )
    for module, shape in (
        (f"{prefix}.self_attn.q_proj", (63, 32)),  # an odd number of rows for k and v
        (f"{prefix}.self_attn.q_proj", (16, 32)),  # fewer heads for q than for k
        (f"{prefix}.self_attn.k_proj", (33, 32)),
        (f"{prefix}.self_attn.v_proj", (32, 16)),
        (f"{prefix}.mlp.up_proj", (24, 32)),
    ):
        with pytest.raises(BaseWeightsError, match=rf"expected {shape[0]}x{shape[1]}, got \d+x32"):
            matrix(base, module, shape)
    with pytest.raises(BaseWeightsError, match=r"expected a tensor of its own, it is a block of '.*qkv_proj.weight'"):
        base.shape(f"{prefix}.self_attn.q_proj.weight")


def test_torchs_own_attention_has_three_equal_blocks() -> None:
    attention = nn.MultiheadAttention(16, 4)
    base = load_base(nn.ModuleDict({"attn": attention}))
    for i, name in enumerate("qkv"):
        block = matrix(base, f"attn.{name}_proj", (16, 16))
        assert torch.equal(block, attention.in_proj_weight[16 * i : 16 * (i + 1)])
    with pytest.raises(BaseWeightsError, match="expected 8x16, got 48x16"):
        matrix(base, "attn.q_proj", (8, 16))


def mixtral() -> Any:
    torch.manual_seed(2)
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> Any:
    torch.manual_seed(3)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=8)
    )


@pytest.mark.parametrize("make", [mixtral, qwen3_moe], ids=["mixtral", "qwen3_moe"])
def test_experts_are_the_same_stacked_and_one_by_one(tmp_path: Path, make: Any) -> None:
    """transformers itself converts between the two on saving, and is the oracle."""
    model = make()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    live, file = load_base(model), load_base(tmp_path)
    stacks = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    singles = {name: tensor for name, tensor in saved.items() if ".experts." in name}
    assert {tensor.ndim for tensor in stacks.values()} == {3}
    assert {tensor.ndim for tensor in singles.values()} == {2}
    for name, stack in stacks.items():
        for base in (live, file):
            assert base.shape(name) == tuple(stack.shape)
            for expert in range(3):
                target = Target(name, expert=expert)
                assert torch.equal(base.matrix(target, (stack.shape[1], stack.shape[2])), stack[expert])
                assert torch.equal(base.matrix(target), stack[expert])
            rows = Target(name, expert=1, rows=(2, 7))
            assert torch.equal(base.matrix(rows, (5, stack.shape[2])), stack[1, 2:7])
    for name, single in singles.items():
        module, shape = name.removesuffix(".weight"), (single.shape[0], single.shape[1])
        for base in (live, file):
            assert torch.equal(matrix(base, module, shape), single)
    first = next(name for name in stacks if name.endswith("gate_up_proj"))
    for number in (3, -1, None):
        with pytest.raises(BaseWeightsError, match="expected a stack of experts"):
            file.matrix(Target(first, expert=number))
    with pytest.raises(BaseWeightsError, match=r"expected a stack of experts with number 3, got \(3, "):
        live.matrix(Target(first, expert=3))


def test_one_expert_of_a_file_costs_its_own_bytes(tmp_path: Path) -> None:
    stack = torch.randn(8, 6, 4)
    save_file({"mlp.experts.down_proj": stack}, tmp_path / "model.safetensors")
    base = load_base(tmp_path)
    assert torch.equal(base.matrix(Target("mlp.experts.down_proj", expert=5), (6, 4)), stack[5])
    assert base.bytes_read == 6 * 4 * 4
    assert base.bytes_total == stack.nbytes


def test_interleaved_experts_are_given_whole_and_not_cut() -> None:
    """GPT-OSS: rows of gate and up alternate, stored as (experts, d_in, d_out), with a bias."""
    stack = torch.randn(2, 8, 12)
    name = "model.layers.0.mlp.experts"
    base = load_base({f"{name}.gate_up_proj": stack, f"{name}.gate_up_proj_bias": torch.zeros(2, 12)})
    assert torch.equal(base.matrix(Target(f"{name}.gate_up_proj", expert=1), (12, 8)), stack[1].T)
    with pytest.raises(BaseWeightsError, match="found none of that name"):
        matrix(base, f"{name}.1.gate_proj", (6, 8))
    plain = load_base({f"{name}.gate_up_proj": stack})  # Llama 4
    assert torch.equal(matrix(plain, f"{name}.1.up_proj", (6, 8)), stack[1].T[6:])


def test_a_whole_adapter_of_stacked_experts_meets_a_base_that_stores_them_apart(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    tensors = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    tensors.append("model.layers.0.self_attn.q_proj.weight")
    assert base.find_all(tensors) == {name: name for name in tensors}
    bare = [name.removeprefix("model.") for name in tensors]
    assert base.find_all(bare) == dict(zip(bare, tensors, strict=True))
    longer = [f"language.{name}" for name in tensors]
    assert base.find_all(longer) == dict(zip(longer, tensors, strict=True))
    with pytest.raises(BaseWeightsError, match=r"expected the tensor 'model.layers.7.mlp.experts.down_proj'"):
        base.find_all([*tensors, "model.layers.7.mlp.experts.down_proj"])


@pytest.mark.parametrize(("there", "asked"), [(10, 13), (10, 8), (10, 10)])
def test_vocabularies_of_other_sizes_are_matched_by_rows(there: int, asked: int) -> None:
    weight, head = torch.randn(there, 6), torch.randn(there, 6)
    base = load_base({"model.embed_tokens.weight": weight, "lm_head.weight": head})
    embedding = base.matrix(Target("model.embed_tokens.weight", transposed=True), (6, asked))
    output = base.matrix(Target("lm_head.weight"), (asked, 6))
    common = min(there, asked)
    assert embedding.shape == (6, asked)
    assert torch.equal(embedding[:, :common], weight[:common].T)
    assert torch.equal(output[:common], head[:common])
    assert not embedding[:, common:].any()
    assert not output[common:].any()
    assert len(base.notes) == (0 if there == asked else 2)
    for note in base.notes:
        assert f"the base has {there} tokens, the update {asked}: the first {common} are matched row by row" in note


def test_only_vocabularies_are_resized_and_only_along_tokens() -> None:
    base = load_base({"model.embed_tokens.weight": torch.randn(10, 6), "model.up_proj.weight": torch.randn(10, 6)})
    for target, shape in (
        (Target("model.up_proj.weight"), (12, 6)),
        (Target("model.embed_tokens.weight", transposed=True), (5, 12)),
        (Target("model.embed_tokens.weight", transposed=True, columns=(0, 12)), (6, 12)),
    ):
        with pytest.raises(BaseWeightsError, match=f"expected {shape[0]}x{shape[1]}"):
            base.matrix(target, shape)
    assert base.notes == ()


def pipeline(folder: Path) -> dict[str, Tensor]:
    """A pipeline of diffusers' form; one component in half precision alone, one in shards."""
    written = {
        "unet.mid.to_q.weight": torch.randn(6, 4),
        "text_encoder.layers.0.q_proj.weight": torch.randn(4, 4),
        "text_encoder_2.layers.0.q_proj.weight": torch.randn(5, 4),
        "vae.conv.weight": torch.randn(2, 3, 3, 3),
    }

    def of(component: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{component}."): v for k, v in written.items() if k.startswith(f"{component}.")}

    names = {
        "unet": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.fp16.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder_2": "model.fp16-00001-of-00001.safetensors",
    }
    for component, file in names.items():
        (folder / component).mkdir(parents=True)
        save_file(of(component), folder / component / file)
    save_file(of("unet"), folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    index = {"weight_map": dict.fromkeys(of("text_encoder_2"), names["text_encoder_2"])}
    (folder / "text_encoder_2" / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    listed: dict[str, Any] = {component: ["library", "Class"] for component in [*names, "scheduler", "tokenizer"]}
    listed |= {"_class_name": "Pipeline", "../secret": ["a", "b"], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(listed))
    return written


@pytest.mark.parametrize("indexed", [True, False])
def test_a_pipeline_is_one_base_of_all_its_components(tmp_path: Path, indexed: bool) -> None:
    written = pipeline(tmp_path / "sd")
    save_file({"x": torch.ones(1)}, tmp_path / "secret")
    if indexed:
        save_file({"all.in.one": torch.ones(2, 2)}, tmp_path / "sd" / "v1-5-pruned.safetensors")
    else:
        (tmp_path / "sd" / "model_index.json").unlink()
    base = load_base(tmp_path / "sd")
    assert set(base) == set(written)
    for again in (base, pickle.loads(pickle.dumps(base))):
        for name, tensor in written.items():
            target = Target(name, kernel=tuple(tensor.shape[2:]))
            assert torch.equal(again.matrix(target, (tensor.shape[0], tensor[0].numel())), tensor.flatten(1))
    assert base.bytes_read == base.bytes_total == sum(tensor.nbytes for tensor in written.values())
    # Without its component's name, a module of one component is found, too; one of two is not guessed.
    assert base.find("mid.to_q.weight") == "unet.mid.to_q.weight"
    with pytest.raises(BaseWeightsError, match="could be any of 2"):
        base.find("layers.0.q_proj.weight")


def test_variants_alone_are_read_and_two_are_not_chosen_between(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert list(load_base(tmp_path)) == ["w"]
    save_file({"w": torch.ones(2, 2)}, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(BaseWeightsError, match=r"expected model weights .*found 2"):
        load_base(tmp_path)


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to the rows of q and k."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def gguf_llama(path: Path, *, heads: bool = True) -> dict[str, Tensor]:
    """A Llama in GGUF, some of it quantised: what its tensors are under Hugging Face's names."""
    gguf = pytest.importorskip("gguf")
    shapes = {
        "self_attn.q_proj": ("attn_q", (64, 64)),
        "self_attn.k_proj": ("attn_k", (32, 64)),
        "self_attn.v_proj": ("attn_v", (32, 64)),
        "self_attn.o_proj": ("attn_output", (64, 64)),
        "mlp.up_proj": ("ffn_up", (96, 64)),
        "mlp.down_proj": ("ffn_down", (64, 96)),
    }
    writer = gguf.GGUFWriter(path, "llama")
    if heads:
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
    generator = np.random.default_rng(0)
    found = {}
    for module, (name, shape) in shapes.items():
        weight = generator.standard_normal(shape).astype(np.float32)
        stored = permuted(weight, {"attn_q": 4, "attn_k": 2}[name]) if name in ("attn_q", "attn_k") else weight
        if name.startswith("ffn"):
            packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            weight = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"blk.0.{name}.weight", stored)
        found[f"model.layers.0.{module}.weight"] = torch.from_numpy(weight)
    embedding = generator.standard_normal((20, 64)).astype(np.float32)
    writer.add_tensor("token_embd.weight", embedding)
    found["model.embed_tokens.weight"] = torch.from_numpy(embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def test_gguf_is_a_base_under_the_names_and_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    written = gguf_llama(tmp_path / "model.gguf")
    for source in (tmp_path / "model.gguf", tmp_path):
        base = load_base(source)
        for name, tensor in written.items():
            shape = (tensor.shape[0], tensor.shape[1])
            for target in (Target(name), Target(name.removeprefix("model."))):
                assert torch.equal(base.matrix(target, shape), tensor), name
            assert base.shape(name) == shape
        embedding = Target("model.embed_tokens.weight", transposed=True)
        assert torch.equal(base.matrix(embedding, (64, 20)), written["model.embed_tokens.weight"].T)
        # (d_out, d_in) whatever the adapter's configuration says of the model it was trained on
        square = Target("model.layers.0.self_attn.o_proj.weight", transposed=True)
        assert torch.equal(base.matrix(square, (64, 64)), written[square.tensor])
        assert "blk.0.attn_q.weight" in base
        assert base.notes[0].startswith("2 tensors are GGUF Q8_0, dequantised when read")
        assert base.matrix(Target("blk.0.attn_q.weight")).equal(written["model.layers.0.self_attn.q_proj.weight"])
    again = pickle.loads(pickle.dumps(base))
    assert torch.equal(again.matrix(square, (64, 64)), written[square.tensor])
    with pytest.raises(BaseWeightsError, match=r"expected the tensor 'model\.layers\.3\.self_attn\.q_proj\.weight'"):
        base.matrix(Target("model.layers.3.self_attn.q_proj.weight"))


def test_gguf_without_numbers_of_heads_has_no_order_of_rows(tmp_path: Path) -> None:
    written = gguf_llama(tmp_path / "model.gguf", heads=False)
    base = load_base(tmp_path / "model.gguf")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(base.matrix(Target(name), (32, 64)), written[name])
    with pytest.raises(BaseWeightsError, match=r"expected llama\.attention\.head_count, found none"):
        base.matrix(Target("model.layers.0.self_attn.q_proj.weight"), (64, 64))


def gguf_of(path: Path, architecture: str, tensors: dict[str, Tensor]) -> BaseWeights:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_base(path)


def test_stacks_of_experts_in_gguf(tmp_path: Path) -> None:
    stacks = {f"blk.0.ffn_{name}_exps.weight": torch.randn(3, *shape) for name, shape in EXPERTS.items()}
    base = gguf_of(tmp_path / "moe.gguf", "qwen3moe", stacks)
    prefix = "model.layers.0.mlp.experts"
    for expert in range(3):
        for name, shape in EXPERTS.items():
            oracle = stacks[f"blk.0.ffn_{name}_exps.weight"][expert]
            assert torch.equal(matrix(base, f"{prefix}.{expert}.{name}_proj", shape), oracle)
        gate_up = torch.cat([stacks[f"blk.0.ffn_{name}_exps.weight"][expert] for name in ("gate", "up")])
        assert torch.equal(base.matrix(Target(f"{prefix}.gate_up_proj", expert=expert), (40, 16)), gate_up)
        down = base.matrix(Target(f"{prefix}.down_proj", expert=expert), (16, 20))
        assert torch.equal(down, stacks["blk.0.ffn_down_exps.weight"][expert])
    fresh = gguf_of(tmp_path / "again.gguf", "qwen3moe", stacks)
    matrix(fresh, f"{prefix}.1.gate_proj", EXPERTS["gate"])
    assert fresh.bytes_read == 20 * 16 * 4
    assert fresh.bytes_total == sum(stack.nbytes for stack in stacks.values())
    assert base.shape(f"{prefix}.gate_up_proj") == (3, 40, 16)
    assert base.shape(f"{prefix}.down_proj") == (3, 16, 20)


EXPERTS = {"gate": (20, 16), "up": (20, 16), "down": (16, 20)}


@pytest.mark.parametrize(
    ("architecture", "role"),
    [
        ("bloom", "attn_qkv"),
        ("gptneox", "attn_qkv"),
        ("falcon", "attn_qkv"),
        ("plamo", "attn_q"),
        ("plamo", "attn_output"),
        ("qwen35", "attn_qkv"),
        ("qwen35moe", "ssm_out"),
        ("qwen3next", "attn_gate"),
    ],
)
def test_attentions_that_the_converter_rearranges_are_refused(tmp_path: Path, architecture: str, role: str) -> None:
    name = f"blk.0.{role}.weight"
    base = gguf_of(tmp_path / "m.gguf", architecture, {name: torch.randn(96, 32), "blk.0.ffn_up.weight": torch.eye(3)})
    with pytest.raises(BaseWeightsError, match=r"GGUF has them in another one for .*Give the original weights"):
        base.matrix(Target(name), (96, 32))
    assert torch.equal(base.matrix(Target("blk.0.ffn_up.weight")), torch.eye(3))


def test_rotary_positions_of_images_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for sections in (False, True):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "glm4")
        if sections:
            writer.add_rope_dimension_sections([8, 12, 12, 0])
        writer.add_tensor("blk.0.attn_k.weight", np.eye(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        base = load_base(tmp_path / "m.gguf")
        if not sections:
            assert torch.equal(base.matrix(Target("model.layers.0.self_attn.k_proj.weight"), (4, 4)), torch.eye(4))
            continue
        with pytest.raises(BaseWeightsError, match="GGUF has them in another one for 'glm4'"):
            base.matrix(Target("model.layers.0.self_attn.k_proj.weight"), (4, 4))


@pytest.mark.parametrize("architecture", ["llama", "llama-embed", "granite", "nemotron_h"])
def test_the_rows_of_every_descendant_of_the_llama_converter_are_turned(tmp_path: Path, architecture: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_head_count(4)
    writer.add_tensor("blk.0.attn_q.weight", permuted(weight, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = load_base(tmp_path / "m.gguf")
    assert base.heads == (4, 4)
    assert torch.equal(base.matrix(Target("blk.0.attn_q.weight"), (32, 16)), torch.from_numpy(weight))


def test_a_part_of_a_model_in_gguf_is_no_base(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.attn_v.weight", np.eye(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for source in (tmp_path, tmp_path / "m-00001-of-00003.gguf"):
        with pytest.raises(BaseWeightsError, match=r"expected a whole model, got one of its 3 parts\. .*--merge"):
            load_base(source)


def test_gguf_in_a_component_of_a_pipeline_is_turned_as_well(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    written = gguf_llama(tmp_path / "text_encoder" / "model.gguf")
    (tmp_path / "model_index.json").write_text('{"text_encoder": ["transformers", "LlamaModel"]}')
    base = load_base(tmp_path)
    q_proj = base.matrix(Target("text_encoder.blk.0.attn_q.weight"), (64, 64))
    assert torch.equal(q_proj, written["model.layers.0.self_attn.q_proj.weight"])
    assert base.bytes_read == 64 * 64 * 4


def test_amplification_against_gguf_is_that_against_the_original(tmp_path: Path) -> None:
    import peft

    written = gguf_llama(tmp_path / "model.gguf")
    original = load_base(written)
    config = LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(
            LlamaForCausalLM(config),
            peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"], init_lora_weights=False),
        )
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    table = amplification_table(adapter, load_base(tmp_path / "model.gguf"))
    assert table.equals(amplification_table(adapter, original))
    assert len(table) > 0
