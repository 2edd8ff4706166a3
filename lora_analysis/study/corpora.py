r"""Byte corpora that are on every machine: the standard library's code, its tests, its prose; torch's C++ headers.

Nothing is imported or run; Python files are read and parsed by ``ast``.

Conventions
-----------
A token is a byte of UTF-8 text with ``\n`` as line end: 256 token ids, no tokenizer.

*Split.* By file: a file is held out if a hash of its path within the library says so, about one in
``ONE_IN``. The caps do not enter, so a file that is held out of a large corpus is in no small one's train
side. Either side is read in the order of that hash. Files with the same content count once. A held-out file
gives at most ``per_file`` bytes, from its middle, since all beginnings are imports: many files with little of
each make narrower intervals than few with much.

*What is left out.* ``site-packages``; tables and copies, which would be the same on both sides
(``encodings``, ``pydoc_data`` but for its texts); what differs between builds (``_sysconfigdata``); of torch's headers
the thousands in ``ATen/ops`` that a program wrote.

Values
------
``Corpus`` and its ``File``; ``code``, ``near``, ``far``, ``headers`` and ``permuted`` make corpora, which
``windows`` cuts into token ids.
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

from lora_analysis.study.docstrings import docstrings
from lora_analysis.study.without_docstrings import without_docstrings

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
_SKIPPED_HEADER_FOLDER = re.compile(r"ops")
_SOURCE_FILE = re.compile(r"(?!_sysconfigdata).*\.py")
_HEADER_FILE = re.compile(r".*\.(h|hpp|cuh)")

_TOPICS = "pydoc_data/topics.py"

_INSTALL = (
    "Use a full CPython (python.org, pyenv, conda; on Debian also the package libpython3-testsuite) and torch as its "
    "wheel has it, as minimal builds leave parts out."
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
        Files that were to be read and are not what they are called: no Python, no UTF-8.
    origin : str
        What the files came with, and its version.

    Raises
    ------
    ValueError
        If a side is empty or a path occurs twice.

    Examples
    --------
    >>> corpus = Corpus("two", (File("a.py", b"a = 1"),), (File("b.py", b"b = 2"),), skipped=0, origin="Python 3.13.0")
    >>> corpus.train, corpus.held_out, corpus.files
    (b'a = 1', b'b = 2', 2)
    """

    name: str
    train_files: tuple[File, ...]
    held_out_files: tuple[File, ...]
    skipped: int
    origin: str

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
    files = _files(root, root, _SKIPPED_FOLDER, _SOURCE_FILE)
    return _corpus("code", files, without_docstrings, _python(), train_bytes, held_out_bytes, per_file)


def near(*, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE) -> Corpus:
    """The source of the standard library's ``test`` folder without docstrings: code in another style.

    Parameters, Returns and Raises as for ``code``, of which it shares no file.
    """
    root = _root()
    files = _files(root, root / "test", _SKIPPED_TEST_FOLDER, _SOURCE_FILE)
    return _corpus("near", files, without_docstrings, _python(), train_bytes, held_out_bytes, per_file)


def far(*, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE) -> Corpus:
    """The standard library's prose: its docstrings, and the texts of ``help``, which quote the manual.

    The texts of ``help`` repeat one another, so that all of them are on the train side, each as a file
    ``pydoc_data/topics.py/<topic>``. Parameters, Returns and Raises as for ``code``.
    """
    root = _root()
    topics = root / _TOPICS
    if not topics.is_file():
        raise ValueError(f"{topics}: expected the texts of help, got no such file. {_INSTALL}")
    files = [*_files(root, root, _SKIPPED_FOLDER, _SOURCE_FILE), *_topics(topics)]
    return _corpus("far", files, _docstrings_of, _python(), train_bytes, held_out_bytes, per_file)


def headers(
    *, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES, per_file: int = PER_FILE
) -> Corpus:
    """The C++ headers that come with torch, comments included: code in another language.

    Parameters, Returns and Raises as for ``code``.
    """
    root = _torch_headers()
    files = _files(root, root, _SKIPPED_HEADER_FOLDER, _HEADER_FILE)
    return _corpus("headers", files, str, f"torch {torch.__version__}", train_bytes, held_out_bytes, per_file)


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


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _python() -> str:
    return f"Python {platform.python_version()}"


def _torch_headers() -> Path:
    return Path(torch.__file__).parent / "include"


def _files(root: Path, folder: Path, skipped: re.Pattern[str], kept: re.Pattern[str]) -> list[File]:
    """Raw source files below a folder, each content once, in the order of a hash of their paths."""
    found = []
    for parent, subfolders, names in os.walk(folder):
        # In place, so that what is left out is not even listed: site-packages can be large.
        subfolders[:] = [name for name in subfolders if not skipped.fullmatch(name)]
        for name in names:
            if kept.fullmatch(name):
                path = Path(parent, name)
                found.append(File(path.relative_to(root).as_posix(), path.read_bytes()))
    if not found:
        raise ValueError(f"{folder}: expected source files, got none. {_INSTALL}")
    seen: set[bytes] = set()
    unlike = []
    for file in sorted(found, key=lambda file: _hash(file.path)):
        if file.content not in seen:
            seen.add(file.content)
            unlike.append(file)
    return unlike


def _topics(path: Path) -> Iterator[File]:
    """The texts of ``help``, which are the values of a dict that is written out in the file."""
    for node in ast.parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            for topic, text in ast.literal_eval(value).items():
                yield File(f"{_TOPICS}/{topic}", text.strip().encode())


def _corpus(
    name: str,
    files: Iterable[File],
    text: Callable[[str], str],
    origin: str,
    train_bytes: int,
    held_out_bytes: int,
    per_file: int,
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
    return Corpus(name, tuple(train), tuple(held_out), skipped, origin)


def _decoded(raw: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _docstrings_of(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in without_docstrings
        return "\n\n".join(docstrings(ast.parse(source)))


def _middle(content: bytes, size: int) -> bytes:
    """At most ``size`` bytes from the middle, from the beginning of a line if one begins there."""
    if len(content) <= size:
        return content
    start = (len(content) - size) // 2
    line = content.rfind(b"\n", 0, start) + 1
    return content[line : line + size]


def _hash(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()
