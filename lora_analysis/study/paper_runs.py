"""Which runs, ranks, layers and modules of a study stand for those of the paper.

Conventions
-----------
Ranks are near by their ratio. A run of the grid has one seed for initial factors and order; the two cells in which
these differ belong to the comparison of seeds alone.

Values
------
``Unavailable``, ``Side``; ``grid_runs``, ``main_ranks``, ``main_run``, ``nearest``; ``kinds_of``, ``layers_of``,
``module_at``, ``middle``, ``spread``; ``require_base``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.evidence import Study
from lora_analysis.study.projections import layer_of, projection_of


class Unavailable(LoraAnalysisError):
    """What the runs of a study cannot give; the message says why."""


def grid_runs(study: Study) -> pd.DataFrame:
    """The LoRA runs of the plan's task on all training items, rows of ``study.runs``."""
    runs = study.runs
    mine = (runs["task"] == study.plan.task) & (runs["method"] == "lora") & runs["size"].isna()
    mine &= runs["scaling"] == study.plan.recipe.scaling
    return runs[mine & (runs["init_seed"] == runs["data_seed"])]


def main_ranks(study: Study) -> list[int]:
    """Ranks at which a run of the main target set has finished, ascending."""
    runs = grid_runs(study)
    ranks = sorted(set(runs.loc[runs["targets"] == "+".join(study.plan.main), "r"].tolist()))
    if not ranks:
        raise Unavailable(f"no run of {'+'.join(study.plan.main)} on {study.plan.task} has finished")
    return ranks


def main_run(study: Study, r: int, *, seed: int | None = None) -> str:
    """The run of the main target set of this rank, of the first seed that has finished unless one is given."""
    runs = grid_runs(study)
    rows = runs[(runs["targets"] == "+".join(study.plan.main)) & (runs["r"] == r)]
    seeds = [seed] if seed is not None else [s for s in study.plan.seeds if s in set(rows["init_seed"])]
    found = [str(name) for s in seeds for name in rows.loc[rows["init_seed"] == s, "run"]]
    if not found:
        wanted = "" if seed is None else f" with seed {seed}"
        raise Unavailable(f"no run of {'+'.join(study.plan.main)} at r = {r}{wanted} has finished")
    return found[0]


def nearest(wanted: int, known: Iterable[int]) -> int:
    """The rank nearest by ratio, the smaller of two.

    Examples
    --------
    >>> nearest(8, [1, 4, 16]), nearest(64, [1, 4, 16])
    (4, 16)
    """
    return min(known, key=lambda r: (round(abs(math.log2(r / wanted)), 9), r))


def kinds_of(adapter: Adapter) -> list[str]:
    """Projections to draw: q and v as in the paper, of those that are there; else the first two."""
    known = list(dict.fromkeys(projection_of(module) for module in adapter))
    return [kind for kind in ("q", "v") if kind in known] or known[:2]


def layers_of(adapter: Adapter) -> list[int]:
    """Numbers of the layers with modules, ascending."""
    return sorted({layer_of(module) for module in adapter})


def module_at(adapter: Adapter, kind: str, layer: int) -> str:
    """The first module of this projection in this layer."""
    found = [module for module in adapter if projection_of(module) == kind and layer_of(module) == layer]
    if not found:
        raise Unavailable(f"{adapter.source} has no {kind} in layer {layer}")
    return found[0]


def middle(layers: Sequence[int]) -> int:
    """The middle layer: the paper's 48 of 96."""
    return layers[len(layers) // 2]


def spread(layers: Sequence[int], count: int = 4) -> list[int]:
    """Layers from the first to the last, evenly: the paper's 1, 32, 64 and 96.

    Examples
    --------
    >>> spread([0, 1, 2, 3, 4, 5]), spread([0, 1])
    ([0, 2, 3, 5], [0, 1])
    """
    last = len(layers) - 1
    places = [int(last * step / (count - 1) + 0.5) for step in range(count)]
    return [layers[place] for place in dict.fromkeys(places)]


def require_base(study: Study) -> BaseWeights:
    """The pretrained weights, where they are there to read."""
    if not study.base_path.exists():
        raise Unavailable(f"the pretrained weights are not at {study.base_path}")
    return study.base
