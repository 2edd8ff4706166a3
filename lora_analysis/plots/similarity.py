"""Which directions do two updates share? The paper's phi as heat maps, with chance beside them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from lora_analysis.plots.appearance import ONE_COLUMN, TWO_COLUMNS, axes_or_new, index_ticks
from lora_analysis.plots.grids import Grid, ModulePair, grid_of, grids_of, null_mean, of_each_shape, random_control

_APART = 0.1
"""Least distance of labels on a colour bar, as a share of it."""


def similarity_grid(
    table: pd.DataFrame,
    *,
    module: ModulePair | None = None,
    side: str = "in",
    excess: bool = False,
    upto: tuple[int, int] | None = None,
    colour_bar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """phi(i, j) of one pair of modules, every i against every j.

    The colour runs from 0 to 1 in every figure, so that figures compare; the bar marks what chance gives at the
    last cell drawn. Cells beyond a numerical rank are grey.

    Parameters
    ----------
    table : DataFrame
        ``similarity_table(a, b, cells="all")``, of one pair of adapters.
    module : str or (str, str), optional
        The module, or both where their names differ; not needed where the table holds one pair.
    side : {"in", "out"}
        Right or left singular vectors.
    excess : bool
        Draw ``(phi - E) / (1 - E)`` with E = max(i, j) / d, so that 0 is chance at every cell and 1 containment;
        below chance the colour is that of chance.
    upto : (int, int), optional
        Largest i and j drawn.
    colour_bar : bool
        Add one beside the axes.
    ax : Axes, optional

    Returns
    -------
    Axes
        i downwards, j to the right, both from 1 in data coordinates.

    Raises
    ------
    ValueError
        If the table lacks the pair, holds several that fit, or not all cells.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2, eq. 4 and figures 3 and 4.
    """
    grid = grid_of(table, module, side, where="similarity_grid")
    if upto is not None:
        if min(upto) < 1:
            raise ValueError(f"similarity_grid: upto: expected i and j of at least 1, got {upto}.")
        grid = grid.top(*upto)
    ax = axes_or_new(ax)
    image = _heat_map(ax, grid, excess=excess)
    ax.set_title(grid.title, fontsize="medium")
    if colour_bar:
        chance_bar(ax.figure, image, [ax], [grid], excess=excess)
    return ax


def figure_ranks(
    table: pd.DataFrame,
    modules: Sequence[ModulePair],
    *,
    side: str = "in",
    zoom: int = 8,
    excess: bool = False,
    width: float = TWO_COLUMNS,
    title: str | None = None,
) -> Figure:
    """Two adapters of different rank: the whole grid above, its first ``zoom`` directions below.

    One column per module. The last shows the mean of the null, max(i, j) / d, in the same colours: what the
    same figure would be if the adapters had nothing to do with each other. With ``excess`` that is 0 everywhere
    and left out.

    Parameters
    ----------
    table : DataFrame
        ``similarity_table(a, b, cells="all")``, a of the smaller rank.
    modules : sequence of str or (str, str)
        Which modules to draw, from left to right.
    side : {"in", "out"}
        Right or left singular vectors.
    zoom : int
        Largest i and j of the lower row.
    excess : bool
        See ``similarity_grid``.
    width : float
        Of the figure, in inches.
    title : str, optional
        Above all panels; the figure grows by its lines.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As ``similarity_grid``; if no modules are named, or zoom is below 1.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, figures 3 and 6.
    """
    if zoom < 1:
        raise ValueError(f"figure_ranks: zoom: expected at least 1, got {zoom}.")
    grids = grids_of(table, modules, side, where="figure_ranks")
    columns = grids if excess else grids + [null_mean(grid) for grid in of_each_shape(grids)]
    panel = min((width - 0.9) / len(columns) - 0.3, 2.2)
    figure = Figure(figsize=(width, 1.8 * panel + 1.1), layout="constrained")
    figure_title(figure, title)
    axes = figure.subplots(2, len(columns), squeeze=False, height_ratios=(0.8, 1))
    images = []
    for column, grid in enumerate(columns):
        for row, part in enumerate((grid, grid.top(zoom, zoom))):
            ax = axes[row, column]
            ax.tick_params(labelsize="small")
            images.append(_heat_map(ax, part, excess=excess, square=False))
            if column > 0 and part.phi.shape[0] == columns[0].phi.shape[0]:
                ax.set_ylabel("")
        axes[0, column].set_title(grid.title, fontsize=_title_size(width))
    marked = [part for grid in grids for part in (grid, grid.top(zoom, zoom))]
    chance_bar(figure, images[0], axes.ravel().tolist(), marked, excess=excess)
    return figure


def figure_seeds(
    table: pd.DataFrame,
    modules: Sequence[ModulePair],
    *,
    side: str = "in",
    seed: int = 0,
    excess: bool = False,
    columns: int = 3,
    width: float = TWO_COLUMNS,
    title: str | None = None,
) -> Figure:
    """Two adapters that differ in their seed: what training finds again, beside a random control.

    One panel per module, then one real draw of the null for each size that occurs: the left singular vectors of
    two independent Gaussian matrices (d, r) and (d, r').

    Parameters
    ----------
    table : DataFrame
        ``similarity_table(a, b, cells="all")`` of the two adapters.
    modules : sequence of str or (str, str)
        Which modules to draw, in order.
    side : {"in", "out"}
        Right or left singular vectors.
    seed : int
        Of the random control, named in its title.
    excess : bool
        See ``similarity_grid``.
    columns : int
        Panels in a row.
    width : float
        Of the figure, in inches.
    title : str, optional
        Above all panels; the figure grows by its lines.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As ``similarity_grid``; if no modules are named, or columns is below 1.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, figures 4 and 7.
    """
    if columns < 1:
        raise ValueError(f"figure_seeds: columns: expected at least 1, got {columns}.")
    grids = grids_of(table, modules, side, where="figure_seeds")
    grids += [random_control(grid, seed) for grid in of_each_shape(grids)]
    columns = min(columns, len(grids))
    rows = -(-len(grids) // columns)
    panel = min((width - 0.9) / columns - 0.3, 2.5)
    figure = Figure(figsize=(width, rows * (panel + 0.55)), layout="compressed")
    figure_title(figure, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[len(grids) :]:
        ax.remove()
    axes = axes[: len(grids)]
    images = []
    for number, (ax, grid) in enumerate(zip(axes, grids, strict=True)):
        ax.tick_params(labelsize="small")
        images.append(_heat_map(ax, grid, excess=excess))
        ax.set_title(grid.title, fontsize=_title_size(width))
        if number % columns and grid.phi.shape == grids[number - 1].phi.shape:
            ax.set_ylabel("")
    chance_bar(figure, images[0], axes, grids, excess=excess)
    return figure


def figure_title(figure: Figure, title: str | None) -> None:
    """A title above all panels, in room of its own."""
    if title is not None:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.17 * len(title.splitlines()))
        figure.suptitle(title, fontsize="small")


def _heat_map(ax: Axes, grid: Grid, *, excess: bool, square: bool = True) -> AxesImage:
    """Draw a grid so that data coordinates are i and j."""
    m, n = grid.phi.shape
    image = ax.imshow(
        grid.excess() if excess else grid.phi,
        cmap=_colours(excess),
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        origin="upper",
        extent=(0.5, n + 0.5, m + 0.5, 0.5),
        aspect="equal" if square and m == n else "auto",
    )
    extent = ax.get_window_extent()
    ax.set_xticks(index_ticks(n, extent.width / ax.figure.dpi))
    ax.set_yticks(index_ticks(m, extent.height / ax.figure.dpi))
    ax.set_xlabel("$j$", labelpad=1)
    ax.set_ylabel("$i$", labelpad=1)
    return image


def _title_size(width: float) -> str:
    return "medium" if width > 1.5 * ONE_COLUMN else "small"


def _colours(excess: bool) -> Colormap:
    """Cividis for the corrected scale, so that it is not taken for phi; grey where there is no value."""
    return colormaps["cividis" if excess else "viridis"].with_extremes(bad="0.8")


def chance_bar(
    figure: Figure | SubFigure, image: AxesImage, axes: list[Axes], grids: Sequence[Grid], *, excess: bool
) -> None:
    """A bar from 0 to 1 with the chance level at the last cell of each grid marked on it."""
    slender = 10 * figure.bbox.height / figure.dpi
    bar = figure.colorbar(image, ax=axes, extend="min" if excess else "neither", pad=0.02, aspect=slender)
    chances = [0.0] if excess else sorted({round(float(grid.chance[-1, -1]), 12) for grid in grids})
    for chance in chances:
        # White on black is seen on any colour.
        for colour, linewidth in (("black", 2.6), ("white", 1.2)):
            bar.ax.axhline(chance, color=colour, linewidth=linewidth)
    ticks: dict[float, str] = {}
    for group in _close(chances):
        ticks[sum(group) / len(group)] = ", ".join(f"{chance:.2g}" for chance in group) + "\nchance"
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        if all(abs(value - tick) >= _APART for tick in ticks):
            ticks[value] = f"{value:.1f}"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(labelsize="small")
    if excess:
        bar.set_label(r"$(\phi - \mathrm{E}\,\phi)\,/\,(1 - \mathrm{E}\,\phi)$")
    else:
        bar.ax.set_title(r"$\phi$", fontsize="medium")


def _close(values: Sequence[float]) -> list[list[float]]:
    """Ascending values, those too close for a label each together."""
    groups: list[list[float]] = []
    for value in values:
        if groups and value - groups[-1][0] < _APART:
            groups[-1].append(value)
        else:
            groups.append([value])
    return groups
