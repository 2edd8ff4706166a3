"""Checkpoints: what was written is read, and any other file is a named error in one line, executed never."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.checkpoint import (
    Checkpoint,
    SafetensorsFile,
    Shards,
    StateDict,
    nbytes,
    open_checkpoint,
    read_json,
)
from lora_analysis.errors import CheckpointError, LoraAnalysisError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
}


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert len(checkpoint) == len(tensors)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert nbytes(checkpoint, name) == tensor.numel() * tensor.itemsize
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint[name].dtype == tensor.dtype
    assert "other" not in checkpoint


def one_line(path: Path, match: str, read: Callable[[Path], object] = open_checkpoint) -> str:
    """Assert that reading fails with a ``CheckpointError`` of one line that starts with the file."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_a_safetensors_file_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(TENSORS, path, metadata={"format": "pt", "note": "x"})
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, SafetensorsFile)
    assert_holds(checkpoint, TENSORS)
    assert checkpoint.metadata == {"format": "pt", "note": "x"}
    assert_holds(pickle.loads(pickle.dumps(checkpoint)), TENSORS)


def test_a_header_without_metadata_has_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    assert open_checkpoint(path).metadata == {}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older than torch 1.6"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_torch_file_is_read(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, TENSORS)
    assert checkpoint.metadata == {}


def test_parameters_and_buffers_of_a_module_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    module = nn.BatchNorm1d(3)
    torch.save(module.state_dict(keep_vars=True), path)
    assert_holds(open_checkpoint(path), dict(module.state_dict()))


def test_content_decides_what_a_file_is(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.bin")
    assert isinstance(open_checkpoint(tmp_path / "model.bin"), SafetensorsFile)
    assert_holds(open_checkpoint(tmp_path / "model.bin"), TENSORS)


@pytest.mark.parametrize("path", [["state_dict"], ["model_state_dict"], ["model"], ["module"], ["model", "state_dict"]])
@pytest.mark.parametrize(
    "beside",
    [{}, {"epoch": 3, "args": {"lr": 0.1}}, {"best_acc1": torch.tensor(0.9), "step": torch.tensor(3)}],
    ids=["alone", "settings", "scores"],
)
def test_a_nested_state_dict_is_found(tmp_path: Path, path: list[str], beside: dict[str, Any]) -> None:
    content: dict[str, Any] = TENSORS
    for key in reversed(path):
        content = {**beside, key: content}
    torch.save(content, tmp_path / "model.pt")
    assert_holds(open_checkpoint(tmp_path / "model.pt"), TENSORS)


def test_tensors_beside_settings_are_found(tmp_path: Path) -> None:
    torch.save({**TENSORS, "epoch": 3, "model": "roberta"}, tmp_path / "model.pt")
    assert_holds(open_checkpoint(tmp_path / "model.pt"), TENSORS)


def test_a_state_dict_of_scalars_is_one(tmp_path: Path) -> None:
    scalars = {"temperature": torch.tensor(1.0), "bias": torch.tensor(2.0)}
    torch.save(scalars, tmp_path / "model.pt")
    assert_holds(open_checkpoint(tmp_path / "model.pt"), scalars)


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "model.pt")
    one_line(tmp_path / "model.pt", "expected a mapping of names to tensors, got a dict without named tensors")


def test_a_state_dict_in_memory_is_a_checkpoint() -> None:
    assert_holds(StateDict(TENSORS), TENSORS)
    assert StateDict(TENSORS, {"a": "b"}).metadata == {"a": "b"}
    with pytest.raises(KeyError, match="other"):
        StateDict(TENSORS)["other"]


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    file = open_checkpoint(tmp_path / "model.safetensors")
    for ask in (file.__getitem__, file.shape, file.dtype):
        with pytest.raises(KeyError, match="other"):
            ask("other")


def sharded(folder: Path, weight_map: object, files: dict[str, dict[str, Tensor]] | None = None) -> Path:
    for name, tensors in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("names", [("1.safetensors", "2.safetensors"), ("1.bin", "2.bin"), ("sub/1.safetensors",) * 2])
def test_shards_behind_an_index_are_one_checkpoint(tmp_path: Path, names: tuple[str, str]) -> None:
    weight_map = {name: names[i % 2] for i, name in enumerate(TENSORS)}
    files = {file: {n: t for n, t in TENSORS.items() if weight_map[n] == file} for file in names}
    checkpoint = open_checkpoint(sharded(tmp_path, weight_map, files))
    assert isinstance(checkpoint, Shards)
    assert_holds(checkpoint, TENSORS)
    assert_holds(pickle.loads(pickle.dumps(checkpoint)), TENSORS)


def test_a_shard_is_opened_when_one_of_its_tensors_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(3)}}
    opened: list[str] = []
    init = SafetensorsFile.__init__

    def counting_init(self: SafetensorsFile, path: Path) -> None:
        opened.append(path.name)
        init(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", counting_init)
    checkpoint = open_checkpoint(sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, files))
    assert (list(checkpoint), opened) == (["a", "b"], [])
    checkpoint["b"]
    checkpoint.shape("b")
    assert opened == ["2.safetensors"]


OUTSIDE = [
    "../model.safetensors",
    "sub/../../model.safetensors",
    "..",
    "/etc/passwd",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "..\\model.safetensors",
    "sub\\..\\..\\model.safetensors",
    "\\\\server\\share\\model.safetensors",
    "\\model.safetensors",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_never_reaches_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "inner" / "sub").mkdir(parents=True)
    one_line(
        sharded(tmp_path / "inner", {"a": name}), f"expected shards inside its folder, got {re.escape(repr(name))}"
    )


@pytest.mark.parametrize("name", ["missing.safetensors", ".", "\0", "x" * 5000, "a\nb", "\ud800"])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    one_line(sharded(tmp_path, {"a": name}), f"expected the shard {re.escape(repr(name[:100]))} beside it, found none")


def test_an_index_of_indices_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"a": "model.safetensors.index.json"})
    one_line(index, "expected shards of tensors, got another index, 'model.safetensors.index.json'")


def test_a_tensor_absent_from_its_shard_is_named(tmp_path: Path) -> None:
    files = {"1.safetensors": {"a": torch.ones(2)}}
    checkpoint = open_checkpoint(sharded(tmp_path, {"a": "1.safetensors", "b\n": "1.safetensors"}, files))
    assert torch.equal(checkpoint["a"], torch.ones(2))
    for ask in (checkpoint.__getitem__, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match=r"expected 'b\\n' in '1.safetensors', it is not there") as caught:
            ask("b\n")
        assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": {"a": torch.ones(2)}})
    written(tmp_path / "1.safetensors", b"")
    one_line(tmp_path / "1.safetensors", "an empty file", lambda _: open_checkpoint(index)["a"])


@pytest.mark.parametrize("weight_map", [None, [], "a", 3, {"a": 3}, {"a": None}, {"a": {"b": "c"}}], ids=str)
def test_a_weight_map_maps_names_to_files(tmp_path: Path, weight_map: object) -> None:
    one_line(sharded(tmp_path, weight_map), "expected a 'weight_map' of tensor names to file names")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"{", "expected JSON, got 1 bytes"),
        (b"\xff\xfe{}", "expected JSON"),
        (b"[" * 100_000, "expected JSON, got 100,000 bytes"),
        (b"1" * 10_000, "expected JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"<html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
    ids=["empty", "cut", "encoding", "deep", "long number", "list", "html", "lfs"],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    one_line(written(tmp_path / "model.safetensors.index.json", content), match)
    one_line(written(tmp_path / "config.json", content), match, read_json)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.bin", "a.index.json"):
        one_line(tmp_path / name, r"no such file\.$")
    one_line(tmp_path / "config.json", r"no such file\.$", read_json)


def test_directories_are_no_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.bin", "a.gguf", "a.npz", "a.index.json"):
        (tmp_path / name).mkdir()
        one_line(tmp_path / name, r"expected a file, got a directory\.$")


def read_all(path: Path) -> dict[str, Tensor]:
    """Everything a caller can ask of a checkpoint."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint:
        checkpoint.shape(name), checkpoint.dtype(name)
    return {name: checkpoint[name] for name in checkpoint}


LEGACY = "legacy.bin"
FILES = ("model.safetensors", "model.bin", LEGACY)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("intact")
    tensors = {"m.lora_A.weight": torch.randn(2, 5), "m.lora_B.weight": torch.randn(4, 2), "n": torch.arange(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "model.bin")
    torch.save(tensors, folder / LEGACY, _use_new_zipfile_serialization=False)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 3, 7, 8, 9, 40, 200, 0.5, 0.9, -2, -1])
def test_a_truncated_file_is_named(tmp_path: Path, intact: dict[str, bytes], name: str, kept: float) -> None:
    content = intact[name]
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    message = one_line(
        written(tmp_path / name, content[:length]), r"expected a (safetensors|torch) file, got", read_all
    )
    assert "again" in message


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "shape larger than its bytes": header({"a": entry([4, 4], 0, 8)}, bytes(8)),
    "shape smaller than its bytes": header({"a": entry([1], 0, 8)}, bytes(8)),
    "overlapping": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "beyond the end": header({"a": entry([2000], 0, 8000)}, bytes(8)),
    "offsets backwards": header({"a": entry([2], 8, 0)}, bytes(8)),
    "trailing bytes": header({"a": entry([2], 0, 8)}, bytes(16)),
    "product overflows": header({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)),
    "negative size": header({"a": entry([-2], 0, 8)}, bytes(8)),
    "unknown dtype": header({"a": entry([2], 0, 8, "F99")}, bytes(8)),
    "huge length": header({}, length=2**63),
    "length beyond the file": header({}, length=10**8 - 1),
    "not an object": header(b"[1, 2]"),
    "not json": header(b"{'a': "),
    "a name of two lines": header({"a\nb": entry([4, 4], 0, 8)}, bytes(8)),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused_before_anything_is_read(tmp_path: Path, content: bytes) -> None:
    one_line(
        written(tmp_path / "model.safetensors", content), "expected a safetensors file, got .*Fetch or copy it again"
    )


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", header({"a\n": entry([4], 0, 2, "F4")}, bytes(2)))
    one_line(path, r"'a\\n': expected a dtype torch knows, got 'F4'", lambda path: open_checkpoint(path).dtype("a\n"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "got an empty file"),
        (b"<!DOCTYPE html>\n<html></html>\n", "got an HTML or XML page"),
        (b"\n  <?xml version='1.0'?>", "got an HTML or XML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            r"Git LFS pointer \(run 'git lfs pull'\)",
        ),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "got a GGUF file"),
        (b"hello\n", "got 6 bytes that are damaged or something else"),
        (bytes(5000), "got 5,000 bytes that are damaged or something else"),
    ],
    ids=["empty", "html", "xml", "lfs", "gguf", "text", "zeros"],
)
def test_what_a_foreign_file_is_gets_said(tmp_path: Path, suffix: str, content: bytes, match: str) -> None:
    one_line(written(tmp_path / f"model{suffix}", content), match)


def test_a_torch_file_under_the_name_of_safetensors_is_named(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.safetensors")
    one_line(tmp_path / "model.safetensors", r"got a zip archive \(a torch file\?\)")


def test_a_zip_archive_without_tensors_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    one_line(tmp_path / "model.bin", "got a zip archive that is damaged or holds more than tensors")


class Malice:
    """Its pickle runs a command when it is opened without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["alone", "in a zip", "as safetensors", "legacy torch", "beside tensors"])
def test_code_in_a_pickle_is_never_executed(tmp_path: Path, protocol: int, place: str) -> None:
    touched = tmp_path / "touched"
    malice = {"a": Malice(f"touch {touched}")}
    path = tmp_path / ("model.safetensors" if place == "as safetensors" else "model.bin")
    if place == "in a zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(malice, protocol))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    elif place in ("alone", "as safetensors"):
        path.write_bytes(pickle.dumps(malice, protocol))
    else:
        content = {**TENSORS, **malice} if place == "beside tensors" else malice
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=place != "legacy torch")
    one_line(path, "nothing was executed", read_all)
    assert not touched.exists()
    # The same file does run under an ordinary unpickler, or the test would prove nothing.
    if place == "alone":
        pickle.loads(path.read_bytes())
        assert touched.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_more_memory_than_there_is_is_refused(tmp_path: Path, zipped: bool) -> None:
    """torch's restricted reader makes a ``bytearray`` of any length."""
    asking = b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 2**62) + b"\x85R."
    path = written(tmp_path / "model.bin", asking)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", asking)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    one_line(path, r"expected a torch file that fits into memory, got one of [\d,]+ bytes that asks for more")


def test_the_code_a_pickle_asks_for_is_named(tmp_path: Path) -> None:
    written(tmp_path / "model.bin", pickle.dumps({"a": Malice("true")}, 2))
    one_line(tmp_path / "model.bin", r"asks for '(posix|nt)\.system'; nothing was executed. Convert it to safetensors")
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "module.pt")
    one_line(tmp_path / "module.pt", r"asks for 'torch\.nn\.modules\.linear\.Linear'")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], r"a list\."),
        ([torch.ones(2), 3], r"a list\."),
        (torch.ones(2), "a Tensor"),
        ({0: torch.ones(2)}, "a dict without named tensors"),
        ({"epoch": 3}, "a dict without named tensors"),
        ({"model": [torch.ones(2)]}, "a dict without named tensors"),
        (3, "a int"),
    ],
    ids=["empty list", "mixed list", "tensor", "numbered", "settings", "nested list", "number"],
)
def test_a_torch_file_without_named_tensors_is_refused(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    one_line(tmp_path / "model.pt", f"expected a mapping of names to tensors, got {found}")


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "of layout torch.sparse_coo"),
    "meta": (lambda: torch.empty(3, 3, device="meta"), "without data, on device 'meta'"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), "quantised"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("wrap", [dict, lambda tensors: {"state_dict": tensors}], ids=["flat", "nested dict"])
@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|[Qq]uantiz).*:UserWarning")
def test_tensors_that_are_not_dense_are_refused_by_name(
    tmp_path: Path, kind: str, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    make, said = ODD[kind]
    torch.save(wrap({"fine": torch.ones(2, 2), "odd\n": make()}), tmp_path / "model.bin")
    one_line(tmp_path / "model.bin", rf"'odd\\n': expected dense \(strided\) tensors, got one {said}")


def damaged(content: bytes, seed: int) -> bytes:
    """A few bytes flipped, and one time in four the end cut off."""
    rng = random.Random(seed)
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 6])):
        flipped[rng.randrange(len(flipped))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return bytes(flipped[: rng.randrange(len(flipped))] if rng.random() < 0.25 else flipped)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def assert_read_or_named(path: Path) -> None:
    said = ""
    try:
        tensors = read_all(path)
    except LoraAnalysisError as error:
        said = str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert "\n" not in said


@pytest.mark.parametrize("name", FILES)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_damage_is_read_or_named(intact: dict[str, bytes], scratch: Path, name: str, seed: int) -> None:
    path = written(scratch / name, damaged(intact[name], seed))
    assert_read_or_named(path)


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".safetensors", ".bin", ".index.json"]))
def test_arbitrary_bytes_are_named(scratch: Path, content: bytes, suffix: str) -> None:
    path = written(scratch / f"arbitrary{suffix}", content)
    assert_read_or_named(path)


def test_running_out_of_memory_is_not_called_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"m": torch.ones(2)}, tmp_path / "model.bin")

    def exhausted(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    assert "damaged" not in one_line(tmp_path / "model.bin", "expected a torch file that fits into memory, got one of")
