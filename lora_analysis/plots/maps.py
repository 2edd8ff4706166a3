"""One number of every module, as a map of layers and projections."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from lora_analysis.plots.appearance import CHANCE, axes_or_new
from lora_analysis.plots.modules import kind_labels, place
from lora_analysis.plots.selection import one_value, require_columns
from lora_analysis.tables.discoveries import RATE


def module_map(
    table: pd.DataFrame,
    column: str,
    *,
    label: str | None = None,
    chance: float | None = None,
    q: str | None = None,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    r"""A number of every module by layer (down) and projection (across).

    Parameters
    ----------
    table : DataFrame
        With ``adapter``, ``module`` and the column, one row for each module: of several k, sides or adapters select
        one.
    column : str
        What is drawn, such as ``relative_norm`` of ``strength_table`` or ``gain`` of ``amplification_table``.
    label : str, optional
        Of the colour bar; the column's name by default.
    chance : float, optional
        Marked on the colour bar.
    q : str, optional
        The column of adjusted p-values: modules consistent with chance (q above 0.05) have a dot.
    log : bool
        Colours by the logarithm; values of 0 and below are then left blank.
    ax : Axes, optional

    Returns
    -------
    Axes
        Cells without a module, or without a value, are blank.

    Raises
    ------
    ValueError
        If the table lacks a column, has several rows for one module, or no value.

    Examples
    --------
    >>> names = [f"layers.{i}.{kind}_proj" for i in range(3) for kind in "qv"]
    >>> table = pd.DataFrame({"adapter": "r8", "module": names, "gain": [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]})
    >>> ax = module_map(table, "gain", chance=1.0)
    >>> [text.get_text() for text in ax.get_xticklabels()]
    ['$\\Delta W_q$', '$\\Delta W_v$']
    """
    where = "module_map"
    columns = ("adapter", "module", column, *([q] if q else []))
    require_columns(table, columns, where=where, made_by="a table with one row per module")
    one_value(table, "adapter", where=where)
    if table["module"].duplicated().any():
        twice = table.loc[table["module"].duplicated(), "module"].iloc[0]
        raise ValueError(f"{where}: expected one row per module, got several of {twice!r}. Select one k, side or pair.")
    places = [place(module) for module in table["module"]]
    labels = kind_labels((p.kind for p in places), update=True)
    layers = sorted({p.layer for p in places if p.layer is not None})
    rows = [*layers, *([None] if any(p.layer is None for p in places) else [])]
    grid = np.full((len(rows), len(labels)), math.nan)
    plain_chance = np.zeros_like(grid, dtype=bool)
    kinds = list(labels)
    for p, value, level in zip(places, table[column], table[q] if q else [math.nan] * len(table), strict=True):
        spot = rows.index(p.layer), kinds.index(p.kind)
        grid[spot] = math.nan if pd.isna(value) or (log and value <= 0) else float(value)
        plain_chance[spot] = not pd.isna(level) and level > RATE
    if not np.isfinite(grid).any():
        raise ValueError(f"{where}: expected values of {column!r}, got none.")
    ax = axes_or_new(ax, height=min(7.0, 1.4 + 0.16 * len(rows)))
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    if chance is not None and (chance > 0 or not log):
        low, high = min(low, chance), max(high, chance)
    if low == high:
        low, high = (low * 0.9, high * 1.1) if low else (-1.0, 1.0)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    image = ax.imshow(grid, cmap=colormaps["cividis"], norm=norm, aspect="auto", interpolation="nearest")
    for row, number in np.argwhere(plain_chance):
        bright = norm(grid[row, number]) > 0.5
        ax.plot(number, row, marker="o", markersize=2, color="black" if bright else "white", linestyle="none")
    ax.set_xticks(range(len(kinds)), labels=[labels[kind] for kind in kinds])
    if max(len(text.strip("$")) for text in labels.values()) > 14 or len(kinds) > 6:
        ax.tick_params(axis="x", rotation=90)
    step = math.ceil(len(rows) / 16)
    ax.set_yticks(range(0, len(rows), step), labels=["-" if row is None else str(row) for row in rows[::step]])
    ax.set_ylabel("layer")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=25)
    bar.set_label(column if label is None else label)
    bar.ax.tick_params(labelsize="small")
    if chance is not None and low <= chance <= high:
        bar.ax.axhline(chance, color="white", linewidth=2.2)
        bar.ax.axhline(chance, color="black", linewidth=1)
        bar.ax.set_xlabel(f"line: chance,\n{chance:.3g}", fontsize="x-small")
    if q and plain_chance.any():
        ax.set_title("dot: consistent with chance", fontsize="small", color=CHANCE, loc="left")
    return ax
