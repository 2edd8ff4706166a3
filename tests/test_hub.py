"""Bases and adapters in repositories of the hub, against a local server that answers as the hub does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}
NAME = "model.layers.0.self_attn.q_proj.weight"


@dataclass
class Hub:
    """Repositories as folders ``root/org/name@revision``, and what was asked of them."""

    root: Path
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def repository(self, name: str, revision: str = "main") -> Path:
        folder = self.root / f"{name}@{revision.replace('/', '%2F')}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def described(file: Path, folder: Path) -> dict[str, Any]:
    return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0"}


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            with lock:
                hub.requests.append(f"{self.command} {path}")
            if path == "/api/models/old-name":
                return self.json({"id": "org/model", "sha": COMMITS["main"], "siblings": []})
            if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(revision|tree)/([\w/]+))?", path):
                return self.listing(found[1], found[2], found[3] or "main")
            if found := re.fullmatch(r"/(\w+/[\w-]+)/resolve/(refs/pr/\d+|\w+)/(.+)", path):
                return self.file(found[1], found[2], found[3])
            return self.refuse(404, "EntryNotFound")

        def do_POST(self) -> None:
            """What older clients ask of single files."""
            body = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode())
            path = unquote(self.path)
            with lock:
                hub.requests.append(f"POST {path}")
            found = re.fullmatch(r"/api/models/(\w+/[\w-]+)/paths-info/([\w/]+)", path)
            folder = self.folder(found[1], found[2]) if found else None
            if folder is None:
                return self.refuse(404, "RepoNotFound")
            files = [file for file in folder.rglob("*") if file.is_file() and str(file.relative_to(folder)) in body]
            return self.json([described(file, folder) for file in files])

        def folder(self, repository: str, revision: str) -> Path | None:
            named = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
            folder = hub.root / f"{repository}@{named.replace('/', '%2F')}"
            return folder if folder.is_dir() else None

        def listing(self, repository: str, kind: str | None, revision: str) -> None:
            folder = self.folder(repository, revision)
            if folder is None:
                return self.refuse(404, "RepoNotFound")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if kind == "tree":
                listed = [described(file, folder) for file in files]
                top = [item for item in listed if "/" not in str(item["path"])]
                return self.json(listed if "recursive=true" in self.path.lower() else top)
            sha = COMMITS.get(revision, revision)
            return self.json(
                {"id": repository, "sha": sha, "siblings": [{"rfilename": str(f.relative_to(folder))} for f in files]}
            )

        def file(self, repository: str, revision: str, name: str) -> None:
            folder = self.folder(repository, revision)
            if folder is None or not (folder / name).is_file():
                return self.refuse(404, "EntryNotFound" if folder else "RepoNotFound")
            if repository == "org/gated":
                return self.refuse(403, "GatedRepo")
            data = (folder / name).read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            piece = data[int(found[1]) : int(found[2]) + 1] if found else data
            headers = {
                "X-Repo-Commit": COMMITS.get(revision, revision),
                "ETag": f'"{abs(hash(data))}"',
                "Accept-Ranges": "bytes",
            }
            if found:
                headers["Content-Range"] = f"bytes {found[1]}-{found[2]}/{len(data)}"
            return self.answer(206 if found else 200, piece, headers)

        def json(self, content: Any) -> None:
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                with lock:  # first: whoever has got the bytes may look at the count before this thread runs again
                    hub.sent += len(body) if "/resolve/" in self.path else 0
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as running:
        yield running


def run(hub: Hub, home: Path, code: str, **environment: str) -> Any:
    """What a process with the hub at this server prints as JSON."""
    prelude = """
        import json, pickle, torch, warnings
        import lora_analysis as la
        from lora_analysis import Target
        def failure(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except la.LoraAnalysisError as error:
                return f"{type(error).__name__}: {error}"
    """
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        env={**os.environ, **variables, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def sharded(folder: Path, value: float) -> dict[str, Tensor]:
    """Two layers in two shards."""
    weights = {NAME.replace("0", str(i)): torch.full((6, 4), value + i) for i in range(2)}
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    for name, file in files.items():
        save_file({name: weights[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text("{}")
    return weights


def adapter(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.randn(2, 4, generator=generator)}
    factors[f"{prefix}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def test_a_base_on_the_hub_is_read_by_range_at_its_revision(hub: Hub, tmp_path: Path) -> None:
    for value, revision in ((1.0, "main"), (5.0, "v2"), (9.0, "refs/pr/1")):
        sharded(hub.repository("org/model", revision), value)
    (hub.repository("org/gated") / "model.safetensors").write_bytes(b"x" * 100)
    found = run(
        hub,
        tmp_path,
        f"""
        target = Target({NAME!r})
        base = la.load_base("org/model")
        first = base.matrix(target, (6, 4))
        result = {{"sent": base.bytes_read, "total": base.bytes_total, "source": base.source}}
        result["first"] = first[0, 0].item()
        result["again"] = pickle.loads(pickle.dumps(base)).matrix(target)[0, 0].item()
        result["v2"] = la.load_base("org/model", revision="v2").matrix(target)[0, 0].item()
        result["pr"] = la.load_base("org/model", revision="refs/pr/1").matrix(target)[0, 0].item()
        result["in url"] = la.load_base("hf://org/model@v2/model-0.safetensors").matrix(target)[0, 0].item()
        result["old"] = la.load_base("old-name").matrix(target)[0, 0].item()
        result["errors"] = [
            failure(la.load_base, "org/none"),
            failure(la.load_base, "org/model", revision="v3"),
            failure(la.load_base, "org/gated"),
            failure(la.load_base, "hf://org/model/none.safetensors"),
        ]
        print(json.dumps(result))
        """,
    )
    folder = hub.repository("org/model")
    shards = [(folder / f"model-{i}.safetensors").stat().st_size for i in range(2)]
    assert found["sent"] == shards[0] + (folder / "model.safetensors.index.json").stat().st_size
    assert found["total"] == sum(shards)
    assert found["source"] == "org/model"
    assert (found["first"], found["again"], found["old"]) == (1.0, 1.0, 1.0)
    assert (found["v2"], found["pr"], found["in url"]) == (5.0, 9.0, 5.0)
    none, revision, gated, file = found["errors"]
    assert none.startswith("BaseWeightsError: org/none: no such path here, and no such repository")
    assert revision.startswith("BaseWeightsError: org/model@v3: no such path here, and no such repository, revision")
    assert "HF_TOKEN" in gated
    assert file.startswith("BaseWeightsError: org/model/none.safetensors: no such path here")
    assert not any("\n" in error for error in found["errors"])
    assert not list((tmp_path / "hub").rglob("snapshots"))


def test_an_adapter_on_the_hub_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    adapter(hub.repository("org/lora"), 0)
    adapter(hub.repository("org/lora", "v2"), 1)
    adapter(hub.repository("org/many") / "a", 2)
    adapter(hub.repository("org/many") / "b", 3)
    sharded(hub.repository("org/model"), 1.0)
    (hub.repository("org/lora") / "huge.bin").write_bytes(bytes(1000))
    module = "model.layers.0.self_attn.q_proj"
    code = f"""
        def numbers(source, **options):
            return la.load_adapter(source, **options)[{module!r}].dense()[0].tolist()
        adapter = la.load_adapter("org/lora")
        result = {{"source": adapter.source, "scale": adapter.modules[{module!r}].scale}}
        result["lora"], result["v2"] = numbers("org/lora"), numbers("org/lora", revision="v2")
        result["again"] = pickle.loads(pickle.dumps(adapter))[{module!r}].dense()[0].tolist()
        result["b"] = numbers("org/many", name="b")
        result["file"] = numbers("hf://org/many/b/adapter_model.safetensors")
        result["errors"] = [
            failure(la.load_adapter, "org/many"),
            failure(la.load_adapter, "org/model"),
            failure(la.load_adapter, "org/none"),
            failure(la.load_adapter, "hf://org/lora/none.safetensors"),
        ]
        print(json.dumps(result))
    """
    found = run(hub, tmp_path, code)
    import lora_analysis as la

    def local(folder: Path) -> Any:
        return pytest.approx(la.load_adapter(folder)[module].dense()[0].tolist())

    assert found["source"] == "org/lora"
    assert found["scale"] == 2.0
    assert found["lora"] == found["again"] == local(hub.repository("org/lora"))
    assert found["v2"] == local(hub.repository("org/lora", "v2"))
    assert found["b"] == found["file"] == local(hub.repository("org/many") / "b")
    many, model, none, file = found["errors"]
    assert file.startswith("AdapterFormatError: org/lora/none.safetensors: no such path here, and no such")
    assert many.startswith(
        "AdapterFormatError: org/many: expected one adapter, found 2 in folders (a, b). Pass its name="
    )
    assert model.startswith(
        "AdapterFormatError: org/model: expected an adapter, found a whole model (model.safetensors.i"
    )
    assert none.startswith("AdapterFormatError: org/none: no such path here")
    assert "huge.bin" not in " ".join(hub.requests)
    # A second process finds them in the cache, and asks nothing, with or without a network.
    cached = (
        'print(json.dumps([numbers("org/lora"), numbers("org/many", name="b"), failure(la.load_adapter, "org/x")]))'
    )
    again = textwrap.dedent(code).split("adapter = ")[0] + cached
    before = list(hub.requests)
    lora, b, error = run(hub, tmp_path, again, HF_HUB_OFFLINE="1")
    assert hub.requests == before
    assert (lora, b) == (found["lora"], found["b"])
    assert error.startswith("AdapterFormatError: org/x: expected it in the local cache, as huggingface_hub is offline")


def test_what_the_local_cache_holds_of_a_base_is_read_from_there(hub: Hub, tmp_path: Path) -> None:
    sharded(hub.repository("org/model"), 1.0)
    sharded(hub.repository("org/half"), 3.0)
    code = f"""
        from huggingface_hub import hf_hub_download, snapshot_download
        for file in ("model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"):
            hf_hub_download("org/model", file)
        hf_hub_download("org/half", "model.safetensors.index.json")
        base = la.load_base("org/half")  # whose shards are not in the cache
        print(json.dumps([base.matrix(Target({NAME!r}))[0, 0].item(), base.bytes_read]))
    """
    value, read = run(hub, tmp_path, code)
    assert value == 3.0
    assert read > 0
    before = list(hub.requests)
    offline = f"""
        base = la.load_base("org/model")
        value = base.matrix(Target({NAME!r}))[0, 0].item()
        print(json.dumps([value, base.source, failure(la.load_base, "org/half"), failure(la.load_base, "org/x")]))
    """
    value, source, half, none = run(hub, tmp_path, offline, HF_HUB_OFFLINE="1")
    assert hub.requests == before
    assert (value, source) == (1.0, "org/model")
    assert "expected the shard 'model-0.safetensors' beside it, found none" in half
    assert none.startswith("BaseWeightsError: org/x: expected it in the local cache, as huggingface_hub is offline")
    assert "\n" not in half + none


def test_a_hub_that_cannot_be_asked_is_named(hub: Hub, tmp_path: Path) -> None:
    """A mistyped path looks like the id of a repository."""
    code = """
        sources = ("runs/r8", "r8", "hf://org/name/adapter_model.safetensors")
        errors = [failure(load, source) for source in sources for load in (la.load_adapter, la.load_base)]
        print(json.dumps(errors))
    """
    errors = run(hub, tmp_path, code, HF_ENDPOINT="http://127.0.0.1:9")
    for error in errors:
        assert (
            "no such path here, and the Hugging Face hub could not be asked whether it has such a repository" in error
        )
        assert "\n" not in error


def test_offline_the_local_cache_is_read_as_a_folder(hub: Hub, tmp_path: Path) -> None:
    """Also what has no configuration, or a name of its own."""
    adapter(hub.repository("org/lora"), 0)
    (hub.repository("org/lora") / "adapter_config.json").unlink()
    style = hub.repository("org/style")
    save_file(
        {"unet.mid.to_q.lora.up.weight": torch.ones(4, 2), "unet.mid.to_q.lora.down.weight": torch.ones(2, 3)},
        style / "s.safetensors",
    )
    save_file({NAME: torch.eye(3)}, hub.repository("org/base") / "odd.safetensors")
    fetch = """
        la.load_adapter("org/lora")
        la.load_adapter("org/style")
        from huggingface_hub import hf_hub_download
        hf_hub_download("org/base", "odd.safetensors")
        print("0")
    """
    run(hub, tmp_path, fetch)
    before = list(hub.requests)
    code = f"""
        result = [list(la.load_adapter(source)) for source in ("org/lora", "org/style", "hf://org/style/s.safetensors")]
        result += [la.load_base(source).matrix(Target({NAME!r})).tolist() for source in ("org/base", "hf://org/base/odd.safetensors")]
        result += [failure(la.load_adapter, "org/style", revision="v2"), failure(la.load_base, "hf://org/base/none.safetensors")]
        print(json.dumps(result))
    """
    lora, style_a, style_b, base_a, base_b, *errors = run(hub, tmp_path, code, HF_HUB_OFFLINE="1")
    assert hub.requests == before
    assert lora == ["model.layers.0.self_attn.q_proj"]
    assert style_a == style_b == ["unet.mid.to_q"]
    assert base_a == base_b == torch.eye(3).tolist()
    for error in errors:
        assert "expected it in the local cache, as huggingface_hub is offline (HF_HUB_OFFLINE), found none" in error


def test_a_base_is_read_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    sharded(hub.repository("org/model"), 1.0)
    code = f"""
        base = la.load_base("org/model")
        print(json.dumps([base.matrix(Target({NAME!r}))[0, 0].item(), base.source, base.heads]))
    """
    (hub.repository("org/model") / "config.json").write_text('{"num_attention_heads": 6, "num_key_value_heads": 2}')
    assert run(hub, tmp_path, code) == [1.0, "org/model", [6, 2]]
    files = [request.split(" ")[1] for request in hub.requests if "/resolve/" in request]
    assert files
    assert all(file.startswith(f"/org/model/resolve/{COMMITS['main']}/") for file in files)
