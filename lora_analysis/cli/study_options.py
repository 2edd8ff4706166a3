"""Options of the commands that train: which model, which task, which modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_analysis.study.plan import Plan
from lora_analysis.study.presets import decoder_plan, generation_plan, minilm_plan

SettingOption = Annotated[
    str, typer.Option(help="minilm: texts by class. decoder: a small language model. generation: MR||text files.")
]
ModelOption = Annotated[str | None, typer.Option(help="A transformers model in place of ours: directory or hub id.")]
TaskOption = Annotated[
    list[Path] | None, typer.Option(help="A file of yours: .csv or .jsonl of text and label, or MR||text.")
]


def chosen_plan(
    setting: str,
    model: str | None,
    tasks: list[Path],
    quick: bool,
    changes: dict[str, Any],
    *,
    steps: int | None,
    lr: float | None,
) -> Plan:
    """The plan that the options name, with what they change of it."""
    files: dict[str, dict[str, Any]] = {}
    for path in tasks:
        name = task_name(path)
        if name in files or (name == "docstrings" and model is None):
            raise typer.BadParameter(f"expected files of different names, got {name!r} twice", param_hint="--task")
        files[name] = {"file": str(path.absolute())}
    if model is not None and Path(model).is_dir():  # gone on with from anywhere
        model = str(Path(model).absolute())
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


def task_name(path: Path) -> str:
    """A task is called after its file, or after the folder of a file that is called ``train``.

    Examples
    --------
    >>> task_name(Path("banking77.csv")), task_name(Path("banking77/train.csv"))
    ('banking77', 'banking77')
    """
    path = path.absolute()
    return path.parent.name if path.stem == "train" and path.parent.name else path.stem


def target_set(text: str) -> tuple[str, ...]:
    """``qv`` or ``vq`` is q and v; ``fc1+fc2`` are modules of those names."""
    if text and set(text) <= set("qkvo"):
        return tuple(letter for letter in "qkvo" if letter in text)
    return tuple(dict.fromkeys(text.split("+")))
