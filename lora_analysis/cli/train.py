"""``lora-analysis train``: one adapter, in one process or under torchrun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from lora_analysis.cli import options
from lora_analysis.cli.study_options import ModelOption, SettingOption, TaskOption, chosen_plan, target_set, task_name
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.plan import Run


def train(
    out: Annotated[Path, typer.Argument(help="Directory for the adapter; a run that is there is gone on with.")],
    setting: SettingOption = "minilm",
    model: ModelOption = None,
    task: TaskOption = None,
    targets: Annotated[str, typer.Option(help="Projections, such as qv; all-linear; or modules, fc1+fc2.")] = "qv",
    r: Annotated[int, typer.Option(min=1, help="Inner dimension.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="The scale is alpha / sqrt(r).")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial factors and of the order of the data.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    init: Annotated[str, typer.Option(help="kaiming, gaussian, orthogonal or pissa.")] = "kaiming",
    dora: Annotated[bool, typer.Option("--dora", help="Train magnitudes apart from directions.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two writings of the state.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="A small task and few steps, to see that it runs.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train one adapter on a task, and save it as PEFT reads it.

    Beside it: the factors it began with, the log, how training went inside, and what it reaches. Under torchrun every
    process takes its part of each batch: torchrun --nproc-per-node 2 -m -- lora_analysis train OUT.

    Example: lora-analysis train runs/r8 --r 8 --targets qv
    """
    from lora_analysis.training.initial import Init

    if init not in get_args(Init):
        raise typer.BadParameter(f"expected one of {', '.join(get_args(Init))}, got {init!r}", param_hint="--init")
    if len(task or []) > 1:
        raise typer.BadParameter("expected one file: an adapter is trained on one task", param_hint="--task")
    plan = chosen_plan(setting, model, task or [], quick, {}, steps=steps, lr=lr)
    if task:  # a study of ours would keep the file for comparison
        name = task_name(task[0])
        only = {name: plan.setting["tasks"][name]}
        plan = replace(plan, setting={**plan.setting, "tasks": only}, task=name, other_tasks=(), control_tasks=())
    run = Run(plan.task, "lora", target_set(targets), r, seed, seed)
    try:
        from lora_analysis.study.single import train_one

        lines = train_one(plan, run, out, alpha=alpha, init=init, dora=dora, checkpoint_every=checkpoint_every)
    except ImportError as error:
        raise LoraAnalysisError(str(error)) from error
    if lines:  # the first process alone has any
        print((out / "run.json").read_text("utf-8").strip() if as_json else "\n".join(lines))
