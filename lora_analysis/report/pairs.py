"""Adapters two by two: what they share, whether they merge, and φ(i, j) of every module, written as it is found."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.report.columns import INTERFERENCE, SAMENESS
from lora_analysis.report.data import rounded, shown, write_data
from lora_analysis.report.verdicts import found_of
from lora_analysis.tables import interference_table, sameness_table, similarity_table

CELLS = 2_000_000
"""Cells of φ grids in one report, about 40 MB; beyond, a part of each pair's modules has grids."""

_COLUMNS = (
    *("number_a", "number_b", "a", "b", "kind", "modules", "rows_shared", "cosine", "cosine_null_sd", "cosine_found"),
    *("phi_in", "phi_in_found", "phi_out", "phi_out_found", "sti", "sti_chance", "sti_found"),
)


class Compared(NamedTuple):
    """What comparing two by two gave."""

    pairs: pd.DataFrame
    """One row per pair, the numbers and names of both, means over modules and counts of findings."""
    notes: list[str]
    """What was left out of all, and why."""


def compare_pairs(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    runs: Mapping[str, Mapping[Any, Any]],
    folder: Path,
    *,
    compared: int,
    draws: int,
    seed: int,
    workers: int | None,
    say: Callable[[str], None],
) -> Compared:
    """Compare the first so many adapters two by two, and write the tables and grids of every pair.

    Parameters
    ----------
    adapters, names
        In the same order.
    runs : mapping of str to mapping
        By adapter's source what a study says of it, ``task targets r``; may be empty.
    folder : Path
        Gets ``pair-A-B.js`` and, for each module that has a grid, ``phi-A-B-M.js``.
    compared : int
    draws, seed, workers
        Of the tables.
    say : callable
        Is told which pair is at work.
    """
    chosen = list(itertools.combinations(range(min(compared, len(adapters))), 2))
    notes = []
    if compared < len(adapters):
        notes.append(
            f"Compared two by two are the first {compared} of {len(adapters)} adapters; the atlas has them all. "
            "--compared N changes that."
        )
    share = min(1.0, CELLS / max(1, sum(_cells(adapters[a], adapters[b]) for a, b in chosen)))
    if share < 1:
        notes.append(
            f"φ grids are there for {share:.0%} of each pair's modules, evenly spread: all would take "
            f"{CELLS / share:,.0f} cells. Other numbers are of all modules."
        )
    rows = []
    for count, (a, b) in enumerate(chosen, start=1):
        say(f"are these the same, will they merge? pair {count} of {len(chosen)}")
        try:
            row = _pair(adapters[a], adapters[b], (a, b), folder, share, draws, seed, workers)
        except LoraAnalysisError as error:
            notes.append(f"Not compared: {error}")
            continue
        kind = _kind(adapters[a], adapters[b], runs)
        rows.append(row | {"number_a": a + 1, "number_b": b + 1, "a": names[a], "b": names[b], "kind": kind})
    return Compared(pd.DataFrame(rows, columns=list(_COLUMNS)), list(dict.fromkeys(notes)))


def _pair(
    a: Adapter,
    b: Adapter,
    numbers: tuple[int, int],
    folder: Path,
    share: float,
    draws: int,
    seed: int,
    workers: int | None,
) -> dict[str, Any]:
    """The summary of one pair; its tables and grids are written, with what was worth a note."""
    stem = f"{numbers[0] + 1}-{numbers[1] + 1}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = sameness_table(a, b, draws=draws, seed=seed, workers=workers)
        merging = interference_table([a, b], signs=False, draws=draws, seed=seed, workers=workers)
        merging = merging.assign(sti_chance=merging["sti_null"] / merging["sigma_sum"])
        modules = list(same["module_a"])
        gridded = [modules[i] for i in _spread(len(modules), share)]
        grids = similarity_table(
            a, b, pairs=[(name, name) for name in gridded], cells="all", draws=draws, seed=seed, workers=workers
        )
    for module, rows in grids.groupby("module_a", sort=False):
        sides = {str(side): _grid(cells) for side, cells in rows.groupby("side", sort=False)}
        write_data(folder, f"phi-{stem}-{modules.index(str(module))}", {"sides": sides, "modules": len(gridded)})
    write_data(
        folder,
        f"pair-{stem}",
        {
            "modules": rounded(modules),
            "notes": rounded(list(dict.fromkeys(str(warning.message) for warning in caught))),
            "gridded": [modules.index(name) for name in gridded],
            "same": shown(same, SAMENESS, f"same-{stem}"),
            "merge": shown(merging, INTERFERENCE, f"merge-{stem}"),
        },
    )
    return {
        "modules": len(same),
        "rows_shared": same["rows_shared"].mean(),
        "cosine": same["cosine"].mean(),
        "cosine_null_sd": same["cosine_null_sd"].mean(),
        "cosine_found": found_of(same["cosine_q"]),
        **{f"phi_{side}": same[f"phi_corrected_{side}"].mean() for side in ("in", "out")},
        **{f"phi_{side}_found": found_of(same[f"phi_q_{side}"]) for side in ("in", "out")},
        "sti": merging["sti_relative"].mean(),
        "sti_chance": merging["sti_chance"].mean(),
        "sti_found": found_of(merging["sti_q"]),
    }


def _grid(cells: pd.DataFrame) -> dict[str, Any]:
    """φ, p and q of one module and side by rows of i; chance by max(i, j), which is all it depends on."""
    cells = cells.sort_values(["i", "j"])
    m, n = int(cells["i"].max()), int(cells["j"].max())
    chance = cells.groupby(cells[["i", "j"]].max(axis=1))[["null_mean"]].first()["null_mean"]
    return {
        "m": m,
        "n": n,
        "chance": rounded(chance.tolist()),
        "phi": rounded(cells["phi"].tolist(), 4),
        "sd": rounded(cells["null_sd"].tolist(), 2),
        "p": rounded(cells["p"].tolist(), 2),
        "q": rounded(cells["q"].tolist(), 2),
        "flags": sorted({word for flags in cells["flags"].unique() for word in flags.split()}),
    }


def _cells(a: Adapter, b: Adapter) -> int:
    """About how many cells the grids of a pair have."""
    return sum(2 * a.modules[name].r * b.modules[name].r for name in a if name in b)


def _spread(count: int, share: float) -> list[int]:
    """Positions of a share of so many things, evenly spread, one at least."""
    kept = min(count, max(1, round(share * count)))
    return sorted({round(x) for x in np.linspace(0, count - 1, kept)})


def _kind(a: Adapter, b: Adapter, runs: Mapping[str, Mapping[Any, Any]]) -> str:
    """What differs between two adapters: by the study's own account, else by their ranks."""
    first, second = runs.get(a.source), runs.get(b.source)
    if first is not None and second is not None:
        return next((word for word in ("task", "targets", "r") if first[word] != second[word]), "seed")
    ranks = [{module.r for module in adapter.modules.values()} for adapter in (a, b)]
    return "seed or task" if ranks[0] == ranks[1] else "r"
