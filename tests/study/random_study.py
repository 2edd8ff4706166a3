"""A study directory of random adapters, made in a moment, as ``execute_plan`` would leave it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.plan import Plan, Recipe, Run

LAYERS, D, D_V = 3, 24, 16
"""Values are narrower than the rest, so that sides that are mixed up show."""
NAMES = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
SHAPES = {"q": (D, D), "k": (D, D), "v": (D_V, D), "o": (D, D_V)}
RECIPE = Recipe(steps=2, batch_size=1, lr={"lora": 1.0, "full": 1.0}, alpha=4.0)
PLAN = Plan(
    setting={"kind": "classification"},
    task="near",
    recipe=RECIPE,
    ranks=(1, 2, 8),
    seeds=(0, 1, 2),
    budget=((("k",), 2), (("v",), 2), (("q", "v"), 1)),
    controls=("full", "bitfit", "head"),
    other_tasks=("far",),
    sizes=(5,),
)


def module(letter: str, layer: int) -> str:
    return f"encoder.layer.{layer}.attention.{NAMES[letter]}"


def update(run: Run, letter: str, layer: int) -> la.LowRankUpdate:
    generator = torch.Generator().manual_seed(hash((run.r, run.init_seed, run.data_seed, "qkvo".index(letter), layer)))
    d_out, d_in = SHAPES[letter]
    up, down = (torch.randn(shape, generator=generator) for shape in ((d_out, run.r), (run.r, d_in)))
    return la.LowRankUpdate(up, down, scale=4.0 / math.sqrt(run.r))


def outcome(run: Run) -> tuple[float, float]:
    """A loss and an accuracy that differ from run to run."""
    number = sum(ord(letter) * place for place, letter in enumerate(run.name, start=1))
    return 1 + number % 997 / 997, number % 89 / 89


def write_study(folder: Path, plan: Plan = PLAN) -> Path:
    """A study directory as ``execute_plan`` leaves it, with random adapters."""
    weights = {f"{module(p, n)}.weight": torch.randn(SHAPES[p]) for n in range(LAYERS) for p in NAMES}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "base.safetensors")
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "base.json").write_text(json.dumps({"path": str(folder / "base.safetensors")}))
    tasks = {name: {"groups": ["a", "b"]} for name in (plan.task, *plan.other_tasks)}
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    for run in plan.runs():
        place = folder / "runs" / run.name
        place.mkdir(parents=True)
        loss, accuracy = outcome(run)
        parameters = 1000
        if run.method == "lora":
            updates = {module(p, n): update(run, p, n) for n in range(LAYERS) for p in run.targets}
            la.save_adapter(la.Adapter(updates, source=run.name), place)
            parameters = sum(run.r * sum(item.shape) for item in updates.values())
        record = {
            "name": run.name,
            "trainable_parameters": 0 if run.method == "frozen" else parameters,
            "losses": [2.0, 1.0],
            "held_out_loss": loss,
            "accuracy": accuracy,
            "metrics": {"bleu": 100 * accuracy},
            "seconds_training": 1.0,
        }
        (place / "run.json").write_text(json.dumps(record))
    return folder


def without(study: Study, folder: Path, *names: str) -> Study:
    """The study with some runs not yet finished."""
    shutil.copytree(study.directory, folder)
    for name in names:
        shutil.rmtree(folder / "runs" / name)
    (folder / "base.json").write_text(json.dumps({"path": str(folder / "base.safetensors")}))
    return open_study(folder)
