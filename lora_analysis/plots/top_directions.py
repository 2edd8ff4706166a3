"""Does ΔW lie in the top directions of W? Figure 8 of the paper, and where in W's whole spectrum it lies."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lora_analysis.plots.appearance import CHANCE, CHANCE_BAND, TWO_COLUMNS, index_ticks, legend_above, style
from lora_analysis.plots.modules import plain
from lora_analysis.plots.selection import require_columns
from lora_analysis.plots.similarity import figure_title

_CELLS = ("series", "i", "j", "phi", "null_mean")
_PARTS = ("series", "part", "share", "null_mean", "null_low", "null_high")
_MADE_BY = "study.paper_directions.top_directions(study)"


def figure_top_directions(
    cells: pd.DataFrame, parts: pd.DataFrame | None = None, *, title: str | None = None, width: float = TWO_COLUMNS
) -> Figure:
    """Phi of W's top i directions with ΔW's top j, a panel for each rank and for random directions.

    All panels have one colour scale, from 0 to the greatest phi of any; the bar marks what chance gives at the last
    cell. Each title says phi there and how many times chance it is. With ``parts``, a panel below has the share of
    ΔW's top directions in each tenth of W's spectrum, with the interval that holds 95 % of random directions.

    Parameters
    ----------
    cells : DataFrame
        Columns ``series i j phi null_mean``, each series every cell of its grid.
    parts : DataFrame, optional
        Columns ``series part share null_mean null_low null_high``: ``part`` names a part of W's spectrum, in order.
    title : str, optional
        Above all panels.
    width : float
        Of the figure, in inches.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If a column is missing or a table empty.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, figure 8; Staats et al. 2024, arXiv:2410.17770 (small singular values matter).
    """
    where = "figure_top_directions"
    require_columns(cells, _CELLS, where=where, made_by=_MADE_BY)
    series = list(dict.fromkeys(cells["series"]))
    figure = Figure(figsize=(width, 2.3 if parts is None else 4.7), layout="constrained")
    figure_title(figure, title)
    grid = figure.add_gridspec(
        1 if parts is None else 2, len(series), height_ratios=None if parts is None else (1, 1.2)
    )
    highest = math.ceil(10 * float(cells["phi"].max())) / 10
    axes, images = [], []
    for number, name in enumerate(series):
        ax = figure.add_subplot(grid[0, number])
        images.append(_panel(ax, cells[cells["series"] == name], highest))
        ax.set_ylabel("$j$, of $\\Delta W$" if number == 0 else "")
        axes.append(ax)
    _bar(figure, images[0], axes, float(cells["null_mean"].iloc[-1]), highest)
    if parts is not None:
        require_columns(parts, _PARTS, where=where, made_by=_MADE_BY)
        _whole_spectrum(figure.add_subplot(grid[1, :]), parts)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, highest: float) -> AxesImage:
    m, n = int(rows["i"].max()), int(rows["j"].max())
    phi = np.full((n, m), np.nan)
    phi[rows["j"].to_numpy() - 1, rows["i"].to_numpy() - 1] = rows["phi"].to_numpy()
    image = ax.imshow(
        phi,
        cmap=colormaps["viridis"].with_extremes(bad="0.8"),
        vmin=0.0,
        vmax=highest,
        interpolation="nearest",
        extent=(0.5, m + 0.5, n + 0.5, 0.5),
        aspect="auto",
    )
    extent = ax.get_window_extent()
    ax.set_xticks(_even_ticks(m))
    ax.set_yticks(index_ticks(n, extent.height / ax.figure.dpi))
    ax.tick_params(labelsize="small")
    ax.set_xlabel("$i$, of $W$", labelpad=1)
    last = rows[(rows["i"] == m) & (rows["j"] == min(n, 4))].iloc[0]
    ratio = last["phi"] / last["null_mean"]
    ax.set_title(
        f"{plain(str(last['series']))}\n$\\phi$({m}, {min(n, 4)}) = {last['phi']:.3f},\n{ratio:.2f} x chance",
        fontsize="small",
    )
    return image


def _even_ticks(count: int) -> list[int]:
    """1, the last, and two or three round numbers between."""
    rough = count / 3
    unit = 10.0 ** math.floor(math.log10(rough)) if rough >= 1 else 1.0
    step = max(1, int(next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)))
    return sorted({1, *(tick for tick in range(step, count + 1, step) if count - tick >= step / 2), count})


def _bar(figure: Figure, image: AxesImage, axes: list[Axes], chance: float, highest: float) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=15)
    for colour, linewidth in (("black", 2.6), ("white", 1.2)):
        bar.ax.axhline(chance, color=colour, linewidth=linewidth)
    step = 0.1 if highest <= 0.5 else 0.2
    ticks = {step * k: f"{step * k:.1f}" for k in range(round(highest / step) + 1)}
    ticks = {value: text for value, text in ticks.items() if abs(value - chance) >= 0.12 * highest}
    ticks[chance] = f"{chance:.2g}\nchance"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(labelsize="small")
    bar.ax.set_title(r"$\phi$", fontsize="medium")


def _whole_spectrum(ax: Axes, parts: pd.DataFrame) -> None:
    """Shares by part of the spectrum, a series each, over the interval of chance."""
    names = list(dict.fromkeys(parts["part"]))
    series = list(dict.fromkeys(parts["series"]))
    first = parts[parts["series"] == series[0]]
    x = np.arange(len(names), dtype=float)
    ax.bar(
        x,
        first["null_high"] - first["null_low"],
        bottom=first["null_low"],
        width=0.9,
        color=CHANCE_BAND,
        linewidth=0,
        zorder=0,
        label="chance, 95 %",
    )
    ax.hlines(first["null_mean"], x - 0.45, x + 0.45, color=CHANCE, linestyle=":", linewidth=1, zorder=1)
    for number, name in enumerate(series):
        colour, marker = style(number)
        shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
        ax.plot(
            x + shift,
            parts.loc[parts["series"] == name, "share"],
            color=colour,
            marker=marker,
            markersize=4.5,
            linestyle="none",
            label=plain(str(name)),
        )
    ax.set_xticks(x, labels=names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.tick_params(labelsize="small")
    ax.set_ylim(0, 1.08 * max(parts["share"].max(), parts["null_high"].max()))
    ax.set_xlabel("$W$'s singular directions in tenths (%), from the largest singular value to the smallest")
    ax.set_ylabel("share of the top\ndirections of $\\Delta W$")
    legend_above(ax)
