"""What full fine-tuning, LoRA and BitFit cost on one model and task: parameters, memory, time, and what they reach.

Conventions
-----------
The step is forward, backward and update of one batch, of the study's size; methods take turns, so that their ratios
hold where a machine's speed drifts. Peak memory is that of one step above what the model and its optimizer hold
before it; held memory is weights, gradients and optimizer states. Memory is measured after a first step, which
creates the optimizer's states.

Values
------
``SystemCost``, ``measured_costs``, ``cost_table``.

References
----------
Hu et al. 2021, arXiv:2106.09685, sections 4.2 and 5.1; BitFit: Ben Zaken et al. 2021, arXiv:2106.10199.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from lora_analysis.study.execution import prepared, trained
from lora_analysis.study.plan import Recipe, Run
from lora_analysis.study.setting import Setting
from lora_analysis.training import measured_memory, parameter_count, peak_memory

METHODS = (
    ("full", (), 0),
    ("lora", ("q", "v"), 8),
    ("lora", ("all-linear",), 8),
    ("bitfit", (), 0),
)
"""Full fine-tuning, LoRA on query and value and on all linear layers, BitFit."""


@dataclass(frozen=True, slots=True)
class SystemCost:
    """What one method costs and reaches.

    Parameters
    ----------
    method : str
    targets : str
    r : int
    trainable_parameters : int
    weights_bytes, gradients_bytes, optimizer_bytes : int
        Held between steps, or through one.
    peak_bytes : int
        At the peak of a step, above what is held before it: activations, gradients, buffers.
    step_seconds : float
        Median.
    held_out_loss : float
        Nats, after the recipe's steps.
    accuracy : float
        NaN where nothing is classified.
    """

    method: str
    targets: str
    r: int
    trainable_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    step_seconds: float
    held_out_loss: float
    accuracy: float


def measured_costs(
    setting: Setting,
    task: str,
    recipe: Recipe,
    *,
    methods: Iterable[tuple[str, Sequence[str], int]] = METHODS,
    rounds: int = 7,
    seed: int = 0,
) -> list[SystemCost]:
    """Train each method for the recipe's steps, measure what it reaches, then what a step costs.

    Parameters
    ----------
    setting : Setting
    task : str
    recipe : Recipe
    methods : iterable of (method, targets, r)
    rounds : int
        Steps timed of each, in turns, after one that does not count.
    seed : int

    Returns
    -------
    list of SystemCost
        In the order of the methods.
    """
    runs = [Run(task, method, tuple(targets), r, seed, seed) for method, targets, r in methods]  # type: ignore[arg-type]
    outcomes = []
    for run in runs:
        model = prepared(run, recipe, setting, setting.model())
        trained(run, recipe, setting, model)
        outcomes.append(setting.outcomes(task, model))
    steps, held, peaks, counts = [], [], [], []
    for run in runs:
        model = prepared(run, recipe, setting, setting.model()).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
        batch = next(setting.batches(task, batch_size=recipe.batch_size, seed=seed, size=None))
        step = _step(setting, task, model, optimizer, batch)
        step()
        torch.autograd.backward(setting.loss(task, model, batch))
        held.append(measured_memory(model, optimizer))
        optimizer.zero_grad()
        peaks.append(peak_memory(step, device=next(model.parameters()).device))
        counts.append(parameter_count(model).trainable)
        steps.append(step)
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for own, step in zip(times, steps, strict=True):
            began = time.perf_counter()
            step()
            own.append(time.perf_counter() - began)
    return [
        SystemCost(
            method=run.method,
            targets="+".join(run.targets),
            r=run.r,
            trainable_parameters=counts[i],
            weights_bytes=held[i].weights,
            gradients_bytes=held[i].gradients,
            optimizer_bytes=held[i].optimizer,
            peak_bytes=peaks[i],
            step_seconds=statistics.median(times[i]),
            held_out_loss=float(outcomes[i].losses.mean()),
            accuracy=float("nan") if (right := outcomes[i].correct) is None else float(right.double().mean()),
        )
        for i, run in enumerate(runs)
    ]


def cost_table(costs: Sequence[SystemCost]) -> pd.DataFrame:
    """One row for each method, with its ratios to the first.

    Returns
    -------
    DataFrame
        The fields of ``SystemCost``, and ``parameters_ratio``, ``memory_ratio`` (held and peak together) and
        ``time_ratio`` of the first method to each; dimensionless.
    """
    table = pd.DataFrame([{name: getattr(cost, name) for name in SystemCost.__slots__} for cost in costs])
    memory = table["weights_bytes"] + table["optimizer_bytes"] + table["peak_bytes"]
    table["parameters_ratio"] = table["trainable_parameters"].iloc[0] / table["trainable_parameters"]
    table["memory_ratio"] = memory.iloc[0] / memory
    table["time_ratio"] = table["step_seconds"].iloc[0] / table["step_seconds"]
    return table


def _step(
    setting: Setting, task: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: object
) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.backward(setting.loss(task, model, batch))
        optimizer.step()
        optimizer.zero_grad()

    return step
