"""How every figure looks: sizes, colours, markers, axes."""

from __future__ import annotations

import math
import re

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

ONE_COLUMN = 3.4
TWO_COLUMNS = 7.0
"""Widths in inches of one and two columns of print."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, without yellow, which is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One per colour, so that neither has to be seen."""
CHANCE = "0.45"
"""Grey of lines that show what chance gives."""
CHANCE_BAND = "0.86"
"""Grey of its bands."""
_TWO_LABELS = 33
"""Characters of two legend entries that stand side by side in one column's width."""
_ROOMY = 1.3
"""Inches of an axis that has room for eight labels. Axes shrink a little when they make room for a colour bar."""


def axes_or_new(ax: Axes | None, *, height: float = 2.8) -> Axes:
    """The axes given, or those of a new figure of one column's width."""
    if ax is None:
        ax = Figure(figsize=(ONE_COLUMN, height), layout="compressed").add_subplot()
    ax.tick_params(which="both", labelsize="small")
    return ax


def legend_above(ax: Axes, title: str | None = None, *, title_size: str = "medium") -> None:
    """A legend above the axes, where it covers no data."""
    handles, labels = ax.get_legend_handles_labels()
    lengths = sorted(len(re.sub(r"[$\\_]|Delta", "", label)) for label in labels)
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=2 if sum(lengths[-2:]) <= _TWO_LABELS else 1,
        fontsize="small",
        frameon=False,
        title=title,
        title_fontsize=title_size,
        alignment="left",
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.0,
        borderaxespad=0.2,
    )


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis: plain numbers, several in each decade, where it spans few of them."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 3:
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def index_ticks(count: int, inches: float) -> list[int]:
    """Ticks of an axis that counts from 1, as many as there is room for.

    Examples
    --------
    >>> index_ticks(8, 2.0), index_ticks(64, 2.0), index_ticks(8, 1.0)
    ([1, 2, 3, 4, 5, 6, 7, 8], [1, 16, 32, 48, 64], [1, 4, 8])
    """
    most = 2 if inches < _ROOMY else 8 if count < 10 else 4
    step = next(2**power for power in range(64) if count // 2**power <= most)
    return sorted({1, *range(step, count + 1, step)})


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the n-th series; they repeat after seven, markers shifted by one."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]
