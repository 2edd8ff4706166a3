"""How updates come about: norm, ranks, directions, the move of A and the gain of every module, every n steps.

Conventions
-----------
Step 0 is the model before its first update, and is logged when a ``TrainingDynamics`` is made. Rows have the keys of
``states.COLUMNS``. Looking draws no random numbers and changes nothing, so losses are the same with and without.
DoRA's low-rank part is what is followed of this package's layers, flagged ``dora-low-rank-part``.

Values
------
``TrainingDynamics``, ``read_dynamics``, ``dynamics_table``; from saved checkpoints: ``checkpoints``; inside
``transformers.Trainer``: ``hf_callback``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7; Zhu et al. 2024, arXiv:2402.16842 (A hardly moves).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import MutatedBaseError
from lora_analysis.training.distributed import rank
from lora_analysis.training.dynamics_log import DynamicsLog, read_dynamics
from lora_analysis.training.extract import extract
from lora_analysis.training.layers import sites
from lora_analysis.training.merging import stored_weight
from lora_analysis.training.states import COLUMNS, Directions, Gains, moved, moves_of, similarity, state_of
from lora_analysis.training.targets import peft_layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "TrainingDynamics", "dynamics_table", "read_dynamics"]


class TrainingDynamics:
    """What becomes of the updates of a model while it is trained: a row for each module every so many steps.

    A callable for ``train(..., on_step=dynamics)``. In a group of processes the first alone looks.

    Parameters
    ----------
    model : Module
        Adapted by ``inject`` or ``attach``, or by peft's LoRA.
    every : int
        Steps between two looks; the step that training ends with comes in by ``finish``.
    adapter : str, optional
        Which one, in a model with several.
    gain_every : int, optional
        Steps between two looks at the gain, a multiple of ``every``; it reads each base weight once. None by default.
        The base is taken to stand still.
    directions : int
        Most directions of each update that ``phi`` and ``gain`` look at and that are kept; 1 asks after the top one.
    memory : int
        Bytes of directions to keep for ``phi_final``. Beyond, every second of those kept is let go, and the rows of
        those steps have none.
    path : path, optional
        A file for the rows as they come, one JSON object a line, NaN as null; a killed run keeps it. What is in it
        of earlier steps stays, of the same and later ones goes, with the first step: a run that is taken up writes
        them again.
    source : str
        What to call the run in the column ``adapter``.
    start : int
        The step the model is at.

    Raises
    ------
    ValueError
        If an argument is out of range, or the model has not the adapter asked for, or several and none is named.
    MutatedBaseError
        If peft took the initial factors off the base and the model is past step 0, where they can no longer be seen.

    Examples
    --------
    >>> from lora_analysis import training
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> training.inject(model, ["0"], r=2, seed=0)
    ['0']
    >>> dynamics = TrainingDynamics(model, every=5)
    >>> batches = [torch.linspace(-1, 1, 32).reshape(4, 8)] * 12
    >>> losses = training.train(model, batches, lambda model, x: (model(x) - x).square().mean(), on_step=dynamics)
    >>> [(row["step"], row["norm"] > 0, round(row["phi_final_in"], 1)) for row in dynamics.finish()]
    [(0, False, nan), (5, True, 1.0), (10, True, 1.0), (12, True, 1.0)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        adapter: str | None = None,
        gain_every: int | None = None,
        directions: int = 8,
        memory: int = 2**28,
        path: str | os.PathLike[str] | None = None,
        source: str = "model",
        start: int = 0,
    ) -> None:
        _require(every=every, gain_every=gain_every, directions=directions, memory=memory, start=start)
        self.model, self.every, self.adapter, self.gain_every = model, every, adapter, gain_every
        self.directions, self.memory, self.source, self.start = directions, memory, source, start
        self._rows: list[dict[str, Any]] = []
        self._kept: dict[int, dict[str, Directions]] = {}
        self._latest: dict[str, Directions] = {}
        self._looks, self._stride = 0, 1
        self._step, self._loss, self._seen = start, math.nan, start
        self._log = None if path is None else DynamicsLog(path, start=start)
        self._subtracted, first = _first(model, adapter, start)
        self._first = {} if sites(model) else {name: first[name] for name in first}
        self._gains = None if gain_every is None else Gains(_base(model, first))
        if rank() == 0:
            self._look()

    def __call__(self, step: int, loss: float = math.nan) -> None:
        """Take note of a step, and look at the model if it is the turn of that step.

        Parameters
        ----------
        step : int
            How many updates there have been.
        loss : float
            Of that step.

        Raises
        ------
        ValueError
            If the step does not come after the last one.
        """
        if rank() > 0:
            return
        if step <= self._step:
            raise ValueError(
                f"{self.source}: expected a step after {self._step}, got {step}. For another run of training make "
                "another TrainingDynamics, and pass start= with the step the model is at."
            )
        self._step, self._loss = step, loss
        if self._log is not None:
            self._log.begin(step)
        if step % self.every == 0:
            self._look()

    def finish(self) -> list[dict[str, Any]]:
        """Look at the model as it is after the last step, unless that is done, and give all rows."""
        if self._log is not None and rank() == 0:
            self._log.begin(self.start + 1)
        if self._seen != self._step:
            self._look()
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each module and logged step, ``phi_final`` being that with the last of them."""
        last = self._latest
        rows = []
        for row in self._rows:
            kept = last if row["step"] == self._seen else self._kept.get(row["step"], {})
            inside, outside = similarity(kept[row["module"]], last.get(row["module"])) if kept else (math.nan, math.nan)
            rows.append(row | {"phi_final_in": inside, "phi_final_out": outside})
        return rows

    def table(self) -> pd.DataFrame:
        """The rows as a frame."""
        return dynamics_table(self.rows())

    def _look(self) -> None:
        step = self._step
        found = _extracted(self.model, self.adapter, self._subtracted)
        moves = _moves(self.model, self.adapter)
        rows, latest = [], {}
        for name, module in found.modules.items():
            update = found[name]
            state = state_of(module, update, directions=self.directions)
            before = similarity(state.directions, self._latest.get(name))
            said = {"adapter": self.source, "step": step, "module": name, "loss": self._loss}
            said |= dict(zip(("phi_previous_in", "phi_previous_out"), before, strict=True))
            if name in moves:
                said |= moves[name]
            else:
                said |= moves_of(update, self._first.get(name), f"step {self.start}")
            if self._gains is not None and self.gain_every is not None and step % self.gain_every == 0:
                said["gain"] = self._gains.of(found.modules, name, state.top)
            rows.append(state.row | said)
            latest[name] = state.directions
        self._rows += rows
        self._keep(step, latest)
        if self._log is not None:
            self._log.write(rows)

    def _keep(self, step: int, latest: dict[str, Directions]) -> None:
        """Keep directions, at even intervals as fine as the memory allows; the latest always."""
        self._latest, self._seen = latest, step
        if self._looks % self._stride == 0:
            self._kept[step] = latest
        self._looks += 1
        while len(self._kept) > 1 and _nbytes(self._kept.values()) > self.memory:
            self._stride *= 2
            self._kept = dict(list(self._kept.items())[::2])


def dynamics_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with the columns of ``COLUMNS``, in their order.

    Parameters
    ----------
    rows : sequence of mappings
        Of ``TrainingDynamics.rows``, ``read_dynamics`` or ``checkpoint_dynamics``, or several of them together.
    """
    import pandas as pd  # not at the top: training does not need it

    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def _extracted(model: nn.Module, adapter: str | None, subtracted: Adapter | None) -> Adapter:
    if peft_layers(model):
        return extract(model, name=adapter, initial=subtracted)
    return extract(model, name=adapter, dora="factors")


def _first(model: nn.Module, adapter: str | None, start: int) -> tuple[Adapter | None, Adapter]:
    """What peft took off the base, where it did, and the adapter as it is now."""
    try:
        return None, _extracted(model, adapter, None)
    except MutatedBaseError:
        if start != 0:
            raise
        # Nothing has been trained, so the factors are those that were taken off.
        now = extract(model, name=adapter, initial=Adapter({}))
        return now, now


def _base(model: nn.Module, adapter: Adapter) -> BaseWeights:
    """The weights under the adapter, by reference."""
    device = next(model.parameters()).device
    if peft_layers(model):
        return load_base(model, device=device)
    tensors = {module.target.tensor for module in adapter.modules.values()}
    weights: dict[str, Tensor] = {}
    for where, site in sites(model).items():
        name = where if where in tensors else f"{where}.weight"
        if name in tensors:
            weights[name] = (stored_weight(model, site) if site.original is None else site.original).detach()
    return load_base(weights, device=device)


def _moves(model: nn.Module, adapter: str | None) -> dict[str, dict[str, Any]]:
    """The moves of this package's factors from their own beginnings, by the names that ``extract`` has for them."""
    found = {}
    for where, site in sites(model).items():
        names = list(site.adapters)
        chosen = adapter if adapter is not None else names[0]
        if chosen not in names:
            continue
        factors = site.adapters.named()[chosen]
        endings = [f".{block.name}" for block in factors.blocks] or [""]
        if site.storage.experts is not None:
            endings = [f".{expert}" for expert in range(len(factors.lora_A))]
        with torch.no_grad():
            now, first = factors.pairs(), factors.pairs(initial=True)
        for ending, (A, B), (A0, B0) in zip(endings, now, first, strict=True):
            found[where + ending] = {"moved_A": moved(A, A0), "moved_B": moved(B, B0), "moved_from": "initial"}
    return found


def _nbytes(kept: Iterable[dict[str, Directions]]) -> int:
    return sum(one.nbytes for directions in kept for one in directions.values())


def _require(*, every: int, gain_every: int | None, directions: int, memory: int, start: int) -> None:
    for name, value, least in (("every", every, 1), ("directions", directions, 1), ("memory", memory, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    if start < 0:
        raise ValueError(f"start: expected a step, got {start}.")
    if gain_every is not None and (gain_every < 1 or gain_every % every):
        raise ValueError(f"gain_every: expected a multiple of every={every}, got {gain_every}.")
