"""What do updates amplify? Table 7 of the paper at every k, and the gain over chance across layers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from scipy import stats

from lora_analysis.plots.appearance import CHANCE, CHANCE_BAND, COLOURS, axes_or_new, legend_above, log_ticks, style
from lora_analysis.plots.modules import Place, kind_labels, module_label, place, plain
from lora_analysis.plots.selection import one_value, require_columns, rows_of_module

_MADE_BY = "amplification_table(adapter, base)"
_WIDTH = 0.6
"""Room that the kinds of one layer share, in layers."""


def amplification_points(table: pd.DataFrame, *, module: str | None = None, ax: Axes | None = None) -> Axes:
    """How much of W lies in the top k directions of ΔW, against chance and against the most there is.

    ``||U_k.T @ W @ V_k||_F`` of the update; the root mean square of random directions, with the interval that
    holds 95 % of them (for k > 1, where the table tells the null's variance); and the ceiling, W's own top k.
    Both axes are logarithmic, so the distance to a line is a ratio: the gain over chance, the fraction of the
    ceiling.

    Parameters
    ----------
    table : DataFrame
        ``amplification_table(adapter, base)``, of one adapter.
    module : str, optional
        Which module; not needed where the table holds one.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If the table lacks the module, or holds several that fit, or no k has a value.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3, table 7: columns ΔW_q, W_q and Random.
    """
    where = "amplification_points"
    columns = ("adapter", "module", "k", "projected", "projected_top", "projected_null_rms", "gain", "z")
    require_columns(table, columns, where=where, made_by=_MADE_BY)
    rows = table if module is None else rows_of_module(table, "module", module, where=where)
    name = one_value(rows, "module", where=where)
    one_value(rows, "adapter", where=where)
    rows = rows[rows["projected"].notna()].sort_values("k")
    if rows.empty:
        raise ValueError(f"{where}: {name!r}: expected a k with a projection, got only rows beyond its rank.")
    ax = axes_or_new(ax)
    k, rms = rows["k"].to_numpy(), rows["projected_null_rms"].to_numpy(dtype=float)
    low, high = _chance_interval(rows["gain"].to_numpy(dtype=float), rows["z"].to_numpy(dtype=float))
    ax.plot(
        k,
        rows["projected_top"],
        color=COLOURS[6],
        marker="^",
        markersize=4,
        linewidth=1,
        linestyle="--",
        label="top $k$ of $W$: ceiling",
    )
    ax.plot(
        k, rows["projected"], color=COLOURS[0], marker="o", markersize=4, linewidth=1.2, label=r"top $k$ of $\Delta W$"
    )
    ax.plot(k, rms, color=CHANCE, marker="s", markersize=3, linewidth=1, linestyle=":", label="random (rms)")
    if np.isfinite(low).any():
        ax.fill_between(k, rms * low, rms * high, color=CHANCE_BAND, linewidth=0, zorder=0, label="chance, 95 %")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(k.astype(float).tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_xlabel("$k$")
    ax.set_ylabel(r"$\|U_k^\top W V_k\|_F$")
    log_ticks(ax.yaxis)
    legend_above(ax, module_label(name))
    return ax


def gain_by_layer(table: pd.DataFrame, *, k: int | None = None, ax: Axes | None = None) -> Axes:
    """Gain over chance of every module, by layer: one colour and marker per projection.

    Behind each point, in grey, what 95 % of random directions would gain in that very module; none at k = 1,
    where the table does not tell the null's variance. Where layers cannot be read from the names, the modules
    stand side by side.

    Parameters
    ----------
    table : DataFrame
        ``amplification_table(adapter, base)``. Of several adapters each is a series.
    k : int, optional
        The truncation at which to compare, the largest that every module has by default. Only equal k compare.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If no k has a gain for every module, or not this one for any.

    References
    ----------
    The gain is ``||U_k.T @ W @ V_k||_F sqrt(d_out d_in) / (k ||W||_F)``; Hu et al. 2021, arXiv:2106.09685, section
    7.3, has its numerator.
    """
    where = "gain_by_layer"
    require_columns(table, ("adapter", "module", "k", "gain", "z"), where=where, made_by=_MADE_BY)
    known = table[table["gain"].notna()]
    k = _common_k(table, known) if k is None else k
    rows = known[known["k"] == k]
    if rows.empty:
        raise ValueError(f"{where}: expected a k with a gain, got k={k}. Known: {sorted(set(known['k']))}.")
    ax = axes_or_new(ax)
    places = {module: place(module) for module in dict.fromkeys(rows["module"])}
    layered = None not in {p.layer for p in places.values()} and len(set(places.values())) == len(places)
    if not layered:
        places = {module: Place(number, "") for number, module in enumerate(places)}
    labels = kind_labels(p.kind for p in places.values())
    keys = list(dict.fromkeys((row.adapter, places[row.module].kind) for row in rows.itertuples()))
    several = rows["adapter"].nunique() > 1
    low, high = _chance_interval(rows["gain"].to_numpy(dtype=float), rows["z"].to_numpy(dtype=float))
    series = np.array([keys.index((row.adapter, places[row.module].kind)) for row in rows.itertuples()])
    x = np.array([places[module].layer for module in rows["module"]], dtype=float)
    x += _WIDTH * ((series + 0.5) / len(keys) - 0.5)
    if np.isfinite(low).any():
        bars = ax.bar(
            x,
            high - low,
            width=0.8 * _WIDTH / len(keys),
            bottom=low,
            color=CHANCE_BAND,
            linewidth=0,
            zorder=0,
            label="chance, 95 %",
        )
        for bar in bars:
            bar.sticky_edges.y.clear()  # or the axis would end where the lowest interval does
    ax.axhline(1.0, color=CHANCE, linestyle=":", linewidth=1, zorder=1)
    for number, (adapter, kind) in enumerate(keys):
        colour, marker = style(number)
        label = ": ".join(part for part in (plain(str(adapter)) if several else "", labels[kind]) if part)
        mine = series == number
        ax.plot(
            x[mine],
            rows["gain"].to_numpy()[mine],
            color=colour,
            marker=marker,
            markersize=4.5,
            linestyle="none",
            label=label or None,
        )
    return _finish_gain(ax, rows, places, k, layered)


def _finish_gain(ax: Axes, rows: pd.DataFrame, places: dict[str, Place], k: int, layered: bool) -> Axes:
    positions = sorted({float(p.layer) for p in places.values() if p.layer is not None})
    if rows["gain"].min() > 0 and rows["gain"].max() > 3 * rows["gain"].clip(upper=1).min():
        ax.set_yscale("log")
        log_ticks(ax.yaxis)
    if layered:
        step = math.ceil(len(positions) / 12)
        ax.set_xticks(positions[::step])
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_xlabel("layer")
    else:
        ax.set_xticks(positions, labels=[plain(module) for module in places], rotation=90)
    ax.set_xlim(positions[0] - 0.6, positions[-1] + 0.6)
    ax.set_ylabel(f"gain over chance, $k$ = {k}")
    legend_above(ax)
    return ax


def _common_k(table: pd.DataFrame, known: pd.DataFrame) -> int:
    """The largest k at which every module of every adapter has a gain."""
    modules = len(table[["adapter", "module"]].drop_duplicates())
    counts = known.groupby("k").size()
    common = counts[counts == modules]
    if common.empty:
        raise ValueError(
            "gain_by_layer: expected a k at which every module has a gain, got none. Pass k=, or the modules that "
            "have one."
        )
    return int(common.index.max())


def _chance_interval(gain: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central 95 % of gains by chance; NaN where z does not tell their variance.

    ``z = (gain² - 1) / sd(gain²)`` gives the sd back. The square of a gain is close to a chi-square over its
    degrees of freedom, ``2 / sd²`` of them (Satterthwaite).
    """
    telling = np.isfinite(z) & (np.abs(gain**2 - 1) > 1e-9)
    sd = np.where(telling, (gain**2 - 1) / np.where(telling, z, 1.0), np.nan)
    freedom = 2 / sd**2
    return np.sqrt(stats.chi2.ppf(0.025, freedom) / freedom), np.sqrt(stats.chi2.ppf(0.975, freedom) / freedom)
