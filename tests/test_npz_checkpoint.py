"""npz files: numpy's arrays and MLX's bfloat16, and archives that lie refused before anything is allocated."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_analysis.checkpoint import NpzFile, open_checkpoint
from lora_analysis.errors import CheckpointError

ARRAYS: dict[str, NDArray[Any]] = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(4, dtype=np.float16),
    "double": np.array(2.5),
    "columns": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "whole": np.arange(3, dtype=np.int64),
    "flags": np.array([True, False]),
    "swapped": np.arange(5, dtype=">f4"),
}


def member(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """An npy file by hand."""
    text = header.encode() + b"\n"
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def described(descr: str, shape: str, *, fortran: bool = False) -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_those_of_numpy(tmp_path: Path, compressed: bool) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **ARRAYS)
    checkpoint = open_checkpoint(tmp_path / "x.npz")
    assert isinstance(checkpoint, NpzFile)
    assert list(checkpoint) == list(ARRAYS)
    assert len(checkpoint) == len(ARRAYS)
    assert checkpoint.metadata == {}
    for name, array in ARRAYS.items():
        tensor = checkpoint[name]
        assert tuple(tensor.shape) == checkpoint.shape(name) == array.shape
        assert tensor.dtype == checkpoint.dtype(name) == torch.from_numpy(array.astype(array.dtype.type)).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    with pytest.raises(KeyError):
        checkpoint["nothing"]
    assert "nothing" not in checkpoint


def test_bfloat16_as_mlx_writes_it(tmp_path: Path) -> None:
    # numpy has no bfloat16; mlx.core.savez calls it '<V2', two bytes of anything.
    tensor = torch.tensor([[1.0, -2.5, 3.0], [0.15625, 5.0, 6.0]], dtype=torch.bfloat16)
    by_row = member(described("<V2", "(2, 3, )"), tensor.view(torch.int16).numpy().tobytes())
    by_column = member(
        described("<V2", "(2, 3, )", fortran=True), tensor.T.contiguous().view(torch.int16).numpy().tobytes()
    )
    checkpoint = NpzFile(archive(tmp_path / "x.npz", {"rows.npy": by_row, "columns.npy": by_column}))
    for name in checkpoint:
        assert checkpoint.dtype(name) == torch.bfloat16
        assert torch.equal(checkpoint[name], tensor)


def test_it_pickles_as_its_path(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    again = pickle.loads(pickle.dumps(NpzFile(tmp_path / "x.npz")))
    np.testing.assert_array_equal(again["a.weight"].numpy(), ARRAYS["a.weight"])


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


FOUR = bytes(4)
LIES: dict[str, tuple[dict[str, bytes], str]] = {
    "objects": ({"a.npy": objects()}, "'a.npy': expected numbers, got pickled objects; nothing was executed"),
    "records": (
        {"a.npy": member("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,), }", FOUR)},
        "expected a dtype torch knows",
    ),
    "text": ({"a.npy": member(described("<U1", "(1,)"), FOUR)}, "expected a dtype torch knows, got '<U1'"),
    "complex": ({"a.npy": member(described("<c8", "(1,)"), bytes(8))}, "expected a dtype torch knows, got 'complex64'"),
    "too long": ({"a.npy": member(described("<f4", "(10**9,)"), FOUR)}, "'a.npy': expected an array of numpy's, got"),
    "shape": ({"a.npy": member(described("<f4", "(1000000000000,)"), FOUR)}, "expected 4 bytes of numbers, the header"),
    "short": ({"a.npy": member(described("<f4", "(2,)"), bytes(12))}, "expected 12 bytes of numbers, the header says"),
    "negative": ({"a.npy": member(described("<f4", "(-1, -1)"), FOUR)}, "the header says"),
    "wide": ({"a.npy": member(described("<f4", "(0, 10000000000000)"))}, "the header says"),
    "no header": ({"a.npy": b"\x93NUMPY\x01\x00"}, "'a.npy': expected an array of numpy's, got"),
    "no array": ({"a.npy": b"hello"}, "'a.npy': expected an array of numpy's, got"),
    "version": ({"a.npy": member(described("<f4", "(1,)"), FOUR, version=3)}, "version .3, 0. of the format"),
    "code": (
        {"a.npy": member("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,), }")},
        "'a.npy': expected an array of numpy's",
    ),
    "nested": ({"a.npy": member("(" * 5000)}, "'a.npy': expected an array of numpy's"),
    "other member": ({"data.pkl": b"x"}, "expected members named .npy, got 'data.pkl'"),
}


@pytest.mark.parametrize("case", LIES)
def test_members_that_lie_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    members, match = LIES[case]
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(archive(tmp_path / "x.npz", members))
    assert "\n" not in str(caught.value)


def test_archives_that_inflate_too_far_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as entry:
        entry.write(member(described("<f4", f"({2**27},)")))
        for _ in range(2**9):
            entry.write(bytes(2**20))
    assert (tmp_path / "x.npz").stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="expected an array of plausible size, got 536870988 bytes in"):
        NpzFile(tmp_path / "x.npz")


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", {"a.npy": member(described("<f4", "(1,)"), FOUR)}, zipfile.ZIP_BZIP2)
    with pytest.raises(CheckpointError, match="expected a member stored or deflated"):
        NpzFile(path)


def test_double_names_are_refused(tmp_path: Path) -> None:
    content = member(described("<f4", "(1,)"), FOUR)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a.npy", content)
    with pytest.raises(CheckpointError, match="expected every array once, got 'a' again"):
        NpzFile(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "got an empty file"), (b"hello", "got 5 bytes"), (b"PK\x03\x04" + bytes(50), "got a zip archive")],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"expected an npz file, {match}"):
        open_checkpoint(tmp_path / "x.npz")


def test_cut_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    content = (tmp_path / "x.npz").read_bytes()
    for end in range(0, len(content), 29):
        (tmp_path / "cut.npz").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match="expected an npz file"):
            NpzFile(tmp_path / "cut.npz")


def test_damaged_numbers_are_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(1000.0))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'a': damaged .*CRC"):
        NpzFile(tmp_path / "x.npz")["a"]
