"""One kind of matrix of a whole base: what it costs to open, and to read, from files and over HTTP.

A base of Llama's shapes in bfloat16, four shards behind an index; asked for is ``q_proj`` of every layer, a
fifteenth of it. Files are in the page cache: this measures what is done, not the disk. A matrix that is read is copied
out of the file's mapping, by every contender.

1. ``load_base`` alone, against opening every shard with ``safe_open``, and against reading the index alone (floor).
2. ``load_base`` and the matrices, against ``safe_open(...).get_tensor`` of the same (floor), and against peers that
   load the whole state dict first: ``safetensors.torch.load_file``, and ``torch.load`` of the same in torch's format.
3. The same over HTTP from a server in this process, against the same ranges asked for by ``http.client`` on one
   connection (floor), and against fetching all shards whole (peer). Bytes are those that the server sent.
4. The same base quantised to GGUF Q8_0: ``load_base`` and the matrices, against ``gguf.GGUFReader`` and its
   ``dequantize`` (peer).

    python tests/benchmarks/bench_reading.py [--quick] [--threads N]
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timing import arguments, medians, table, threads
from torch import Tensor

from lora_analysis import load_base
from lora_analysis.adapter import Target

sys.path.append(str(Path(__file__).parents[1]))
from range_server import Behaviour, serving

SHARDS = 4


def shapes(d: int) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear layers of a Llama of this width."""
    wide = 11 * d // 4
    attention = {f"self_attn.{side}_proj": (d, d) for side in "qkvo"}
    return attention | {"mlp.gate_proj": (wide, d), "mlp.up_proj": (wide, d), "mlp.down_proj": (d, wide)}


def written(folder: Path, layers: int, d: int) -> list[str]:
    """A base in shards, and in one file of torch's and one of GGUF's; the names of its q_proj."""
    import gguf

    files = {}
    whole = {}
    (folder / "model").mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * layers // SHARDS, (shard + 1) * layers // SHARDS)
        tensors = {
            f"model.layers.{i}.{name}.weight": torch.randn(shape).bfloat16()
            for i in numbers
            for name, shape in shapes(d).items()
        }
        save_file(tensors, folder / "model" / f"model-{shard}.safetensors")
        files |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
        whole |= tensors
    total = {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    index = json.dumps({"metadata": total, "weight_map": files})
    (folder / "model" / "model.safetensors.index.json").write_text(index)
    torch.save(whole, folder / "model.bin")
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    for i in range(layers):
        for name, ours in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            weight = whole[f"model.layers.{i}.{ours}.weight"].float().numpy()
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{i}.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [name for name in files if "q_proj" in name]


def ours(source: str | Path, names: list[str]) -> list[Tensor]:
    base = load_base(source)
    return [base.matrix(Target(name)).clone() for name in names]


def by_safetensors(folder: Path, names: list[str]) -> list[Tensor]:
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = []
    for file in dict.fromkeys(files[name] for name in names):
        with safe_open(folder / file, framework="pt") as shard:
            found += [shard.get_tensor(name).clone() for name in names if files[name] == file]
    return found


def whole_state_dict(folder: Path, names: list[str]) -> list[Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    return [tensors[name] for name in names]


def opening(folder: Path, rounds: int) -> None:
    index, shards = folder / "model.safetensors.index.json", list(folder.glob("*.safetensors"))
    times = medians(
        {
            "ours: load_base": lambda: load_base(folder),
            "safe_open of every shard": lambda: [safe_open(file, framework="pt") for file in shards],
            "floor: the index alone": lambda: json.loads(index.read_text()),
        },
        rounds=rounds,
    )
    table("Opening a base", times, ours="ours: load_base", floors=["floor: the index alone"])


def reading(folder: Path, names: list[str], rounds: int) -> None:
    model = folder / "model"
    floor = "floor: safe_open and get_tensor"
    contenders = {
        "ours: load_base and matrix": lambda: ours(model, names),
        floor: lambda: by_safetensors(model, names),
        "peer: the whole state dict by load_file": lambda: whole_state_dict(model, names),
        "peer: torch.load of the whole": lambda: torch.load(folder / "model.bin", weights_only=True),
    }
    for a, b in zip(ours(model, names), by_safetensors(model, names), strict=True):
        assert torch.equal(a, b)
    times = medians(contenders, rounds=rounds)
    title = f"Reading {len(names)} matrices of a base of {sum(f.stat().st_size for f in model.iterdir()) / 1e6:.0f} MB"
    table(title, times, ours="ours: load_base and matrix", floors=[floor])


@contextmanager
def connected(url: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    try:
        yield connection
    finally:
        connection.close()


def ranges(server: Behaviour, wanted: list[tuple[str, str]]) -> int:
    """The same ranges one after another, by the standard library; bytes that came."""
    with connected(server.url) as connection:
        count = 0
        for path, piece in wanted:
            connection.request("GET", path, headers={"Range": piece})
            count += len(connection.getresponse().read())
        return count


def fetched(server: Behaviour, names: list[str]) -> int:
    with connected(server.url) as connection:
        count = 0
        for name in names:
            connection.request("GET", f"/{name}")
            count += len(connection.getresponse().read())
        return count


def over_http(folder: Path, names: list[str], rounds: int) -> None:
    files = sorted(path.name for path in folder.iterdir())
    with serving(folder) as server:
        base = load_base(server.url)
        for name in names:
            base.matrix(Target(name))
        assert base.bytes_read == server.sent
        print(f"\nOver HTTP: {base.report()} in {len(server.requests)} requests")
        wanted = [(path, piece) for method, path, piece in server.requests if method == "GET" and piece]
        wanted = [(path, piece) for path, piece in wanted if (folder / path.lstrip("/")).is_file()]
        floor = "floor: the same ranges by http.client"
        contenders = {
            "ours: load_base and matrix": lambda: ours(server.url, names),
            floor: lambda: ranges(server, wanted),
            "peer: all files whole, by http.client": lambda: fetched(server, files),
        }
        times = medians(contenders, rounds=rounds)
    table("Reading them over HTTP", times, ours="ours: load_base and matrix", floors=[floor])


def dequantising(folder: Path, names: list[str], rounds: int) -> None:
    import gguf

    def peer() -> list[object]:
        reader = gguf.GGUFReader(folder / "model.gguf")
        wanted = [tensor for tensor in reader.tensors if "attn_q" in tensor.name]
        return [gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in wanted]

    times = medians(
        {
            "ours: load_base and matrix": lambda: ours(folder / "model.gguf", names),
            "peer: GGUFReader and dequantize": peer,
        },
        rounds=rounds,
    )
    table("Reading them from GGUF, Q8_0", times, ours="ours: load_base and matrix")


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    layers, d, rounds = (4, 128, 3) if options.quick else (16, 1024, 7)
    with threads(options.threads), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = written(folder, layers, d)
        opening(folder / "model", rounds)
        reading(folder, names, rounds)
        over_http(folder / "model", names, rounds)
        dequantising(folder, names, rounds)


if __name__ == "__main__":
    main()
