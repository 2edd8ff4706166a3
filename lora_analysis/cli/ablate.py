"""``lora-analysis ablate``: the paper's Section 7 as a study."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.plan import Plan, Scaling
from lora_analysis.study.presets import decoder_plan, generation_plan, minilm_plan
from lora_analysis.tables.pool import available_cores


def ablate(
    out: Annotated[Path, typer.Argument(help="Directory of the study; one that is there is gone on with.")],
    setting: Annotated[
        str,
        typer.Option(
            help="minilm: texts by class. decoder: a small language model. generation: MR||text files, with BLEU."
        ),
    ] = "minilm",
    model: Annotated[
        str | None, typer.Option(help="A transformers model in place of ours: directory or hub id.")
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="A file of yours: .csv or .jsonl of text and label, or MR||text."),
    ] = None,
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
) -> None:
    """Train adapters over target sets, ranks and seeds, and judge the paper's claims C1 to C17.

    Killed and called again, it goes on with the runs that are left.

    Example: lora-analysis ablate study --quick
    """
    changes: dict[str, Any] = {}
    if targets:
        changes["target_sets"] = tuple(_target_set(part.strip()) for part in targets.split(","))
    if ranks:
        changes["ranks"] = tuple(_positive(part) for part in ranks.split(","))
    if seeds is not None:
        changes["seeds"] = tuple(range(seeds))
    plan = _plan(setting, model, task or [], quick, changes, steps, lr)
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
        say("done")
    except ImportError as error:
        raise LoraAnalysisError(str(error)) from error
    print("\n".join(lines))


def _plan(
    setting: str, model: str | None, tasks: list[Path], quick: bool, changes: dict[str, Any],
    steps: int | None, lr: float | None,
) -> Plan:  # fmt: skip
    files: dict[str, dict[str, Any]] = {path.stem: {"file": str(path.absolute())} for path in tasks}
    if setting == "minilm" and model is None:
        plan = minilm_plan(other_tasks=files, quick=quick, **changes)
    elif setting == "minilm" and files:
        first, *others = files
        plan = minilm_plan(other_tasks=files, quick=quick, **changes)
        plan = replace(
            plan, setting={**plan.setting, "model": model, "tasks": files}, task=first, other_tasks=tuple(others)
        )
    elif setting == "decoder" and not files and model is None:
        plan = decoder_plan(quick=quick, **changes)
    elif setting == "generation" and files:
        plan = generation_plan(files, model=model or "decoder", quick=quick, **changes)
    else:
        raise typer.BadParameter(
            "expected minilm (with --task for another --model), decoder (with neither), or generation with --task",
            param_hint="--setting",
        )
    recipe = plan.recipe
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    if lr is not None:
        recipe = replace(recipe, lr={**recipe.lr, "lora": lr})
    return replace(plan, recipe=recipe)


def _target_set(text: str) -> tuple[str, ...]:
    """``qv`` is q and v; ``fc1+fc2`` are modules of those names."""
    return tuple(text) if text and set(text) <= set("qkvo") else tuple(text.split("+"))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"expected positive integers, got {text!r}", param_hint="--ranks")
    return value
