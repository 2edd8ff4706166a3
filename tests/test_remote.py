"""Remote checkpoints: what is asked for is read, by byte range, and nothing else."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import torch
from range_server import Behaviour, serving
from safetensors.torch import save, save_file
from torch import Tensor

from lora_analysis import amplification_table, load_adapter, load_base
from lora_analysis.adapter import Target
from lora_analysis.checkpoint import remote
from lora_analysis.checkpoint.folders import RemoteFolder, RemoteShards
from lora_analysis.checkpoint.hub import HubPlace, located
from lora_analysis.checkpoint.remote import RemoteFile, shown
from lora_analysis.checkpoint.remote_safetensors import RemoteSafetensors
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, CheckpointError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Behaviour]:
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as behaviour:
        yield behaviour


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """fsspec's memory file system, empty, in a folder of its own."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def tensors() -> dict[str, Tensor]:
    named = {f"layer.{i}.{dtype}": (torch.randn(5 + i, 3) * 4).to(dtype) for i, dtype in enumerate(DTYPES)}
    return named | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def header_of(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def test_a_remote_file_holds_what_the_local_one_holds(server: Behaviour) -> None:
    written = tensors()
    save_file(written, server.root / "x.safetensors", metadata={"who": "me"})
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    assert set(checkpoint) == set(written)
    assert len(checkpoint) == len(written)
    assert checkpoint.metadata == {"who": "me"}
    for name, tensor in written.items():
        assert name in checkpoint
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint[name], tensor)
    assert torch.equal(checkpoint.rows("layer.0.torch.float32", 1, 4), written["layer.0.torch.float32"][1:4])
    again = pickle.loads(pickle.dumps(checkpoint))
    assert torch.equal(again["scalar"], written["scalar"])
    with pytest.raises(KeyError):
        checkpoint["none"]


def test_every_byte_that_is_read_is_counted_and_none_is_read_twice(server: Behaviour) -> None:
    written = tensors()
    data = save(written)
    (server.root / "x.safetensors").write_bytes(data)
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    assert checkpoint.count.value == header_of(data) == server.sent
    assert checkpoint.bytes_total == len(data)
    assert torch.equal(checkpoint["layer.0.torch.float32"], written["layer.0.torch.float32"])
    assert checkpoint.count.value == server.sent == header_of(data) + 5 * 3 * 4
    checkpoint.rows("layer.0.torch.float32", 1, 3)
    assert checkpoint.count.value == server.sent == header_of(data) + 5 * 3 * 4 + 2 * 3 * 4
    assert server.gets("x.safetensors")[:2] == ["bytes=0-7", f"bytes=8-{header_of(data) - 1}"]


def test_long_ranges_are_read_in_parallel_pieces(server: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 1000)
    weight = torch.randn(123, 45)
    save_file({"w": weight}, server.root / "x.safetensors")
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    assert torch.equal(checkpoint["w"], weight)
    pieces = server.gets("x.safetensors")[2:]
    assert len(pieces) == len(set(pieces)) == -(-123 * 45 * 4 // 1000)
    assert checkpoint.count.value == server.sent


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(server: Behaviour, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    save_file({"w": torch.ones(3)}, server.root / "x.safetensors")
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    server.failures, server.status = 2, status
    assert torch.equal(checkpoint["w"], torch.ones(3))
    assert slept == [0.5, 1.0]


def test_the_server_may_ask_for_a_longer_pause_within_reason(
    server: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    save_file({"w": torch.ones(3)}, server.root / "x.safetensors")
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    for asked, pause in (("7", 7.0), ("90000", 30.0)):
        server.failures, server.status, server.headers = 1, 429, {"Retry-After": asked}
        checkpoint["w"]
        assert slept.pop() == pause


def test_an_answer_cut_short_is_asked_for_again(server: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    save_file({"w": torch.arange(5000.0)}, server.root / "x.safetensors")
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    server.truncated = 2
    assert torch.equal(checkpoint["w"], torch.arange(5000.0))


def test_a_server_that_stays_away_is_named_after_a_few_attempts(
    server: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    save_file({"w": torch.ones(3)}, server.root / "x.safetensors")
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    server.failures = 100
    before = len(server.requests)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected its bytes, got status 503, still after"):
        checkpoint["w"]
    assert len(server.requests) - before == 4
    with pytest.raises(CheckpointError, match=r"could not be read: \w+: \[Errno"):
        RemoteSafetensors("http://127.0.0.1:9/x.safetensors")


def test_what_will_not_pass_is_not_tried_again(server: Behaviour) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file or folder there\.$"):
        RemoteSafetensors(f"{server.url}/x.safetensors")
    save_file({"w": torch.ones(3)}, server.root / "x.safetensors")
    server.forbidden = "token=right"
    with pytest.raises(CheckpointError, match=r"access refused \(status 403\).*HF_TOKEN.*accept the licence") as caught:
        RemoteSafetensors(f"{server.url}/x.safetensors?token=secret")
    assert "secret" not in str(caught.value)
    assert torch.equal(RemoteSafetensors(f"{server.url}/x.safetensors?token=right")["w"], torch.ones(3))


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(server: Behaviour) -> None:
    save_file({"w": torch.zeros(25_000_000)}, server.root / "x.safetensors")
    server.ranges = False
    with pytest.raises(CheckpointError, match=r"expected a server that answers byte ranges.*Download it"):
        RemoteSafetensors(f"{server.url}/x.safetensors")
    assert server.sent < 30_000_000  # of 100: what lay in the sockets' buffers


def written_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int = 0, stop: int = 8, dtype: object = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "got 0 bytes"),
        (b"<!DOCTYPE html><html></html>", "got an HTML or XML page.*org/name"),
        (b"version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), r"got a zip archive \(a torch file\?\)"),
        (b"GGUF" + bytes(60), "got a GGUF file"),
        (bytes(100), "truncated or something else"),
        (struct.pack("<Q", 2**60) + bytes(100), "truncated or something else"),
        (struct.pack("<Q", 101) + bytes(100), "truncated or something else"),
        (struct.pack("<Q", 100) + b"{" * 100, "header: expected JSON"),
        (struct.pack("<Q", 5000) + b"[" * 5000, "header: expected JSON"),
        (written_header([1]), "expected a JSON object, got list"),
        (written_header({"__metadata__": {"a": 1}}), "'__metadata__' to map names to strings"),
        (written_header({"w": 3}), "'w': expected a dtype, a shape and two offsets"),
        (written_header({"w": entry(shape=[-2])}, bytes(8)), "'w': expected a dtype, a shape"),
        (written_header({"w": entry(shape=[True])}, bytes(8)), "'w': expected a dtype, a shape"),
        (written_header({"w": entry(shape=[2**64])}, bytes(8)), "'w': expected a dtype, a shape"),
        (written_header({"w": entry(shape=[3])}, bytes(8)), r"expected F32 of shape \[3\], got bytes 0 to 8"),
        (written_header({"w": entry(8, 0)}, bytes(8)), "expected F32 of shape"),
        (written_header({"w": entry()}, bytes(4)), "expected 8 bytes of numbers, got 4. Is it uploaded whole"),
        (written_header({"w": entry()}, bytes(9)), "expected 8 bytes of numbers, got 9"),
        (written_header({"a": entry(), "b": entry(4, 12)}, bytes(12)), "'b': expected its numbers at byte 8, got 4"),
        (written_header({"a": entry(4, 12)}, bytes(12)), "'a': expected its numbers at byte 0, got 4"),
    ],
)
def test_headers_that_lie_are_refused(memory: Any, data: bytes, match: str) -> None:
    memory.pipe_file("/x.safetensors", data)
    with pytest.raises(CheckpointError, match=match) as caught:
        RemoteSafetensors("memory://x.safetensors")
    assert str(caught.value).startswith("memory://x.safetensors: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_dtype_that_torch_lacks_is_named_when_it_is_read(memory: Any) -> None:
    memory.pipe_file(
        "/x.safetensors", written_header({"w": entry(dtype="F4", shape=[4]), "v": entry(8, 16)}, bytes(16))
    )
    checkpoint = RemoteSafetensors("memory://x.safetensors")
    assert torch.equal(checkpoint["v"], torch.zeros(2))
    with pytest.raises(CheckpointError, match="'w': expected a dtype torch knows, got 'F4'"):
        checkpoint["w"]


def test_a_longer_header_than_the_format_allows_is_not_fetched(
    server: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (server.root / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="truncated or something else"):
        RemoteSafetensors(f"{server.url}/x.safetensors")
    assert server.sent == 8


def sharded(folder: Path) -> dict[str, Tensor]:
    written = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(6, 4) for i in range(4)}
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, (name, tensor) in enumerate(written.items()):
        file = f"model-{i % 2}.safetensors"
        weight_map[name] = file
        del tensor
    for file in set(weight_map.values()):
        save_file({name: written[name] for name in written if weight_map[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def copied_into(memory: Any, folder: Path, where: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/{where}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("form", ["folder", "index", "slash"])
def test_remote_shards_are_opened_one_by_one(server: Behaviour, form: str) -> None:
    written = sharded(server.root / "model")
    source = {
        "folder": f"{server.url}/model",
        "index": f"{server.url}/model/model.safetensors.index.json",
        "slash": f"{server.url}/model/",
    }[form]
    base = load_base(source)
    assert set(base) == set(written)
    assert server.gets("model-0.safetensors") == server.gets("model-1.safetensors") == []
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(base.matrix(Target(name), (6, 4)), written[name])
    assert server.gets("model-1.safetensors") == []
    assert base.bytes_read == server.sent
    assert base.bytes_total == sum(tensor.nbytes for tensor in written.values())
    assert base.source == source
    again = pickle.loads(pickle.dumps(base))
    assert torch.equal(again.matrix(Target(name), (6, 4)), written[name])


def test_other_protocols_are_read_through_fsspec(memory: Any, tmp_path: Path) -> None:
    written = sharded(tmp_path / "model")
    copied_into(memory, tmp_path / "model", "bucket/model")
    base = load_base("memory://bucket/model")
    for name, tensor in written.items():
        assert torch.equal(base.matrix(Target(name), (6, 4)), tensor)
    files = [path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")]
    assert base.bytes_total == sum(files)
    index = (tmp_path / "model" / "model.safetensors.index.json").stat().st_size
    assert base.bytes_read == sum(files) + index
    said = f"read {base.bytes_read / 1e3:.2f} of {sum(files) / 1e3:.2f} kB"
    assert base.report() == f"{said}, headers and repeats counted"
    with pytest.raises(BaseWeightsError, match="memory://nowhere/model: no such file or folder there"):
        load_base("memory://nowhere/model")
    memory.mkdir("/empty")
    with pytest.raises(BaseWeightsError, match=r"memory://empty: expected model weights .*found none"):
        load_base("memory://empty")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"w": "../secret.safetensors"}, "expected shards inside its folder"),
        ({"w": "/etc/passwd"}, "expected shards inside its folder"),
        ({"w": "C:\\x.safetensors"}, "expected shards inside its folder"),
        ({"w": "model.safetensors.index.json"}, "expected shards of tensors, got another index"),
        ({"w": "pytorch_model.bin"}, "expected safetensors, the one kind that is read by byte range"),
        ({"w": 3}, "expected a 'weight_map'"),
        ([], "expected a 'weight_map'"),
    ],
)
def test_an_index_stays_in_its_folder(memory: Any, weight_map: object, match: str) -> None:
    memory.pipe_file("/m/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    with pytest.raises(CheckpointError, match=match):
        RemoteShards("memory://m/model.safetensors.index.json")


def test_names_of_shards_are_names_not_parts_of_a_url(server: Behaviour) -> None:
    (server.root / "m").mkdir()
    save_file({"w": torch.ones(2, 2)}, server.root / "m" / "a %2e?b#c.safetensors")
    index = {"weight_map": {"w": "a %2e?b#c.safetensors"}}
    (server.root / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_base(f"{server.url}/m").matrix(Target("w")), torch.ones(2, 2))


def test_a_query_goes_with_every_file_of_a_folder_and_is_never_shown(server: Behaviour) -> None:
    written = sharded(server.root / "model")
    server.forbidden = "sig=right"
    base = load_base(f"{server.url}/model?sig=right")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(base.matrix(Target(name), (6, 4)), written[name])
    assert base.source == f"{server.url}/model"
    assert "right" not in repr(base)
    with pytest.raises(BaseWeightsError, match="found none") as caught:
        load_base(f"{server.url}/model?sig=wrong")
    assert "wrong" not in str(caught.value)
    assert shown("s3://key:secret@bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter.pt", "model.gguf", "adapters.npz"])
def test_other_files_are_not_fetched_whole(server: Behaviour, name: str) -> None:
    (server.root / name).write_bytes(b"PK" + bytes(100))
    for load in (load_base, load_adapter):
        with pytest.raises(
            (BaseWeightsError, AdapterFormatError), match=r"expected safetensors, the one kind .*Download"
        ):
            load(f"{server.url}/{name}")
    assert server.sent == 0


def test_unknown_protocols_and_chains_are_named() -> None:
    for source, match in (
        ("nonsense://x/y.safetensors", "nonsense://x/y.safetensors: protocol 'nonsense'"),
        ("memory://a::b/c.safetensors", "expected one URL, got a chain"),
    ):
        with pytest.raises(BaseWeightsError, match=match) as caught:
            load_base(source)
        assert "\n" not in str(caught.value)


LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def llama_7b(folder: Path) -> tuple[int, int]:
    """A model of Llama 7B's shapes, real headers and holes for numbers, in two shards: bytes of headers, and of all."""
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in LLAMA_7B.items()} | {
        f"model.layers.{i}.{name}.weight": (4096,) for i in range(32) for name in ("input_layernorm", "post_layernorm")
    }
    shapes |= {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
        "model.norm.weight": (4096,),
    }
    weight_map = {name: f"model-{1 + (i * 2 >= len(shapes))}-of-2.safetensors" for i, name in enumerate(sorted(shapes))}
    headers = whole = 0
    for file in sorted(set(weight_map.values())):
        end = 0
        header = {}
        for name in (name for name, where in weight_map.items() if where == file):
            count = 2 * int(torch.tensor(shapes[name]).prod())
            header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [end, end + count]}
            end += count
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        headers += 8 + len(text)
        whole += 8 + len(text) + end
    index = json.dumps({"metadata": {"total_size": whole - headers}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return headers + len(index), whole - headers


@pytest.mark.parametrize("declared", [True, -5, "x", None, float("nan"), 1e300, [1]], ids=str)
def test_a_size_that_the_index_cannot_mean_is_asked_of_the_server(server: Behaviour, declared: object) -> None:
    save_file({"w": torch.ones(50, 4)}, server.root / "x.safetensors")
    index = {"metadata": {"total_size": declared}, "weight_map": {"w": "x.safetensors"}}
    (server.root / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_base(server.url).bytes_total == (server.root / "x.safetensors").stat().st_size


def test_one_matrix_of_seven_billion_numbers_costs_its_own_bytes(server: Behaviour) -> None:
    headers, whole = llama_7b(server.root)
    base = load_base(server.url)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 31)]
    assert base.find_all(names) == {name: name for name in names}
    for name in names:
        weight = base.matrix(Target(name), (4096, 4096))
        assert weight.shape == (4096, 4096)
        assert weight.dtype == torch.float16
        del weight
    q_proj = 4096 * 4096 * 2
    assert 2 * q_proj < base.bytes_read <= 2 * q_proj + headers
    assert base.bytes_read == server.sent
    assert base.bytes_total == whole
    assert base.report() == "read 0.07 of 13.5 GB"


def peft_adapter(folder: Path, names: list[str], shape: tuple[int, int], r: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, shape[1])
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape[0], r)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_amplification_reads_the_matrices_that_the_adapter_updates_and_no_other(
    server: Behaviour, tmp_path: Path
) -> None:
    written = sharded(server.root / "model")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (1, 3)]
    peft_adapter(tmp_path / "adapter", names, (6, 4))
    adapter = load_adapter(tmp_path / "adapter")
    base = load_base(f"{server.url}/model")
    table = amplification_table(adapter, base)
    local = amplification_table(adapter, load_base(server.root / "model"))
    assert table.equals(local)
    index = (server.root / "model" / "model.safetensors.index.json").stat().st_size
    header = header_of((server.root / "model" / "model-1.safetensors").read_bytes())
    matrices = sum(written[f"{name}.weight"].nbytes for name in names)
    assert base.bytes_read == server.sent == index + header + matrices


@pytest.mark.parametrize("form", ["folder", "file"])
def test_an_adapter_at_a_url_is_read_by_range(server: Behaviour, form: str, tmp_path: Path) -> None:
    peft_adapter(server.root / "lora", ["model.layers.0.self_attn.q_proj"], (6, 4))
    source = f"{server.url}/lora" + ("" if form == "folder" else "/adapter_model.safetensors")
    adapter, local = load_adapter(source), load_adapter(server.root / "lora")
    assert adapter.source == source
    assert adapter.modules["model.layers.0.self_attn.q_proj"].scale == 2.0
    assert adapter.config == local.config
    for again in (adapter, pickle.loads(pickle.dumps(adapter))):
        assert list(again) == list(local)
        for module in local:
            assert torch.equal(again[module].dense(), local[module].dense())
    assert len(pickle.dumps(adapter)) < 1000


def test_several_adapters_in_folders_of_a_url_have_names(memory: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        peft_adapter(tmp_path / name, ["lin"], (6, 4))
    copied_into(memory, tmp_path, "many")
    local = load_adapter(tmp_path, name="b")
    assert torch.equal(load_adapter("memory://many", name="b")["lin"].dense(), local["lin"].dense())
    with pytest.raises(AdapterFormatError, match=r"memory://many: expected adapter_model.safetensors or one"):
        load_adapter("memory://many")
    with pytest.raises(AdapterFormatError, match="no such file or folder there"):
        load_adapter("memory://nothing/here")


def test_an_adapter_alone_in_a_folder_may_have_any_name(memory: Any, tmp_path: Path) -> None:
    peft_adapter(tmp_path / "one", ["lin"], (6, 4))
    (tmp_path / "one" / "adapter_model.safetensors").rename(tmp_path / "one" / "style.safetensors")
    copied_into(memory, tmp_path / "one", "one")
    assert list(load_adapter("memory://one")) == ["lin"]


def test_what_a_source_is_is_decided_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "local").mkdir()
    assert located("org/local") == Path("org/local")
    assert located("org/other") == HubPlace("org/other")
    assert located("org/other", "v2") == HubPlace("org/other", "v2")
    assert located("gpt2") == HubPlace("gpt2")
    assert located("hf://org/name@v1/sub/x.safetensors") == HubPlace("org/name", "v1", "sub/x.safetensors")
    assert located("file:///tmp/a%20b") == Path("/tmp/a b")
    for path in ("a/b/c", "./x", "../x", "/x/y", "org/na--me", "org/..", "x.safetensors", "model.bin", "a b", "é"):
        assert located(path) == Path(path)
    assert located(Path("org/other")) == Path("org/other")
    with pytest.raises(CheckpointError, match="expected a path, a hub id or a URL, got an empty string"):
        located("")
    for source in ("hf://", "hf://datasets/org/name", "hf://spaces/org/name/x", "file://host/share/x"):
        with pytest.raises(CheckpointError, match=f"{source}: expected "):
            located(source)
    for source in (Path("x"), "org/local", "s3://b/x"):
        with pytest.raises(ValueError, match="revision: expected None for what is no repository of the hub, got 'v1'"):
            located(source, "v1")
    with pytest.raises(ValueError, match="revision: expected the one in"):
        located("hf://org/name@v1", "v2")


def test_a_folder_of_a_plain_server_has_no_list(server: Behaviour) -> None:
    folder = RemoteFolder(server.url)
    (server.root / "there.json").write_text("{}")
    assert folder.names() is None
    assert folder.has("there.json")
    assert not folder.has("missing.json")
    assert folder.json("there.json") == {}
    with pytest.raises(BaseWeightsError, match=r"expected model weights \(model.safetensors.index.json.*found none"):
        load_base(server.url)


def test_reading_past_the_end_is_an_error(server: Behaviour) -> None:
    (server.root / "x.json").write_text("{}")
    file = RemoteFile(f"{server.url}/x.json")
    assert file.read(0, 2) == b"{}"
    assert file.read(1, 1) == b""
    with pytest.raises(CheckpointError, match="expected bytes 1 to 3, it has 2"):
        file.read(1, 3)
