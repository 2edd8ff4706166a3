"""How did the updates come about? Norm, ranks, directions and the move of A over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_analysis.plots.appearance import CHANCE, TWO_COLUMNS, axes_or_new, legend_above, style
from lora_analysis.plots.modules import kind_labels, place
from lora_analysis.plots.selection import one_value, require_columns, rows_of_module

_MADE_BY = "dynamics_table(rows)"
_LABELS = {
    "norm": r"$\|\Delta W\|_F$",
    "sigma_max": r"$\sigma_1(\Delta W)$",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "phi_previous_in": r"$\phi$ with previous, in",
    "phi_previous_out": r"$\phi$ with previous, out",
    "phi_final_in": r"$\phi$ with final, in",
    "phi_final_out": r"$\phi$ with final, out",
    "moved_A": r"$\|A - A_0\|\,/\,\|A_0\|$",
    "moved_B": r"$\|B - B_0\|\,/\,\|B_0\|$",
    "gain": "gain over chance",
}
_DASHES = ("-", "--", "-.", (0, (3, 1, 1, 1)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 3)), (0, (8, 3)))


class _Look(NamedTuple):
    colour: Any
    dash: Any
    marker: str


class _Looks(NamedTuple):
    """How every module is drawn, and what says so."""

    of: dict[str, _Look]
    entries: dict[str, _Look]
    """Labels of the legend."""
    scale: ScalarMappable | None
    """Colours of layers, where there are several."""


def training_dynamics(
    table: pd.DataFrame, *, value: str = "norm", modules: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """One number of every module over the steps of training, a line per module.

    Colours tell the layer and dashes the projection; modules whose layer cannot be read from their names have a
    colour each. A grey dotted line is what chance gives, for ``gain`` and for ``phi`` (the largest level of any
    module). Steps at which a module has no value, such as ranks while ΔW = 0, are left out.

    Parameters
    ----------
    table : DataFrame
        ``dynamics_table(rows)``, of one run.
    value : str
        Column: ``norm``, ``sigma_max``, ``stable_rank``, ``effective_rank``, ``moved_A``, ``moved_B``, ``gain``,
        ``phi_previous_in`` and ``phi_final_in``, or the same with ``out``.
    modules : sequence of str, optional
        Which modules; all by default.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If the table lacks a column or a module, holds several runs, or the value nowhere.
    """
    rows = _rows(table, modules, where="training_dynamics")
    looks = _looks(list(dict.fromkeys(rows["module"])))
    ax = axes_or_new(ax)
    for label, look in looks.entries.items():
        ax.add_line(_line(look, label))
    _panel(ax, rows, value, looks)
    if looks.scale is not None:
        _colour_bar(ax.figure, looks.scale, [ax])
    legend_above(ax)
    return ax


def figure_dynamics(
    table: pd.DataFrame,
    *,
    values: Sequence[str] = ("norm", "stable_rank", "phi_final_in", "moved_A"),
    modules: Sequence[str] | None = None,
    width: float = TWO_COLUMNS,
) -> Figure:
    """Several numbers of every module over the steps of training, a panel each, under one legend.

    Parameters
    ----------
    table : DataFrame
        ``dynamics_table(rows)``, of one run.
    values : sequence of str
        Columns, as ``training_dynamics`` takes them. Rows read from a log have ``phi_previous`` alone.
    modules : sequence of str, optional
        Which modules; all by default.
    width : float
        Of the figure, in inches.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As ``training_dynamics``; if no values are named.
    """
    where = "figure_dynamics"
    if isinstance(values, str) or not values:
        raise ValueError(f"{where}: values: expected a list of at least one column, got {values!r}.")
    rows = _rows(table, modules, where=where)
    looks = _looks(list(dict.fromkeys(rows["module"])))
    columns = min(2, len(values))
    lines = -(-len(values) // columns)
    figure = Figure(figsize=(width, lines * 0.31 * width + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel().tolist()
    for ax in axes[len(values) :]:
        ax.remove()
    axes = axes[: len(values)]
    for ax, value in zip(axes, values, strict=True):
        ax.tick_params(labelsize="small")
        _panel(ax, rows, value, looks)
        ax.xaxis.set_tick_params(labelbottom=True)
    if looks.scale is not None:
        _colour_bar(figure, looks.scale, axes)
    handles = [_line(look, label) for label, look in looks.entries.items()]
    if any(value.startswith(("phi", "gain")) for value in values):
        handles.append(Line2D([], [], color=CHANCE, linestyle=":", linewidth=1, label="chance"))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(4, len(handles)),
            fontsize="small",
            frameon=False,
            handlelength=2.4,
        )
    return figure


def _rows(table: pd.DataFrame, modules: Sequence[str] | None, *, where: str) -> pd.DataFrame:
    require_columns(table, ("adapter", "step", "module"), where=where, made_by=_MADE_BY)
    if modules is not None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f"{where}: modules: expected a list of at least one module, got {modules!r}.")
        table = pd.concat([rows_of_module(table, "module", name, where=where) for name in modules])
    one_value(table, "adapter", where=where)
    return table.sort_values("step", kind="stable")


def _looks(modules: list[str]) -> _Looks:
    places = {module: place(module) for module in sorted(modules, key=lambda name: place(name).layer or 0)}
    labels = kind_labels((p.kind for p in places.values()), update=True)
    kinds = list(labels)
    layers = sorted({p.layer for p in places.values() if p.layer is not None})
    if len(layers) < 2 or any(p.layer is None for p in places.values()):
        named = kind_labels(places)
        if len(labels) == len(places):
            named = {module: labels[p.kind] for module, p in places.items()}
        looks = {}
        for number, module in enumerate(places):
            colour, marker = style(number)
            looks[module] = _Look(colour, _DASHES[number % len(_DASHES)], marker)
        return _Looks(looks, {named[module]: look for module, look in looks.items()}, None)
    scale = ScalarMappable(Normalize(layers[0], layers[-1]), colormaps["viridis"])
    looks = {}
    colours = scale.to_rgba(np.array([p.layer for p in places.values()], dtype=float))
    for colour, (module, p) in zip(colours, places.items(), strict=True):
        number = kinds.index(p.kind)
        looks[module] = _Look(colour, _DASHES[number % len(_DASHES)], style(number)[1])
    entries = {label: _Look("0.2", _DASHES[n % len(_DASHES)], style(n)[1]) for n, label in enumerate(labels.values())}
    return _Looks(looks, entries, scale)


def _panel(ax: Axes, rows: pd.DataFrame, value: str, looks: _Looks) -> None:
    if value not in _LABELS:
        raise ValueError(f"value: expected one of {', '.join(_LABELS)}, got {value!r}.")
    require_columns(rows, (value,), where="training_dynamics", made_by=_MADE_BY)
    known = rows[rows[value].notna()]
    if known.empty:
        raise ValueError(
            f"training_dynamics: expected a step at which {value!r} is known, got none among {len(rows)} rows. "
            "Choose another value=: a log read back has no phi_final, and gain needs gain_every= or base=."
        )
    for module, look in looks.of.items():
        mine = known[known["module"] == module]
        ax.plot(
            mine["step"],
            mine[value].astype(float),
            color=look.colour,
            linestyle=look.dash,
            linewidth=1.1,
            marker=look.marker,
            markersize=2.6,
            markevery=max(1, len(mine) // 8),
        )
    chance = _chance(known, value)
    if chance is not None:
        ax.plot(chance.index, chance, color=CHANCE, linestyle=":", linewidth=1, zorder=1, label="chance")
    if value.startswith("phi"):
        ax.set_ylim(-0.03, 1.03)
    elif value in ("norm", "sigma_max", "moved_A", "moved_B"):
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel(_label(known, value))


def _label(known: pd.DataFrame, value: str) -> str:
    """What the axis is called; of a move also from which step it is counted, if not from the beginning."""
    if not value.startswith("moved") or "moved_from" not in known:
        return _LABELS[value]
    since = {str(start).removeprefix("step ") for start in known["moved_from"]} - {"initial", "0"}
    return _LABELS[value].replace("_0", f"_{{{since.pop()}}}") if len(since) == 1 else _LABELS[value]


def _chance(known: pd.DataFrame, value: str) -> pd.Series | None:
    """What chance gives at each step: of the modules' levels the largest."""
    if value == "gain":
        return pd.Series(1.0, index=[known["step"].min(), known["step"].max()])
    column = f"chance_{value.rpartition('_')[2]}"
    if not value.startswith("phi") or column not in known:
        return None
    return known.groupby("step")[column].max()


def _line(look: _Look, label: str) -> Line2D:
    return Line2D(
        [], [], color=look.colour, linestyle=look.dash, marker=look.marker, markersize=3, linewidth=1.1, label=label
    )


def _colour_bar(figure: Figure | SubFigure, scale: ScalarMappable, axes: list[Axes]) -> None:
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=25 * (1 + (len(axes) > 2)))
    bar.set_label("layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.tick_params(labelsize="small")
