"""Whether two adapters began with the same A, asked before what they share is taken for learning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_analysis.adapter import Module
from lora_analysis.measures.shared_start import SHARED, shared_rows
from lora_analysis.update import LowRankUpdate

_HALF, _ONE = 0.5, 1.5


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


def same_start(shares: Sequence[float], r: Sequence[int], *, two_adapters: bool = True) -> list[bool]:
    """Which pairs of modules began alike: of two adapters all, if their mean share says so; else each by itself.

    A direction that both have learned makes one pair of rows look shared, which is much where there are few rows: a
    module by itself needs two of them, and half of its rows.

    Parameters
    ----------
    shares : sequence of float
        ``rows_shared`` of every pair of modules.
    r : sequence of int
        Rows of the smaller A of each.
    two_adapters : bool
        Whether the pairs are of the modules of two adapters, which as a whole began alike or not.

    Examples
    --------
    >>> same_start([1.0, 0.0, 0.0, math.nan], [8, 8, 8, 8]), same_start([0.5, 0.0, 0.0, 0.0, 0.0, 0.0], [2] * 6)
    ([True, True, True, True], [False, False, False, False, False, False])
    """
    known = [share for share in shares if not math.isnan(share)]
    if two_adapters and known and sum(known) / len(known) >= SHARED:
        return [True] * len(shares)
    return [share >= _HALF and share * rows > _ONE for share, rows in zip(shares, r, strict=True)]
