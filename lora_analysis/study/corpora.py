r"""Byte corpora that are on every machine: the standard library's code, its tests, its prose.

Nothing is imported or run; source files are read and parsed by ``ast``.

Conventions
-----------
A token is a byte of UTF-8 text with ``\n`` as line end: 256 token ids, no tokenizer.

*Split.* By file: a file is held out if a hash of its path within the library says so, about one in
``ONE_IN``. The caps do not enter, so a file that is held out of a large corpus is in no small one's train
side. Either side is read in the order of that hash. Files with the same content count once. A held-out file
gives at most ``per_file`` bytes, from its middle, since all beginnings are imports: many files with little of
each make narrower intervals than few with much.

*What is left out.* ``site-packages``; tables and copies, which would be the same on both sides
(``encodings``, ``pydoc_data`` but for its texts); what differs between builds (``_sysconfigdata``).

Values
------
``Corpus`` and its ``File``; ``code``, ``near``, ``far`` and ``permuted`` make corpora; ``blocks``,
``held_out_blocks`` and ``windows`` cut them into token ids; ``without_docstrings`` is the step between.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.study.docstrings import docstrings

ONE_IN = 5
"""One file in so many is held out."""

TRAIN_BYTES = 2_000_000
HELD_OUT_BYTES = 131_072
PER_FILE = 2_048
"""Caps by default: 1,024 held-out blocks of 128 bytes, from 64 files or more."""

_SKIPPED_FOLDER = re.compile(
    r"tests? | idle_test | (site|dist)-packages | __pycache__ | encodings | pydoc_data | config-.* | ensurepip",
    re.VERBOSE,
)
_SKIPPED_TEST_FOLDER = re.compile(r"(site|dist)-packages|__pycache__")
_SKIPPED_FILE = re.compile(r"_sysconfigdata.*\.py")

_TOPICS = "pydoc_data/topics.py"

_INSTALL = (
    "Use a full CPython (python.org, pyenv, conda; on Debian also the package libpython3-testsuite), "
    "as minimal builds leave parts out."
)


class File(NamedTuple):
    """A file's path within the library, with ``/``, and what of it is in the corpus."""

    path: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on and bytes never to train on, of different files.

    Parameters
    ----------
    name : str
    train_files, held_out_files : tuple of File
    skipped : int
        Files that were to be read and are no Python.
    python : str
        Version of the Python whose library it is.

    Raises
    ------
    ValueError
        If a side is empty or a path occurs twice.

    Examples
    --------
    >>> corpus = Corpus("two", (File("a.py", b"a = 1"),), (File("b.py", b"b = 2"),), skipped=0, python="3.13.0")
    >>> corpus.train, corpus.held_out, corpus.files
    (b'a = 1', b'b = 2', 2)
    """

    name: str
    train_files: tuple[File, ...]
    held_out_files: tuple[File, ...]
    skipped: int
    python: str

    def __post_init__(self) -> None:
        for side, files in (("train", self.train_files), ("held_out", self.held_out_files)):
            if not any(file.content for file in files):
                raise ValueError(f"{self.name}: expected at least one byte on the {side} side, got none.")
        paths = [file.path for file in self.train_files + self.held_out_files]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"{self.name}: expected every file once, got {twice!r} twice.")

    @property
    def train(self) -> bytes:
        """The train side, file after file."""
        return b"\n".join(file.content for file in self.train_files)

    @property
    def held_out(self) -> bytes:
        """The held-out side, file after file; ``held_out_blocks`` keeps the files apart."""
        return b"\n".join(file.content for file in self.held_out_files)

    @property
    def files(self) -> int:
        """Number of files on both sides."""
        return len(self.train_files) + len(self.held_out_files)

    @property
    def digest(self) -> str:
        """The sha256 of paths and contents, in order: equal for equal corpora only, whatever their names."""
        digest = hashlib.sha256()
        for files in (self.train_files, self.held_out_files):
            for path, content in files:
                digest.update(f"{path}\n{len(content)}\n".encode() + content)
            digest.update(b"end of side")
        return digest.hexdigest()


def code(*, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE) -> Corpus:
    """The standard library's source without docstrings and without its tests. Comments stay.

    Parameters
    ----------
    train_bytes, held_out_bytes : int
        Caps on the two sides; a library that has less gives what it has.
    per_file : int
        Cap on what one held-out file gives.

    Returns
    -------
    Corpus
        The same for the same build of Python; ``digest`` tells.

    Raises
    ------
    ValueError
        If a cap is below 1 or the library's source files are missing.
    """
    root = _root()
    files = _files(root, root, _SKIPPED_FOLDER)
    return _corpus("code", files, without_docstrings, train_bytes, held_out_bytes, per_file)


def near(*, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE) -> Corpus:
    """The source of the standard library's ``test`` folder without docstrings: code in another style.

    Parameters, Returns and Raises as for ``code``, of which it shares no file.
    """
    root = _root()
    files = _files(root, root / "test", _SKIPPED_TEST_FOLDER)
    return _corpus("near", files, without_docstrings, train_bytes, held_out_bytes, per_file)


def far(*, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE) -> Corpus:
    """The standard library's prose: its docstrings, and the texts of ``help``, which quote the manual.

    The texts of ``help`` repeat one another, so that all of them are on the train side, each as a file
    ``pydoc_data/topics.py/<topic>``. Parameters, Returns and Raises as for ``code``.
    """
    root = _root()
    topics = root / _TOPICS
    if not topics.is_file():
        raise ValueError(f"{topics}: expected the texts of help, got no such file. {_INSTALL}")
    files = [*_files(root, root, _SKIPPED_FOLDER), *_topics(topics)]
    return _corpus("far", files, _docstrings_of, train_bytes, held_out_bytes, per_file)


def permuted(corpus: Corpus, *, seed: int) -> Corpus:
    """A corpus with its byte values renamed by one random permutation: a negative control.

    It has the statistics of the original but for the names of the symbols, so that what a model knows of
    the original's bytes is worthless.

    Parameters
    ----------
    corpus : Corpus
    seed : int
        Of the permutation.

    Returns
    -------
    Corpus
        The same files with ``permutation(seed)`` applied to every byte.
    """
    table = permutation(seed)
    return replace(
        corpus,
        name=f"{corpus.name}-permuted-{seed}",
        train_files=tuple(File(path, content.translate(table)) for path, content in corpus.train_files),
        held_out_files=tuple(File(path, content.translate(table)) for path, content in corpus.held_out_files),
    )


def permutation(seed: int) -> bytes:
    """A random permutation of the 256 byte values, as a table for ``bytes.translate``.

    Examples
    --------
    >>> sorted(permutation(0)) == list(range(256))
    True
    """
    return bytes(torch.randperm(256, generator=torch.Generator().manual_seed(seed)).tolist())


def without_docstrings(source: str) -> str:
    r"""Python source without its docstrings; ``pass`` where nothing else would be left.

    Strings that follow a docstring, and would take its place, go with it, and so does a comment behind it.
    Everything else stays as written.

    Parameters
    ----------
    source : str

    Returns
    -------
    str

    Raises
    ------
    SyntaxError, ValueError
        If the source is no Python.

    Examples
    --------
    >>> print(without_docstrings("def f(x):\n    '''What f is.'''\n    return x  # as it is"))
    def f(x):
        return x  # as it is
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes are not our caller's business
        tree = ast.parse(source)
    lines = source.encode().split(b"\n")  # positions of ast are bytes, and only \n ends a line
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    data = b"\n".join(lines)
    cuts: list[tuple[int, int, bytes]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        leading = 0
        while leading < len(node.body) and _is_text(node.body[leading]):
            leading += 1
        needed = leading == len(node.body) and not isinstance(node, ast.Module)
        for number, statement in enumerate(node.body[:leading]):
            assert statement.end_lineno is not None  # ast.parse sets both
            assert statement.end_col_offset is not None
            start = starts[statement.lineno - 1] + statement.col_offset
            end = starts[statement.end_lineno - 1] + statement.end_col_offset
            before = data[starts[statement.lineno - 1] : start]
            after = data[end : starts[statement.end_lineno] - 1].strip()
            if (needed and number == 0) or before.strip() or (after and not after.startswith(b"#")):
                cuts.append((start, end, b"pass"))
            else:
                cuts.append((start - len(before), starts[statement.end_lineno], b""))
    for start, end, instead in sorted(cuts, reverse=True):
        data = data[:start] + instead + data[end:]
    return data.decode()


def blocks(data: bytes, length: int) -> Tensor:
    """Consecutive blocks of bytes as token ids; an incomplete last one is left out.

    Parameters
    ----------
    data : bytes
    length : int

    Returns
    -------
    Tensor, shape (n, length), int64
        n = len(data) // length.

    Raises
    ------
    ValueError
        If ``length`` is below 1.

    Examples
    --------
    >>> blocks(bytes(range(7)), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}.")
    n = len(data) // length
    return _ids(data[: n * length]).reshape(n, length)


def held_out_blocks(corpus: Corpus, length: int) -> tuple[Tensor, tuple[str, ...]]:
    """Held-out blocks, none across two files, and the file of each: the unit that intervals are clustered by.

    Parameters
    ----------
    corpus : Corpus
    length : int

    Returns
    -------
    ids : Tensor, shape (n, length), int64
    groups : tuple of str, length n

    Raises
    ------
    ValueError
        If no held-out file is that long.
    """
    parts = [(path, blocks(content, length)) for path, content in corpus.held_out_files]
    groups = tuple(path for path, part in parts for _ in range(len(part)))
    if not groups:
        raise ValueError(f"{corpus.name}: expected a held-out file of at least {length} bytes, got none.")
    return torch.cat([part for _, part in parts]), groups


def windows(corpus: Corpus, *, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Random stretches of the train side, without end.

    Parameters
    ----------
    corpus : Corpus
    length, batch_size : int
    seed : int
        Of a generator of its own: the global random state is neither used nor changed.

    Yields
    ------
    Tensor, shape (batch_size, length), int64

    Raises
    ------
    ValueError
        If a size is below 1 or the train side is shorter than ``length``.
    """
    data = corpus.train
    if length < 1 or batch_size < 1:
        raise ValueError(f"length, batch_size: expected at least 1, got {length} and {batch_size}.")
    if len(data) < length:
        raise ValueError(f"{corpus.name}: expected at least {length} bytes on the train side, got {len(data)}.")
    return _windows(_ids(data), length, batch_size, torch.Generator().manual_seed(seed))


def _windows(ids: Tensor, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    within = torch.arange(length)
    while True:
        starts = torch.randint(len(ids) - length + 1, (batch_size, 1), generator=generator)
        yield ids[starts + within]


def _ids(data: bytes) -> Tensor:
    # bytearray: torch warns of a buffer that must not be written to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else torch.empty(0, dtype=torch.long)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(root: Path, folder: Path, skipped: re.Pattern[str]) -> list[File]:
    """Raw source files below a folder, each content once, in the order of a hash of their paths."""
    found = []
    for parent, subfolders, names in os.walk(folder):
        # In place, so that what is left out is not even listed: site-packages can be large.
        subfolders[:] = [name for name in subfolders if not skipped.fullmatch(name)]
        for name in names:
            if name.endswith(".py") and not _SKIPPED_FILE.fullmatch(name):
                path = Path(parent, name)
                found.append(File(path.relative_to(root).as_posix(), path.read_bytes()))
    if not found:
        raise ValueError(f"{folder}: expected source files of the standard library, got none. {_INSTALL}")
    seen: set[bytes] = set()
    kept = []
    for file in sorted(found, key=lambda file: _hash(file.path)):
        if file.content not in seen:
            seen.add(file.content)
            kept.append(file)
    return kept


def _topics(path: Path) -> Iterator[File]:
    """The texts of ``help``, which are the values of a dict that is written out in the file."""
    for node in ast.parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            for topic, text in ast.literal_eval(value).items():
                yield File(f"{_TOPICS}/{topic}", text.strip().encode())


def _corpus(
    name: str, files: Iterable[File], text: Callable[[str], str], train_bytes: int, held_out_bytes: int, per_file: int
) -> Corpus:
    """Files as ``text`` makes them, split, capped, in the order of a hash of their paths."""
    for argument, value in (("train_bytes", train_bytes), ("held_out_bytes", held_out_bytes), ("per_file", per_file)):
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}.")
    train: list[File] = []
    held_out: list[File] = []
    room = {True: held_out_bytes, False: train_bytes}
    skipped = 0
    for path, raw in sorted(files, key=lambda file: _hash(file.path)):
        is_topic = path.startswith(f"{_TOPICS}/")
        is_held_out = not is_topic and int(_hash(path), 16) % ONE_IN == 0
        if not room[is_held_out]:
            continue
        try:
            content = raw if is_topic else text(_decoded(raw)).strip().encode()
        except (SyntaxError, ValueError):  # templates and deliberately broken examples
            skipped += 1
            continue
        content = _middle(content, per_file) if is_held_out else content
        if content := content[: room[is_held_out]]:
            room[is_held_out] -= len(content)
            (held_out if is_held_out else train).append(File(path, content))
    return Corpus(name, tuple(train), tuple(held_out), skipped, platform.python_version())


def _decoded(raw: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _docstrings_of(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in without_docstrings
        return "\n\n".join(docstrings(ast.parse(source)))


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _middle(content: bytes, size: int) -> bytes:
    """At most ``size`` bytes from the middle, from the beginning of a line if one begins there."""
    if len(content) <= size:
        return content
    start = (len(content) - size) // 2
    line = content.rfind(b"\n", 0, start) + 1
    return content[line : line + size]


def _hash(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()
