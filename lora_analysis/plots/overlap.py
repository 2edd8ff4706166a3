"""Where along the whole spectrum of W an update lies: figure 8 of the paper, and its other end."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lora_analysis.plots.appearance import CHANCE, CHANCE_BAND, COLOURS, axes_or_new, legend_above
from lora_analysis.plots.modules import kind_labels, place
from lora_analysis.plots.selection import one_value, require_columns

_COLUMNS = ("adapter", "module", "side", "k", "part", "overlap", "null_mean", "null_sd", "flags")


def spectrum_overlap(table: pd.DataFrame, *, side: str = "out", k: int | None = None, ax: Axes | None = None) -> Axes:
    """Overlap of ΔW's top k directions with every part of W's spectrum, over what chance gives.

    A line for each module, coloured by projection; 1 is chance, and the grey band holds two standard deviations of it
    in one module. Parts are tenths by default, the largest singular values on the left.

    Parameters
    ----------
    table : DataFrame
        ``spectrum_overlap_table(adapter, base)``, of one adapter.
    side : {"out", "in"}
    k : int, optional
        How many top directions; the largest that every module has by default.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If the table lacks a column, holds several adapters, or has no overlap on this side at this k.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, figure 8; Staats, Thamm and Rosenow 2024, arXiv:2410.17770.
    """
    where = "spectrum_overlap"
    require_columns(table, _COLUMNS, where=where, made_by="spectrum_overlap_table(adapter, base)")
    one_value(table, "adapter", where=where)
    rows = table[(table["side"] == side) & table["overlap"].notna()]
    rows = rows[~rows["flags"].str.contains("outside-base")]
    counts = rows.groupby("k")["module"].nunique()
    if k is None and len(counts):
        k = int(counts[counts == counts.max()].index.max())
    rows = rows[rows["k"] == k]
    if rows.empty:
        at = "" if k is None else f" at k={k}"
        raise ValueError(
            f"{where}: expected overlaps on side {side!r}{at}, got none: ΔW or W is zero, or k beyond its rank."
        )
    ax = axes_or_new(ax)
    spread = (rows["null_sd"] / rows["null_mean"]).groupby(rows["part"]).max()
    parts = spread.index.to_numpy()
    ax.fill_between(parts, 1 - 2 * spread, 1 + 2 * spread, color=CHANCE_BAND, linewidth=0, label="chance, ± 2 sd")
    ax.axhline(1, color=CHANCE, linestyle="--", linewidth=0.8)
    labels = kind_labels((place(module).kind for module in rows["module"]), update=True)
    seen: set[str] = set()
    for module, mine in rows.groupby("module", sort=False):
        kind = place(str(module)).kind
        colour = COLOURS[list(labels).index(kind) % len(COLOURS)]
        label = None if kind in seen else labels[kind]
        seen.add(kind)
        ax.plot(mine["part"], mine["overlap"] / mine["null_mean"], color=colour, linewidth=0.8, alpha=0.7, label=label)
    ax.set_xticks(parts if len(parts) <= 12 else np.linspace(parts[0], parts[-1], 6).round())
    ax.set_xlabel(f"{len(parts)} parts of $W$'s spectrum, large $\\sigma$ first")
    ax.set_ylabel(f"overlap over chance, $k$ = {k}")
    legend_above(ax)
    return ax
