"""Rows of training dynamics as a file of JSON lines that outlives a killed run.

Values
------
``DynamicsLog``, ``read_dynamics``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_analysis.training.states import COLUMNS

_NUMBERS = frozenset(COLUMNS) - {"adapter", "step", "module", "moved_from", "flags"}


class DynamicsLog:
    """A file of one run that grows by the rows of one step at a time.

    Parameters
    ----------
    path : path
        Its folder is made if need be.
    start : int
        The step that the model is at now.
    """

    def __init__(self, path: str | os.PathLike[str], *, start: int) -> None:
        self._path, self._start = Path(path), start
        self._waiting: list[dict[str, Any]] | None = []
        """Rows from before the first step, which tells what of an older file they follow."""

    def begin(self, step: int) -> None:
        """Cut off what training writes anew, going on with ``step``; does nothing once it has begun.

        Where that follows on ``start``, lines of ``start`` and later ones. A later step is one of a run that was
        taken up after ``start`` was looked at: then lines before it stay.
        """
        if self._waiting is None:
            return
        cut = self._start if step <= self._start + 1 else step
        kept = [row for row in read_dynamics(self._path) if row["step"] < cut] if self._path.exists() else []
        steps = {row["step"] for row in kept}
        rows = kept + [row for row in self._waiting if row["step"] not in steps]
        self._waiting = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._path.parent, prefix=".writing-") as scratch:
            written = Path(scratch) / self._path.name
            written.write_text(_lines(rows), encoding="utf-8")
            written.replace(self._path)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows. The file is closed in between, so that what is written stays."""
        if self._waiting is not None:
            self._waiting += rows
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))


def read_dynamics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file that ``TrainingDynamics(path=...)`` wrote, without ``phi_final``.

    Parameters
    ----------
    path : path
        A last line that was torn when the run was killed is left out.

    Raises
    ------
    ValueError
        If another line is no row.
    """
    # Not splitlines, which also breaks at characters that a module's name may hold.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not found.keys() >= {"step", "module"}:
            raise ValueError(
                f"{path}: line {number}: expected a row of training dynamics, got {line[:60]!r}. Pass the file that "
                "TrainingDynamics(path=...) wrote."
            )
        rows.append({name: _number(name, found.get(name)) for name in COLUMNS})
    return rows


def _number(name: str, value: Any) -> Any:
    return math.nan if value is None and name in _NUMBERS else value


def _lines(rows: list[dict[str, Any]]) -> str:
    plain = [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in r.items()} for r in rows
    ]
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in plain)
