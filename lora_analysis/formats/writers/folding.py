"""Numbers that a format has one of for all modules, or holds as float32: what becomes of their scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.writers.losses import count
from lora_analysis.formats.writers.parts import Part, refactored, scaled


def with_one_scale(
    source: str, parts: Sequence[Part], what: str, unit: Callable[[Part], int]
) -> tuple[float, list[Part], list[str]]:
    """One number for a file that has one for all modules, the rest of each folded into its ``up``.

    Parameters
    ----------
    source : str
        The adapter, for messages.
    parts : sequence of Part
    what : str
        What the number is called.
    unit : callable
        Number of a part with scale 1: 1 where the number is the scale itself, r where it is alpha.

    Returns
    -------
    float
        The most frequent number other than 0.
    list of Part
        In factors that have it.
    list of str
        How many have others for it, unless they are others by a power of two.
    """
    common = Counter(part.scale * unit(part) for part in parts if part.scale != 0).most_common(1)
    number = common[0][0] if common else 1.0
    folded, rounded = [], 0
    for part in parts:
        factor = part.scale * unit(part) / number
        if not math.isclose(factor, 1, rel_tol=1e-14):  # 1/3 times 3 is not always 1
            made = refactored(source, part, scaled(part.up, factor), part.down, number / unit(part))
            rounded += abs(math.frexp(factor)[0]) != 0.5 and factor != 0
            part = made
        folded.append(part)
    losses = zeroed(parts)
    if rounded:
        losses.append(
            f"{count(rounded, 'module')} of another {what} than {number:g}, which is folded into the factors."
        )
    return number, folded, losses


def zeroed(parts: Sequence[Part]) -> list[str]:
    """What is lost of modules whose scale is 0, where a format cannot say so: their factors."""
    number = sum(part.scale == 0 for part in parts)
    return [f"{count(number, 'module')} of scale 0 written as zeros, in place of its factors."] if number else []


def float32_alpha(source: str, what: str, alpha: float) -> float:
    """An alpha as the float32 that a format holds.

    Raises
    ------
    UnsupportedAdapterError
        If that is another number: zero, denormal or infinite.
    """
    held = float(torch.tensor(alpha, dtype=torch.float32))
    if not math.isclose(held, alpha, rel_tol=1e-6):
        raise UnsupportedAdapterError(
            f"{source}: {what}: expected an alpha that a float32 can hold, got {alpha:g}. Multiply the factors by it "
            "and give them a scale of 1."
        )
    return held
