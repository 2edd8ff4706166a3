"""A text classification task from a file of the user's: CSV or JSON lines with a text and a label in each row.

Conventions
-----------
White space of a text is normalised. A text that occurs twice with one label is kept once, where it was first; with
two labels it is dropped. Without a file of held-out texts, a share of the texts is held out by a hash of the text, so
that the split depends on nothing else; the training texts come in the order of that hash, a mixture of all classes.

Values
------
``read_task``.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.task import TextTask

TEXT_COLUMNS = ("text", "sentence", "utterance", "content")
LABEL_COLUMNS = ("label", "category", "class", "intent", "label_text")


def read_task(
    file: str,
    *,
    held_out_file: str | None = None,
    text: str | None = None,
    label: str | None = None,
    held_out: float = 0.2,
    train_items: int | None = None,
    held_out_items: int | None = None,
) -> TextTask:
    """Labelled texts of a file, split.

    Parameters
    ----------
    file : str
        ``.csv`` (with a header) or ``.jsonl``.
    held_out_file : str, optional
        Texts that are held out; those that are in ``file`` too are dropped from there.
    text, label : str, optional
        Names of the columns; by default the first of those usual ones that is there.
    held_out : float
        Share that is held out where there is no file of it, in (0, 1).
    train_items, held_out_items : int, optional
        Keep so many of either side, the first in the order of the hash.

    Returns
    -------
    TextTask
        Classes in alphabetical order.

    Raises
    ------
    LoraAnalysisError
        If a file is neither, or a row has no text or label; with file, line and content.
    ValueError
        If there are fewer than two classes, a class has no training text, or ``held_out`` is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}.")
    rows = _distinct(_rows(Path(file), text, label))
    if held_out_file is None:
        kept = {key: value for key, value in rows.items() if _share(key) < held_out}
        rows = {key: value for key, value in rows.items() if key not in kept}
    else:
        kept = _distinct(_rows(Path(held_out_file), text, label))
        rows = {key: value for key, value in rows.items() if key not in kept}
    train = sorted(rows.items(), key=lambda item: _share(item[0]))[:train_items]
    held = sorted(kept.items(), key=lambda item: _share(item[0]))[:held_out_items]
    if not train or not held:
        raise ValueError(f"{file}: expected texts on either side, got {len(train)} and {len(held)}. Give more of them.")
    classes = tuple(sorted({value for _, value in [*train, *held]}))
    if len(classes) < 2:
        raise ValueError(f"{file}: expected texts of at least two classes, got {list(classes)}.")
    if missing := sorted(set(classes) - {value for _, value in train}):
        raise ValueError(f"{file}: expected training texts of every class, got none of {missing[0]!r}.")
    index = {name: i for i, name in enumerate(classes)}
    return TextTask(
        train_texts=tuple(key for key, _ in train),
        train_labels=tuple(index[value] for _, value in train),
        held_out_texts=tuple(key for key, _ in held),
        held_out_labels=tuple(index[value] for _, value in held),
        classes=classes,
    )


def _distinct(rows: Iterator[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    contradictory: set[str] = set()
    for text, label in rows:
        if found.setdefault(text, label) != label:
            contradictory.add(text)
    return {text: label for text, label in found.items() if text not in contradictory}


def _rows(path: Path, text: str | None, label: str | None) -> Iterator[tuple[str, str]]:
    if path.suffix not in (".csv", ".jsonl"):
        raise LoraAnalysisError(f"{path}: expected a file .csv or .jsonl, got {path.suffix or 'no suffix'}.")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            names = (_column(path, reader.fieldnames or (), text, TEXT_COLUMNS, "text"),
                     _column(path, reader.fieldnames or (), label, LABEL_COLUMNS, "label"))  # fmt: skip
            for row in reader:
                yield _row(path, reader.line_num, row, names)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LoraAnalysisError(f"{path}, line {number}: expected JSON, got {line[:60]!r}: {error}.") from None
            if not isinstance(row, dict):
                raise LoraAnalysisError(f"{path}, line {number}: expected an object, got {line[:60]!r}.")
            names = (_column(path, row, text, TEXT_COLUMNS, "text"), _column(path, row, label, LABEL_COLUMNS, "label"))
            yield _row(path, number, row, names)


def _column(path: Path, columns: object, wanted: str | None, usual: tuple[str, ...], what: str) -> str:
    known = [str(column) for column in columns]  # type: ignore[attr-defined]
    found = next((name for name in ([wanted] if wanted else usual) if name in known), None)
    if found is None:
        raise LoraAnalysisError(
            f"{path}: expected a column {wanted or ' or '.join(usual)}, got {', '.join(known) or 'none'}. "
            f"Name it with {what}=."
        )
    return found


def _row(path: Path, line: int, row: dict[str, object], names: tuple[str, str]) -> tuple[str, str]:
    text, label = (row.get(name) for name in names)
    normalised = " ".join(str(text or "").split())
    if not normalised or label is None or str(label) == "":
        raise LoraAnalysisError(f"{path}, line {line}: expected a text and a label, got {str(row)[:80]}.")
    return normalised, str(label)


def _share(text: str) -> float:
    """A number in [0, 1) that a text always has."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
