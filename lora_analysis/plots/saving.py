"""Figures as files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure

_METADATA: dict[str, dict[str, Any]] = {
    ".pdf": {"CreationDate": None},
    ".png": {},
    ".svg": {"Date": None},
}
"""What to leave out of each kind of file, so that the same figure is the same file on every day."""

_PNG_DPI = 200


def save_figure(figure: Artist, path: str | os.PathLike[str]) -> Path:
    """Write a figure; the suffix says how.

    ``.png`` with 200 dots per inch, ``.pdf`` or ``.svg``. No dates and no random names are written: the same
    figure gives the same bytes with the same matplotlib. The file appears whole or not at all.

    Parameters
    ----------
    figure : Figure or Axes
        For axes, the whole figure they are in.
    path : path
        Its folder is made if need be.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the suffix is none of these.
    TypeError
        If ``figure`` is neither a figure nor in one.
    """
    path = Path(path)
    if path.suffix not in _METADATA:
        raise ValueError(f"{path}: expected a name ending in {', '.join(_METADATA)}.")
    whole = figure if isinstance(figure, Figure) else figure.figure
    while whole is not None and not isinstance(whole, Figure):
        whole = whole.figure
    if whole is None:
        raise TypeError(f"figure: expected a Figure or Axes of one, got {figure!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        written = Path(scratch) / path.name
        # The names of clip paths in an SVG hash this salt, which is random unless set; it is put back after.
        with mpl.rc_context({"svg.hashsalt": "lora_analysis"}):
            dpi = _PNG_DPI if path.suffix == ".png" else "figure"
            whole.savefig(written, format=path.suffix[1:], dpi=dpi, metadata=_METADATA[path.suffix])
        written.replace(path)
    return path
