"""What commands print: tables of at most 80 columns, JSON, and files.

Names come from untrusted files: control and direction characters are shown as escapes, and nothing is
interpreted as markup.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_analysis.adapter import Adapter
from lora_analysis.tables.frames import records, write_table

_NAME_WIDTH = 26
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}

Column = tuple[str, str, Callable[[Any], str]]
"""Column of the frame, heading, and how to write a value."""


def plain_text(text: str) -> str:
    """The text with control, format and direction characters as visible escapes."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN_CATEGORIES else char
        for char in text
    )


def number(digits: int = 3) -> Callable[[Any], str]:
    """A writer of numbers with so many significant digits; a dash for what is missing."""

    def write(value: Any) -> str:
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(value, float):
            return f"{value:.{digits}g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.{digits - 1}e}"
        return str(value)

    return write


def probability(value: float) -> str:
    """A p-value: three decimals, or the bound it is below."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def share(value: float) -> str:
    """A share, in per cent."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def deliver(table: pd.DataFrame, *, out: Path | None, as_json: bool) -> bool:
    """Write or dump the whole table if asked to; whether that was all there is to do."""
    if out is not None:
        write_table(table, out)
        if not as_json:
            say(f"{len(table):,} rows in {out}")
    if as_json:
        print(json.dumps(records(table), indent=1, allow_nan=False))
    return out is not None or as_json


def explain(text: str) -> None:
    """How to read the table above, after a blank line."""
    print(f"\n{textwrap.fill(text, 80, break_on_hyphens=False)}")


def say(line: str) -> None:
    """A line beside the results, on stderr."""
    print(plain_text(line), file=sys.stderr)


def report_notes(adapters: Sequence[Adapter]) -> None:
    """What the readers found worth a note, each once."""
    for note in dict.fromkeys(f"{adapter.source}: {note}" for adapter in adapters for note in adapter.notes):
        say(f"note: {note}")


def print_table(table: pd.DataFrame, columns: Sequence[Column], *, limit: int | None = None) -> None:
    """Print a frame at up to 80 columns, module names shortened and the rule stated above the table."""
    shown = table if limit is None else table.head(limit)
    names = [column for column, _, _ in columns if column.startswith("module")]
    shortened = _shortened([str(name) for column in names for name in shown[column]])
    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False, soft_wrap=False)
    example = next(((name, short) for name, short in shortened.items() if name != short), None)
    if example:
        console.print(Text(plain_text(f"{example[1]} is {example[0]}"), style="dim"), soft_wrap=True)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, heading, _ in columns:
        numeric = column not in {*names, "flags", "side", "scale_source", "adapter"}
        grid.add_column(heading, justify="right" if numeric else "left", no_wrap=column != "flags", overflow="fold")
    for row in shown.to_dict("records"):
        cells = (shortened[row[c]] if c in names else write(row[c]) for c, _, write in columns)
        grid.add_row(*(Text(plain_text(cell)) for cell in cells))
    console.print(grid)
    if len(shown) < len(table):
        say(f"{len(table) - len(shown):,} more rows; --out FILE writes them all.")


def _shortened(names: Sequence[str]) -> dict[str, str]:
    """Names without the components that all of them share, if they are long."""
    distinct = list(dict.fromkeys(names))
    if not distinct or max(map(len, distinct)) <= _NAME_WIDTH:
        return {name: name for name in distinct}
    parts = {name: name.split(".") for name in distinct}
    common = set.intersection(*(set(components) for components in parts.values())) if len(distinct) > 1 else set()
    short = {name: _elided(components, common) for name, components in parts.items()}
    return short if len(set(short.values())) == len(distinct) else {name: name for name in distinct}


def _elided(components: Sequence[str], common: set[str]) -> str:
    kept: list[str] = []
    for component in components:
        if component not in common:
            kept.append(component)
        elif kept and kept[-1] != "…":
            kept.append("…")
    while kept and kept[-1] == "…":
        kept.pop()
    return ".".join(kept).replace(".….", "…") or ".".join(components)
