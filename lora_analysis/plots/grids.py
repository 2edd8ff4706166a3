"""Grids of phi: read back from a table, and what chance gives in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lora_analysis.measures.null import similarity_null
from lora_analysis.measures.subspace import corrected_similarity, subspace_similarity
from lora_analysis.plots.modules import module_label
from lora_analysis.plots.selection import one_value, require_columns

ModulePair = str | tuple[str, str]
"""One name for a module compared with its namesake, or the names of both."""

_COLUMNS = ("adapter_a", "adapter_b", "module_a", "module_b", "target", "side", "i", "j", "phi", "null_mean")
_MADE_BY = "similarity_table(a, b, cells='all')"


class Grid(NamedTuple):
    """The phi of one pair on one side, with its chance level."""

    title: str
    d: int
    phi: np.ndarray
    """Shape (r, r')."""
    chance: np.ndarray
    """Shape (r, r'): max(i, j) / d."""

    def top(self, i: int, j: int) -> Grid:
        """The cells up to (i, j)."""
        return self._replace(phi=self.phi[:i, :j], chance=self.chance[:i, :j])

    def excess(self) -> np.ndarray:
        """``(phi - chance) / (1 - chance)``."""
        return corrected_similarity(torch.from_numpy(self.phi), torch.from_numpy(self.chance)).numpy()


def grids_of(table: pd.DataFrame, modules: Sequence[ModulePair], side: str, *, where: str) -> list[Grid]:
    """The grids of the chosen pairs, in order."""
    if isinstance(modules, str) or not modules:
        raise ValueError(f"{where}: modules: expected a list of at least one module, got {modules!r}.")
    return [grid_of(table, module, side, where=where) for module in modules]


def grid_of(table: pd.DataFrame, module: ModulePair | None, side: str, *, where: str) -> Grid:
    """The whole grid of one pair, from the rows of a table."""
    require_columns(table, _COLUMNS, where=where, made_by=_MADE_BY)
    rows = table[table["side"] == side]
    if module is not None:
        first, second = (module, module) if isinstance(module, str) else module
        rows = rows[(rows["module_a"] == first) & (rows["module_b"] == second)]
    if rows.empty:
        raise ValueError(
            f"{where}: the table has no rows for module {module!r} on side {side!r} (first: "
            f"{table['module_a'].iloc[0]!r} and {table['module_b'].iloc[0]!r}, side {table['side'].iloc[0]!r})."
        )
    module_a, module_b, *_ = (
        one_value(rows, column, where=where) for column in ("module_a", "module_b", "adapter_a", "adapter_b", "target")
    )
    i, j = rows["i"].to_numpy(dtype=int), rows["j"].to_numpy(dtype=int)
    m, n = int(i.max()), int(j.max())
    if len(set(zip(i.tolist(), j.tolist(), strict=True))) != m * n or len(rows) != m * n:
        raise ValueError(
            f"{where}: expected every cell up to ({m}, {n}) once for {module_a!r}, got {len(rows)} rows. "
            f"Pass {_MADE_BY}."
        )
    phi, chance = np.full((m, n), np.nan), np.full((m, n), np.nan)
    phi[i - 1, j - 1] = rows["phi"].to_numpy(dtype=float)
    chance[i - 1, j - 1] = rows["null_mean"].to_numpy(dtype=float)
    d = round(max(m, n) / float(chance[-1, -1]))
    title = module_label(module_a, update=True)
    if module_b != module_a:
        title += f"\nand {module_label(module_b, update=True)}"
    return Grid(title, d, phi, chance)


def of_each_shape(grids: Sequence[Grid]) -> list[Grid]:
    """The first grid of each size and dimension."""
    return list({(grid.d, *grid.phi.shape): grid for grid in reversed(grids)}.values())[::-1]


def null_mean(grid: Grid) -> Grid:
    """What chance gives on average in place of a grid."""
    return grid._replace(title=f"chance, $d$ = {grid.d}", phi=grid.chance)


def random_control(grid: Grid, seed: int) -> Grid:
    """One real draw of the null in place of a grid: left singular vectors of independent Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)
    m, n = grid.phi.shape
    a, b = (
        torch.linalg.svd(torch.randn(grid.d, k, dtype=torch.float64, generator=generator), full_matrices=False).U
        for k in (m, n)
    )
    phi = subspace_similarity(a, b).numpy()
    chance = similarity_null(grid.d, m, n).mean.numpy()
    return Grid(f"Gaussian, seed {seed}", grid.d, phi, chance)
