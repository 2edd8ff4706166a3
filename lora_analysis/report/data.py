"""Tables as compact JSON in scripts, which pages opened from disk can load."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_analysis.report.columns import Column
from lora_analysis.tables.names import plain_text

DIGITS = 6
"""Significant digits of a number on a page."""


def rounded(value: Any, digits: int = DIGITS) -> Any:
    r"""A value as JSON holds it: numbers to so many digits, what is missing or infinite as None, names as plain text.

    Examples
    --------
    >>> rounded(float("nan")), rounded(1 / 3), rounded("a\x1b"), rounded(7.0)
    (None, 0.333333, 'a\\x1b', 7)
    """
    if value is None or value is pd.NA:
        return None
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, Mapping):
        return {plain_text(str(key)): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(item, digits) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.{digits}g}")
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    return value


def shown(table: pd.DataFrame, columns: Sequence[Column], name: str, **more: Any) -> dict[str, Any]:
    """A table as a page shows it: those of the columns that it has any value of, and its rows.

    Parameters
    ----------
    table : DataFrame
    columns : sequence of Column
    name : str
        Of the file that it is downloaded as.
    **more
        Beside it, such as where rows lead to.
    """
    # By columns: a row of a frame is slow to take, and a thousand adapters have many.
    values = {column: rounded(table[column.key].tolist()) for column in columns if column.key in table}
    kept = [c for c in values if c.key in ("flags", "module") or any(value is not None for value in values[c])]
    rows = [list(row) for row in zip(*(values[column] for column in kept), strict=True)]
    return {"name": name, "columns": [column._asdict() for column in kept], "rows": rows, **more}


def write_data(folder: Path, name: str, value: Any) -> None:
    """``folder/name.js``, a script that hands the value to the page that loads it.

    Written in ASCII and without ``<``, so that no name in it can end the script or begin another.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    (folder / f"{name}.js").write_text(f"report.receive({json.dumps(name)},{text});\n", encoding="ascii")


def short_names(sources: Iterable[str]) -> list[str]:
    """Sources without the folders that all of them share.

    Examples
    --------
    >>> short_names(["/runs/a/r8", "/runs/b/r8"]), short_names(["/runs/a/r8"])
    (['a/r8', 'b/r8'], ['r8'])
    """
    parts = [source.rstrip("/").split("/") for source in sources]
    shortest = min((len(one) for one in parts), default=1) - 1
    common = next((n for n in range(shortest) if len({one[n] for one in parts}) > 1), shortest)
    return ["/".join(one[common:]) for one in parts]
