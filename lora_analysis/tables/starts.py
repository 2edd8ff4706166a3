"""Whether two adapters began with the same A, asked before what they share is taken for learning."""

from __future__ import annotations

import math

from lora_analysis.adapter import Module
from lora_analysis.measures.shared_start import SHARED, shared_rows
from lora_analysis.update import LowRankUpdate


def rows_shared(a: Module, b: Module) -> float:
    """Share of the rows of A that two modules began with in common, as far as their trained A's tell.

    NaN where that cannot be told: of updates that are no product, of embeddings, whose A begins at zero, of factors
    that are not finite or not of one width.
    """
    if a.embedding or b.embedding:
        return math.nan
    first, second = a.read(), b.read()
    if not (isinstance(first, LowRankUpdate) and isinstance(second, LowRankUpdate) and first.finite and second.finite):
        return math.nan
    if first.down.shape[1] != second.down.shape[1]:
        return math.nan
    return shared_rows(first.down, second.down, trained=True)


def same_start(share: float) -> list[str]:
    """The flag of rows whose modules began alike.

    Examples
    --------
    >>> same_start(0.5), same_start(0.0), same_start(math.nan)
    (['same-start'], [], [])
    """
    return ["same-start"] * (share >= SHARED)
