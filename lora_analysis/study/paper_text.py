"""The paper's tables of a study as aligned text of 80 columns.

Values
------
``table_text``.
"""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd

from lora_analysis.study.projections import layer_of, projection_of

WIDTH = 80
_KEYS = ("method", "targets", "r", "module", "seeds")
"""Columns that say what a row is about; they stand at the left of every block."""
_HEADINGS = {
    "projected": "of ΔW",
    "projected_top": "of W",
    "projected_null_rms": "random",
    "norm_base": "|W|",
    "norm_update": "|ΔW|",
    "ceiling_fraction": "share of\nceiling",
    "amplification": "factor",
    "amplification_null": "factor,\nrandom",
    "seeds": "seed",
    "paper_projected": "paper\nof ΔW",
    "paper_projected_top": "paper\nof W",
    "paper_random": "paper\nrandom",
    "paper_norm_base": "paper\n|W|",
    "paper_norm_update": "paper\n|ΔW|",
    "paper_gain": "paper\ngain",
    "paper_ceiling_fraction": "paper\nshare",
    "paper_amplification": "paper\nfactor",
    "paper_wikisql": "paper\nWikiSQL",
    "paper_multinli": "paper\nMultiNLI",
    "paper_millions": "paper\nmillions",
    "paper_loss": "paper\nloss",
    "paper_bleu": "paper\nBLEU",
}
_FEW = 4
"""Seeds whose values are all printed; of more the least and the greatest."""


def table_text(table: pd.DataFrame, *, title: str, notes: str = "") -> str:
    """A table as text, in blocks below each other where its columns need more than 80 characters.

    Every block begins with the columns that say what a row is about. Columns of one metric, and those of the paper,
    stay together. A value that is missing is ``-``.

    Parameters
    ----------
    table : DataFrame
        Of ``paper_tables``.
    title : str
    notes : str
        Put below the title.

    Returns
    -------
    str
        Lines of at most 80 characters.
    """
    shown = [column for column in table.columns if not (column.startswith("paper_") and table[column].isna().all())]
    cells = {column: _column(column, table[column].tolist()) for column in shown}
    keys = [column for column in shown if column in _KEYS]
    groups: dict[str, list[str]] = {}
    for column in shown:
        if column not in keys:
            groups.setdefault(_group(column), []).append(column)
    blocks: list[list[str]] = [[]]
    for group in groups.values():
        if blocks[-1] and _width(cells, keys + blocks[-1] + group) > WIDTH:
            blocks.append([])
        blocks[-1] += group
    parts = [textwrap.fill(line, WIDTH) for line in (title, *notes.splitlines())]
    for block in blocks:
        if block:
            # Rows of which the paper has nothing are not repeated for its sake.
            apart = all(column.startswith("paper_") for column in block)
            rows = [not apart or bool(table[block].iloc[row].notna().any()) for row in range(len(table))]
            parts.append("\n" + _block(cells, keys + block, rows))
    return "\n".join(parts) + "\n"


def _group(column: str) -> str:
    """Columns that stay together: those of a metric, of the paper, or else of the rest."""
    if column.startswith("paper_"):
        return "paper, derived" if column.removeprefix("paper_") in _FACTORS else "paper"
    head, _, tail = column.rpartition("_")
    return head if tail in ("mean", "seeds", "gain") else "rest" if column in _FACTORS else ""


_FACTORS = ("gain", "z", "ceiling_fraction", "amplification", "amplification_null")


def _column(column: str, values: list[Any]) -> list[str]:
    """Two lines of heading and the cells."""
    heading = _HEADINGS.get(column, column.replace("_", "\n", 1)).split("\n")
    if column.startswith("accuracy"):
        heading = ["acc. %", {"mean": "mean", "seeds": "by seed", "gain": "gain"}[column.rpartition("_")[2]]]
    elif column.endswith("_seeds"):
        heading = [heading[0], "by seed"]
    return [*([""] * (2 - len(heading))), *heading, *(_cell(column, value) for value in values)]


def _cell(column: str, value: Any) -> str:
    if isinstance(value, tuple):
        if len(value) <= _FEW:
            return " ".join(_cell(column, item) for item in value)
        finished = [item for item in value if not pd.isna(item)]
        return f"{_cell(column, min(finished))} to {_cell(column, max(finished))}"
    if isinstance(value, str):
        return _short(value) if column == "module" else value or "-"
    if pd.isna(value):
        return "-"
    if column == "r" and value == 0:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if column.startswith("accuracy"):
        return f"{100 * value:+.1f}" if column.endswith("gain") else f"{100 * value:.1f}"
    if column.startswith("loss"):
        return f"{value:+.4f}" if column.endswith("gain") else f"{value:.4f}"
    if column.endswith("ceiling_fraction"):
        return f"{value:.1%}"
    if column == "z":
        return f"{value:+.1f}"
    if column.startswith("paper_norm") or column in ("paper_projected", "paper_projected_top", "paper_random"):
        return f"{value:.2f}"
    if column.startswith("paper_"):
        return f"{value:,.2f}" if column in ("paper_loss", "paper_bleu") else f"{value:,.1f}"
    return f"{value:+.4g}" if column.endswith("_gain") else f"{value:.3g}"


def _short(module: str) -> str:
    """A module as projection and layer; other text as it stands."""
    layer = layer_of(module)
    return module if layer < 0 else f"{projection_of(module)}, layer {layer}"


def _width(cells: dict[str, list[str]], columns: list[str]) -> int:
    return sum(max(map(len, cells[column])) for column in columns) + 2 * (len(columns) - 1)


def _block(cells: dict[str, list[str]], columns: list[str], rows: list[bool]) -> str:
    aligned = []
    for column in columns:
        width = max(map(len, cells[column]))
        left = column in _KEYS and column != "r"
        aligned.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells[column]])
    lines = ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]
    body = [line for line, shown in zip(lines[2:], rows, strict=True) if shown]
    return "\n".join([*(line for line in lines[:2] if line), "-" * _width(cells, columns), *body])
