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
"""Learning rates that are tried, by method; where the best is an end of them, more beyond it."""

_MOST = 7
"""Rates tried of one method at most."""


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
    # Of every rank there is, that of a budget too.
    own = sorted({run.r for run in plan.runs() if run.method == "lora"})
    ranks = own if plan.recipe.scaling == "lora" else [_middle(plan.ranks)]
    keys: dict[str, Run] = {
        "lora" if plan.recipe.scaling == "rslora" else f"lora-r{r}": Run(plan.task, "lora", plan.main, r, SEED, SEED)
        for r in ranks
    }
    keys |= {method: Run(plan.task, method, init_seed=SEED, data_seed=SEED) for method in plan.controls}
    held_back = setting.held_back()
    losses: dict[str, dict[float, float]] = {key: {} for key in keys}
    wanted = [(key, lr) for key in keys for lr in candidates[key.partition("-")[0]]]
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        while wanted:
            jobs = [(replace(keys[key], lr=lr), plan.recipe, held_back) for key, lr in wanted]
            for (key, lr), loss in zip(wanted, pool.map(_loss, jobs), strict=True):
                say(f"{key}, learning rate {lr:.2g}: loss {loss:.4f} on items held back")
                losses[key][lr] = loss
            further = {key: _beyond(tried) for key, tried in losses.items()}
            wanted = [(key, lr) for key, lr in further.items() if lr is not None]
    best = {key: min(tried, key=tried.__getitem__) for key, tried in losses.items()}
    return replace(plan.recipe, lr={**plan.recipe.lr, **best})


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The next rate to try where the best so far is the least or the largest; None where it lies between others.

    Examples
    --------
    >>> _beyond({1e-3: 2.0, 4e-3: 1.0}), _beyond({1e-3: 2.0, 2e-3: 1.0, 4e-3: 1.5})
    (0.016, None)
    """
    rates = sorted(losses)
    best = min(losses, key=losses.__getitem__)
    if len(rates) < 2 or len(rates) >= _MOST or best not in (rates[0], rates[-1]):
        return None
    near, end = (rates[1], rates[0]) if best == rates[0] else (rates[-2], rates[-1])
    return end * end / near


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
