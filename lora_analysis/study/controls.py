"""What the controls of a study did, in a few lines: other methods, other tasks, and what needs no model at all.

Values
------
``control_lines``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lora_analysis.study.plan import Plan

_WIDTH = 80


def control_lines(runs: pd.DataFrame, tasks: Mapping[str, Any], plan: Plan) -> list[str]:
    """Held-out losses of the controls beside the frozen model's, as lines of 80 columns.

    Parameters
    ----------
    runs : DataFrame
        ``Study.runs``.
    tasks : mapping
        What ``tasks.json`` says of each task.
    plan : Plan

    Returns
    -------
    list of str
    """
    found = runs[runs["size"].isna() & (runs["scaling"] == plan.recipe.scaling)]
    lines = ["Controls: mean held-out loss in nats (least to most over the seeds)."]
    for task, about in tasks.items():
        mine = found[found["task"] == task]
        if mine.empty:
            continue
        parts = [_of(rows, _name(method, str(targets), int(r))) for (method, targets, r), rows in _groups(mine, plan)]
        baselines = [
            f"{name} of the training bytes {about[key] * math.log(2):.3f}"
            for name, key in (("unigrams", "unigram_bits"), ("bigrams", "bigram_bits"))
            if key in about
        ]
        text = "; ".join([*parts, *baselines])
        lines += textwrap.wrap(f"{task}: {text}.", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def _groups(rows: pd.DataFrame, plan: Plan) -> Any:
    """The controls, and of LoRA the main target set at its largest rank in the task."""
    lora = rows[(rows["method"] == "lora") & (rows["targets"] == "+".join(plan.main))]
    kept = pd.concat([rows[rows["method"] != "lora"], lora[lora["r"] == lora["r"].max()]])
    return kept.groupby(["method", "targets", "r"], sort=False)


def _name(method: str, targets: str, r: int) -> str:
    return f"LoRA on {targets} at r = {r}" if method == "lora" else {"full": "full fine-tuning"}.get(method, method)


def _of(rows: pd.DataFrame, name: str) -> str:
    losses = rows["held_out_loss"]
    spread = f" ({losses.min():.3f} to {losses.max():.3f})" if len(losses) > 1 else ""
    right = rows["accuracy"]
    accuracy = "" if right.isna().all() else f", accuracy {right.mean():.1%}"
    return f"{name} {losses.mean():.3f}{spread}{accuracy}"
