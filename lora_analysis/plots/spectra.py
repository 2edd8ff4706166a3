"""Was the rank used? Singular values of updates against those of random factors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lora_analysis.measures.precision import RESOLVED
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.plots.appearance import CHANCE, CHANCE_BAND, axes_or_new, index_ticks, legend_above, log_ticks, style
from lora_analysis.plots.modules import kind_labels, place
from lora_analysis.plots.selection import one_value, require_columns, rows_of_module

_COLUMNS = ("adapter", "module", "d_out", "d_in", "r", "numerical_rank", "singular_values", "noise_floors")
_LARGEST = 512
"""Singular values up to which the null is drawn; its cost grows with their cube."""


def spectra(
    table: pd.DataFrame,
    *,
    modules: Sequence[str] | None = None,
    draws: int = 400,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Singular values of every module, divided by ``||ΔW||_F``, against what random factors of its shape have.

    The grey band is where 5 to 95 % of the draws of ``measures.spectrum_null`` lie, one for each shape and r, round
    their median. An update above it at k = 1 and below it at large k concentrates on few directions; one inside
    is, by its spectrum, noise. There is no band for updates of more than 512 singular values, differences of full
    checkpoints, nor for those of more than r (LoHa, LoKr, DoRA's true update): a product of two random factors is not
    their chance. Dotted lines are three
    storage-noise floors, where those come near the picture: values below them are rounding. Values beyond the
    numerical rank are left out.

    Parameters
    ----------
    table : DataFrame
        ``spectrum_table(adapter)``, of one adapter. Lists may be JSON strings, as in a CSV.
    modules : sequence of str, optional
        Which modules; all by default. Colours tell projections apart, or layers where there is one projection.
    draws, seed : int
        Of the null.
    ax : Axes, optional

    Returns
    -------
    Axes
        A note counts the modules that have no spectrum: ΔW = 0, not finite, or of unknown scale.

    Raises
    ------
    ValueError
        If the table lacks a module, holds several adapters, or no module has a spectrum.

    References
    ----------
    The null: ``lora_analysis.measures.spectrum_null``; the floors: ``lora_analysis.measures.precision``.
    """
    where = "spectra"
    require_columns(table, _COLUMNS, where=where, made_by="spectrum_table(adapter)")
    if modules is not None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f"{where}: modules: expected a list of at least one module, got {modules!r}.")
        table = pd.concat([rows_of_module(table, "module", name, where=where) for name in modules])
    one_value(table, "adapter", where=where)
    drawn = [row for row in table.to_dict("records") if _known(row) > 0]
    if not drawn:
        raise ValueError(
            f"{where}: expected a module with singular values, got none among {len(table)}. Where the scale is "
            "unknown, pass alpha= when loading the adapter."
        )
    ax = axes_or_new(ax)
    kinds = list(dict.fromkeys((row["d_out"], row["d_in"], row["r"]) for row in drawn if _is_product(row)))
    for d_out, d_in, r in kinds:
        label = f"chance {d_out}x{d_in}, $r$ = {r} (90 % band)" if len(kinds) > 1 else "chance (90 % band)"
        _band(ax, spectrum_null((d_out, d_in), r, draws=draws, seed=seed), label)
    colours = _colours(ax, [row["module"] for row in drawn])
    spectra_of = [(colours[row["module"]], _shares(row), RESOLVED * _floors(row)) for row in drawn]
    longest = max(len(shares) for _, shares, _ in spectra_of)
    lowest = min(shares[-1] for _, shares, _ in spectra_of)
    for (colour, marker, name), shares, _ in spectra_of:
        every = max(1, len(shares) // 8)
        k = np.arange(1, len(shares) + 1)
        ax.plot(k, shares, color=colour, marker=marker, markevery=every, markersize=3, linewidth=0.8, label=name)
    visible = [(colour, floors) for (colour, *_), _, floors in spectra_of if floors.size and floors.max() > lowest / 3]
    for number, (colour, floors) in enumerate(visible):
        name = None if number else "3 x noise floor"
        k = np.arange(1, len(floors) + 1)
        ax.plot(k, floors, color=colour, linestyle=(0, (1, 1.5)), linewidth=0.8, label=name)
    ax.set_yscale("log")
    ax.set_xticks(index_ticks(longest, ax.get_window_extent().width / ax.figure.dpi))
    ax.set_xlabel("$k$")
    ax.set_ylabel(r"$\sigma_k\,/\,\|\Delta W\|_F$")
    log_ticks(ax.yaxis)
    missing = len(table) - len(drawn)
    legend_above(ax, f"no spectrum: {missing} of {len(table)} modules" if missing else None, title_size="small")
    return ax


def _band(ax: Axes, S: Tensor, label: str) -> None:
    """Where the spectra of random factors lie, S of shape (draws, k)."""
    shares = S / S.norm(dim=1, keepdim=True)
    low, middle, high = torch.quantile(shares, torch.tensor([0.05, 0.5, 0.95], dtype=S.dtype), dim=0).numpy()
    k = np.arange(1, S.shape[1] + 1)
    ax.fill_between(k, low, high, color=CHANCE_BAND, linewidth=0, zorder=0)
    ax.plot(k, middle, color=CHANCE, linewidth=0.8, linestyle="--", zorder=1, label=label)


def _colours(ax: Axes, modules: Sequence[str]) -> dict[str, tuple[Any, str, str | None]]:
    """Colour, marker and legend entry of each module."""
    places = {module: place(module) for module in modules}
    labels = kind_labels((p.kind for p in places.values()), update=True)
    layers = sorted({p.layer for p in places.values() if p.layer is not None})
    result: dict[str, tuple[Any, str, str | None]] = {}
    if len(labels) == 1 and len(layers) > 1:
        scale = ScalarMappable(Normalize(layers[0], layers[-1]), colormaps["viridis"])
        bar = ax.figure.colorbar(scale, ax=ax, pad=0.02, aspect=25)
        bar.set_label(f"layer of {next(iter(labels.values()))}")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.ax.tick_params(labelsize="small")
        rgba = scale.to_rgba(np.array([p.layer for p in places.values()], dtype=float))
        return {module: (colour, "o", None) for module, colour in zip(places, rgba, strict=True)}
    seen: set[str] = set()
    for module, p in places.items():
        result[module] = (*style(list(labels).index(p.kind)), None if p.kind in seen else labels[p.kind])
        seen.add(p.kind)
    return result


def _is_product(row: dict[Any, Any]) -> bool:
    """Whether the spectrum can be that of a product of two factors, of a size that the null is drawn for."""
    return len(_numbers(row["singular_values"])) <= min(int(row["r"]), int(row["d_out"]), int(row["d_in"]), _LARGEST)


def _known(row: dict[Any, Any]) -> int:
    """How many singular values of a row can be drawn."""
    if pd.isna(row["numerical_rank"]):
        return 0
    return min(int(row["numerical_rank"]), len(_numbers(row["singular_values"])))


def _shares(row: dict[Any, Any]) -> np.ndarray:
    """Singular values up to the numerical rank, divided by the norm of all."""
    S = _numbers(row["singular_values"])
    shares: np.ndarray = S[: _known(row)] / np.linalg.norm(S)
    return shares


def _floors(row: dict[Any, Any]) -> np.ndarray:
    """Noise floors on the same scale, empty where they are unknown."""
    floors: np.ndarray = _numbers(row["noise_floors"])[: _known(row)] / np.linalg.norm(_numbers(row["singular_values"]))
    return floors


def _numbers(cell: Any) -> np.ndarray:
    """A list of a table as an array; empty where it is missing."""
    if isinstance(cell, str):
        cell = json.loads(cell)
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return np.empty(0)
    return np.asarray(cell, dtype=float)
