"""What rank does the task need? Runs of an ablation by r: tables 6 and 18 of the paper as a figure."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from lora_analysis.plots.appearance import CHANCE, CHANCE_BAND, axes_or_new, legend_above, style
from lora_analysis.plots.modules import plain
from lora_analysis.plots.selection import require_columns

_DODGE = 0.09
"""Shift in octaves between target sets, so that points of one r do not cover each other."""


def rank_ablation(
    runs: pd.DataFrame,
    *,
    metric: str = "accuracy",
    baseline: float | None = None,
    baseline_interval: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy (or loss) against r, one series per set of adapted matrices.

    Every run is a point and the line joins the means over seeds: two or three seeds make no error bar. Series
    are shifted sideways by a hair, so that runs of one r stay apart; the ticks are the ranks themselves.

    Parameters
    ----------
    runs : DataFrame
        One row per run, columns ``targets r seed`` and the metric.
    metric : str
        Column to draw. ``"accuracy"`` is a share, in [0, 1], drawn in per cent; any other as it is.
    baseline : float, optional
        The metric of the frozen model, a horizontal line.
    baseline_interval : (float, float), optional
        Confidence interval of the baseline, a band.
    ax : Axes, optional

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If a column is missing, a rank is below 1, a run has no value, or targets, r and seed name two runs.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, tables 6 and 18.
    """
    require_columns(
        runs, ("targets", "r", "seed", metric), where="rank_ablation", made_by="one row per run of an ablation"
    )
    if runs["r"].min() < 1:
        raise ValueError(f"rank_ablation: expected ranks r of at least 1, got {runs['r'].min()}.")
    if runs[metric].isna().any():
        first = runs[runs[metric].isna()].iloc[0]
        raise ValueError(
            f"rank_ablation: expected a number in {metric!r} for every run, got none for targets={first['targets']!r}, "
            f"r={first['r']}, seed={first['seed']}. Leave out runs that did not finish, and say so."
        )
    again = runs[runs.duplicated(["targets", "r", "seed"])]
    if not again.empty:
        first = again.iloc[0]
        raise ValueError(
            f"rank_ablation: expected one run per targets, r and seed, got two for targets={first['targets']!r}, "
            f"r={first['r']}, seed={first['seed']}. Select the runs of one experiment."
        )
    ax = axes_or_new(ax)
    groups = list(runs.groupby("targets", sort=False))
    for number, (targets, group) in enumerate(groups):
        colour, marker = style(number)
        shift = 2.0 ** (_DODGE * (number - (len(groups) - 1) / 2))
        means = group.groupby("r")[metric].mean()
        ax.plot(means.index.to_numpy() * shift, means.to_numpy(), color=colour, linewidth=1.2, zorder=2)
        ax.plot(
            group["r"].to_numpy() * shift,
            group[metric].to_numpy(),
            linestyle="none",
            marker=marker,
            markersize=4.5,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=3,
            label=f"{plain(str(targets))} ({_seeds(group)})",
        )
    if baseline_interval is not None:
        ax.axhspan(*baseline_interval, color=CHANCE_BAND, linewidth=0, zorder=0)
    if baseline is not None:
        label = "frozen model" if baseline_interval is None else "frozen model, interval"
        ax.axhline(baseline, color=CHANCE, linestyle="--", linewidth=1.0, zorder=1, label=label)
    _rank_axis(ax, sorted(set(runs["r"])))
    if metric == "accuracy":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        ax.set_ylabel("accuracy (%)")
    else:
        ax.set_ylabel(plain(metric.replace("_", " ")))
    legend_above(ax)
    return ax


def _rank_axis(ax: Axes, ranks: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(np.asarray(ranks, dtype=float).tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())
    margin = 2.0 ** max(0.4, 0.06 * math.log2(ranks[-1] / ranks[0]))
    ax.set_xlim(ranks[0] / margin, ranks[-1] * margin)
    if len(ranks) > 8:
        ax.tick_params(axis="x", labelsize="x-small")
    ax.set_xlabel("rank $r$")


def _seeds(group: pd.DataFrame) -> str:
    """How many seeds a series has at each of its ranks."""
    counts = group.groupby("r").size()
    least, most = int(counts.min()), int(counts.max())
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} seed{'' if most == 1 else 's'}"
