"""Bases under threads, in other processes and from odd sources; what they say of themselves."""

from __future__ import annotations

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis import load_adapter, load_base
from lora_analysis.adapter import Target
from lora_analysis.base.architecture import of_config, of_gguf
from lora_analysis.base.names import NamesByEnd
from lora_analysis.checkpoint import open_checkpoint, read_json
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, CheckpointError, LoraAnalysisError


def sharded(folder: Path, count: int = 24) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(12, 8) for i in range(count)}
    files = {name: f"model-{i % 5}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return weights


def peft_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(12, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def test_many_threads_read_the_same_matrices_and_every_byte_is_counted(tmp_path: Path) -> None:
    weights = sharded(tmp_path / "model")
    torch.save(weights, tmp_path / "model.pt")
    for source in (tmp_path / "model", tmp_path / "model.pt", weights):
        base = load_base(source)
        asked = list(weights) * 8
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda name, base=base: base.matrix(Target(name), (12, 8)), asked))
        for name, matrix in zip(asked, found, strict=True):
            assert torch.equal(matrix, weights[name])
        assert base.bytes_read == len(asked) * 12 * 8 * 4


def test_what_was_opened_by_a_relative_path_opens_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sharded(tmp_path / "here" / "model")
    peft_adapter(tmp_path / "here" / "lora")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base, adapter = load_base("model"), load_adapter("lora", base="model")
    data = pickle.dumps((base, adapter))
    monkeypatch.chdir(tmp_path / "there")
    for _ in range(2):  # also what was opened again
        base, adapter = pickle.loads(data)
        name = next(iter(weights))
        assert torch.equal(base.matrix(Target(name), (12, 8)), weights[name])
        assert torch.equal(adapter["model.layers.0.self_attn.q_proj"].dense(), torch.full((12, 8), 4.0).double())
        assert (base.source, adapter.source) == ("model", "lora")
        data = pickle.dumps((base, adapter))


def test_heads_are_those_of_the_configuration_beside_the_weights(tmp_path: Path) -> None:
    weights = sharded(tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    assert load_base(tmp_path / "model").heads is None
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    for source in (tmp_path / "model", index, tmp_path / "model" / "model-0.safetensors"):
        base = load_base(source)
        assert (base.heads, base.architecture.name) == ((4, 4), "llama")
        assert pickle.loads(pickle.dumps(base)).heads == (4, 4)
    assert load_base(weights).heads is None
    (tmp_path / "model" / "config.json").write_text("[")
    base = load_base(tmp_path / "model")
    assert base.matrix(Target(next(iter(weights)))).shape == (12, 8)
    with pytest.raises(BaseWeightsError, match=r"config\.json: expected JSON"):
        print(base.heads)


@pytest.mark.parametrize(
    ("config", "name", "heads"),
    [
        ({}, None, None),
        ({"model_type": 3, "num_attention_heads": True}, None, None),
        ({"model_type": "gpt2", "n_head": 12}, "gpt2", None),
        ({"num_attention_heads": 8, "num_key_value_heads": None}, None, (8, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": "2"}, None, None),
        ({"num_attention_heads": 0}, None, None),
        ({"num_attention_heads": 10**30}, None, None),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "num_attention_heads": 2}}, "llama", (2, 2)),
    ],
)
def test_configurations_say_what_they_say_and_nothing_else(config: Any, name: str | None, heads: Any) -> None:
    assert of_config(config) == (name, heads)


def test_headers_with_heads_that_differ_between_layers_have_no_one_number() -> None:
    fields: dict[str, Any] = {
        "general.architecture": "deci",
        "deci.block_count": 3,
        "deci.attention.head_count": (8, 8, 8),
    }
    assert of_gguf(fields).heads == (8, 8)
    assert of_gguf(fields | {"deci.attention.head_count": (8, 8, 4)}).heads is None
    assert of_gguf(fields | {"deci.attention.head_count": (8, 8)}).heads is None
    assert of_gguf(fields | {"deci.attention.head_count_kv": 2}).heads == (8, 2)
    assert of_gguf({}) == (None, None)
    assert of_gguf({"general.architecture": "llama", "llama.block_count": 2**40}).heads is None


def test_names_are_found_by_their_ends() -> None:
    names = NamesByEnd(["a.b.c.d.e.f", "c.d.e.f", "x.e.f", "f", "ae.f"])
    assert names.longer_than("c.d.e.f") == ["a.b.c.d.e.f"]
    assert names.longer_than("b.c.d.e.f") == ["a.b.c.d.e.f"]
    assert names.longer_than("e.f") == ["a.b.c.d.e.f", "c.d.e.f", "x.e.f"]
    assert names.longer_than("f") == ["a.b.c.d.e.f", "c.d.e.f", "x.e.f", "ae.f"]
    assert names.longer_than("z") == names.longer_than("z.a.b.c.d.e.f") == []


def test_two_tensors_of_one_name_are_not_chosen_between() -> None:
    with pytest.raises(BaseWeightsError, match=r"'module.a.weight' and 'a.weight': expected one tensor 'a.weight'"):
        load_base({"module.a.weight": torch.ones(2, 2), "a.weight": torch.zeros(2, 2)})


def test_mappings_of_something_else_are_wrong_arguments() -> None:
    for source in ({"a": 1}, {1: torch.ones(2)}, {"a.weight": None}):
        with pytest.raises(TypeError, match="source: expected a mapping of names to tensors, got"):
            load_base(source)  # type: ignore[arg-type]
    # Modules of other libraries keep what they please beside their tensors.
    assert list(load_base({"a.weight": torch.ones(2, 2), "a._extra_state": None})) == ["a.weight"]  # type: ignore[dict-item]


def test_tensors_without_numbers_are_named() -> None:
    for tensor, kind in ((torch.ones(2, 2, device="meta"), "without data"), (torch.eye(2).to_sparse(), "sparse_coo")):
        base = load_base({"a.weight": tensor, "b.weight": torch.eye(2)})
        assert torch.equal(base.matrix(Target("b.weight")), torch.eye(2))
        with pytest.raises(LoraAnalysisError, match=f"'a.weight': expected a dense .*{kind}"):
            base.matrix(Target("a.weight"))
    with pytest.raises(LoraAnalysisError, match="on device 'meta'"):
        load_base(nn.Linear(2, 2, device="meta")).matrix(Target("weight"))


def test_a_stack_of_experts_needs_a_number() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    base = load_base({name: torch.randn(3, 4, 5), "conv.weight": torch.randn(3, 4, 5)})
    assert base.matrix(Target(name, expert=1)).shape == (4, 5)
    assert base.matrix(Target("conv.weight")).shape == (3, 20)
    with pytest.raises(BaseWeightsError, match="expected the number of an expert, it is a stack of 3"):
        base.matrix(Target(name))


def test_folders_without_a_base_say_what_they_hold(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "lora")
    with pytest.raises(BaseWeightsError, match=r"expected model weights .*found none, but an adapter\.$"):
        load_base(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseWeightsError, match=r"expected model weights .*found none\.$"):
        load_base(tmp_path / "empty")
    for name in "ab":
        save_file({"w": torch.ones(2, 2)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(BaseWeightsError, match=r"found 2 \(a\.safetensors, b\.safetensors\)\.$"):
        load_base(tmp_path / "empty")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(BaseWeightsError, match="expected a 'weight_map' with tensors in it, got an empty one"):
        load_base(tmp_path / "index")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "\0", "x/" * 3000, "hf://", "::", "http://", "a::b://c"])
def test_sources_that_cannot_be_are_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load, error in ((load_base, BaseWeightsError), (load_adapter, AdapterFormatError)):
        with pytest.raises(error) as caught:
            load(source)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens and cannot be read")
def test_files_that_cannot_be_read_are_named() -> None:
    for load, error in (
        (open_checkpoint, CheckpointError),
        (load_base, BaseWeightsError),
        (load_adapter, AdapterFormatError),
    ):
        with pytest.raises(error, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
            load("/proc/self/mem")


def test_json_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="expected at most 100,000,000 bytes of JSON, got 200,000,000"):
        read_json(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BaseWeightsError, match="expected at most 100,000,000 bytes"):
        load_base(tmp_path)
