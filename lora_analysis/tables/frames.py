"""Frames as files: CSV, Parquet, or JSON as a list of row objects."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lora_analysis.adapter import Adapter, Module

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".parquet", ".json")
LIST_COLUMNS = ("singular_values", "noise_floors", "truncation_errors", "tokens", "token_ids", "cosines")
"""Columns that hold a list of numbers, or nothing."""


def as_adapters(adapter: Adapter | Sequence[Adapter]) -> list[Adapter]:
    """One adapter or several, as a list."""
    adapters = [adapter] if isinstance(adapter, Adapter) else list(adapter)
    for item in adapters:
        if not isinstance(item, Adapter):
            raise TypeError(f"adapter: expected an Adapter or a sequence of them, got {type(item).__name__}.")
    return adapters


def module_flags(module: Module) -> list[str]:
    """The words about a module that hold before any number is read."""
    unknown = ["unknown-scale"] * (module.scale_source == "unknown")
    return unknown + ["r>d"] * (module.r > min(module.shape)) + list(module.flags)


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, counts: Sequence[str] = ()) -> pd.DataFrame:
    """A frame with exactly these columns, also where there are no rows; ``counts`` are integers or missing."""
    return pd.DataFrame(list(rows), columns=list(columns)).astype(dict.fromkeys(counts, "Int64"))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain objects, NaN and infinities as None."""
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


def write_table(table: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table; the suffix says how.

    ``.csv`` holds lists as JSON strings, ``.parquet`` as lists, ``.json`` is a list of row objects with NaN
    and infinities as null. The file appears whole or not at all.

    Raises
    ------
    ValueError
        If the suffix is none of these.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        written = Path(scratch) / path.name
        if path.suffix == ".parquet":
            from pyarrow import parquet  # a third of a second to import, and not needed by most

            parquet.write_table(_arrow(table), written)
        elif path.suffix == ".json":
            written.write_text(json.dumps(records(table), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        else:
            _lists_as_json(table).to_csv(written, index=False)
        written.replace(path)
    return path


def _arrow(table: pd.DataFrame) -> pyarrow.Table:
    """The frame with column types that do not depend on whether any value is there."""
    import pyarrow

    schema = pyarrow.Schema.from_pandas(table, preserve_index=False)
    for position, field in enumerate(schema):
        if field.name in LIST_COLUMNS and pyarrow.types.is_null(field.type):
            schema = schema.set(position, field.with_type(pyarrow.list_(pyarrow.float64())))
    return pyarrow.Table.from_pandas(table, schema=schema, preserve_index=False)


def _lists_as_json(table: pd.DataFrame) -> pd.DataFrame:
    flat = table.copy()
    for column in flat:
        if any(isinstance(value, list) for value in flat[column]):
            flat[column] = [json.dumps(_plain(value)) if isinstance(value, list) else value for value in flat[column]]
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value.item() if hasattr(value, "item") else value
