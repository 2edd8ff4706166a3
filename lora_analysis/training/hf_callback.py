"""Training dynamics inside ``transformers.Trainer``, of models adapted by this package or by peft.

Imported by name, because it imports transformers::

    from lora_analysis.training.hf_callback import DynamicsCallback
    callback = DynamicsCallback(every=50, path="dynamics.jsonl")
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    table = callback.dynamics.table()

Values
------
``DynamicsCallback``.
"""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_analysis.training.dynamics import TrainingDynamics


class DynamicsCallback(TrainerCallback):
    """A ``TrainingDynamics`` of the model that a Trainer trains, from the step where it begins to the last.

    The loss of a row is NaN: a Trainer says its losses apart, and as means over several steps. Of peft's layers A
    and B are followed from where ``train`` began; a run that is taken up begins there, as ``moved_from`` says.

    Parameters
    ----------
    every, adapter, gain_every, directions, memory, path, source
        As ``TrainingDynamics``.

    Attributes
    ----------
    dynamics : TrainingDynamics or None
        Of the latest call of ``train``; None before the first, and in all processes but the first.

    Raises
    ------
    ValueError, MutatedBaseError
        When training begins, as ``TrainingDynamics``.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        adapter: str | None = None,
        gain_every: int | None = None,
        directions: int = 8,
        memory: int = 2**28,
        path: str | os.PathLike[str] | None = None,
        source: str = "model",
    ) -> None:
        self.every, self.adapter, self.gain_every = every, adapter, gain_every
        self.directions, self.memory, self.path, self.source = directions, memory, path, source
        self.dynamics: TrainingDynamics | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model before its first update."""
        self.dynamics = None
        if state.is_world_process_zero:
            self.dynamics = TrainingDynamics(
                kwargs["model"],
                every=self.every,
                adapter=self.adapter,
                gain_every=self.gain_every,
                directions=self.directions,
                memory=self.memory,
                path=self.path,
                source=self.source,
                start=state.global_step,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the model, if it is the turn of this step."""
        if self.dynamics is not None:
            self.dynamics(state.global_step, math.nan)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model as it is in the end."""
        if self.dynamics is not None:
            self.dynamics.finish()
