"""Memory that training takes: predicted from counts, counted on a live optimizer, and the peak of one step.

Conventions
-----------
Bytes are the tensors' own sizes, not what the process occupies: that adds libraries, blocks an allocator keeps for
reuse, and on a GPU the context. What training *holds* is weights, gradients and optimizer states. **Activations and
the buffers of operations are not included**: they depend on the batch, and only ``peak_memory`` measures them.

Values
------
``training_memory``, ``measured_memory``, ``TrainingMemory``, ``peak_memory``; ``Precision``, and some: ``FP32``,
``FP16``, ``FP16_STREAMED``, ``MIXED``, ``FROZEN_16``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.2. Moments: Kingma and Ba 2014, arXiv:1412.6980, algorithm 1. Mixed
precision: Micikevicius et al. 2017, arXiv:1710.03740, section 3.1.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_analysis.training.accounting import ParameterCount

Optimizer = Literal["adam", "adamw", "sgd", "sgd-momentum"]
"""Optimizers of torch: Adam's keep two moments of every trained number, SGD one with momentum and none without."""

_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0, "sgd-momentum": 1}

_STEP_BYTES = 4
"""torch's Adam counts the steps of every tensor in a float32 scalar."""

_CPU = 0
"""The device type that torch's profiler writes for memory of the CPU."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype in which training holds each thing.

    Parameters
    ----------
    frozen, trained : torch.dtype
        Of weights that do not train, and of those that do, as the forward pass reads them.
    gradients : torch.dtype or None
        None: each is used and freed as soon as it is there, and they are never held together.
    moments : torch.dtype
        Of the optimizer's states.
    master : torch.dtype, optional
        Of a second copy of the trained weights, which the optimizer updates.
    """

    frozen: torch.dtype
    trained: torch.dtype
    gradients: torch.dtype | None
    moments: torch.dtype
    master: torch.dtype | None = None


FP32 = Precision(torch.float32, torch.float32, torch.float32, torch.float32)
"""Everything in float32; torch's ``autocast`` too, but for its passing copies."""
FP16 = Precision(torch.float16, torch.float16, torch.float16, torch.float16)
"""Everything in 16 bits, the moments too."""
FP16_STREAMED = Precision(torch.float16, torch.float16, None, torch.float16)
"""As ``FP16``, with gradients never held together."""
MIXED = Precision(torch.float16, torch.float16, torch.float16, torch.float32, torch.float32)
"""Mixed precision: weights and gradients in 16 bits, master weights and moments in float32."""
FROZEN_16 = Precision(torch.float16, torch.float32, torch.float32, torch.float32)
"""A base in 16 bits beside factors in float32, as ``inject`` leaves such a base."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that training holds between two steps, without activations.

    Parameters
    ----------
    weights : int
        Of the model, frozen and trained.
    master : int
        Of the optimizer's own copy of the trained weights, if it has one.
    gradients, optimizer : int
    """

    weights: int
    master: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.master + self.gradients + self.optimizer


def training_memory(
    count: ParameterCount, *, optimizer: Optimizer = "adamw", precision: Precision = FP32
) -> TrainingMemory:
    """Bytes that training a model holds, from its counts: only what trains has gradients and optimizer states.

    Adam adds ``4`` bytes for each trained tensor, its step counter.

    Parameters
    ----------
    count : ParameterCount
        ``parameter_count(model)``, or ``lora_count(...).adapted`` for LoRA on a model that is not adapted.
    optimizer : {"adam", "adamw", "sgd", "sgd-momentum"}
        torch's, without AMSGrad.
    precision : Precision

    Returns
    -------
    TrainingMemory
        In bytes.

    Raises
    ------
    ValueError
        If the optimizer is not one of these.

    Examples
    --------
    >>> from lora_analysis.training.accounting import lora_count, parameter_count
    >>> model = nn.Linear(1000, 1000, bias=False, device="meta")
    >>> training_memory(parameter_count(model), precision=MIXED)
    TrainingMemory(weights=2000000, master=4000000, gradients=2000000, optimizer=8000004)
    >>> training_memory(lora_count(nn.Sequential(model), ["0"], r=1).adapted, precision=MIXED)
    TrainingMemory(weights=2004000, master=8000, gradients=4000, optimizer=16008)
    """
    if optimizer not in get_args(Optimizer):
        raise ValueError(f"optimizer: expected one of {get_args(Optimizer)}, got {optimizer!r}.")
    steps = _STEP_BYTES * count.trainable_tensors if optimizer.startswith("adam") else 0
    return TrainingMemory(
        weights=count.frozen * precision.frozen.itemsize + count.trainable * precision.trained.itemsize,
        master=count.trainable * _itemsize(precision.master),
        gradients=count.trainable * _itemsize(precision.gradients),
        optimizer=count.trainable * _MOMENTS[optimizer] * precision.moments.itemsize + steps,
    )


def measured_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingMemory:
    """Bytes that a model and its optimizer hold now, counted from the tensors themselves.

    Gradients are there from ``backward`` to ``zero_grad``, optimizer states from the first ``step`` on.

    Parameters
    ----------
    model : Module
    optimizer : torch.optim.Optimizer
        Parameters it has that the model has not count as ``master``: mixed precision keeps such copies.

    Returns
    -------
    TrainingMemory
        In bytes, each tensor once.

    Examples
    --------
    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.ones(3)).backward()
    >>> optimizer.step()
    >>> measured_memory(model, optimizer)  # 3 weights and 1 bias; two moments of each and two counters
    TrainingMemory(weights=16, master=0, gradients=16, optimizer=40)
    """
    own = {id(parameter): parameter for parameter in model.parameters()}
    master = {id(p): p for group in optimizer.param_groups for p in group["params"] if id(p) not in own}
    held = [*own.values(), *master.values()]
    return TrainingMemory(
        weights=_total_bytes(own.values()),
        master=_total_bytes(master.values()),
        gradients=_total_bytes(p.grad for p in held if p.grad is not None),
        optimizer=_total_bytes(_tensors(optimizer.state)),
    )


def peak_memory(step: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """Most bytes that a call holds at once beyond what was there before it: activations included.

    On a GPU this is ``max_memory_allocated`` less ``memory_allocated`` at the start; the peak that torch keeps is
    reset. On the CPU, which keeps no such figure, torch's profiler records every allocation of torch's allocator and
    every release of one made during the call, and the peak of their sum is returned: exact to the byte, buffers of
    operations included, but what a call releases of **earlier** memory does not lower it: release gradients before.
    Libraries that allocate by themselves, and threads that the call starts, are not seen.

    The weights are part of it only if the call makes them. The first step of Adam makes its states; a later one finds
    them there.

    Parameters
    ----------
    step : callable
        Run once, for instance one step of training. It must not use torch's profiler.
    device : str or torch.device
        Of the CPU or CUDA: whose memory.

    Returns
    -------
    int
        Bytes, at least 0.

    Raises
    ------
    ValueError
        If the device is of another kind.

    Notes
    -----
    Some versions of torch (2.13) log two lines of the profiler's on stderr; the environment variable
    ``KINETO_LOG_LEVEL=5`` silences them. Recording costs some microseconds an operation.

    Examples
    --------
    >>> peak_memory(lambda: torch.empty(1000) + torch.empty(1000))  # two terms and the sum, 4 bytes a number
    12000
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak(step, device)
    if device.type != "cpu":
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {str(device)!r}, whose peak torch does not tell.")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())["traceEvents"]
    events = [event for event in trace if event["name"] == "[memory]" and event["args"]["Device Type"] == _CPU]
    # Two events may fall on the same nanosecond: the profiler's own index orders them.
    events.sort(key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    live: dict[int, int] = {}
    now = peak = 0
    for event in events:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
        else:
            # torch remembers sizes from earlier recordings: a release counts only if its allocation did.
            now -= live.pop(address, 0)
    return peak


def _cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _itemsize(dtype: torch.dtype | None) -> int:
    return 0 if dtype is None else dtype.itemsize


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return _bytes(tensor._indices()) + _bytes(tensor._values())
    return tensor.numel() * tensor.element_size()


def _tensors(state: object) -> list[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        # Keys of an optimizer's state are its parameters, which it does not own.
        return [tensor for value in state.values() for tensor in _tensors(value)]
    if isinstance(state, list | tuple):
        return [tensor for value in state for tensor in _tensors(value)]
    return []
