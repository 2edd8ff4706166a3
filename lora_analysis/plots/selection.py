"""Rows of a table that one figure is about, or an error that says which to choose."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def require_columns(table: pd.DataFrame, columns: Sequence[str], *, where: str, made_by: str) -> None:
    """Raise unless the table has these columns and at least one row."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"{where}: expected a table with columns {' '.join(columns)}, got none called {missing[0]!r}. "
            f"Pass {made_by}."
        )
    if table.empty:
        raise ValueError(f"{where}: expected rows to draw, got an empty table. Pass {made_by}.")


def one_value(table: pd.DataFrame, column: str, *, where: str) -> str:
    """The single value of a column."""
    values = list(dict.fromkeys(table[column]))
    if len(values) != 1:
        raise ValueError(
            f"{where}: expected rows of one {column}, got {len(values)} (first: {values[0]!r}, {values[1]!r}). "
            f"Select one: table[table[{column!r}] == {values[0]!r}]."
        )
    return str(values[0])


def rows_of_module(table: pd.DataFrame, column: str, module: str, *, where: str) -> pd.DataFrame:
    """The rows of one module."""
    rows = table[table[column] == module]
    if rows.empty:
        raise ValueError(f"{where}: no module {module!r} in the table (first: {table[column].iloc[0]!r}).")
    return rows
