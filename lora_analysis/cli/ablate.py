"""``lora-analysis ablate``: the paper's Section 7 as a study."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_analysis.cli import options
from lora_analysis.cli.study_options import ModelOption, SettingOption, TaskOption, chosen_plan, target_set
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.plan import Scaling
from lora_analysis.tables.pool import available_cores


def ablate(
    out: Annotated[Path, typer.Argument(help="Directory of the study; one that is there is gone on with.")],
    setting: SettingOption = "minilm",
    model: ModelOption = None,
    task: TaskOption = None,
    targets: Annotated[
        str, typer.Option(help="Target sets, such as q,qv,qkvo; or names of modules, such as fc1+fc2.")
    ] = "",
    ranks: Annotated[str, typer.Option(help="Ranks, such as 1,2,4,8,64.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of LoRA.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A study of minutes, too small to show much.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at a time; by default one a core.")] = None,
    scaling: Annotated[
        str, typer.Option(help="rslora: alpha / sqrt(r), one learning rate. lora: alpha / r, one for each rank.")
    ] = "rslora",
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune learning rates first, on training items held back.")
    ] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="List the runs and stop.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train adapters over target sets, ranks and seeds, and judge the paper's claims C1 to C17.

    Killed and called again, it goes on with the runs that are left.

    Example: lora-analysis ablate study --quick
    """
    changes: dict[str, Any] = {}
    if targets:
        changes["target_sets"] = tuple(dict.fromkeys(target_set(part.strip()) for part in targets.split(",")))
    if ranks:
        changes["ranks"] = tuple(dict.fromkeys(_positive(part) for part in ranks.split(",")))
    if seeds is not None:
        changes["seeds"] = tuple(range(seeds))
    plan = chosen_plan(setting, model, task or [], quick, changes, steps=steps, lr=lr)
    if scaling not in ("rslora", "lora"):
        raise typer.BadParameter(f"expected rslora or lora, got {scaling!r}", param_hint="--scaling")
    if scaling == "lora" and not tune:
        raise typer.BadParameter("lora needs a learning rate for each rank; pass --tune", param_hint="--scaling")
    plan = replace(plan, recipe=replace(plan.recipe, scaling=cast(Scaling, scaling)))
    if plan_only:
        for run in plan.runs():
            print(run.name)
        return
    try:
        from lora_analysis.study.analysis import analyse_study
        from lora_analysis.study.execution import execute_plan
        from lora_analysis.study.tuning import tuned_plan

        started = time.perf_counter()

        def say(text: str) -> None:
            print(f"[{time.perf_counter() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

        workers = processes or available_cores()
        if tune:
            plan = tuned_plan(plan, out, processes=workers, say=say)
        execute_plan(plan, out, processes=workers, say=say)
        say("analysing")
        lines = analyse_study(out, say=say)
        if quick:
            say("a quick study shows that it runs: its verdicts judge nothing")
        say("done")
    except ImportError as error:
        raise LoraAnalysisError(str(error)) from error
    print((out / "claims.json").read_text("utf-8").strip() if as_json else "\n".join(lines))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"expected positive integers, got {text!r}", param_hint="--ranks")
    return value
