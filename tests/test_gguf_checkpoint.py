"""GGUF files: the same numbers as the gguf library gives, and hostile headers refused cheaply."""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from lora_analysis.base import load_base
from lora_analysis.checkpoint import GGUFFile, open_checkpoint
from lora_analysis.checkpoint.gguf_names import (
    PERMUTED_ARCHITECTURES,
    gguf_place,
    head_counts,
    hugging_face_names,
    permuted_heads,
)
from lora_analysis.errors import CheckpointError

SHAPE = (6, 256)
NATIVE = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
QUANTISED = [Kind.Q4_0, Kind.Q5_1, Kind.Q8_0, Kind.TQ2_0]


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape or SHAPE).astype(np.float32)


def writer(path: Path, architecture: str = "llama") -> gguf.GGUFWriter:
    return gguf.GGUFWriter(path, architecture)


def finished(file: gguf.GGUFWriter) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def add(file: gguf.GGUFWriter, name: str, array: NDArray[np.float32], kind: Kind) -> None:
    if kind in (Kind.F32, Kind.F16):
        file.add_tensor(name, gguf.quants.quantize(array, kind))
    else:
        file.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A file with a tensor of each type and fields of each type."""
    file = writer(tmp_path / "x.gguf")
    file.add_uint32("llama.block_count", 3)
    file.add_float32("adapter.lora.alpha", 16.5)
    file.add_bool("some.flag", True)
    file.add_int64("some.negative", -(2**40))
    file.add_string("general.name", "naïve ÷ name")
    file.add_array("llama.attention.head_count_kv", [2, 4, 2])
    file.add_array("short.strings", ["a", "bb"])
    file.add_token_list([f"token {i}" for i in range(5000)])
    file.add_token_scores([float(i) for i in range(5000)])
    for kind in (*NATIVE, *QUANTISED):
        add(file, f"{kind.name}.weight", numbers(), kind)
    file.add_tensor("bias", numbers(5))
    file.add_tensor("experts", numbers(2, 3, 4))
    file.add_tensor("numbers", np.arange(6, dtype=np.int32))
    finished(file)
    return tmp_path / "x.gguf"


def test_tensors_are_those_of_the_library(several: Path) -> None:
    checkpoint = open_checkpoint(several)
    assert isinstance(checkpoint, GGUFFile)
    reader = gguf.GGUFReader(several)
    assert list(checkpoint) == [tensor.name for tensor in reader.tensors]
    assert len(checkpoint) == len(reader.tensors)
    for theirs in reader.tensors:
        ours = checkpoint[theirs.name]
        assert tuple(ours.shape) == checkpoint.shape(theirs.name) == tuple(theirs.shape[::-1])
        assert ours.dtype == checkpoint.dtype(theirs.name)
        assert checkpoint.stored_type(theirs.name) == theirs.tensor_type.name
        expected = (
            theirs.data
            if theirs.tensor_type == Kind.I32
            else gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(ours.shape)
        )
        np.testing.assert_array_equal(ours.float().numpy(), expected)


def test_rows_are_those_of_the_whole_tensor(several: Path) -> None:
    checkpoint = GGUFFile(several)
    for name in checkpoint:
        for start, stop in ((0, 1), (1, 3), (2, 2), (0, 100), (5, 4)):
            assert torch.equal(checkpoint.rows(name, start, stop), checkpoint[name][start:stop])


@pytest.mark.parametrize("kind", [*NATIVE, *QUANTISED], ids=lambda kind: kind.name)
def test_a_dtype_is_torchs_or_float32_for_what_is_quantised(several: Path, kind: Kind) -> None:
    checkpoint = GGUFFile(several)
    name = f"{kind.name}.weight"
    assert checkpoint.dtype(name) == NATIVE.get(kind, torch.float32)
    assert checkpoint.is_quantised(name) == (kind in QUANTISED)


def test_fields_have_their_types_and_long_arrays_are_not_read(several: Path) -> None:
    checkpoint = GGUFFile(several)
    assert checkpoint.fields["general.architecture"] == "llama"
    assert checkpoint.fields["llama.block_count"] == 3
    assert checkpoint.fields["adapter.lora.alpha"] == 16.5
    assert checkpoint.fields["some.flag"] is True
    assert checkpoint.fields["some.negative"] == -(2**40)
    assert checkpoint.fields["llama.attention.head_count_kv"] == (2, 4, 2)
    assert checkpoint.fields["short.strings"] == ("a", "bb")
    assert checkpoint.fields["tokenizer.ggml.tokens"] is checkpoint.fields["tokenizer.ggml.scores"] is None
    assert checkpoint.metadata["general.name"] == "naïve ÷ name"
    assert checkpoint.metadata["adapter.lora.alpha"] == "16.5"
    assert "tokenizer.ggml.tokens" not in checkpoint.metadata


def test_content_decides_and_the_name_of_the_file_helps(several: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(several.read_bytes())
    assert isinstance(open_checkpoint(tmp_path / "blob"), GGUFFile)
    (tmp_path / "other.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="expected a GGUF file, got a Git LFS pointer"):
        open_checkpoint(tmp_path / "other.gguf")


def test_it_pickles_as_its_path(several: Path) -> None:
    checkpoint = GGUFFile(several)
    data = pickle.dumps(checkpoint)
    assert len(data) < 300
    assert torch.equal(pickle.loads(data)["Q8_0.weight"], checkpoint["Q8_0.weight"])
    with pytest.raises(KeyError):
        checkpoint["nothing"]
    assert "nothing" not in checkpoint


def test_a_base_in_gguf_gives_its_matrices(several: Path) -> None:
    base = load_base(several)
    assert base.shape("BF16.weight") == SHAPE


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*, tensors: int = 0, fields: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def tensor(name: bytes = b"w", *, shape: tuple[int, ...] = (2, 3), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def field(kind: int, value: bytes, key: bytes = b"k") -> bytes:
    return string(key) + struct.pack("<I", kind) + value


DATA = bytes(200)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "got an empty file"),
    "magic alone": (b"GGUF", "expected 4 bytes at 4 of the header, got 0: truncated"),
    "version 1": (header(version=1), "expected GGUF of version 2 or 3, little-endian, got version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "got a big-endian one"),
    "many tensors": (header(tensors=2**60), "expected at most 131072 tensors and 65536 fields"),
    "many fields": (header(fields=2**63), "expected at most 131072 tensors and 65536 fields"),
    "no tensors": (header(tensors=1000), "truncated"),
    "long key": (header(fields=1, rest=struct.pack("<Q", 2**62)), "strings of at most 16777216 bytes, got one of"),
    "key past the end": (header(fields=1, rest=struct.pack("<Q", 1000)), "expected 1000 bytes .* truncated"),
    "long array": (header(fields=1, rest=field(9, struct.pack("<IQ", 0, 2**40))), "expected 1099511627776 bytes at"),
    "overflowing array": (header(fields=1, rest=field(9, struct.pack("<IQ", 12, 2**63))), "expected .* bytes at"),
    "many strings": (
        header(fields=1, rest=field(9, struct.pack("<IQ", 8, 2**40))),
        "expected at most 8388608 strings in arrays, got 1099511627776",
    ),
    "strings past the end": (header(fields=1, rest=field(9, struct.pack("<IQ", 8, 10000))), "truncated"),
    "nested array": (
        header(fields=1, rest=field(9, struct.pack("<IQ", 9, 1))),
        "'k': expected an array of numbers or strings, got one of type 9",
    ),
    "unknown value": (header(fields=1, rest=field(13, DATA)), "'k': expected a type of value that GGUF has, got 13"),
    "double key": (header(fields=2, rest=field(7, b"\1") * 2), "expected every field once, got 'k' again"),
    "long key of nonsense": (
        header(fields=1, rest=field(13, DATA, b"k" * 5000)),
        r"x\.gguf: 'k{100}': expected a type of value that GGUF has, got 13",
    ),
    "key of bytes": (
        header(fields=1, rest=field(7, b"\1", b"\xff\xfe")),
        r"expected names in UTF-8, got b'\\xff\\xfe'",
    ),
    "alignment": (
        header(fields=1, rest=field(4, struct.pack("<I", 3), b"general.alignment")),
        "expected an alignment that is a power of two, got 3",
    ),
    "alignment of text": (
        header(fields=1, rest=field(8, string(b"x"), b"general.alignment")),
        "expected an alignment that is a power of two, got x",
    ),
    "double tensor": (header(tensors=2, rest=tensor() * 2 + DATA), "expected every tensor once, got 'w' again"),
    "dimensions": (header(tensors=1, rest=tensor(shape=(1,) * 5) + DATA), "'w': expected at most 4 dimensions, got 5"),
    "huge": (header(tensors=1, rest=tensor(shape=(2**40, 2**40)) + DATA), "'w': expected .* bytes at .*: truncated"),
    "wide": (header(tensors=1, rest=tensor(shape=(0, 2**63)) + DATA), "'w': expected sides of at most 1099511627776"),
    "offset": (header(tensors=1, rest=tensor(offset=2**63) + DATA), "'w': expected 24 bytes at .*: truncated"),
    "cut data": (header(tensors=1, rest=tensor(shape=(100, 100)) + DATA), "'w': expected 40000 bytes at"),
    "type": (
        header(tensors=1, rest=tensor(kind=999) + DATA),
        "'w': expected a type of tensor that gguf knows, got 999",
    ),
    "blocks": (
        header(tensors=1, rest=tensor(kind=8) + DATA),
        r"'w': expected rows in blocks of 32 for Q8_0, got \(3, 2\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, match = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert str(caught.value).startswith(f"{tmp_path / 'x.gguf'}: ")
    assert "\n" not in str(caught.value)


def test_a_minimal_file_by_hand(tmp_path: Path) -> None:
    start = header(tensors=1, rest=tensor(shape=(2, 3)))
    data = struct.pack("<6f", *range(6))
    (tmp_path / "x.gguf").write_bytes(start + bytes(-len(start) % 32) + data)
    assert GGUFFile(tmp_path / "x.gguf")["w"].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_every_cut_of_a_file_is_refused(several: Path, tmp_path: Path) -> None:
    content = several.read_bytes()
    step = len(content) // 97
    for end in (*range(0, 400, 7), *range(400, len(content), step)):
        (tmp_path / "cut.gguf").write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            GGUFFile(tmp_path / "cut.gguf")


def test_flipped_bytes_of_the_header_never_crash(several: Path, tmp_path: Path) -> None:
    content = bytearray(several.read_bytes())
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = content.copy()
        for position in generator.integers(4, 600, size=3):
            damaged[position] = generator.integers(256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            checkpoint = GGUFFile(tmp_path / "damaged.gguf")
            assert len([checkpoint.shape(name) for name in checkpoint]) == len(checkpoint)


def test_a_hostile_header_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(HOSTILE["long array"][0])
    code = (
        "import resource, sys\n"
        "from lora_analysis.checkpoint import GGUFFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    GGUFFile(sys.argv[1])\nexcept Exception as error:\n    print(type(error).__name__)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.gguf")], capture_output=True, text=True, check=True
    )
    kind, growth = run.stdout.split()
    assert kind == "CheckpointError"
    assert int(growth) < 50_000  # kB; importing gguf is most of it


def test_a_file_that_shrinks_afterwards_is_noticed(several: Path) -> None:
    checkpoint = GGUFFile(several)
    several.write_bytes(several.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes, got 0. Has it changed"):
        checkpoint["numbers"]
    several.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint["numbers"]


def test_types_that_the_library_cannot_dequantise_are_named(tmp_path: Path) -> None:
    start = header(tensors=1, rest=tensor(shape=(32,), kind=Kind.Q8_1.value))
    (tmp_path / "x.gguf").write_bytes(start + bytes(-len(start) % 32) + bytes(100))
    checkpoint = GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="'w': expected a type that gguf can dequantise, got Q8_1"):
        checkpoint["w"]


def test_the_extra_is_named_where_the_library_is_absent(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'it is not installed. Run pip install "lora-analysis\[gguf\]"'):
        open_checkpoint(several)


def test_names_go_forth_and_back() -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 5)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"):
        name = f"model.layers.4.{part}.weight"
        place = gguf_place(name, "llama")
        assert place is not None
        assert place.tensor == table.get_name(name, try_suffixes=(".weight",))
        assert name in hugging_face_names(place.tensor, "llama")
    for name, expected in (("lm_head.weight", "output.weight"), ("model.embed_tokens.weight", "token_embd.weight")):
        assert gguf_place(name, "llama") == (expected, None)
        assert name in hugging_face_names(expected, "llama")
    assert gguf_place("model.layers.2.mlp.experts.11.down_proj.weight", "qwen3moe") == (
        "blk.2.ffn_down_exps.weight",
        11,
    )
    for unknown in ("model.foo.weight", "blk", ""):
        assert gguf_place(unknown, "llama") is None
    assert gguf_place("lm_head.weight", "no such architecture") is None
    assert hugging_face_names("blk.0.foo.weight", "llama") == ()


def test_permuted_architectures_are_known_to_the_library() -> None:
    assert set(gguf.MODEL_ARCH_NAMES.values()) >= PERMUTED_ARCHITECTURES
    assert permuted_heads("blk.12.attn_q.bias", "llama", (32, 8)) == 32
    for name in ("blk.12.attn_output.weight", "blk.12.attn_q_norm.weight", "x.blk.12.attn_q.weight"):
        assert permuted_heads(name, "llama", (32, 8)) is None


def test_head_counts_come_from_the_header(several: Path) -> None:
    fields = dict(GGUFFile(several).fields)
    assert head_counts(fields, 1) is None
    fields["llama.attention.head_count"] = 8
    assert [head_counts(fields, block) for block in range(3)] == [(8, 2), (8, 4), (8, 2)]
