"""What commands print: tables of at most 80 columns, JSON, and files.

Names come from untrusted files: control and direction characters are shown as escapes, and nothing is
interpreted as markup.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.cli.layout import Kind, laid_out
from lora_analysis.tables.discoveries import findings as findings
from lora_analysis.tables.frames import records, write_table
from lora_analysis.tables.names import plain_text as plain_text

_TEXT = {"side", "scale_source"}

Column = tuple[str, str, Callable[[Any], str]]
"""Column of the frame, heading, and how to write a value."""


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


def print_source(source: object) -> None:
    """Which adapter the next table is of, where there are several."""
    print(f"\n{plain_text(str(source))}")


def explain(text: str) -> None:
    """How to read the table above, after a blank line."""
    print(f"\n{wrapped(text)}")


def wrapped(text: str, *, indent: str = "", hanging: int = 0) -> str:
    """Text in lines of 80 columns, or a narrower terminal's; words stay whole, so that names can be copied.

    Lines after the first stand ``hanging`` further to the right.
    """
    # A hanging indent needs room for the text beside it.
    hanging = hanging if hanging <= columns() // 2 else len("    ")
    return textwrap.fill(
        text,
        columns(),
        initial_indent=indent,
        subsequent_indent=indent + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns() -> int:
    """How wide running text is: no wider than 80, and as narrow as the terminal."""
    return min(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


def say(line: str) -> None:
    """A line beside the results, on stderr."""
    print(plain_text(line), file=sys.stderr)


def report_notes(adapters: Sequence[Adapter]) -> None:
    """What the readers found worth a note, each once."""
    for note in dict.fromkeys(f"{adapter.source}: {note}" for adapter in adapters for note in adapter.notes):
        say(f"note: {note}")


def report_base(base: BaseWeights) -> None:
    """What was done to the weights of a base, and how much of it was read where that is of interest."""
    for note in base.notes:
        say(f"note: {base.source}: {note}")
    report_read(base)


def report_read(base: BaseWeights) -> None:
    """How much of a base was read, if it came over a network or was dequantised."""
    if base.is_remote or base.is_quantised:
        say(f"{base.source}: {base.report()}")


def print_table(table: pd.DataFrame, columns: Sequence[Column], *, limit: int | None = None) -> None:
    """Print a frame at 80 columns, or the terminal's, with what shortened module names stand for above it."""
    shown = table if limit is None else table.head(limit)
    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False)
    rows = [[plain_text(write(row[column])) for column, _, write in columns] for row in shown.to_dict("records")]
    page = laid_out(
        [heading for _, heading, _ in columns], rows, [_kind(name) for name, _, _ in columns], console.width
    )
    for line, style in [
        *((line, "dim") for line in page.legend),
        (page.heading, "bold"),
        *((line, "") for line in page.lines),
    ]:
        console.print(Text(line, style=style), soft_wrap=True)
    if len(shown) < len(table):
        say(f"{len(table) - len(shown):,} more rows; --out FILE writes them all.")


def _kind(column: str) -> Kind:
    if column.startswith("module"):
        return "name"
    if column == "flags":
        return "flags"
    return "text" if column in _TEXT else "number"
