"""A plain training loop: AdamW over whatever parameters of a model are trainable.

Conventions
-----------
Steps are updates and count from 1; the loss of a step is taken before its update, and is the mean over the batches
that are accumulated for it and over the processes that train together. Nothing here draws random numbers, so the same
model, batches and (for dropout) random state give the same losses, also if the run is interrupted and taken up again.

Values
------
``train``, ``learning_rate_factor``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_analysis.training.distributed import mean_over_processes, rank, require_equal, world_size
from lora_analysis.training.frozen_prefix import frozen_prefix
from lora_analysis.training.layers import sites
from lora_analysis.training.optimizer import parameter_groups
from lora_analysis.training.recompute import recomputed
from lora_analysis.training.records import TrainingLog, progress_bar, tokens_in
from lora_analysis.training.resume import RunState, load_state, save_state, set_random_state

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
    lr_ratio: float = 1.0,
    steps: int | None = None,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    schedule: Schedule = "constant",
    warmup: int = 0,
    autocast: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    recompute: bool = False,
    cache_frozen: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    log: str | Path | None = None,
    progress: bool = False,
    tokens: Callable[[Batch], int] = tokens_in,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Losses of training a model, in place.

    The model is in train mode meanwhile, but for frozen batch normalisation: its running statistics are
    part of the base and would drift. Every module's mode is restored at the end, also after an error.

    In a group of processes (``process_group``) each trains on its own batches, gradients are averaged by
    ``torch.nn.parallel.DistributedDataParallel``, and ``loss`` is given the model wrapped in it.

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
    lr_ratio : float
        The learning rate of B is so many times ``lr`` (LoRA+).
    steps : int, optional
        Stop after so many updates; when all batches are used by default.
    accumulate : int
        Batches whose mean gradient makes one update.
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
    recompute : bool
        Gradient checkpointing: less memory for more computing.
    cache_frozen : bool
        Compute blocks below the first adapted one once for each row of the data; see ``frozen_prefix``.
    checkpoint : path, optional
        A file to write the state of the run to. If it is there, the run is taken up from it: the batches it has used
        are skipped, so they must come in the same order again (a ``DataLoader`` that shuffles: after the same
        ``torch.manual_seed``, or with a ``generator``). One of a finished run trains nothing.
    checkpoint_every : int, optional
        Steps between two writings; only at the end by default.
    log : path, optional
        A file of JSON lines, one a step: step, loss, lr, grad_norm, tokens and seconds so far.
    progress : bool
        Show a bar with loss, tokens/s and time left, on stderr.
    tokens : callable
        Counts the tokens of a batch, for speed.
    on_step : callable, optional
        ``on_step(step, loss)`` after each update.

    Returns
    -------
    list of float
        The loss at each step, before its update; those of a run that is taken up included.

    Raises
    ------
    ValueError
        If an argument is out of range, the model is merged or has nothing to train, the loss is not a
        scalar that depends on what is trained, the batches run out before ``steps`` or within an update, the
        checkpoint is of another run, or, with several processes, the loss leaves out a parameter that trains.
    AdapterFormatError
        If the checkpoint cannot be read.
    FloatingPointError
        If the loss or a gradient is NaN or infinite; the parameters are those before that step.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> losses = train(model, [torch.ones(1, 1)] * 3, lambda model, x: model(x).square().sum(), lr=0.01)
    >>> losses[0] > losses[2]
    True
    """
    lr, lr_ratio, weight_decay = float(lr), float(lr_ratio), float(weight_decay)  # numpy's are not read back
    max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
    total = _step_count(batches, steps, accumulate)
    _require_settings(schedule, total, warmup, autocast, checkpoint_every)
    for name, site in sites(model).items():
        if site.merged:
            raise ValueError(f"{name!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, lr_ratio=lr_ratio), weight_decay=weight_decay)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    require_equal("steps", total)
    settings = {
        "lr": lr,
        "lr_ratio": lr_ratio,
        "steps": None if schedule == "constant" else total,  # such a run can be prolonged
        "accumulate": accumulate,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "autocast": str(autocast),
        "max_grad_norm": max_grad_norm,
    }
    path = None if checkpoint is None else Path(checkpoint)
    resumed = None if path is None else load_state(path, model, optimizer, settings)
    state = resumed or RunState(0, [], 0)
    require_equal("checkpoint: steps made", state.step)
    if progress and rank() == 0 and total is not None and state.step >= total:
        print(f"{path}: all {total} steps were made before, nothing is trained.", file=sys.stderr)
    losses, seen = list(state.losses), state.tokens
    device = trained[0].device.type
    with ExitStack() as stack:
        stack.enter_context(_train_mode(model))
        stack.callback(optimizer.zero_grad)
        optimizer.zero_grad()
        if recompute:
            stack.enter_context(recomputed(model))
        if cache_frozen:
            stack.enter_context(frozen_prefix(model))
        advance = stack.enter_context(progress_bar(total, state.step)) if progress and rank() == 0 else None
        written = None
        if log is not None and rank() == 0:
            written = TrainingLog(Path(log), state.step)
            stack.callback(written.close)
        wrapped = model if world_size() == 1 else DistributedDataParallel(model)
        stream = iter(batches)
        skipped = sum(1 for _ in islice(stream, state.step * accumulate))
        if resumed is not None:
            set_random_state(resumed)
        if total is not None:
            stream = islice(stream, max(0, total * accumulate - skipped))
        for step, group in enumerate(_in_every_process(_groups(stream, accumulate)), start=state.step + 1):
            for part in optimizer.param_groups:
                part["lr"] = part.setdefault("peak_lr", part["lr"]) * learning_rate_factor(
                    schedule, step - 1, warmup=warmup, total=total
                )
            values = []
            for number, batch in enumerate(group, start=1):
                last = number == accumulate
                waits = nullcontext() if last or world_size() == 1 else cast(Any, wrapped).no_sync()
                with waits:
                    with nullcontext() if autocast is None else torch.autocast(device, dtype=autocast):
                        value = loss(cast(ModelT, wrapped), batch)
                    values.append(_checked(value, step))
                    (value / accumulate if accumulate > 1 else value).backward()  # type: ignore[no-untyped-call]
                seen += int(tokens(batch))
            if world_size() > 1:
                _require_gradients(model)
            mean = mean_over_processes(torch.stack(values).double().mean()).item()
            _require_finite("loss", mean, step)
            norm = _clipped_norm(trained, max_grad_norm)
            _require_finite("norm of the gradients", norm, step)
            losses.append(mean)
            optimizer.step()
            optimizer.zero_grad()
            if written is not None:
                rate = optimizer.param_groups[0]["lr"]
                written.write(step=step, loss=mean, lr=rate, grad_norm=norm, tokens=seen)
            if advance is not None:
                advance(step, mean, seen - state.tokens)
            if on_step is not None:
                on_step(step, mean)
            if path is not None and (step == total or (checkpoint_every and step % checkpoint_every == 0)):
                save_state(path, RunState(step, losses, seen), model, optimizer, settings)
    if len(losses) < (steps or 1):
        raise ValueError(_too_few(steps, len(losses), accumulate))
    if path is not None and total is None:
        save_state(path, RunState(len(losses), losses, seen), model, optimizer, settings)
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


def _require_settings(
    schedule: str, total: int | None, warmup: int, autocast: torch.dtype | None, checkpoint_every: int | None
) -> None:
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: expected one of {get_args(Schedule)}, got {schedule!r}.")
    if schedule != "constant" and total is None:
        raise ValueError(f"schedule: {schedule!r} needs the number of steps, got none. Pass steps=.")
    if warmup < 0:
        raise ValueError(f"warmup: expected a number of steps, got {warmup}.")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected at least 1 step, got {checkpoint_every}.")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast: expected None or torch.bfloat16, got {autocast}. float16 needs loss scaling, "
            "which this loop does not do."
        )


def _step_count(batches: Iterable[object], steps: int | None, accumulate: int) -> int | None:
    try:
        available = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset
        available = None
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 batch, got {accumulate}.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    if available is not None and available < (steps or 1) * accumulate:
        raise ValueError(_too_few(steps, available, accumulate))
    if available is not None and steps is None and available % accumulate:
        raise ValueError(f"batches: expected a multiple of accumulate={accumulate}, got {available}. Pass steps=.")
    return available // accumulate if available is not None and steps is None else steps


def _groups(stream: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(stream)
    while group := list(islice(iterator, size)):
        if len(group) < size:
            raise ValueError(
                f"batches: expected accumulate={size} of them for every step, got {len(group)} at the end."
            )
        yield group


def _in_every_process(groups: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
    """The same; refused in every process where one has more of them than another, which would wait for ever."""
    for group in groups:
        require_equal("batches: whether there are more", True)
        yield group
    require_equal("batches: whether there are more", False)


def _too_few(steps: int | None, got: int, accumulate: int) -> str:
    each = f" times accumulate={accumulate}" if accumulate > 1 else ""
    wanted = f"at least one{each}" if steps is None else f"steps={steps}{each} of them"
    return f"batches: expected {wanted}, got {got}. Pass more, or itertools.cycle(batches) to go round."


def _checked(loss: Tensor, step: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"step {step}: expected loss(model, batch) to give a scalar Tensor, got {got}.")
    if not loss.requires_grad:
        raise ValueError(
            f"step {step}: expected a loss that depends on trainable parameters, got a constant. "
            "Check that loss runs the model, and not under no_grad."
        )
    return loss.detach()


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: expected a finite {what}, got {value}. Lower lr=, or pass max_grad_norm=."
        )


def _require_gradients(model: nn.Module) -> None:
    """Refuse what DistributedDataParallel would wait for, having averaged nothing of the same bucket."""
    if unused := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
        raise ValueError(
            f"{unused[0]!r}: expected a loss that depends on every parameter that trains, which several processes "
            f"need, got one without {len(unused)} of them. Adapt other modules, or freeze these."
        )


def _clipped_norm(parameters: list[nn.Parameter], limit: float | None) -> float:
    """Norm of all gradients together, before they are clipped to the limit, if there is one."""
    if limit is not None:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


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
