"""What the runs of a study did, as tables: the evidence that claims, tables and figures are made of.

Conventions
-----------
``runs`` has one row for each finished run. ``outcomes`` has one for each run and group of held-out items (the folder
or file they were cut from), because items of a group are not independent: number of items, sum of their losses, how
many are right. Everything later is computed from these and the adapters; nothing is trained again.

Values
------
``Study``, ``open_study``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint import read_json
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import load_adapter
from lora_analysis.study.plan import Plan


@dataclass(frozen=True)
class Study:
    """A study directory.

    Parameters
    ----------
    directory : Path
    plan : Plan
    tasks : dict
        What ``tasks.json`` says: for each task its digest, groups of held-out items, metric.
    base_path : Path
        The file of the pretrained weights.
    """

    directory: Path
    plan: Plan
    tasks: dict[str, Any]
    base_path: Path

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row for each finished run, in the order of the plan.

        Columns: ``run task method targets r init_seed data_seed size scaling trainable_parameters held_out_loss
        accuracy train_loss_first train_loss_last seconds_training``. ``targets`` is joined by ``+``, "" without;
        ``size`` and ``accuracy`` are NaN where there is none; losses in nats.
        """
        rows = []
        for run in self.plan.runs():
            record = self.record(run.name)
            if record is None:
                continue
            losses = record["losses"]
            rows.append(
                {
                    "run": run.name,
                    "task": run.task,
                    "method": run.method,
                    "targets": "+".join(run.targets),
                    "r": run.r,
                    "init_seed": run.init_seed,
                    "data_seed": run.data_seed,
                    "size": float("nan") if run.size is None else run.size,
                    "scaling": run.scaling or self.plan.recipe.scaling,
                    "trainable_parameters": record["trainable_parameters"],
                    "held_out_loss": record["held_out_loss"],
                    "accuracy": float("nan") if record["accuracy"] is None else record["accuracy"],
                    "train_loss_first": sum(losses[:5]) / max(1, len(losses[:5])) if losses else float("nan"),
                    "train_loss_last": sum(losses[-5:]) / max(1, len(losses[-5:])) if losses else float("nan"),
                    "seconds_training": record["seconds_training"],
                }
            )
        if not rows:
            raise LoraAnalysisError(f"{self.directory}: expected finished runs, got none. Run the study first.")
        return pd.DataFrame(rows)

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """One row for each run and group: ``run group items loss_sum correct_sum``, the last NaN without classes."""
        parts = []
        for name, task in zip(self.runs["run"], self.runs["task"], strict=True):
            stored = load_file(self.directory / "runs" / name / "outcomes.safetensors")
            correct = stored.get("correct")
            items = pd.DataFrame(
                {
                    "group": self.tasks["tasks"][task]["groups"],
                    "items": 1,
                    "loss_sum": stored["losses"].numpy(),
                    "correct_sum": float("nan") if correct is None else correct.double().numpy(),
                }
            )
            summed = items.groupby("group", sort=True).sum(min_count=1).reset_index()
            summed.insert(0, "run", name)
            parts.append(summed)
        return pd.concat(parts, ignore_index=True)

    def record(self, run: str) -> dict[str, Any] | None:
        """The ``run.json`` of a run; None if it is not finished."""
        path = self.directory / "runs" / run / "run.json"
        return dict(read_json(path)) if path.exists() else None

    def correct(self, run: str) -> Tensor:
        """Which held-out items a run classifies rightly, bool, shape (n,); of tasks with classes."""
        return load_file(self.directory / "runs" / run / "outcomes.safetensors")["correct"]

    def adapter(self, run: str) -> Adapter:
        """The adapter of a LoRA run."""
        return load_adapter(self.directory / "runs" / run)

    def initial(self, run: str) -> dict[str, Any]:
        """The A that a run began with, by module, shape (r, d_in)."""
        stored = load_file(self.directory / "runs" / run / "initial.safetensors")
        return {name.removesuffix(".lora_A0"): A for name, A in stored.items() if name.endswith(".lora_A0")}

    @cached_property
    def base(self) -> BaseWeights:
        """The pretrained weights."""
        return load_base(self.base_path)

    def find(self, **columns: Any) -> list[str]:
        """Names of the finished runs whose columns have these values.

        Those on all training items unless ``size`` is given, with the recipe's scale unless ``scaling`` is.

        Examples of columns: ``method="lora", targets="q+v", r=8``.
        """
        table = self.runs
        if "size" not in columns:
            table = table[table["size"].isna()]
        columns.setdefault("scaling", self.plan.recipe.scaling)
        for column, value in columns.items():
            table = table[table[column] == value]
        return list(table["run"])


def open_study(directory: Path) -> Study:
    """A study directory with at least its plan and tasks.

    Raises
    ------
    LoraAnalysisError
        If it is none.
    """
    for name in ("plan.json", "tasks.json", "base.json"):
        if not (directory / name).is_file():
            raise LoraAnalysisError(f"{directory}: expected a study directory with {name}, got none. Run ablate first.")
    plan, tasks, base = (read_json(directory / name) for name in ("plan.json", "tasks.json", "base.json"))
    return Study(directory, Plan.from_json(plan), dict(tasks), Path(base["path"]))
