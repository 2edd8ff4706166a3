"""Figures 3, 4, 6, 7 and 8 of the paper from the runs of a study.

Conventions
-----------
Where the plan lacks a rank or layer of the paper, the nearest stands for it, and the title says which. Subspaces are
those of ΔW, on the input side (right singular vectors) or the output side; ``target="A"`` takes the right singular
vectors of A as the paper does, which depend on how ΔW is factored and are mostly A's initialisation. Every figure says
what chance gives, max(i, j) / d, and shows it in the same colours.

Figures
-------
``figure_3``, ``figure_4``, ``figure_6``, ``figure_7``, ``figure_8``.

References
----------
Hu et al. 2021, arXiv:2106.09685v2, sections 7.2 and 7.3, appendices H.3 and H.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lora_analysis.adapter import Adapter
from lora_analysis.measures.null import similarity_null
from lora_analysis.plots.appearance import TWO_COLUMNS
from lora_analysis.plots.grids import grid_of, random_control
from lora_analysis.plots.modules import module_label
from lora_analysis.plots.similarity import chance_bar, figure_ranks, figure_seeds, figure_title, similarity_grid
from lora_analysis.plots.top_directions import figure_top_directions
from lora_analysis.study.evidence import Study
from lora_analysis.study.paper_directions import top_directions
from lora_analysis.study.paper_runs import (
    Unavailable,
    kinds_of,
    layers_of,
    main_ranks,
    main_run,
    middle,
    module_at,
    nearest,
    spread,
)
from lora_analysis.study.plan import Side
from lora_analysis.study.printed import GPT_3, OBSERVATIONS, SHAPE_GPT_3
from lora_analysis.study.projections import projection_of
from lora_analysis.tables import similarity_table

Which = Literal["update", "A"]

_ZOOM = 8
_LEVEL = 0.05
"""Error rate over the modules of a figure, by Bonferroni."""
_LINE_P, _LINE_Z = 0.001, 3.0
"""Beyond which a cell is within the line: p where the null is exact and skewed, else the standard score."""
_FINE = 32
"""Cells a side beyond which the line is a finer one."""


def figure_3(study: Study, *, side: Side = "in", target: Which = "update") -> Figure:
    """Two ranks, q and v of the middle layer: phi of r = 8 against the largest rank, whole and up to 8.

    Both runs have the same seed, hence one order of the data; their initial factors are independent.

    Raises
    ------
    Unavailable
        If runs of two ranks are lacking.
    """
    pair = _two_ranks(study)
    modules = _modules(pair.a, [middle(layers_of(pair.a))])[0]
    table = _similarity(pair, modules, target)
    figure = figure_ranks(table, modules, side=side, zoom=_ZOOM, title=_title(3, pair, table, side, target))
    whole, zoomed = figure.axes[: len(modules)], figure.axes[_columns(figure) : _columns(figure) + len(modules)]
    for ax, module in zip([*whole, *zoomed], [*modules, *modules], strict=True):
        _outline(ax, table, module, side)
    return figure


def figure_4(study: Study, *, side: Side = "in", target: Which = "update") -> Figure:
    """Two seeds at the largest rank, q and v of the middle layer, beside two random Gaussian matrices.

    Raises
    ------
    Unavailable
        If runs of two seeds are lacking.
    """
    pair = _two_seeds(study)
    modules = _modules(pair.a, [middle(layers_of(pair.a))])[0]
    table = _similarity(pair, modules, target)
    title = _title(4, pair, table, side, target)
    widths = table.loc[(table["side"] == side) & (table["i"] == 1) & (table["j"] == 1), "null_mean"].unique()
    figure = figure_seeds(table, modules, side=side, columns=len(modules) + len(widths), title=title)
    for ax, chance in zip(figure.axes[len(modules) :], widths, strict=False):  # after them is the colour bar
        ax.set_title(f"Gaussian, $d$ = {1 / chance:.0f}", fontsize="medium")
    for ax, module in zip(figure.axes, modules, strict=False):  # those after them are controls
        _outline(ax, table, module, side)
    return figure


def figure_6(study: Study, *, side: Side = "in", target: Which = "update") -> Figure:
    """Figure 3 in up to four layers from the first to the last: a row each, and one of what chance gives.

    Raises
    ------
    Unavailable
        If runs of two ranks are lacking.
    """
    pair = _two_ranks(study)
    layers = spread(layers_of(pair.a))
    rows = _modules(pair.a, layers)
    table = _similarity(pair, [module for row in rows for module in row], target)
    chance = table.assign(phi=table["null_mean"])
    count = len(rows[0])
    figure = Figure(figsize=(TWO_COLUMNS, 0.95 * len(rows) + 1.4), layout="constrained")
    figure_title(figure, _title(6, pair, table, side, target))
    axes = figure.subplots(len(rows) + 1, 2 * count, squeeze=False)
    for number, row in enumerate([*rows, rows[0]]):
        last = number == len(rows)
        for column, module in enumerate([*row, *row]):
            ax = axes[number, column]
            upto = (_ZOOM, _ZOOM) if column >= count else None
            shown = chance if last else table
            similarity_grid(shown, module=module, side=side, upto=upto, colour_bar=False, ax=ax)
            ax.set_aspect("auto")
            if not last:
                _outline(ax, table, module, side)
            _label(ax, first=column == 0, last=last, row="chance" if last else f"layer {layers[number]}")
            ax.tick_params(labelleft=column in (0, count), labelbottom=last)
            kind = module_label(module, update=True).partition(",")[0]
            ax.set_title("" if number else kind if upto is None else f"{kind}, up to {_ZOOM}", fontsize="small")
    grids = [grid_of(table, module, side, where="figure_6") for module in rows[0]]
    marked = [part for grid in grids for part in (grid, grid.top(_ZOOM, _ZOOM))]
    chance_bar(figure, axes[0, 0].images[0], axes.ravel().tolist(), marked, excess=False)
    return figure


def figure_7(study: Study, *, side: Side = "in", target: Which = "update") -> Figure:
    """Figure 4 in up to four layers: a column each, and one of two random Gaussian matrices.

    Raises
    ------
    Unavailable
        If runs of two seeds are lacking.
    """
    pair = _two_seeds(study)
    layers = spread(layers_of(pair.a))
    rows = [list(row) for row in zip(*_modules(pair.a, layers), strict=True)]
    table = _similarity(pair, [module for row in rows for module in row], target)
    figure = Figure(figsize=(TWO_COLUMNS, 1.3 * len(rows) + 0.5), layout="compressed")
    figure_title(figure, _title(7, pair, table, side, target))
    axes = figure.subplots(len(rows), len(layers) + 1, squeeze=False)
    grids = [grid_of(table, row[0], side, where="figure_7") for row in rows]
    for number, (row, grid) in enumerate(zip(rows, grids, strict=True)):
        gaussian = _with_phi(table, row[0], side, random_control(grid, number).phi)
        for column, module in enumerate([*row, row[0]]):
            ax = axes[number, column]
            control = column == len(row)
            similarity_grid(gaussian if control else table, module=module, side=side, colour_bar=False, ax=ax)
            kind = module_label(module, update=True).partition(",")[0]
            _outline(ax, gaussian if control else table, module, side)
            _label(ax, first=column == 0, last=number == len(rows) - 1, row=kind)
            ax.tick_params(labelleft=column == 0, labelbottom=number == len(rows) - 1)
            title = f"Gaussian, seed {number}" if control else "" if number else f"layer {layers[column]}"
            ax.set_title(title, fontsize="small")
    chance_bar(figure, axes[0, 0].images[0], axes.ravel().tolist(), grids, excess=False)
    return figure


def figure_8(study: Study, *, side: Side = "in") -> Figure:
    """W's top directions against those of ΔW at several ranks and random ones, q of the middle layer.

    Above, i goes to 10 % of W's directions. Below, the top four directions of ΔW in tenths of W's whole spectrum.

    Raises
    ------
    Unavailable
        If no run of the main target set has finished, or the pretrained weights are not there.
    """
    cells, parts = top_directions(study, side=side)
    module, j = str(cells["module"].iloc[0]), int(parts["j"].iloc[0])
    title = (
        f"Figure 8: $\\phi$ of {module_label(module)} with the top $j$ directions of $\\Delta W$ at rank $r$, "
        f"{side}put side, $d$ = {int(cells['d'].iloc[0])}\n"
        f"above, $W$'s top 10 %; below, all of $W$, the top {j} of $\\Delta W$; $r$ nearest to the paper's 4, 8, 64"
        f"\npaper ({GPT_3}, $d$ = {SHAPE_GPT_3[1]}): {OBSERVATIONS[8]}"
    )
    return figure_top_directions(cells, parts, title=title)


class _Pair(NamedTuple):
    """Two adapters and what tells them apart."""

    a: Adapter
    b: Adapter
    i: str
    j: str


def _two_ranks(study: Study) -> _Pair:
    ranks = main_ranks(study)
    if len(ranks) < 2:
        raise Unavailable(f"runs of two ranks are wanted; {'+'.join(study.plan.main)} has only r = {ranks[0]}")
    few = nearest(8, ranks[:-1])
    for seed in study.plan.seeds:
        try:
            names = [main_run(study, r, seed=seed) for r in (few, ranks[-1])]
        except Unavailable:
            continue
        a, b = (study.adapter(name) for name in names)
        return _Pair(a, b, f"$r$ = {few}, seed {seed}", f"$r$ = {ranks[-1]}, seed {seed}")
    raise Unavailable(f"no seed has finished runs at both r = {few} and r = {ranks[-1]}")


def _two_seeds(study: Study) -> _Pair:
    most = main_ranks(study)[-1]
    finished = []
    for seed in study.plan.seeds:
        try:
            finished.append((seed, main_run(study, most, seed=seed)))
        except Unavailable:
            continue
    if len(finished) < 2:
        raise Unavailable(f"runs of two seeds at r = {most} are wanted; {len(finished)} has finished")
    (first, a), (second, b) = finished[0], finished[-1]
    return _Pair(study.adapter(a), study.adapter(b), f"$r$ = {most}, seed {first}", f"$r$ = {most}, seed {second}")


def _modules(adapter: Adapter, layers: Sequence[int]) -> list[list[str]]:
    """For each layer, the modules of the projections drawn."""
    return [[module_at(adapter, kind, layer) for kind in kinds_of(adapter)] for layer in layers]


def _similarity(pair: _Pair, modules: Sequence[str], target: Which) -> pd.DataFrame:
    pairs = [(module, module) for module in modules]
    # One draw: the p that is drawn is not looked at.
    return similarity_table(pair.a, pair.b, target=target, pairs=pairs, cells="all", draws=1)


def _title(number: int, pair: _Pair, table: pd.DataFrame, side: Side, target: Which) -> str:
    rows = table[table["side"] == side]
    if rows.empty:
        raise Unavailable(f"{target} has no {side}put side")
    what = r"$\Delta W$" if target == "update" else "$A$"
    i, j = int(rows["i"].max()), int(rows["j"].max())
    ends = [rows[(rows["i"] == row) & (rows["j"] == column)] for row, column in ((1, 1), (i, j))]
    (lowest, highest), top = (_listed(end["null_mean"].unique()) for end in ends), ends[0]
    widths = ", ".join(f"{1 / chance:.0f}" for chance in top["null_mean"].unique())
    beyond = int((top["p"] < _LEVEL / len(top)).sum())
    kinds = top["phi"].groupby(top["module_a"].map(projection_of), sort=False)
    shown = ", ".join(f"{kind} {_range(float(phi.min()), float(phi.max()))}" for kind, phi in kinds)
    return (
        f"Figure {number}: $\\phi$ of {what}, {side}put side; $i$: {pair.i}; $j$: {pair.j}; $d$ = {widths}\n"
        f"$\\phi$(1, 1): {shown}; beyond chance (p < {_LEVEL}/{len(top)}) in {beyond} of {len(top)}\n"
        f"chance max($i$, $j$)/$d$: {lowest} at (1, 1), {highest} at ({i}, {j}); "
        f"within white lines z > {_LINE_Z:g} (p < {_LINE_P} at $i$ or $j$ = 1)\n"
        f"paper ({GPT_3}, $d$ = {SHAPE_GPT_3[1]}): {OBSERVATIONS[number]}"
    )


def _listed(values: Iterable[float]) -> str:
    return " or ".join(f"{value:.2g}" for value in values)


def _range(least: float, most: float) -> str:
    ends = dict.fromkeys((f"{least:.2g}", f"{most:.2g}"))
    return "–".join(ends)


def _label(ax: Axes, *, first: bool, last: bool, row: str) -> None:
    ax.set_ylabel(f"{row}\n$i$" if first else "", fontsize="small")
    ax.set_xlabel("$j$" if last else "", labelpad=1, fontsize="small")


def _columns(figure: Figure) -> int:
    """Columns of a figure of two rows, whose colour bar comes last."""
    return len(figure.axes) // 2


def _outline(ax: Axes, table: pd.DataFrame, module: str, side: Side) -> None:
    """A line round the cells of a heat map that are beyond chance."""
    rows = table[(table["module_a"] == module) & (table["side"] == side)]
    rows = rows[(rows["i"] < ax.get_ylim()[0]) & (rows["j"] < ax.get_xlim()[1])]
    i, j = rows["i"].to_numpy(), rows["j"].to_numpy()
    inside = np.zeros((i.max() + 2, j.max() + 2), dtype=bool)
    inside[i, j] = np.where(np.minimum(i, j) == 1, rows["p"] < _LINE_P, rows["z"] > _LINE_Z)
    across, down = np.argwhere(inside[:-1] != inside[1:]), np.argwhere(inside[:, :-1] != inside[:, 1:])
    segments = [[(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)] for y, x in across]
    segments += [[(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)] for y, x in down]
    limits = ax.get_xlim(), ax.get_ylim()
    fine = 0.6 if max(i.max(), j.max()) > _FINE else 1.0
    for colour, linewidth in (("black", 2.2 * fine), ("white", fine)):
        # Over the frame as well, so that every region is seen to be closed.
        lines = LineCollection(
            segments, colors=colour, linewidths=linewidth, capstyle="projecting", clip_on=False, zorder=4
        )
        ax.add_collection(lines, autolim=False)
    ax.set(xlim=limits[0], ylim=limits[1])


def _with_phi(table: pd.DataFrame, module: str, side: Side, phi: np.ndarray) -> pd.DataFrame:
    """The rows of one module with another phi of the same shape and dimension."""
    rows = table[(table["module_a"] == module) & (table["side"] == side)].sort_values(["i", "j"])
    null = similarity_null(round(1 / float(rows["null_mean"].iloc[0])), *phi.shape, draws=1)
    observed = torch.from_numpy(phi)
    z, p = (values.numpy().ravel() for values in (null.z(observed), null.p(observed)))
    return rows.assign(phi=phi.ravel(), z=z, p=p)
