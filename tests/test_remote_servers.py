"""Servers that misbehave: what they send is held against what was asked for, and nobody waits for ever."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from range_server import Answer, Behaviour, serving
from safetensors.torch import save, save_file

from lora_analysis import amplification_table, load_adapter, load_base
from lora_analysis.adapter import Adapter, Target
from lora_analysis.checkpoint import remote, remote_http
from lora_analysis.checkpoint.folders import RemoteFolder
from lora_analysis.checkpoint.remote_safetensors import RemoteSafetensors
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, CheckpointError
from lora_analysis.update import LowRankUpdate

WEIGHT = torch.arange(24.0).reshape(6, 4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Behaviour]:
    (tmp_path / "served").mkdir()
    save_file({"w": WEIGHT}, tmp_path / "served" / "x.safetensors")
    with serving(tmp_path / "served") as behaviour:
        yield behaviour


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and little patience."""
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    monkeypatch.setattr(remote_http, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(remote_http, "_CONNECT_SECONDS", 0.3)
    monkeypatch.setattr("lora_analysis.checkpoint.remote_failures._FIRST_PAUSE", 0.0)


def with_headers(**changed: str | None) -> Callable[[Answer], Answer]:
    def change(answer: Answer) -> Answer:
        status, headers, body = answer
        headers = headers | {name.replace("_", "-"): value for name, value in changed.items() if value is not None}
        return status, {name: value for name, value in headers.items() if changed.get(name, "") is not None}, body

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_headers(Content_Range="bytes 1-8/200"), r"expected bytes 0 to 7 .* announces 'bytes 1-8/200'"),
        (with_headers(Content_Range="bytes 0-6/200"), r"expected bytes 0 to 7 .* announces 'bytes 0-6/200'"),
        (with_headers(Content_Range="bytes 0-7/*"), r"expected bytes 0 to 7 .* announces 'bytes 0-7/\*'"),
        (with_headers(Content_Range="bytes 0-7/7"), r"announces 'bytes 0-7/7'"),
        (with_headers(Content_Range="bytes 0-7/" + "9" * 40), r"announces 'bytes 0-7/999"),
        (with_headers(Content_Range="nonsense" * 100), r"announces 'nonsense"),
        (lambda answer: (206, {"Content-Length": "8"}, answer[2]), r"announces 'nothing'"),
        (lambda answer: (200, {"Content-Length": "8"}, answer[2]), "expected a server that answers byte ranges"),
        (with_headers(Content_Encoding="gzip"), r"as they are in the file, the server compresses them \('gzip'\)"),
        (lambda answer: (206, answer[1] | {"Content-Length": "9"}, answer[2] + b"x"), "expected 8 bytes .*got more"),
        (lambda answer: (416, {"Content-Length": "0"}, b""), "expected bytes from 0 on, it has none there"),
        (
            lambda answer: (302, {"Content-Length": "0", "Location": "/x.safetensors"}, b""),
            "could not be read: TooManyRedirects",
        ),
        (lambda answer: (204, {}, b""), "expected a server that answers byte ranges"),
    ],
)
def test_an_answer_to_another_question_is_refused(
    server: Behaviour, change: Callable[[Answer], Answer], match: str
) -> None:
    server.change = change
    with pytest.raises(CheckpointError, match=match) as caught:
        RemoteSafetensors(f"{server.url}/x.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_page_in_place_of_a_range_is_not_taken_for_numbers(server: Behaviour) -> None:
    """A login page of as many bytes as the tensor has: fsspec alone would give it for the tensor."""
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    server.change = lambda answer: (200, {"Content-Length": str(len(answer[2]))}, b"<" * len(answer[2]))
    with pytest.raises(CheckpointError, match="expected a server that answers byte ranges"):
        checkpoint["w"]


def test_a_range_of_other_bytes_is_not_taken_for_numbers(server: Behaviour) -> None:
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    size = (server.root / "x.safetensors").stat().st_size
    server.change = with_headers(Content_Range=f"bytes 0-95/{size}")
    with pytest.raises(CheckpointError, match=r"the server announces 'bytes 0-95/"):
        checkpoint["w"]


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_is_replaced_while_it_is_read_is_noticed(server: Behaviour, same_size: bool) -> None:
    server.headers = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    checkpoint = RemoteSafetensors(f"{server.url}/x.safetensors")
    assert torch.equal(checkpoint["w"], WEIGHT)
    server.headers = {"ETag": '"2"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert torch.equal(checkpoint["w"], WEIGHT)  # another of several servers, with its own tags
    if same_size:
        server.headers["Last-Modified"] = "Tue, 02 Jan 2024 00:00:00 GMT"
    save_file({"w": WEIGHT + 1 if same_size else torch.zeros(60, 4)}, server.root / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: it changed while it was read\. Open it again\.$"):
        checkpoint["w"]


def test_ranges_without_a_length_are_read(server: Behaviour) -> None:
    """As a server gives them that makes its answers up as it goes."""
    server.change = lambda answer: (206, {"Content-Range": answer[1]["Content-Range"]}, answer[2])
    assert torch.equal(RemoteSafetensors(f"{server.url}/x.safetensors")["w"], WEIGHT)


def test_addresses_that_may_only_be_got_are_read(server: Behaviour) -> None:
    server.heads = False
    assert torch.equal(load_base(f"{server.url}/x.safetensors").matrix(Target("w")), WEIGHT)
    assert {method for method, _, _ in server.requests} == {"GET"}


def test_every_file_costs_as_few_requests_as_it_can(server: Behaviour) -> None:
    """One that tells its size, one for the header, one a tensor; one a name that is looked for."""
    (server.root / "x.safetensors").rename(server.root / "model.safetensors")
    base = load_base(server.url)
    base.matrix(Target("w"))
    assert [
        (Path(path).name, wanted) for _, path, wanted in server.requests if Path(path).name == "model.safetensors"
    ] == [
        ("model.safetensors", "bytes=0-7"),
        ("model.safetensors", f"bytes=8-{len(save({'w': WEIGHT})) - 97}"),
        ("model.safetensors", f"bytes={len(save({'w': WEIGHT})) - 96}-{len(save({'w': WEIGHT})) - 1}"),
    ]
    assert len(server.requests) == 5  # model_index.json and model.safetensors.index.json are not there
    assert base.bytes_read == server.sent


def test_a_mark_of_a_place_in_a_page_is_no_part_of_an_address(server: Behaviour) -> None:
    """Behind it every name of a file would be lost, and the server give the same page for all."""
    (server.root / "m").mkdir()
    save_file({"w": WEIGHT}, server.root / "m" / "model.safetensors")
    for source in (f"{server.url}/x.safetensors#files", f"{server.url}/m#files", f"{server.url}/m?a=1#b?c"):
        assert torch.equal(load_base(source).matrix(Target("w")), WEIGHT)


def test_redirects_are_followed(server: Behaviour, tmp_path: Path) -> None:
    with serving(server.root) as other:
        server.redirect = other.url
        assert torch.equal(RemoteSafetensors(f"{server.url}/x.safetensors")["w"], WEIGHT)
        server.redirect = server.url
        with pytest.raises(CheckpointError, match="could not be read: TooManyRedirects"):
            RemoteSafetensors(f"{server.url}/x.safetensors")


@pytest.mark.usefixtures("hurried")
def test_a_silent_server_is_given_up(server: Behaviour) -> None:
    server.silence = 5
    with pytest.raises(CheckpointError, match=r"x\.safetensors: could not be read: TimeoutError: no answer in time\.$"):
        RemoteSafetensors(f"{server.url}/x.safetensors")


@pytest.mark.usefixtures("hurried")
def test_a_server_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps no one waiting for ever."""
    monkeypatch.setattr(remote_http, "_SLOWEST", 1e9)
    stop = threading.Event()

    def trickle(listening: socket.socket) -> None:
        while not stop.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-7/800\r\nContent-Length: 8\r\n\r\n")
                for _ in range(7):
                    if stop.wait(0.2):
                        break
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        break

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        thread = threading.Thread(target=lambda: [trickle(listening) for _ in iter(stop.is_set, True)], daemon=True)
        thread.start()
        with pytest.raises(CheckpointError, match="could not be read: TimeoutError: no answer in time"):
            RemoteSafetensors(f"http://127.0.0.1:{listening.getsockname()[1]}/x.safetensors")
        stop.set()
        thread.join()


@pytest.mark.usefixtures("hurried")
def test_credentials_are_in_no_message_and_no_traceback(server: Behaviour) -> None:
    secret = "".join(["hid", "den"])
    sources = [
        f"{server.url}/none.safetensors?sig={secret}",
        f"{server.url}/none?sig={secret}",
        f"{server.url}/none.safetensors#{secret}",
        f"{server.url.replace('//', f'//me:{secret}@')}/none.safetensors",
        f"http://me:{secret}@127.0.0.1:9/x.safetensors?sig={secret}",
        f"http://me:{secret}@nowhere.invalid/x.safetensors?sig={secret}",
        f"nonsense://me:{secret}@host/x.safetensors",
        f"ftp://me:{secret}@127.0.0.1:9/x.safetensors",
    ]
    for source in sources:
        for load in (load_base, load_adapter):
            with pytest.raises((BaseWeightsError, AdapterFormatError)) as caught:
                load(source)
            assert secret not in "".join(traceback.format_exception(caught.value)), source
    base = load_base(f"{server.url}/x.safetensors?sig={secret}")
    assert secret not in f"{base!r} {base.source} {base.notes} {base.report()}"


def test_many_threads_read_the_same_numbers(server: Behaviour) -> None:
    """Shards are opened once, whoever asks first, and every byte is counted."""
    (server.root / "m").mkdir()
    weights = {f"layers.{i}.w.weight": torch.randn(8, 6) for i in range(24)}
    files = {name: f"model-{i % 6}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, server.root / "m" / file)
    (server.root / "m" / "model.safetensors.index.json").write_text(
        '{"weight_map": {' + ", ".join(f'"{name}": "{file}"' for name, file in files.items()) + "}}"
    )
    base = load_base(f"{server.url}/m")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: base.matrix(Target(name)), list(weights) * 4))
    for name, matrix in zip(list(weights) * 4, found, strict=True):
        assert torch.equal(matrix, weights[name])
    assert base.bytes_read == server.sent
    for file in set(files.values()):
        assert server.gets(file).count("bytes=0-7") == 1
    adapter = Adapter(
        {name.removesuffix(".weight"): LowRankUpdate(torch.randn(8, 2), torch.randn(2, 6), 1.0) for name in weights}
    )
    table = amplification_table(adapter, base, workers=8)
    assert table.equals(amplification_table(adapter, load_base(server.root / "m"), workers=1))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_bases_that_are_gone_leave_no_files_or_connections_open(server: Behaviour, tmp_path: Path) -> None:
    local = tmp_path / "served" / "x.safetensors"

    def opened() -> int:
        gc.collect()
        time.sleep(0.05)
        return len(list(Path("/proc/self/fd").iterdir()))

    for source in (f"{server.url}/x.safetensors", local):
        load_base(source).matrix(Target("w"))
        before = opened()
        for _ in range(12):
            load_base(source).matrix(Target("w"))
        assert opened() <= before + 2, source


def test_what_a_folder_knows_of_a_file_is_asked_once(server: Behaviour) -> None:
    (server.root / "there.json").write_text('{"a": 1}')
    folder = RemoteFolder(server.url)
    for _ in range(3):
        assert folder.has("there.json")
        assert not folder.has("missing.json")
        assert folder.json("there.json") == {"a": 1}
    assert server.gets("there.json") == ["bytes=0-7"]  # eight bytes, the whole of it
    assert len(server.gets("missing.json")) == 1
