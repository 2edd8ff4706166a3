"""Learning rates, tuned on training items held back, with a seed that no run of a study has.

With rsLoRA's scale one rate of LoRA serves all ranks; with LoRA's own scale, alpha / r, each rank has one of its own,
``lora-r8``. A rate is the best on average of two runs: the plan's main target set, at the middle rank where there is
one rate, and its widest target set, at the largest. (By the first alone, the largest adapters of a grid may diverge.)
What is measured on later is never looked at.

Values
------
``tuned_plan``, ``tuning_losses``, ``best_rates``, ``CANDIDATES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from lora_analysis.checkpoint import read_json
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.execution import prepared, trained, write_json
from lora_analysis.study.plan import Plan, Recipe, Run, Scaling
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
    """The plan with tuned learning rates: by the losses that ``tuning.json`` of the study holds, else measured now.

    Parameters
    ----------
    plan : Plan
    directory : Path
        Of the study.
    processes : int
    say : callable

    Raises
    ------
    LoraAnalysisError
        If the study was begun without tuning.
    """
    kept = directory / "tuning.json"
    if not kept.exists():
        if (directory / "plan.json").exists():
            raise LoraAnalysisError(
                f"{directory}: expected a study whose learning rates were tuned, got one begun without. Go on without "
                "--tune, or use another directory."
            )
        say("tuning learning rates")
        losses = tuning_losses(plan, open_setting(plan.setting, folder=directory), processes=processes, say=say)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(kept, {key: list(map(list, tried.items())) for key, tried in losses.items()})
    losses = {key: {float(lr): float(loss) for lr, loss in tried} for key, tried in read_json(kept).items()}
    return replace(plan, recipe=best_rates(plan.recipe, losses))


def best_rates(recipe: Recipe, losses: Mapping[str, Mapping[float, float]]) -> Recipe:
    """The recipe with the learning rates of least loss.

    Examples
    --------
    >>> best_rates(Recipe(100, 8, {"lora": 1.0, "head": 0.1}, 6.0), {"lora": {0.01: 2.0, 0.02: 1.5}}).lr
    {'lora': 0.02, 'head': 0.1}
    """
    best = {key: min(tried, key=tried.__getitem__) for key, tried in losses.items()}
    return replace(recipe, lr={**recipe.lr, **best})


def tuning_losses(
    plan: Plan,
    setting: Setting,
    *,
    processes: int,
    candidates: Mapping[str, Sequence[float]] = CANDIDATES,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[float, float]]:
    """Loss on items held back by learning rate, for each method, and each rank where the scaling is LoRA's.

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
    dict of str to dict of float to float
        By the names that ``Recipe.lr`` has: the mean over the runs that a rate has to serve; infinite where one of them
        diverged.
    """
    cells = _cells(plan)
    held_back = setting.held_back()
    losses: dict[str, dict[float, float]] = {key: {} for key in cells}
    wanted = [(key, lr) for key in cells for lr in candidates[key.partition("-")[0]]]
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        while wanted:
            jobs = [(key, lr, cell) for key, lr in wanted for cell in cells[key]]
            found = pool.map(_loss, [(replace(cell, lr=lr), plan.recipe, held_back) for _, lr, cell in jobs])
            for (key, lr, cell), loss in zip(jobs, found, strict=True):
                where = f" on {'+'.join(cell.targets)} at r = {cell.r}" if cell.method == "lora" else ""
                say(f"{key}, learning rate {lr:.2g}{where}: loss {loss:.4f} on items held back")
                losses[key][lr] = losses[key].get(lr, 0.0) + loss / len(cells[key])
            further = {key: _beyond(tried) for key, tried in losses.items()}
            wanted = [(key, lr) for key, lr in further.items() if lr is not None]
    return losses


def _cells(plan: Plan) -> dict[str, list[Run]]:
    """For each rate there is to find, by its name in ``Recipe.lr``, the runs that it has to serve."""

    def lora(r: int, most: int, scaling: Scaling | None) -> list[Run]:
        cells = {Run(plan.task, "lora", plan.main, r, SEED, SEED, scaling=scaling): None}
        widest = max(plan.target_sets, key=len)
        return [*(cells | {Run(plan.task, "lora", widest, most, SEED, SEED, scaling=scaling): None})]

    cells: dict[str, list[Run]] = {}
    # Of every rank there is, that of a budget too.
    own = sorted({run.r for run in plan.runs() if run.method == "lora"})
    for scaling in (None, *plan.scalings):
        rule = "lora" if scaling is None else f"lora-{scaling}"
        if (scaling or plan.recipe.scaling) == "rslora":
            cells[rule] = lora(sorted(plan.ranks)[len(plan.ranks) // 2], max(plan.ranks), scaling)
        else:
            cells |= {f"{rule}-r{r}": lora(r, r, scaling) for r in (own if scaling is None else plan.ranks)}
    return cells | {method: [Run(plan.task, method, init_seed=SEED, data_seed=SEED)] for method in plan.controls}


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
