"""What the updates of a study do to the base they are added to, and how far they lie in its top directions.

Conventions
-----------
Of the runs of the main target set on the main task, one row for each module and truncation k: ``p`` is Monte Carlo of
``draws`` exact draws, upper tail of ``gain``; ``null_ceiling`` is what ``ceiling_fraction`` is for random directions,
root mean square. ``top_directions`` has the paper's figure 8: ``phi`` of the first i directions of W, the plan's share
of them, and the first j of ΔW, on either side.

Values
------
``amplification_rows``, ``top_direction_rows``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3, table 7 and appendix H.4; figure 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.study.chance import Nulls
from lora_analysis.study.compared import top_directions_shape
from lora_analysis.study.evidence import Study
from lora_analysis.study.plan import Run
from lora_analysis.study.projections import layer_of, projection_of
from lora_analysis.tables.amplification import amplification_table
from lora_analysis.tables.pool import over_modules

AMPLIFICATION = (
    *("run", "r", "module", "layer", "projection", "d_out", "d_in", "k", "gain", "p", "ceiling_fraction"),
    *("null_ceiling", "amplification", "amplification_null", "signed_positive", "cosine", "draws"),
)
TOP_DIRECTIONS = ("run", "r", "module", "layer", "projection", "side", "d", "i", "j", "phi", "p", "draws")


def amplification_rows(study: Study, runs: Sequence[Run], *, draws: int, seed: int) -> pd.DataFrame:
    """Table 7 of each run, without rows beyond an update's rank."""
    if not runs:
        return pd.DataFrame(columns=list(AMPLIFICATION))
    adapters = [study.adapter(run.name) for run in runs]
    smallest = min(min(module.shape) for module in adapters[0].modules.values())
    most = max(run.r for run in runs)
    ks = sorted({2**power for power in range(most.bit_length())} | {run.r for run in runs})
    about = pd.DataFrame(
        [
            (adapter.source, run.name, run.r, name, layer_of(name), projection_of(name), *module.shape)
            for adapter, run in zip(adapters, runs, strict=True)
            for name, module in adapter.modules.items()
        ],
        columns=["adapter", "run", "r", "module", "layer", "projection", "d_out", "d_in"],
    )
    table = amplification_table(adapters, study.base, [k for k in ks if k <= smallest], draws=draws, seed=seed)
    table["null_ceiling"] = table["projected_null_rms"] / table["projected_top"]
    table["draws"] = draws
    merged = about.merge(table, on=["adapter", "module"], validate="one_to_many")
    return merged[merged["gain"].notna()].reset_index(drop=True)[list(AMPLIFICATION)]


def top_direction_rows(study: Study, runs: Sequence[Run], nulls: Nulls) -> pd.DataFrame:
    """How far the first directions of updates lie in the top share of W's own."""
    j = top_directions_shape(study.plan)
    chosen = {run: study.adapter(run.name) for run in runs if run.r >= j}
    modules = next(iter(chosen.values())).modules if chosen else {}
    names = study.base.find_all(module.target.tensor for module in modules.values()) if modules else {}

    def rows_of(name: str) -> list[tuple[Any, ...]]:
        module = modules[name]
        weight = study.base.matrix(replace(module.target, tensor=names[module.target.tensor]), module.shape)
        U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        own, rows = {"in": Vh.mT, "out": U}, []
        for run, adapter in chosen.items():
            svd = adapter[name].svd(j)
            if numerical_rank(svd.S, module.shape) < j:
                continue
            for side, basis in {"in": svd.V, "out": svd.U}.items():
                i = min(max(1, round(study.plan.margins.top_share * len(basis))), own[side].shape[1])
                phi = float(subspace_similarity(own[side][:, :i], basis)[-1, -1])
                rows.append((run.name, run.r, name, layer_of(name), projection_of(name), side, len(basis), i, j, phi))
        return rows

    found = [row for rows in over_modules(rows_of, list(modules)) for row in rows] if modules else []
    table = pd.DataFrame(found, columns=[name for name in TOP_DIRECTIONS if name not in ("p", "draws")])
    table["p"], table["draws"] = float("nan"), nulls.draws
    for _, part in table.groupby(["d", "i"]):
        d, i = int(part["d"].iloc[0]), int(part["i"].iloc[0])
        table.loc[part.index, "p"] = nulls.p(d, i, j, part["phi"], (i, j))
    return table[list(TOP_DIRECTIONS)]
