"""Training dynamics after the fact: the same rows from checkpoints that a run has saved.

Conventions
-----------
A checkpoint's step is the number in its name: ``checkpoint-500`` (transformers, peft), ``0000100_adapters.safetensors``
(MLX), ``epoch_3`` (torchtune), ``name-step00000200.safetensors``, ``name-000004.safetensors`` (kohya's steps and
epochs). One checkpoint is in memory at a time, and the directions of the last.

Values
------
``checkpoint_dynamics``, ``checkpoints_in``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import MutatedBaseError
from lora_analysis.formats import load_adapter
from lora_analysis.training.states import Directions, Gains, moves_of, similarity, state_of

Place = str | os.PathLike[str]

_STEP = re.compile(
    r"(?:checkpoint|ckpt|step|iter(?:ation)?|epoch)[-_=]?(?P<said>\d{1,18})(?!\d)"
    r"|\A(?P<mlx>\d{1,18})_adapters\Z"
    r"|-(?P<kohya>\d{6,18})\Z",
    re.IGNORECASE,
)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")


def checkpoint_dynamics(
    checkpoints: Place | Sequence[Place] | Mapping[int, Place | Adapter],
    *,
    base: BaseWeights | Place | None = None,
    initial: Adapter | Place | None = None,
    directions: int = 8,
    alpha: float | None = None,
    source: str | None = None,
) -> list[dict[str, Any]]:
    """What became of the updates of a run, a row for each module and checkpoint, as ``TrainingDynamics`` logs it.

    Parameters
    ----------
    checkpoints : path, sequence of paths, or mapping of int to path or Adapter
        A directory that holds checkpoints; or their paths, in the order of their steps; or steps with the checkpoint
        of each, where names do not say.
    base : BaseWeights or path, optional
        The base model, for ``gain``; with it DoRA is read as its true update.
    initial : Adapter or path, optional
        The adapter as it was before training. ``moved_A`` and ``moved_B`` are then counted from it, and from the first
        checkpoint otherwise: the column ``moved_from`` says which. Checkpoints of PiSSA and its like cannot be read
        without; where they were saved as a difference of two products, of twice the r, it tells the two apart, which
        else count as one.
    directions : int
        Most directions of each update that ``phi`` and ``gain`` look at; 1 asks after the top one.
    alpha : float, optional
        Of training, where the files do not hold it; see ``load_adapter``.
    source : str, optional
        What to call the run in the column ``adapter``; the directory by default.

    Returns
    -------
    list of dict
        By step, then in the order of modules, with the keys of ``states.COLUMNS``; ``loss`` is NaN.
        ``dynamics_table`` makes a frame of them.

    Raises
    ------
    ValueError
        If there is no checkpoint, the names do not say their steps, or these do not ascend.
    AdapterFormatError, BaseWeightsError
        If a checkpoint cannot be read, or the base does not fit.
    """
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}.")
    places, name = _places(checkpoints)
    weights = base if base is None or isinstance(base, BaseWeights) else load_base(base)
    start = None if initial is None else _beginning(initial, alpha)
    steps = list(places)
    gains = None if weights is None else Gains(weights)

    def adapter_at(step: int) -> Adapter:
        found = places[step]
        return found if isinstance(found, Adapter) else _loaded(found, weights, alpha, start)

    final = adapter_at(steps[-1])
    last = {
        module: state_of(final.modules[module], final[module], directions=directions).directions for module in final
    }
    first, since = (adapter_at(steps[0]), f"step {steps[0]}") if start is None else (start, "initial")
    before: dict[str, Directions] = {}
    rows: list[dict[str, Any]] = []
    for step in steps:
        adapter, now = adapter_at(step), {}
        for module, description in adapter.modules.items():
            update = adapter[module]
            state = state_of(description, update, directions=directions)
            now[module] = state.directions
            row = state.row | {"adapter": source or name, "step": step, "module": module}
            row |= moves_of(update, first.get(module), since)
            row |= _named("previous", similarity(state.directions, before.get(module)))
            row |= _named("final", similarity(state.directions, last.get(module)))
            row["gain"] = math.nan if gains is None else gains.of(adapter.modules, module, state.top)
            rows.append(row)
        before = now
    return rows


def checkpoints_in(directory: Place) -> dict[int, Path]:
    """The checkpoints in a directory by step, ascending: folders and files whose names say a step.

    Raises
    ------
    ValueError
        If there is none, or two of one step.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a directory of checkpoints, got none there.")
    found: dict[int, Path] = {}
    for entry in sorted(folder.iterdir()):
        step = _step(entry)
        if step is None or entry.name.startswith(".") or not (entry.is_dir() or entry.suffix in _FILES):
            continue
        if step in found:
            raise ValueError(
                f"{folder}: expected one checkpoint of step {step}, got {found[step].name} and {entry.name}. Pass "
                "{step: path, …} with those meant."
            )
        found[step] = entry
    if not found:
        raise ValueError(
            f"{folder}: expected checkpoints such as checkpoint-500 or 0000100_adapters.safetensors, found none. Pass "
            "{step: path, …} where names do not say the step."
        )
    return dict(sorted(found.items()))


def _places(
    given: Place | Sequence[Place] | Mapping[int, Place | Adapter],
) -> tuple[dict[int, Place | Adapter], str]:
    """Checkpoints by step, and what to call them all."""
    if isinstance(given, str | os.PathLike):
        return dict(checkpoints_in(given)), os.fspath(given)
    if isinstance(given, Mapping):
        places: dict[int, Place | Adapter] = dict(sorted(given.items()))
    else:
        places = {}
        for place in given:
            step = _step(Path(place))
            if step is None:
                raise ValueError(f"{place}: expected a name that says its step, got none. Pass {{step: path, …}}.")
            if places and step <= max(places):
                raise ValueError(f"{place}: expected steps that ascend, got {step} after {max(places)}.")
            places[step] = place
    if not places:
        raise ValueError("checkpoints: expected at least one, got none.")
    one = next(iter(places.values()))
    return places, one.source if isinstance(one, Adapter) else str(Path(one).parent)


def _step(path: Path) -> int | None:
    found = list(_STEP.finditer(path.name.removesuffix(path.suffix) if path.suffix in _FILES else path.name))
    return None if not found else int(next(digits for digits in found[-1].groups() if digits))


def _loaded(place: Place, base: BaseWeights | None, alpha: float | None, initial: Adapter | None) -> Adapter:
    try:
        return load_adapter(place, base=base, alpha=alpha)
    except MutatedBaseError:
        if initial is None:
            raise
        return load_adapter(place, base=base, alpha=alpha, initial=initial)


def _beginning(initial: Adapter | Place, alpha: float | None) -> Adapter:
    """The adapter before training, its own factors where they were taken off the base."""
    return initial if isinstance(initial, Adapter) else _loaded(initial, None, alpha, Adapter({}))


def _named(other: str, phi: tuple[float, float]) -> dict[str, float]:
    return {f"phi_{other}_in": phi[0], f"phi_{other}_out": phi[1]}
