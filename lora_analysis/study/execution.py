"""Runs of a plan in processes of their own, each leaving a directory that appears whole or not at all.

Conventions
-----------
A study directory holds ``plan.json`` and ``tasks.json``, and for each finished run ``runs/<name>/``: ``run.json``
(settings, losses of training, versions, digests), ``outcomes.safetensors`` (what it does on every held-out item), of
LoRA the adapter in PEFT's format with the factors it began with, ``initial.safetensors``; of full fine-tuning the
singular values of what it changed, ``spectra.safetensors``. A run that is there is not repeated, so that a study
that was killed goes on where it was.

Values
------
``execute_plan``, ``execute_runs``, ``execute``; ``prepared``, ``trained``, ``bfloat16_pays``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.checkpoint import read_json
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import save_adapter
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.projections import placement
from lora_analysis.study.setting import Setting, open_setting
from lora_analysis.training import extract, inject, sites, train
from lora_analysis.training.accounting import parameter_count


def execute_plan(
    plan: Plan, directory: Path, *, processes: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Execute what is left to do of a plan.

    Parameters
    ----------
    plan : Plan
    directory : Path
        A new one, or that of the same plan.
    processes : int
        Runs at a time, each with one thread.
    say : callable
        Is told what happens.

    Raises
    ------
    LoraAnalysisError
        If the directory is that of another plan, or the texts are not those it was begun with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _keep(directory / "plan.json", plan.to_json(), "another plan", read=Plan.from_json)
    say("preparing model and tasks")
    setting = open_setting(plan.setting, folder=directory)
    tasks = setting.record()
    _keep(directory / "tasks.json", {"tasks": tasks, "base_sha256": _digest(setting.base)}, "other texts")
    # Where the weights are may change from machine to machine; what they are may not.
    write_json(directory / "base.json", {"path": str(setting.base.absolute())})
    runs = [run for run in plan.runs() if run.size is None or run.size <= tasks[run.task]["train_items"]]
    if len(runs) < len(plan.runs()):
        say(f"{len(plan.runs()) - len(runs)} runs are left out: there are fewer training items than they ask for")
    left = [run for run in runs if not (directory / "runs" / run.name / "run.json").exists()]
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them done; {len(left)} left in {processes} processes")
    done = len(runs) - len(left)
    for record in execute_runs(left, plan.recipe, setting, directory / "runs", processes=processes):
        done += 1
        say(f"{done} of {len(runs)}: {record['name']}, {summary(record)}")


def execute_runs(
    runs: Sequence[Run], recipe: Recipe, setting: Setting, parent: Path, *, processes: int
) -> Iterator[dict[str, Any]]:
    """Execute runs in a pool, yielding records as they finish."""
    if not runs:
        return
    parent.mkdir(parents=True, exist_ok=True)
    # Not forked: a fork of a process whose BLAS has started threads may hang.
    pool: Executor = ProcessPoolExecutor(
        min(processes, len(runs)), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        futures = [pool.submit(execute, run, recipe, setting, parent) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def execute(run: Run, recipe: Recipe, setting: Setting, parent: Path) -> dict[str, Any]:
    """Train, measure and save one run.

    Returns
    -------
    dict
        The content of ``run.json``.

    Raises
    ------
    LoraAnalysisError
        If the training diverges.
    """
    started = time.perf_counter()
    base = setting.model()
    model = prepared(run, recipe, setting, base)
    count = parameter_count(model)
    try:
        losses = [] if run.method == "frozen" else trained(run, recipe, setting, model)
    except FloatingPointError as error:
        # One learning rate serves all runs of a method: a study that leaves out those it is too large for would lie.
        raise LoraAnalysisError(f"{run.name}: {error} Or tune the rates of the whole study: --tune.") from error
    ended = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
        outcomes = setting.outcomes(run.task, model)
    record = {
        "name": run.name,
        "run": asdict(run),
        "recipe": asdict(recipe),
        "trainable_parameters": count.trainable,
        "losses": losses,
        "held_out_loss": float(outcomes.losses.mean()),
        "accuracy": None if outcomes.correct is None else float(outcomes.correct.double().mean()),
        "metrics": dict(outcomes.metrics),
        "seconds_training": ended - started,
        "seconds_evaluation": time.perf_counter() - ended,
        "environment": environment(),
    }
    scratch = parent / f".{run.name}.{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": outcomes.losses} | ({} if outcomes.correct is None else {"correct": outcomes.correct})
    save_file(tensors, scratch / "outcomes.safetensors")
    if run.method == "lora":
        save_run_adapter(base, scratch, setting, source=run.name)
    elif run.method == "full":
        save_file(_spectra(base, setting.model()), scratch / "spectra.safetensors")
    (scratch / "run.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    final = parent / run.name
    if final.exists():
        shutil.rmtree(final)
    scratch.replace(final)
    return record


def save_run_adapter(model: nn.Module, folder: Path, setting: Setting, *, source: str) -> None:
    """The adapter of a model in PEFT's format, and the factors it began with, in a folder."""
    save_adapter(extract(model, source=source), folder)
    initial = {
        f"{name}.{part}": tensor.clone()
        for name, site in sites(model).items()
        for part, tensor in (("lora_A0", site.factors.lora_A0), ("lora_B0", site.factors.lora_B0))
        if part == "lora_A0" or bool(tensor.any())
    }
    save_file(initial, folder / "initial.safetensors")


def bfloat16_pays() -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32 ones, by trying.

    CPUs without the instructions emulate them, many times slower. The fastest of many short products on one
    thread tells, whatever else the machine is doing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
        for _ in range(60):
            for dtype in seconds:
                a, b = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
                started = time.perf_counter()
                a @ b
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def environment() -> dict[str, Any]:
    """What a run's numbers may depend on beside its settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lora-analysis": version("lora-analysis"),
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def summary(record: dict[str, Any]) -> str:
    """What a run came to, in a few words."""
    accuracy = "" if record["accuracy"] is None else f", accuracy {record['accuracy']:.1%}"
    others = "".join(f", {name} {value:.4g}" for name, value in record["metrics"].items())
    return f"held-out loss {record['held_out_loss']:.4f}{accuracy}{others}"


def prepared(run: Run, recipe: Recipe, setting: Setting, model: nn.Module) -> nn.Module:
    """The model with what trains in this run, and nothing else, taking gradients."""
    if run.method == "lora":
        inject(
            model,
            r=run.r,
            alpha=recipe.alpha,
            seed=run.init_seed,
            rslora=(run.scaling or recipe.scaling) == "rslora",
            **placement(model, run.targets),
        )
    elif run.method == "full":
        model.requires_grad_(True)
    elif run.method == "bitfit":
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        if not biases:
            raise LoraAnalysisError(f"{run.name}: expected a model with biases, got none. Leave bitfit out.")
        for p in biases:
            p.requires_grad_(True)
    elif run.method == "head":
        return setting.trainable_head(model, run.task)
    return model


def trained(run: Run, recipe: Recipe, setting: Setting, model: nn.Module) -> list[float]:
    """Losses of training a prepared model for the steps of the recipe."""
    batches = setting.batches(run.task, batch_size=recipe.batch_size, seed=run.data_seed, size=run.size)
    return train(
        model,
        batches,
        lambda model, batch: setting.loss(run.task, model, batch),
        lr=recipe.rate(run),
        steps=recipe.steps,
        schedule="linear",
        warmup=recipe.steps // 10,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        autocast=torch.bfloat16 if recipe.bfloat16 else None,
    )


def _spectra(tuned: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Singular values of what full fine-tuning changed, of every matrix."""
    before = base.state_dict()
    return {
        name.removesuffix(".weight"): torch.linalg.svdvals(tensor.detach().double() - before[name].double())
        for name, tensor in tuned.state_dict().items()
        if name.endswith(".weight") and tensor.dim() == 2 and min(tensor.shape) > 1 and max(tensor.shape) < 8192
    }


def _keep(
    path: Path, content: Mapping[str, Any], otherwise: str, *, read: Callable[[Mapping[str, Any]], Any] = dict
) -> None:
    """Write a file of the study, or see that the one there says the same."""
    if not path.exists():
        write_json(path, content)
    elif read(read_json(path)) != read(json.loads(json.dumps(content))):
        raise LoraAnalysisError(
            f"{path}: expected what this study was begun with, got {otherwise}. Use another directory."
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file to a temporary name and move it into place."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content) + "\n", encoding="utf-8")
    scratch.replace(path)


def _digest(path: Path) -> str:
    """The sha256 of a file, or of all weight files of a directory."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise LoraAnalysisError(f"{path}: expected weights, .safetensors or .bin, got none.")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
