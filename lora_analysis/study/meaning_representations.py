"""Files of meaning representations (MR) and the texts that people wrote for them, as in E2E NLG.

The files are the user's: lines ``MR||text``, or CSV with the columns ``mr`` and ``ref``.

Conventions
-----------
An example is one MR with all its references, and the split is by MR.

Values
------
``Example``, ``Split``; ``read_examples``, ``split_by_mr``.

References
----------
Novikova et al. 2017, arXiv:1706.09254 (E2E).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Example:
    """A meaning representation and the texts that people wrote for it."""

    mr: str
    references: tuple[str, ...]


class Split(NamedTuple):
    """Examples to train on and examples of other MRs to measure with."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def read_examples(path: Path) -> tuple[Example, ...]:
    """Examples of a file, grouped by MR, in the order in which MRs first occur.

    Parameters
    ----------
    path : Path
        UTF-8. ``.csv``: columns ``mr`` and ``ref``, others are passed over. Else: a line ``MR||text`` each.

    Returns
    -------
    tuple of Example

    Raises
    ------
    ValueError
        If a line is malformed or empty on a side, a column is missing, or there are no examples.
    """
    references: dict[str, list[str]] = {}
    try:
        for number, mr, text in _rows_of_csv(path) if path.suffix.lower() == ".csv" else _rows_of_lines(path):
            if not mr.strip() or not text.strip():
                raise ValueError(f"{path}: line {number}: expected an MR and a text, got {mr!r} and {text!r}.")
            references.setdefault(mr.strip(), []).append(text.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got {error}.") from error
    if not references:
        raise ValueError(f"{path}: expected at least one example, got none.")
    return tuple(Example(mr, tuple(texts)) for mr, texts in references.items())


def _rows_of_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            parts = line.split("||")
            if len(parts) != 2:
                raise ValueError(
                    f"{path}: line {number}: expected 'MR||text', got {line.rstrip()!r}. "
                    "A file with the columns mr and ref must be named .csv."
                )
            yield number, parts[0], parts[1]


def _rows_of_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        rows = csv.reader(handle, strict=True)
        try:
            header = next(rows, [])
            if header.count("mr") != 1 or header.count("ref") != 1:
                raise ValueError(f"{path}: line 1: expected the columns mr and ref, got {header}.")
            mr, ref = header.index("mr"), header.index("ref")
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(f"{path}: line {rows.line_num}: expected {len(header)} fields, got {row}.")
                if row:
                    yield rows.line_num, row[mr], row[ref]
        except csv.Error as error:
            raise ValueError(f"{path}: line {rows.line_num}: expected CSV, got {error}.") from error


def split_by_mr(examples: Sequence[Example], *, held_out: float = 0.2) -> Split:
    """A split of the examples of one file, the same for the same MRs in any order.

    Parameters
    ----------
    examples : sequence of Example
    held_out : float
        Share of the MRs, in (0, 1), rounded to at least one on either side.

    Returns
    -------
    Split
        Each side in the order of a hash of its MRs, so that any first n are a fair sample.

    Raises
    ------
    ValueError
        If the share is not in (0, 1), there are fewer than two examples, or an MR occurs twice.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}.")
    if len(examples) < 2 or len({example.mr for example in examples}) < len(examples):
        raise ValueError(f"examples: expected at least two, each with an MR of its own, got {len(examples)}.")
    ordered = sorted(examples, key=lambda example: hashlib.sha256(example.mr.encode()).hexdigest())
    count = min(max(1, round(held_out * len(ordered))), len(ordered) - 1)
    return Split(tuple(ordered[count:]), tuple(ordered[:count]))
