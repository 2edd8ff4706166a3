"""What a caller may tell a reader that the file does not say."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError

Split = str | Sequence[str] | Sequence[bool]
"""Slots of a fused weight: ``"q,v"``, ``["q", "v"]`` or ``[True, False, True]``."""

MAX_ALPHA = 1e100
"""Larger ones are mistakes, and their squares would overflow."""

_QKV = ("q", "k", "v")
_PURPOSES = {
    "split": "cuts fused weights of q, k and v",
    "initial": "takes off factors that an initialisation subtracted from the base",
    "heads": "turns or cuts the rows of q and k by heads",
}
"""What the options are for that not every reader takes, but for ``name``."""


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


def parse_alpha(alpha: Any) -> float | None:
    """The caller's lora_alpha as a float.

    Raises
    ------
    TypeError, ValueError
        If it is no number that can be one.
    """
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha: expected a number, got {str(alpha)[:40]!r}.")
    try:
        value = float(alpha)
    except OverflowError:  # an integer of hundreds of digits
        value = 10 * MAX_ALPHA
    if not abs(value) <= MAX_ALPHA:
        kind = "plausible" if math.isfinite(value) else "finite"
        raise ValueError(f"alpha: expected a {kind} number, got {str(alpha)[:40]}.")
    return value


def parse_heads(heads: Any) -> tuple[int, int] | None:
    """Numbers of query and of key-value heads.

    Raises
    ------
    ValueError
        If they are no two positive integers.

    Examples
    --------
    >>> parse_heads([32, 8])
    (32, 8)
    """
    if heads is None:
        return None
    counts = list(heads) if isinstance(heads, tuple | list) else []
    if len(counts) != 2 or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"heads: expected two positive integers, (n_heads, n_kv_heads), got {str(heads)[:40]!r}.")
    return counts[0], counts[1]


def refuse_others(options: ReadOptions, taken: Collection[str], format: str) -> None:
    """Refuse what a reader would not use, so that no option is without effect in silence.

    ``alpha``, ``base`` and ``device`` mean something to all; ``pattern`` chooses its reader by itself.

    Parameters
    ----------
    options : ReadOptions
    taken : collection of str
        Those of ``name``, ``split``, ``initial`` and ``heads`` that the reader uses.
    format : str
        The reader's name.

    Raises
    ------
    AdapterFormatError
        If an adapter of some name is asked for where they have none.
    UnsupportedAdapterError
        If another option has no meaning in this format.
    """
    if options.name is not None and "name" not in taken:
        raise AdapterFormatError(
            f"{options.where}: expected an adapter named {options.name!r}; {format}'s have no names. Leave name= out."
        )
    for option, purpose in _PURPOSES.items():
        given = getattr(options, option)
        if given is None or option in taken or (isinstance(given, Adapter) and not len(given)):
            continue
        raise UnsupportedAdapterError(
            f"{options.where}: {option}= {purpose}, which has no meaning for a file that is read as {format!r}. Leave "
            f"{option}= out."
        )


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
    items: list[Any] = [part.strip() for part in split.split(",")] if isinstance(split, str) else []
    if isinstance(split, tuple | list):
        items = list(split)
    if items and all(isinstance(item, bool) for item in items):
        names = _QKV if len(items) == len(_QKV) else tuple(f"slot{i}" for i in range(len(items)))
        indices = tuple(i for i, enabled in enumerate(items) if enabled)
        if indices:
            return Slots(tuple(names[i] for i in indices), indices, len(items))
    elif items and all(item in _QKV for item in items) and len(set(items)) == len(items):
        indices = tuple(sorted(_QKV.index(item) for item in items))
        return Slots(tuple(_QKV[i] for i in indices), indices, len(_QKV))
    raise ValueError(f"split: expected the adapted ones of q,k,v, as 'q,v' or [True, False, True], got {split!r}.")
