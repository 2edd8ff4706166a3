"""One adapter, trained in this process or in several under torchrun, with everything worth keeping beside it.

Values
------
``train_one``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_analysis.checkpoint import read_json
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.execution import environment, save_run_adapter, summary, write_json
from lora_analysis.study.plan import Plan, Run
from lora_analysis.study.projections import placement
from lora_analysis.study.setting import open_setting
from lora_analysis.training import TrainingDynamics, inject, local_parts, parameter_count, process_group, train
from lora_analysis.training.distributed import rank, world_size


def train_one(
    plan: Plan,
    run: Run,
    directory: Path,
    *,
    alpha: float | None = None,
    init: str = "kaiming",
    dora: bool = False,
    checkpoint_every: int = 20,
) -> list[str]:
    """Train, measure and save one LoRA run; killed and called again, it goes on where it was.

    Parameters
    ----------
    plan : Plan
        Its setting and recipe are used.
    run : Run
    directory : Path
        Gets the adapter in PEFT's format, ``initial.safetensors``, ``log.jsonl``, ``dynamics.jsonl``, ``run.json``
        and ``state.pt``, from which an interrupted run goes on, with ``settings.json``, of which it has to be.
    alpha : float, optional
        The recipe's by default.
    init : str
    dora : bool
        As ``training.inject`` takes them.
    checkpoint_every : int

    Returns
    -------
    list of str
        What it came to; nothing in all but the first process.

    Raises
    ------
    LoraAnalysisError
        If the directory is that of a run with other settings.
    """
    recipe = plan.recipe if alpha is None else replace(plan.recipe, alpha=alpha)
    with process_group():
        # What takes long to prepare is kept in the directory: the first process does it, the others find it there.
        if rank() == 0:
            settings = {"setting": plan.setting, "run": asdict(run), "recipe": asdict(recipe)}
            began = _require_same(directory, {**settings, "init": init, "dora": dora})
            try:
                setting = open_setting(plan.setting, folder=directory)
            except (ImportError, LoraAnalysisError):
                if began:  # nothing was: another try may have other settings
                    (directory / "settings.json").unlink()
                raise
        if world_size() > 1:
            torch.distributed.barrier()
        if rank() != 0:
            setting = open_setting(plan.setting, folder=directory)
        model = setting.model()
        inject(
            model,
            r=run.r,
            alpha=recipe.alpha,
            seed=run.init_seed,
            rslora=recipe.scaling == "rslora",
            init=init,  # type: ignore[arg-type]
            dora=dora,
            **placement(model, run.targets),
        )
        directory.mkdir(parents=True, exist_ok=True)
        every = max(1, recipe.steps // 20)
        dynamics = TrainingDynamics(model, every=every, path=directory / "dynamics.jsonl") if rank() == 0 else None
        batches = setting.batches(run.task, batch_size=recipe.batch_size, seed=run.data_seed, size=run.size)
        losses = train(
            model,
            local_parts(batches),
            lambda model, batch: setting.loss(run.task, model, batch),
            lr=recipe.rate(run),
            steps=recipe.steps,
            schedule="linear",
            warmup=recipe.steps // 10,
            weight_decay=recipe.weight_decay,
            max_grad_norm=1.0,
            checkpoint=directory / "state.pt",
            checkpoint_every=checkpoint_every,
            log=directory / "log.jsonl",
            progress=True,
            on_step=dynamics,
        )
        if rank() != 0:
            return []
        outcomes = setting.outcomes(run.task, model)
        frozen = setting.outcomes(run.task, setting.model())
        save_run_adapter(model, directory, setting, source=run.name)
        record = {
            "name": run.name,
            "run": asdict(run),
            "recipe": asdict(recipe),
            "processes": world_size(),
            "trainable_parameters": parameter_count(model).trainable,
            "losses": losses,
            "held_out_loss": float(outcomes.losses.mean()),
            "accuracy": None if outcomes.correct is None else float(outcomes.correct.double().mean()),
            "metrics": dict(outcomes.metrics),
            "frozen_loss": float(frozen.losses.mean()),
            "environment": environment(),
        }
        write_json(directory / "run.json", record)
    before, gain = float(frozen.losses.mean()), float(frozen.losses.mean() - outcomes.losses.mean())
    return [
        f"{run.name}: {record['trainable_parameters']:,} parameters, {recipe.steps} steps, processes: "
        f"{record['processes']}",
        f"{summary(record)}; the frozen model has loss {before:.4f}, so the gain is {gain:+.4f} nats",
        f"adapter, log and training dynamics are in {directory}/",
    ]


def _require_same(directory: Path, settings: Mapping[str, Any]) -> bool:
    """See that a directory is new or that of a run with these settings, whose state knows only a part of them.

    Returns
    -------
    bool
        Whether it is new.
    """
    path = directory / "settings.json"
    if not path.exists():
        if (directory / "state.pt").exists():
            raise LoraAnalysisError(f"{directory}: expected settings.json beside state.pt, got none. Use another one.")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return True
    known, wanted = read_json(path), json.loads(json.dumps(settings))
    for name in wanted:
        if known.get(name) != wanted[name]:
            raise LoraAnalysisError(
                f"{path}: expected the {name} that this run was begun with, {known.get(name)}, got {wanted[name]}. "
                "Use another directory."
            )
    return False
