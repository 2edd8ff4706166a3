"""A text task that is on every machine: telling which library a docstring paragraph comes from.

Six classes: the standard library and five libraries this package depends on. The paragraphs are cut from
the *source files*, by ``ast``; no library is imported or run.

Conventions
-----------
A *paragraph* is running prose of a docstring with its white space normalised: at least 8 words, from a
capital letter to a full stop, and no headers, parameter lines, doctests, tables, formulas or code. In
every class alike the names of all six libraries and their usual aliases become ``[LIB]``, so a paragraph
is recognised by what it says and not by its name.

*Split.* The unit is the folder with the files in it, ``numpy/polynomial``; a file directly in a library's
root is a unit of its own. Docstrings are copied between sibling files (the six polynomial classes of
numpy, the indexes of pandas), so a split by file would leak more. Whole sub-packages would be safer
still, but one holds most of pandas and two most of numpy: no split of their sizes could share them out.
Folders go, largest first, to the side that is further below its share of the source bytes; within a
side, files are read in the order of a hash of their paths. Nothing depends on a seed.

*Duplicates.* Texts are compared folded: lower case, letters and digits only. Two paragraphs count as the
same if their first 60 folded characters are. One that occurs in several libraries is dropped altogether;
one that occurs several times in a library is kept once, where it was read first, held-out side first.
A training paragraph is dropped if it contains more than half of the word 5-grams of any held-out one.

*What that is worth*, as the share of held-out paragraphs that have more than half of their 5-grams in one
training paragraph (numpy 2.4, scipy 1.17, torch 2.13, matplotlib 3.11, pandas 3.1, Python 3.11): 10 % in
a random split with duplicates, 3 % without duplicates, 0.6 % by file, 0.3 % by folder, none in the task.

Values
------
``docstring_task`` makes the task; ``docstrings``, ``prose``, ``mask_libraries``, ``folded`` and
``ngram_shares`` are its steps.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lora_analysis.study.task import Source, TextTask

LIBRARIES = ("standard library", "numpy", "scipy", "torch", "matplotlib", "pandas")
"""The classes, in the order of their labels."""

MASK = "[LIB]"
"""What the name of every library is replaced by."""

MIN_WORDS = 8
"""Shorter paragraphs are mostly labels and fragments."""

PER_FILE = 40
"""Paragraphs taken from one file at most, so that no single module makes up a class."""

LEAK = 0.5
"""Share of a held-out paragraph's 5-grams above which a training paragraph that has them is dropped."""

Side = Literal["held_out", "train"]

_MARGIN = 1.2
"""How many times as many paragraphs are read as are asked for: duplicates and leaks are taken from them."""

_NAMES = re.compile(
    r"""(numpy|scipy|pytorch|torch|matplotlib|pyplot|pylab|pandas|cpython|python|stdlib|standard\ library)
      | (?<![^\W_]) (np|sp|plt|mpl|pd) (?![^\W_])""",
    re.IGNORECASE | re.VERBOSE,
)

# Tests, vendored or generated copies of other projects, and packages installed inside the standard
# library's folder. distutils was in two of the libraries, and torch._numpy repeats numpy's documentation.
_SKIPPED_FOLDER = re.compile(
    r"""tests? | _?testing | idle_test | lib2to3 | distutils | ensurepip | (site|dist)-packages | __pycache__
      | _?vendor(ed)? | externs? | _?externals? | third_party | array_api_(compat|extra) | _numpy""",
    re.VERBOSE,
)
_SKIPPED_FILE = re.compile(r"conftest\.py|setup\.py|_?docscrape\.py")

_DOCUMENTING_CALLS = frozenset({"add_newdoc", "add_docstr"})
"""Functions that give a compiled object its docstring as a string (numpy, scipy, torch)."""

_ITEM = re.compile(r"[-*•+]\s|\(?\w{1,2}[.)]\s|\.\.|:\w|@\w|[\w.*`, ]+(\([^)]*\))?\s*:(\s|$)")
"""How list items, directives, fields and parameter lines begin."""

_CODE = re.compile(r">>>|[{}\\|<>]|==|\w\(\w*=|[=~^-]{4,}|::|:math:")
"""What marks a paragraph as code, formula or table."""

_PROSE_LETTERS = 0.85
"""Least share of letters and spaces in prose; below it are tables of numbers and formulas."""


class _Paragraph(NamedTuple):
    text: str
    key: str
    folder: str


class _Pool(NamedTuple):
    root: Path
    files: int
    sides: dict[Side, list[_Paragraph]]


def docstring_task(*, held_out_per_class: int = 600, train_per_class: int = 600) -> TextTask:
    """Docstring paragraphs of six libraries, split by folder, with the library as the label.

    Either side holds the same number of paragraphs of every library, in the order of a hash of their
    texts, so that any first n are a mixture of all of them.

    Parameters
    ----------
    held_out_per_class, train_per_class : int
        Paragraphs of each library on either side.

    Returns
    -------
    TextTask
        The same for the same versions of the libraries; ``digest`` tells.

    Raises
    ------
    ValueError
        If a number is below 1, or the source files of a library are missing or hold too few paragraphs.
    """
    wanted: dict[Side, int] = {"held_out": held_out_per_class, "train": train_per_class}
    for side, count in wanted.items():
        if count < 1:
            raise ValueError(f"{side}_per_class: expected at least 1, got {count}.")
    pools = [_read_library(library, wanted) for library in LIBRARIES]

    found_in = Counter(key for pool in pools for key in {p.key for ps in pool.sides.values() for p in ps})
    for pool in pools:
        for side, paragraphs in pool.sides.items():
            pool.sides[side] = [p for p in paragraphs if found_in[p.key] == 1]
    held_out = _first_of_each(pools, "held_out", held_out_per_class)

    trainable = [p.text for pool in pools for p in pool.sides["train"]]
    leaking = {
        trainable[j]
        for shares in ngram_shares([p.text for p, _ in held_out], trainable)
        for j, share in shares.items()
        if share > LEAK
    }
    for pool in pools:
        pool.sides["train"] = [p for p in pool.sides["train"] if p.text not in leaking]
    train = _first_of_each(pools, "train", train_per_class)

    return TextTask(
        train_texts=tuple(p.text for p, _ in train),
        train_labels=tuple(label for _, label in train),
        held_out_texts=tuple(p.text for p, _ in held_out),
        held_out_labels=tuple(label for _, label in held_out),
        classes=LIBRARIES,
        held_out_groups=tuple(p.folder for p, _ in held_out),
        sources={
            library: Source(_version(library), pool.files, held_out_per_class + train_per_class)
            for library, pool in zip(LIBRARIES, pools, strict=True)
        },
    )


def _first_of_each(pools: Sequence[_Pool], side: Side, count: int) -> list[tuple[_Paragraph, int]]:
    """The first ``count`` paragraphs of every pool with their labels, in the order of a hash."""
    chosen: list[tuple[_Paragraph, int]] = []
    for label, pool in enumerate(pools):
        if len(pool.sides[side]) < count:
            raise ValueError(
                f"{pool.root}: expected {count} docstring paragraphs of {LIBRARIES[label]} for the {side} "
                f"side, got {len(pool.sides[side])}. Ask for fewer with {side}_per_class=; an installation "
                "without .py files has none."
            )
        chosen += [(paragraph, label) for paragraph in pool.sides[side][:count]]
    return sorted(chosen, key=lambda pair: _hash(pair[0].text))


def _read_library(library: str, wanted: Mapping[Side, int]) -> _Pool:
    """Paragraphs of one library by side, each key once, until there are enough of them."""
    root = _root(library)
    sides: dict[Side, list[_Paragraph]] = {}
    seen: set[str] = set()
    files = 0
    for side, paths in _split_by_folder(root, wanted).items():
        paragraphs = sides[side] = []
        for path in sorted(paths, key=lambda path: _hash(f"{library}/{path.relative_to(root).as_posix()}")):
            if len(paragraphs) >= _MARGIN * wanted[side]:
                break
            files += 1
            kept = 0
            for text in _texts_of_file(path):
                key = folded(text)[:60]
                if key in seen or kept == PER_FILE:
                    continue
                seen.add(key)
                kept += 1
                paragraphs.append(_Paragraph(text, key, f"{library}/{_unit(path, root)}"))
    return _Pool(root, files, sides)


def _root(library: str) -> Path:
    if library == "standard library":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)  # of a top-level name: finds the folder, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{library}: expected an installed package, found none. Install it with pip.")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(library: str) -> str:
    return platform.python_version() if library == "standard library" else importlib.metadata.version(library)


def _unit(path: Path, root: Path) -> str:
    """The folder of a file within the library; for a file directly in the root, the file."""
    return (path if path.parent == root else path.parent).relative_to(root).as_posix()


def _split_by_folder(root: Path, wanted: Mapping[Side, int]) -> dict[Side, list[Path]]:
    """Files of either side, whole folders each, in bytes as ``wanted`` is in paragraphs."""
    units: defaultdict[str, list[Path]] = defaultdict(list)
    sizes: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root):
        # In place, so that what is left out is not even listed: site-packages can be large.
        subfolders[:] = sorted(name for name in subfolders if not _SKIPPED_FOLDER.fullmatch(name))
        for name in sorted(names):
            if name.endswith(".py") and not _SKIPPED_FILE.fullmatch(name):
                path = Path(folder, name)
                units[_unit(path, root)].append(path)
                sizes[_unit(path, root)] += path.stat().st_size
    filled: dict[Side, int] = dict.fromkeys(wanted, 0)
    sides: dict[Side, list[Path]] = {side: [] for side in wanted}
    for unit in sorted(units, key=lambda unit: (-sizes[unit], unit)):
        side = min(wanted, key=lambda side: filled[side] / wanted[side])
        filled[side] += sizes[unit]
        sides[side] += units[unit]
    return sides


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _texts_of_file(path: Path) -> list[str]:
    """The masked paragraphs of a source file, in the order of a hash; none if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not our caller's business
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken examples
        return []
    texts = (mask_libraries(text) for docstring in docstrings(tree) for text in prose(docstring))
    return sorted(texts, key=_hash)


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings of a syntax tree, cleaned of their indentation.

    Those of the module, its classes and functions, and the strings given to ``add_newdoc`` and
    ``add_docstr``, which document compiled functions.

    Examples
    --------
    >>> list(docstrings(ast.parse("def f(): 'What f is.'")))
    ['What f is.']
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if found := ast.get_docstring(node):
                yield found
        elif isinstance(node, ast.Call) and _called(node) in _DOCUMENTING_CALLS:
            for argument in node.args:
                for part in ast.walk(argument):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield inspect.cleandoc(part.value)


def _called(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else None


def prose(docstring: str) -> Iterator[str]:
    """Paragraphs of running prose in a docstring, white space normalised.

    A paragraph ends at a blank line or where the indentation changes. It is prose if it has at least
    8 words, begins with a capital, ends with a full stop, colon, question or exclamation mark, is mostly
    letters, and looks like no list item, parameter, directive, code or formula.

    Examples
    --------
    >>> list(prose('''Return the sum of all the elements of a list.
    ...
    ... Parameters
    ... ----------
    ... values : list
    ...     Short.
    ... '''))
    ['Return the sum of all the elements of a list.']
    """
    block: list[str] = []
    indent = 0
    for line in [*docstring.expandtabs().splitlines(), ""]:
        stripped = line.strip()
        if block and (not stripped or len(line) - len(line.lstrip()) != indent):
            text = " ".join(" ".join(block).split())
            if _is_prose(text):
                yield text
            block = []
        if stripped:
            indent = len(line) - len(line.lstrip())
            block.append(stripped)


def _is_prose(text: str) -> bool:
    opening = text.lstrip("`'\"*([~:.")
    return (
        len(text.split()) >= MIN_WORDS
        and opening[:1].isupper()
        and text.rstrip("`'\"*)]").endswith((".", ":", "!", "?"))
        and not _ITEM.match(text)
        and not _CODE.search(text)
        and sum(c.isalpha() or c.isspace() for c in text) >= _PROSE_LETTERS * len(text)
    )


def mask_libraries(text: str) -> str:
    """A text with the name of every library, wherever it stands, replaced by ``[LIB]``.

    Full names also inside words; the aliases np, sp, plt, mpl and pd as whole words. Upper and lower case.

    Examples
    --------
    >>> mask_libraries("Like np.sum of a numpy.ndarray, in PyTorch; npz is no alias.")
    'Like [LIB].sum of a [LIB].ndarray, in [LIB]; npz is no alias.'
    """
    return _NAMES.sub(MASK, text)


def folded(text: str) -> str:
    """A text without case, white space and punctuation, by which duplicates are found.

    Examples
    --------
    >>> folded("The `dtype`,  if any.")
    'thedtypeifany'
    """
    return re.sub(r"[\W_]+", "", text.lower())


def ngram_shares(texts: Sequence[str], references: Sequence[str], *, n: int = 5) -> list[dict[int, float]]:
    """How much of each text is in each reference: the share of its word n-grams that occur there.

    ``|G(text) & G(reference)| / |G(text)|``, G being the set of n-grams of folded words.

    Parameters
    ----------
    texts, references : sequence of str
    n : int
        Words in an n-gram.

    Returns
    -------
    list of dict of int to float
        For each text, index of a reference to the share, dimensionless, in (0, 1]; references that share
        nothing are left out.

    Examples
    --------
    >>> ngram_shares(["one two three four"], ["Zero, one, two, three.", "four"], n=2)
    [{0: 0.6666666666666666}]
    """
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, reference in enumerate(references):
        for gram in _ngrams(reference, n):
            holders[gram].append(j)
    shares = []
    for text in texts:
        grams = _ngrams(text, n)
        counts = Counter(j for gram in grams for j in holders.get(gram, ()))
        shares.append({j: count / len(grams) for j, count in counts.items()})
    return shares


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
