"""A training run that was interrupted, taken up where its last checkpoint was written.

Conventions
-----------
A checkpoint is one file, written to a temporary name and moved into place: the parameters that train, the factors they
began with, buffers of modules that train (running statistics), the optimizer's state, torch's random states of every
process, the losses so far. It is read without unpickling code. Batches are not in it: the iterable is begun anew and
what was used of it is skipped, so it must give the same batches again. Random states are set after that, since a
``DataLoader`` draws from them.

Values
------
``RunState``, ``save_state``, ``load_state``, ``set_random_state``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.errors import AdapterFormatError
from lora_analysis.training.distributed import gathered, rank

_CONTENT = {"step", "losses", "tokens", "settings", "parameters", "buffers", "optimizer", "random"}


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run has come.

    Parameters
    ----------
    step : int
        Updates made.
    losses : list of float
    tokens : int
        Tokens (or rows) seen.
    random : list of mappings
        Random states by rank, of a run that is taken up.
    """

    step: int
    losses: list[float]
    tokens: int
    random: list[Mapping[str, Any]] = field(default_factory=list)


def save_state(
    path: Path, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> None:
    """Write a checkpoint; in a group of processes the first one does.

    Parameters
    ----------
    path : Path
    state : RunState
    model : Module
    optimizer : Optimizer
    settings : mapping
        What must be the same when the run is taken up again: numbers and strings.
    """
    random = gathered(_random_state())
    if rank() != 0:
        return
    content = {
        "step": state.step,
        "losses": state.losses,
        "tokens": state.tokens,
        "settings": dict(settings),
        "parameters": _trained(model),
        "buffers": _buffers(model),
        "optimizer": optimizer.state_dict(),
        "random": random,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> RunState | None:
    """Put a checkpoint into the model and the optimizer; None where there is none.

    Raises
    ------
    AdapterFormatError
        If the file is no checkpoint of a run.
    ValueError
        If it is one of another model or with other settings. Nothing is changed.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise AdapterFormatError(f"{path}: expected a checkpoint of a training run, got {error}.") from error
    if not isinstance(content, dict) or not content.keys() >= _CONTENT:
        raise AdapterFormatError(f"{path}: expected a checkpoint of a training run, got something else.")
    for key, value in settings.items():
        if content["settings"].get(key) != value:
            raise ValueError(
                f"{path}: expected a run with {key}={value!r}, got one with {content['settings'].get(key)!r}. "
                "Train with the same settings, or remove the checkpoint."
            )
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    # With their order, by which the optimizer's state is told apart.
    shapes = [(name, p.shape) for name, p in own.items()]
    kept = content["buffers"]
    if [(name, tensor.shape) for name, tensor in content["parameters"].items()] != shapes or any(
        name not in buffers or buffers[name].shape != tensor.shape for name, tensor in kept.items()
    ):
        raise ValueError(f"{path}: expected the parameters that train here, got those of another model or adapter.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(content["parameters"][name])
        for name, tensor in kept.items():
            buffers[name].copy_(tensor)
    optimizer.load_state_dict(content["optimizer"])
    return RunState(content["step"], list(content["losses"]), content["tokens"], content["random"])


def set_random_state(state: RunState) -> None:
    """Put the random state of this process back; of a process or device that was not there before nothing is known."""
    if len(state.random) <= rank():
        return
    own = state.random[rank()]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        for device, random in enumerate(own["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(random, device)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The factors that the trained ones began with, which no state dict holds, and what modules that train count."""
    names = {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for buffer, _ in module.named_buffers(recurse=False)
    }
    return {name: b for name, b in model.named_buffers() if name in names}


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state
