"""What a caller may tell a reader that the file does not say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights

Split = str | Sequence[str] | Sequence[bool]
"""Slots of a fused weight: ``"q,v"``, ``["q", "v"]`` or ``[True, False, True]``."""

MAX_ALPHA = 1e100
"""Larger ones are mistakes, and their squares would overflow."""

_QKV = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Slots:
    """The blocks of rows of a fused weight that are adapted.

    Parameters
    ----------
    names : tuple of str
        Names of the adapted blocks, in the weight's order.
    indices : tuple of int
        Their positions.
    total : int
        How many equal blocks the weight has.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    total: int


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What ``load_adapter`` hands to a reader: its own arguments, opened and checked."""

    where: str
    alpha: float | None
    base: BaseWeights | None
    split: Slots | None
    device: torch.device
    name: str | None
    initial: Adapter | None = None
    heads: tuple[int, int] | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not abs(self.alpha) <= MAX_ALPHA:
            kind = "plausible" if abs(self.alpha) < math.inf else "finite"
            raise ValueError(f"alpha: expected a {kind} number, got {str(self.alpha)[:40]}.")


def parse_split(split: Split | None) -> Slots | None:
    """The slots that ``split=`` names.

    Examples
    --------
    >>> parse_split("q,v")
    Slots(names=('q', 'v'), indices=(0, 2), total=3)
    >>> parse_split([True, False, True]) == parse_split("q,v")
    True
    """
    if split is None:
        return None
    items: list[str | bool] = [part.strip() for part in split.split(",")] if isinstance(split, str) else list(split)
    if items and all(isinstance(item, bool) for item in items):
        names = _QKV if len(items) == len(_QKV) else tuple(f"slot{i}" for i in range(len(items)))
        indices = tuple(i for i, enabled in enumerate(items) if enabled)
        if indices:
            return Slots(tuple(names[i] for i in indices), indices, len(items))
    elif items and set(items) <= set(_QKV) and len(set(items)) == len(items):
        indices = tuple(sorted(_QKV.index(str(item)) for item in items))
        return Slots(tuple(_QKV[i] for i in indices), indices, len(_QKV))
    raise ValueError(f"split: expected the adapted ones of q,k,v, as 'q,v' or [True, False, True], got {split!r}.")
