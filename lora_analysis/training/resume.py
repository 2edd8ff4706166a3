"""A training run that was interrupted, taken up where its last checkpoint was written.

Conventions
-----------
A checkpoint is one file, written to a temporary name and moved into place: the parameters that train, the factors they
began with, the optimizer's state, the random states of every process, the losses so far. It is read without
unpickling code. Batches are not in it: the iterable is begun anew and what was used of it is skipped, so it must give
the same batches again.

Values
------
``RunState``, ``save_state``, ``load_state``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.errors import AdapterFormatError
from lora_analysis.training.distributed import gathered, rank


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
    """

    step: int
    losses: list[float]
    tokens: int


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
        "initial": _initial(model),
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
    """Put a checkpoint into the model, the optimizer and the random state; None where there is none.

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
    if not isinstance(content, dict) or "settings" not in content:
        raise AdapterFormatError(f"{path}: expected a checkpoint of a training run, got something else.")
    for key, value in settings.items():
        if content["settings"].get(key) != value:
            raise ValueError(
                f"{path}: expected a run with {key}={value!r}, got one with {content['settings'].get(key)!r}. "
                "Train with the same settings, or remove the checkpoint."
            )
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in own.items()}
    if {name: tensor.shape for name, tensor in content["parameters"].items()} != shapes:
        raise ValueError(f"{path}: expected the parameters that train here, got those of another model or adapter.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(content["parameters"][name])
        buffers = dict(model.named_buffers())
        for name, tensor in content["initial"].items():
            buffers[name].copy_(tensor)
    optimizer.load_state_dict(content["optimizer"])
    if len(content["random"]) > rank():
        _set_random_state(content["random"][rank()])
    return RunState(content["step"], list(content["losses"]), content["tokens"])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _initial(model: nn.Module) -> dict[str, Tensor]:
    """The factors as they began, which no state dict holds."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("lora_A0", "lora_B0")}


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
