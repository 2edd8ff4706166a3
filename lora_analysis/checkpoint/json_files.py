"""Small JSON files beside tensors, and headers: configurations and indices, bounded before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_analysis.checkpoint.diagnosis import is_file, one_line, what_is
from lora_analysis.errors import CheckpointError

MAX_JSON = 100_000_000
"""Bytes that are read at most: safetensors' own bound for headers."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        If it is missing, too long, damaged, or no object.
    """
    if not is_file(path):
        raise CheckpointError(f"{path}: no such file.")
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON:,} bytes of JSON, got {size:,}.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    return json_object(data, str(path), what_is(path))


def json_object(data: bytes, where: str, instead: str | None = None) -> dict[str, Any]:
    """The object that bytes of JSON hold.

    Parameters
    ----------
    data : bytes
    where : str
        What to call it in messages.
    instead : str, optional
        What it is if it is no JSON.

    Raises
    ------
    CheckpointError
        If they are damaged, or hold no object.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        page = "an HTML or XML page" if data.lstrip()[:1] == b"<" else "something else"
        raise CheckpointError(f"{where}: expected JSON, got {instead or page} ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}.")
    return content
