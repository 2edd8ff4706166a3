"""What a study needs of a model and its tasks, whatever they are.

Values
------
``Setting``, ``Outcomes``, ``open_setting``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Outcomes(NamedTuple):
    """What a model does on the held-out items of a task.

    Attributes
    ----------
    losses : Tensor, shape (n,), float64
        Cross-entropy of each item, in nats.
    correct : Tensor or None, shape (n,), bool
        Whether each is classified rightly; None where nothing is classified.
    metrics : mapping of str to float
        Figures of all items together, such as BLEU.
    """

    losses: Tensor
    correct: Tensor | None = None
    metrics: Mapping[str, float] = MappingProxyType({})


ITEMS: Mapping[str, str] = {
    "classification": "An item is a text, its loss the cross-entropy of its label.",
    "language": "An item is a block of bytes, its loss the mean cross-entropy of its bytes: nats per byte.",
    "generation": "An item is a text, its loss the mean cross-entropy of its tokens: nats per token.",
}
"""What held-out items and their losses are, by kind of setting."""


class Setting(Protocol):
    """A pretrained model with tasks. Picklable: runs open their own model in processes of their own."""

    @property
    def base(self) -> Path:
        """The file of the pretrained weights."""
        ...

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model, frozen."""
        ...

    def trainable_head(self, model: nn.Module, task: str) -> nn.Module:
        """What trains where only the head does, with the model inside."""
        ...

    def batches(self, task: str, *, batch_size: int, seed: int, size: int | None) -> Iterator[Any]:
        """Training batches without end, each seed in an order of its own."""
        ...

    def loss(self, task: str, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        ...

    def outcomes(self, task: str, model: nn.Module) -> Outcomes:
        """What the model does on the held-out items."""
        ...

    def held_back(self) -> Setting:
        """The same with a share of the training items in the place of the held-out ones, to tune on."""
        ...

    def record(self) -> Mapping[str, Any]:
        """What ``tasks.json`` says of the tasks: for each its digest, groups of held-out items, and more."""
        ...


def open_setting(content: Mapping[str, Any], *, folder: Path) -> Setting:
    """The setting that a plan names, ready to run: texts collected, frozen classifiers computed.

    Parameters
    ----------
    content : mapping
        ``kind`` is ``"classification"``, ``"language"`` or ``"generation"``; the rest is that class's.
    folder : Path
        The study's directory, where what takes long to compute is kept.

    Raises
    ------
    ValueError
        If the kind is unknown.
    """
    from lora_analysis.study.classification import open_classification
    from lora_analysis.study.e2e import open_generation
    from lora_analysis.study.language import open_language

    options = dict(content)
    kind = options.pop("kind", None)
    if kind == "classification":
        return open_classification(folder=folder, **options)
    if kind == "language":
        return open_language(folder=folder, **options)
    if kind == "generation":
        return open_generation(folder=folder, **options)
    raise ValueError(f"setting: expected 'classification', 'language' or 'generation', got {kind!r}.")
