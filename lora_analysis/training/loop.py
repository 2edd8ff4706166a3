"""A plain training loop: AdamW over whatever parameters of a model are trainable.

Conventions
-----------
Steps count from 1; the loss of a step is taken before its update. Nothing here draws random numbers,
so the same model, batches and (for dropout) random state give the same losses.

Values
------
``train``, ``learning_rate_factor``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Literal, TypeVar, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lora_analysis.training.layers import lora_layers

Schedule = Literal["constant", "linear", "cosine"]
"""How the learning rate goes on after warmup: kept, to zero on a line, to zero on half a cosine."""

Batch = TypeVar("Batch")
ModelT = TypeVar("ModelT", bound=nn.Module)


def train(
    model: ModelT,
    batches: Iterable[Batch],
    loss: Callable[[ModelT, Batch], Tensor],
    *,
    lr: float = 1e-3,
    steps: int | None = None,
    weight_decay: float = 0.0,
    schedule: Schedule = "constant",
    warmup: int = 0,
    autocast: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Losses of training a model, one step per batch, in place.

    The model is in train mode meanwhile, but for frozen batch normalisation: its running statistics are
    part of the base and would drift. Every module's mode is restored at the end, also after an error.

    Parameters
    ----------
    model : Module
        Its trainable parameters are trained: the factors only, after ``inject`` or ``attach``.
    batches : iterable
        Of anything ``loss`` understands, on the model's device.
    loss : callable
        ``loss(model, batch)``, a scalar Tensor.
    lr : float
        Peak learning rate of AdamW.
    steps : int, optional
        Stop after so many batches; all of them by default.
    weight_decay : float
        Of AdamW; decays both factors towards zero.
    schedule : {"constant", "linear", "cosine"}
        After warmup. The last two need ``steps`` or ``len(batches)``.
    warmup : int
        Steps over which the learning rate rises on a line from zero.
    autocast : torch.dtype, optional
        ``torch.bfloat16`` runs ``loss`` under ``torch.autocast``; the factors stay as they are.
    max_grad_norm : float, optional
        Clip the norm of all gradients together.
    progress : bool
        Show a bar with loss, speed and time left, on stderr.
    on_step : callable, optional
        ``on_step(step, loss)`` after each update.

    Returns
    -------
    list of float
        The loss at each step, before its update.

    Raises
    ------
    ValueError
        If an argument is out of range, the model is merged or has nothing to train, the loss is not a
        scalar that depends on what is trained, or the batches run out before ``steps``.
    FloatingPointError
        If the loss is NaN or infinite; the parameters are those before that step.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> losses = train(model, [torch.ones(1, 1)] * 3, lambda model, x: model(x).square().sum(), lr=0.01)
    >>> losses[0] > losses[2]
    True
    """
    total = _step_count(batches, steps)
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: expected one of {get_args(Schedule)}, got {schedule!r}.")
    if schedule != "constant" and total is None:
        raise ValueError(f"schedule: {schedule!r} needs the number of steps, got none. Pass steps=.")
    if warmup < 0:
        raise ValueError(f"warmup: expected a number of steps, got {warmup}.")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast: expected None or torch.bfloat16, got {autocast}. float16 needs loss scaling, "
            "which this loop does not do."
        )
    for name, layer in lora_layers(model).items():
        if layer.merged:
            raise ValueError(f"{name!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__}: expected trainable parameters, got none. Call inject or attach first."
        )
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(schedule, step, warmup=warmup, total=total)
    )
    device = parameters[0].device.type
    losses: list[float] = []
    with _train_mode(model), _progress_bar(total) if progress else nullcontext() as advance:
        for step, batch in enumerate(islice(batches, total), start=1):
            with nullcontext() if autocast is None else torch.autocast(device, dtype=autocast):
                value = loss(model, batch)
            losses.append(_checked(value, step))
            value.backward()  # type: ignore[no-untyped-call]
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if advance is not None:
                advance(step, losses[-1])
            if on_step is not None:
                on_step(step, losses[-1])
    if len(losses) < (steps or 1):
        raise ValueError(_too_few(steps, len(losses)))
    return losses


def learning_rate_factor(schedule: Schedule, step: int, *, warmup: int, total: int | None) -> float:
    """What the peak learning rate is multiplied by after ``step`` updates; in [0, 1].

    ``step / warmup`` during warmup; then with ``t = (step - warmup) / (total - warmup)``: 1 (constant),
    ``1 - t`` (linear) or ``(1 + cos(pi t)) / 2`` (cosine). transformers' schedules of the same names.

    Examples
    --------
    >>> [learning_rate_factor("linear", step, warmup=2, total=6) for step in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant" or total is None:
        return 1.0
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _step_count(batches: Iterable[object], steps: int | None) -> int | None:
    available = len(batches) if isinstance(batches, Sized) else None
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    if available is not None and available < (steps or 1):
        raise ValueError(_too_few(steps, available))
    return available if steps is None else steps


def _too_few(steps: int | None, got: int) -> str:
    wanted = "at least one" if steps is None else f"steps={steps} of them"
    return f"batches: expected {wanted}, got {got}. Pass more, or itertools.cycle(batches) to go round."


def _checked(loss: Tensor, step: int) -> float:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"step {step}: expected loss(model, batch) to give a scalar Tensor, got {got}.")
    if not loss.requires_grad:
        raise ValueError(
            f"step {step}: expected a loss that depends on trainable parameters, got a constant. "
            "Check that loss runs the model, and not under no_grad."
        )
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: expected a finite loss, got {value}. Lower lr=, or pass max_grad_norm=."
        )
    return value


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _progress_bar(total: int | None) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total, loss="-", speed="-")
        began = time.perf_counter()

        def advance(step: int, loss: float) -> None:
            speed = step / (time.perf_counter() - began)
            bar.update(task, completed=step, loss=f"{loss:.4g}", speed=f"{speed:.1f}")

        yield advance
