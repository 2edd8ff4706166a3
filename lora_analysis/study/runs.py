"""One training run of a study: an adapter on MiniLM for a text task, saved with all it takes to recompute it.

Conventions
-----------
A run leaves one directory: the adapter in PEFT's format, ``initial.safetensors`` with the A it started from
(B starts at zero), and ``run.json`` with settings, losses, accuracy, versions and the digest of the texts.
The directory appears whole or not at all.

The scale is rsLoRA's, alpha / sqrt(r), so that one learning rate serves every rank. The classifier is fixed
(``minilm.class_means`` of the frozen model on the training texts), so all learning is in the adapter.

References
----------
Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.formats import save_adapter
from lora_analysis.study.minilm import SentenceModel, cosine_logits, embed, embeddings, load_minilm, tokenize
from lora_analysis.study.task import TextTask
from lora_analysis.training import extract, inject, train
from lora_analysis.training.layers import lora_layers


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs of a study share.

    Parameters
    ----------
    steps, batch_size : int
    lr : float
        Peak learning rate of AdamW, falling to zero on a line after a tenth of the steps.
    alpha : float
        The scale is alpha / sqrt(r).
    temperature : float
        Of the cosine classifier.
    bfloat16 : bool
        Train and evaluate under bfloat16 autocast.
    """

    steps: int = 160
    batch_size: int = 32
    lr: float = 5e-3
    alpha: float = 6.0
    temperature: float = 0.05
    bfloat16: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One adapter to train.

    Parameters
    ----------
    targets : tuple of str
        Last names of the adapted modules, ``("query", "value")``.
    r : int
    seed : int
        Of the initial A and of the order of the data: two seeds differ in both.
    """

    targets: tuple[str, ...]
    r: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{'-'.join(self.targets)}-r{self.r}-seed{self.seed}"


def execute(run: Run, settings: Settings, task: TextTask, means: Tensor, parent: Path) -> dict[str, Any]:
    """Train, evaluate and save one run.

    Parameters
    ----------
    run : Run
    settings : Settings
    task : TextTask
    means : Tensor, shape (classes, d)
        The fixed classifier.
    parent : Path
        The run's directory is made in it.

    Returns
    -------
    dict
        The content of ``run.json``.
    """
    started = time.perf_counter()
    dtype = torch.bfloat16 if settings.bfloat16 else None
    loaded = load_minilm()
    model = loaded.model
    inject(model, list(run.targets), r=run.r, alpha=settings.alpha, seed=run.seed, rslora=True)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        input_ids, mask, labels = batch
        logits = cosine_logits(embed(model, input_ids, mask), means, temperature=settings.temperature)
        return nn.functional.cross_entropy(logits, labels)

    losses = train(
        model,
        _batches(loaded, task, settings, run.seed),
        loss,
        lr=settings.lr,
        steps=settings.steps,
        schedule="linear",
        warmup=settings.steps // 10,
        autocast=dtype,
    )
    trained = time.perf_counter()
    correct = correct_predictions(loaded, task, means, autocast=dtype)
    record = {
        "name": run.name,
        **asdict(run),
        **asdict(settings),
        "losses": losses,
        "accuracy": float(correct.double().mean()),
        "correct": correct.int().tolist(),
        "seconds_training": trained - started,
        "seconds_evaluation": time.perf_counter() - trained,
        "task_sha256": task.digest,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    scratch = parent / f".{run.name}.{os.getpid()}"
    save_adapter(extract(model, source=run.name), scratch)
    save_file(
        {f"{name}.lora_A0": layer.factors.lora_A0 for name, layer in lora_layers(model).items()},
        scratch / "initial.safetensors",
    )
    (scratch / "run.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    final = parent / run.name
    if final.exists():
        shutil.rmtree(final)
    scratch.replace(final)
    return record


def correct_predictions(
    model: SentenceModel, task: TextTask, means: Tensor, *, autocast: torch.dtype | None = None
) -> Tensor:
    """Whether each held-out text is classified rightly, bool, shape (n,)."""
    found = embeddings(model, task.held_out_texts, autocast=autocast)
    predicted = (found @ means.mT).argmax(1)
    return predicted == torch.tensor(task.held_out_labels)


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


def execute_all(
    runs: list[Run], settings: Settings, task: TextTask, means: Tensor, parent: Path, *, processes: int
) -> Iterator[dict[str, Any]]:
    """Execute runs in a pool of processes with one thread each, yielding records as they finish."""
    parent.mkdir(parents=True, exist_ok=True)
    # Not forked: a fork of a process whose BLAS has started threads may hang.
    pool: Executor = ProcessPoolExecutor(
        min(processes, len(runs)), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        futures = [pool.submit(execute, run, settings, task, means, parent) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _batches(
    loaded: SentenceModel, task: TextTask, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled passes over the training texts, without end, each seed its own order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(task.train_labels)
    while True:
        order = torch.randperm(len(task.train_texts), generator=generator)
        for index in torch.split(order, settings.batch_size):
            if len(index) == settings.batch_size or len(order) < settings.batch_size:
                input_ids, mask = tokenize(loaded.tokenizer, [task.train_texts[i] for i in index.tolist()])
                yield input_ids, mask, labels[index]
