"""A shelf of adapters: which are alike."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster import hierarchy

from lora_analysis.plots.appearance import CHANCE, TWO_COLUMNS
from lora_analysis.plots.modules import plain
from lora_analysis.tables.atlas_result import Atlas

_NAMED = 60
"""Adapters up to which each has its name."""


def figure_atlas(atlas: Atlas, *, names: list[str] | None = None) -> Figure:
    """Dendrogram and cosines of every two adapters, likest side by side.

    Parameters
    ----------
    atlas : Atlas
        Of two adapters or more.
    names : list of str, optional
        In the order of ``atlas.sources``; the last parts of these by default, as many as tell them apart.

    Returns
    -------
    Figure
        The colours are symmetric about 0, which is chance: white is within three standard deviations of it. Whole
        updates count, so a large one tells more than a small one. Shared starts are flagged in ``atlas.adapters()``.

    Raises
    ------
    ValueError
        If there are fewer than two adapters, or not as many names.
    """
    count = len(atlas.sources)
    if count < 2:
        raise ValueError(f"figure_atlas: expected two adapters or more, got {count}.")
    names = _short(atlas.sources) if names is None else names
    if len(names) != count:
        raise ValueError(f"figure_atlas: names: expected {count}, got {len(names)}.")
    order = atlas.order()
    height = min(9.0, max(2.6, 1.2 + 0.14 * count))
    figure = Figure(figsize=(TWO_COLUMNS, height), layout="compressed")
    tree, grid = figure.subplots(1, 2, width_ratios=(1, 2.2))
    hierarchy.dendrogram(
        atlas.linkage,
        orientation="left",
        ax=tree,
        no_labels=True,
        link_color_func=lambda _: "black",
    )
    tree.collections[0].set_linewidth(0.9)
    tree.set_ylim(10 * count, 0)
    tree.set_xlabel("1 - cos, average linkage", fontsize="small")
    tree.tick_params(labelsize="small")
    for edge in ("left", "right", "top"):
        tree.spines[edge].set_visible(False)
    cosine = atlas.cosine[np.ix_(order, order)].copy()
    chance = np.abs(cosine) <= 3 * atlas.cosine_null_sd[np.ix_(order, order)]
    cosine[chance] = 0
    most = float(np.nanmax(np.abs(cosine[~np.eye(count, dtype=bool)]), initial=0.0)) or 1.0
    np.fill_diagonal(cosine, np.nan)
    # As high as the tree beside it, so that leaves and rows meet.
    colours = {"cmap": colormaps["PuOr"], "norm": Normalize(-most, most)}
    image = grid.imshow(cosine, aspect="auto", interpolation="nearest", **colours)
    if count <= _NAMED:
        grid.set_yticks(range(count), labels=[plain(names[number]) for number in order], fontsize="x-small")
    else:
        grid.set_yticks([])
        grid.set_ylabel(f"{count} adapters")
    grid.yaxis.tick_right()
    grid.set_xticks([])
    grid.set_facecolor("0.9")  # the diagonal, and pairs without a common module
    bar = figure.colorbar(image, ax=grid, location="top", aspect=30, pad=0.02, ticks=MaxNLocator(4))
    bar.set_label("cosine of ΔW; white: within chance", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.ax.axvline(0, color=CHANCE, linewidth=0.8)
    return figure


def _short(sources: tuple[str, ...]) -> list[str]:
    """The least endings of paths that are all different."""
    parts = [source.rstrip("/").split("/") for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(sources)
