"""Learning rates, tuned on training items held back, with a seed that no run of a study has.

With rsLoRA's scale one rate of LoRA serves all ranks, and is tuned at one; with LoRA's own scale, alpha / r, each rank
has one of its own, ``lora-r8``. What is measured on later is never looked at.

Values
------
``tuned_plan``, ``tuned_recipe``, ``CANDIDATES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from lora_analysis.checkpoint import read_json
from lora_analysis.study.execution import prepared, trained
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.setting import Setting, open_setting

SEED = 1000
"""Of initial factors and of the order of the data while tuning."""

CANDIDATES: Mapping[str, tuple[float, ...]] = {
    "lora": (2e-3, 5e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
    "bitfit": (2e-3, 5e-3, 1e-2),
    "head": (3e-3, 1e-2, 3e-2),
}
"""Learning rates that are tried, by method."""


def tuned_plan(plan: Plan, directory: Path, *, processes: int, say: Callable[[str], None] = lambda text: None) -> Plan:
    """The plan with tuned learning rates: those of the study that is there, else tuned now.

    Parameters
    ----------
    plan : Plan
    directory : Path
        Of the study; what was tuned is in its ``plan.json``.
    processes : int
    say : callable
    """
    begun = directory / "plan.json"
    if begun.exists():
        return replace(plan, recipe=replace(plan.recipe, lr=Plan.from_json(read_json(begun)).recipe.lr))
    say("tuning learning rates")
    setting = open_setting(plan.setting, folder=directory)
    return replace(plan, recipe=tuned_recipe(plan, setting, processes=processes, say=say))


def tuned_recipe(
    plan: Plan,
    setting: Setting,
    *,
    processes: int,
    candidates: Mapping[str, Sequence[float]] = CANDIDATES,
    say: Callable[[str], None] = lambda text: None,
) -> Recipe:
    """The plan's recipe with the best of the candidates for each method, and each rank where the scaling is LoRA's.

    Parameters
    ----------
    plan : Plan
    setting : Setting
        The plan's, opened.
    processes : int
    candidates : mapping of str to sequence of float
    say : callable

    Returns
    -------
    Recipe
    """
    ranks = plan.ranks if plan.recipe.scaling == "lora" else (_middle(plan.ranks),)
    keys: dict[str, Run] = {
        "lora" if plan.recipe.scaling == "rslora" else f"lora-r{r}": Run(plan.task, "lora", plan.main, r, SEED, SEED)
        for r in ranks
    }
    keys |= {method: Run(plan.task, method, init_seed=SEED, data_seed=SEED) for method in plan.controls}
    tried = [(key, replace(run, lr=lr)) for key, run in keys.items() for lr in candidates[key.partition("-")[0]]]
    held_back = setting.held_back()
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        losses = list(pool.map(_loss, [(run, plan.recipe, held_back) for _, run in tried]))
    found: dict[str, tuple[float, float]] = {}
    for (key, run), loss in zip(tried, losses, strict=True):
        say(f"{key}, learning rate {run.lr:g}: loss {loss:.4f} on items held back")
        found[key] = min(found.get(key, (float("inf"), 0.0)), (loss, float(run.lr or 0)))
    return replace(plan.recipe, lr={**plan.recipe.lr, **{key: lr for key, (_, lr) in found.items()}})


def _loss(arguments: tuple[Run, Recipe, Setting]) -> float:
    run, recipe, setting = arguments
    model = prepared(run, recipe, setting, setting.model())
    try:
        trained(run, recipe, setting, model)
    except FloatingPointError:  # this rate is too large
        return float("inf")
    return float(setting.outcomes(run.task, model).losses.mean())


def _middle(ranks: Sequence[int]) -> int:
    return sorted(ranks)[len(ranks) // 2]
