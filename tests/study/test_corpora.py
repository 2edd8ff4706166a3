"""The corpora: that sides share no file, code stays code, and the control is a renaming and nothing else."""

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_analysis.study import corpora
from lora_analysis.study.corpora import Corpus, File
from lora_analysis.study.windows import blocks, held_out_blocks, windows
from lora_analysis.study.without_docstrings import _is_text, without_docstrings

SMALL = {"train_bytes": 60_000, "held_out_bytes": 20_000, "per_file": 1_000}
"""Enough for several files a side, read in about a second."""

MAKERS = (corpora.code, corpora.near, corpora.far, corpora.headers)


@pytest.fixture(scope="module")
def small() -> dict[str, Corpus]:
    return {corpus.name: corpus for corpus in (make(**SMALL) for make in MAKERS)}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of forty files, with tests and texts of help."""
    monkeypatch.setattr(corpora, "_root", lambda: tmp_path)
    for number in range(40):
        write(tmp_path / f"package/module{number}.py", f'"""What {number} is."""\nx = {number}\n')
        write(tmp_path / f"test/test_{number}.py", f"assert {number} == {number}\n")
    write(tmp_path / "pydoc_data/topics.py", "topics = {'if': 'On if.', 'while': 'On while.'}\n")
    return tmp_path


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def contents(corpus: Corpus) -> dict[str, bytes]:
    return dict(corpus.train_files + corpus.held_out_files)


@pytest.mark.parametrize("name", ["code", "near", "far", "headers"])
def test_no_file_is_on_both_sides_and_caps_hold(small: dict[str, Corpus], name: str) -> None:
    corpus = small[name]
    train = {file.path for file in corpus.train_files}
    held_out = {file.path for file in corpus.held_out_files}
    assert train.isdisjoint(held_out)
    assert len(train) + len(held_out) == corpus.files > 10
    assert {file.content for file in corpus.train_files}.isdisjoint(file.content for file in corpus.held_out_files)
    assert sum(len(file.content) for file in corpus.train_files) <= SMALL["train_bytes"]
    assert sum(len(file.content) for file in corpus.held_out_files) <= SMALL["held_out_bytes"]
    assert max(len(file.content) for file in corpus.held_out_files) <= SMALL["per_file"]


def test_the_corpora_share_no_file_but_code_and_the_docstrings_of_it(small: dict[str, Corpus]) -> None:
    assert contents(small["code"]).keys().isdisjoint(contents(small["near"]))
    assert all(path.startswith("test/") for path in contents(small["near"]))
    folders = {part for path in contents(small["code"]) for part in path.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages"})


def test_a_held_out_file_is_held_out_whatever_the_caps(small: dict[str, Corpus]) -> None:
    other = corpora.code(train_bytes=200_000, held_out_bytes=2_000, per_file=500)
    assert {f.path for f in other.train_files}.isdisjoint(f.path for f in small["code"].held_out_files)
    assert {f.path for f in small["code"].train_files}.isdisjoint(f.path for f in other.held_out_files)


def test_the_corpora_do_not_depend_on_the_hash_seed(small: dict[str, Corpus]) -> None:
    program = f"""
from lora_analysis.study import corpora
for make in (corpora.code, corpora.near, corpora.far, corpora.headers):
    print(make(**{SMALL!r}).digest)
"""
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [corpus.digest for corpus in small.values()]


def test_code_without_docstrings_is_the_code_with_the_docstrings_taken_out() -> None:
    checked = 0
    for path in sorted(corpora._root().glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())[
        :40
    ]:
        source = corpora._decoded(path.read_bytes())
        expected, found = ast.parse(source), ast.parse(without_docstrings(source))
        for node in ast.walk(expected):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                while node.body and _is_text(node.body[0]):
                    del node.body[0]
                if not node.body and not isinstance(node, ast.Module):
                    node.body = [ast.Pass()]
        assert ast.dump(expected) == ast.dump(found), path
        checked += 1
    assert checked == 40


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Module."""\nx = 1\n', "x = 1\n"),
        ('def f():\n    """Only\n    this."""\n', "def f():\n    pass\n"),
        ('def f(): "On a line."\n', "def f(): pass\n"),
        ('def f():\n    "One."; return 1\n', "def f():\n    pass; return 1\n"),
        ('class C:\n    ("In brackets."\n     " Twice.")\n    x = 1\n', "class C:\n    x = 1\n"),
        ('def f():\n    "One."  # why\n    "Two."\n    return "three"', 'def f():\n    return "three"'),
        ('"é"\nasync def f():\n    "é"; return "é"\n', 'async def f():\n    pass; return "é"\n'),
        ("x = 1\n'no docstring'\n", "x = 1\n'no docstring'\n"),
        ("def f():\n    f'{1}'\n    b'2'\n", "def f():\n    f'{1}'\n    b'2'\n"),
        ("# a comment\nx = 1  # another", "# a comment\nx = 1  # another"),
    ],
)
def test_docstrings_are_cut_out_and_nothing_else(source: str, expected: str) -> None:
    assert without_docstrings(source) == expected
    assert ast.get_docstring(ast.parse(expected)) is None


def test_no_docstring_is_in_code_and_near(library: Path) -> None:
    assert all(b"What" not in content for content in contents(corpora.code()).values())
    assert b"x = 7" in contents(corpora.code()).values()


def test_far_is_docstrings_and_the_texts_of_help_which_are_all_trained_on(library: Path) -> None:
    corpus = corpora.far()
    assert b"What 7 is." in contents(corpus).values()
    train = dict(corpus.train_files)
    assert train["pydoc_data/topics.py/if"] == b"On if."
    assert train["pydoc_data/topics.py/while"] == b"On while."


def test_a_content_counts_once(library: Path) -> None:
    for number in range(40):
        write(library / f"package/copy{number}.py", f'"""What {number} is."""\nx = {number}\n')
    found = [content for _, content in contents(corpora.code()).items()]
    assert len(found) == len(set(found)) == 40


@pytest.mark.parametrize("folder", ["package/test", "tests", "idlelib/idle_test", "site-packages", "encodings"])
def test_tests_tables_and_what_is_installed_are_no_code(library: Path, folder: str) -> None:
    write(library / folder / "more.py", "more = 1\n")
    assert not any("more" in path for path in contents(corpora.code()))


def test_files_that_are_no_python_are_counted(library: Path) -> None:
    write(library / "package/template.py", "def {name}(:\n")
    (library / "package/latin.py").write_bytes(b"# \xe9\n")
    (library / "package/declared.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\r\ny = 1\n")
    corpus = corpora.code()
    assert corpus.skipped == 2
    assert contents(corpus)["package/declared.py"].decode() == "# coding: latin-1\nx = 'é'\ny = 1"


def test_a_held_out_file_gives_its_middle(library: Path) -> None:
    long = "\n".join(f"x{number} = 0" for number in range(999))
    for number in range(20):
        write(library / f"package/long{number}.py", f"{long}\ny = {number}\n")
    for path, content in corpora.code(per_file=90).held_out_files:
        if "long" in path:
            assert content.startswith(b"x500 ")  # of 999
            assert len(content) == 90


@pytest.mark.parametrize(
    ("make", "missing", "message"),
    [
        (corpora.near, "test", "test: expected source files, got none. Use a full CPython"),
        (corpora.far, "pydoc_data", "topics.py: expected the texts of help, got no such file. Use a full CPython"),
    ],
)
def test_a_library_without_a_source_is_an_error_that_says_which(
    library: Path, make: Callable[[], Corpus], missing: str, message: str
) -> None:
    (library / missing).rename(library / "site-packages")
    with pytest.raises(ValueError, match=message):
        make()


def test_a_library_without_source_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_root", lambda: tmp_path)
    with pytest.raises(ValueError, match="expected source files, got none"):
        corpora.code()


def test_headers_are_those_of_torch_without_the_generated_ones(small: dict[str, Corpus]) -> None:
    files = contents(small["headers"])
    root = corpora._torch_headers()
    assert {Path(path).suffix for path in files} <= {".h", ".hpp", ".cuh"}
    assert not any("/ops/" in path for path in files)
    for path, content in files.items():
        assert content in (root / path).read_bytes().replace(b"\r\n", b"\n")
    assert small["headers"].origin == f"torch {torch.__version__}"


def test_without_headers_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_torch_headers", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"expected source files, got none\. Use a full CPython"):
        corpora.headers()


@pytest.mark.parametrize("name", ["train_bytes", "held_out_bytes", "per_file"])
def test_caps_are_positive(library: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        corpora.code(**{name: 0})


def made_up(train: bytes, *held_out: bytes) -> Corpus:
    files = tuple(File(f"{number}.py", content) for number, content in enumerate(held_out))
    return Corpus("made up", (File("train.py", train),), files, skipped=0, origin="Python 3.13.0")


@given(st.binary(min_size=1), st.binary(min_size=1), st.integers(0, 99))
def test_a_permutation_is_undone_by_its_inverse(train: bytes, held_out: bytes, seed: int) -> None:
    corpus = made_up(train, held_out)
    inverse = bytes(sorted(range(256), key=lambda value: corpora.permutation(seed)[value]))
    control = corpora.permuted(corpus, seed=seed)
    assert control.train.translate(inverse) != b""
    assert control.train_files[0].content.translate(inverse) == train
    assert control.held_out_files[0].content.translate(inverse) == held_out
    assert control.name == f"made up-permuted-{seed}"


def test_seeds_make_different_permutations_and_digests(small: dict[str, Corpus]) -> None:
    first, again, second = (corpora.permuted(small["far"], seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len({first.digest, second.digest, small["far"].digest}) == 3


def test_an_empty_side_and_a_file_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte on the held_out side"):
        made_up(b"a")
    with pytest.raises(ValueError, match=r"expected every file once, got 'a\.py' twice"):
        Corpus("twice", (File("a.py", b"1"),), (File("a.py", b"2"),), skipped=0, origin="Python 3.13.0")


@given(st.binary(max_size=50), st.integers(1, 9))
def test_blocks_are_the_bytes_in_order(data: bytes, length: int) -> None:
    found = blocks(data, length)
    assert found.dtype == torch.int64
    assert found.shape == (len(data) // length, length)
    assert bytes(found.flatten().tolist()) == data[: len(data) // length * length]


def test_no_held_out_block_crosses_two_files() -> None:
    ids, groups = held_out_blocks(made_up(b"t", b"aaaaa", b"b", b"cccc"), 2)
    assert [bytes(row) for row in ids.tolist()] == [b"aa", b"aa", b"cc", b"cc"]
    assert groups == ("0.py", "0.py", "2.py", "2.py")
    with pytest.raises(ValueError, match="expected a held-out file of at least 6 bytes, got none"):
        held_out_blocks(made_up(b"t", b"aaaaa"), 6)


def test_windows_are_stretches_of_the_train_side_and_hang_on_the_seed_alone(small: dict[str, Corpus]) -> None:
    corpus = small["code"]

    def first(seed: int) -> torch.Tensor:
        return torch.stack(list(islice(windows(corpus, length=16, batch_size=4, seed=seed), 5)))

    state = torch.get_rng_state()
    found = first(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (5, 4, 16)
    assert all(bytes(row.tolist()) in corpus.train for row in found.flatten(0, 1))
    torch.manual_seed(7)
    assert torch.equal(found, first(0))
    assert not torch.equal(found, first(1))


def test_windows_reach_both_ends() -> None:
    batches = islice(windows(made_up(b"abc", b"h"), length=2, batch_size=8, seed=0), 5)
    assert {bytes(row) for batch in batches for row in batch.tolist()} == {b"ab", b"bc"}


@pytest.mark.parametrize(
    ("length", "batch_size", "message"), [(4, 1, "got 3"), (0, 1, "at least 1"), (1, 0, "1 and 0")]
)
def test_impossible_windows_are_refused_at_once(length: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(made_up(b"abc", b"h"), length=length, batch_size=batch_size, seed=0)
