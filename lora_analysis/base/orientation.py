"""Whether a weight is stored as (d_out, d_in) or turned, and which slice of it an update acts on.

Conventions
-----------
What the shape of the update allows comes first. Where both orientations fit, as for a square weight, the base itself
decides: the module's type in a live model; in a file, a bias that proves another weight of the same name to be
transposed, as GPT-2's ``mlp.c_proj`` proves for the square ``attn.c_proj``. Then the adapter's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property

from lora_analysis.adapter import Target
from lora_analysis.base.layouts import block_rows

Slices = tuple[tuple[int, int], tuple[int, int]]
"""Half-open ranges of rows and of columns of a matrix as (d_out, d_in)."""


def slices(target: Target, whole: tuple[int, int], shape: tuple[int, int] | None, block: str | None) -> Slices | None:
    """The part of a matrix, as (d_out, d_in), that an update of a shape acts on; None where it does not fit."""
    d_out, d_in = (None, None) if shape is None else shape
    if block is not None:
        rows = block_rows(block, whole[0], d_out)
        return None if rows is None or d_in not in (None, whole[1]) else (rows, (0, whole[1]))
    found = []
    for bounds, length, wanted in zip((target.rows, target.columns), whole, (d_out, d_in), strict=True):
        start, stop = bounds or (0, length)
        if not 0 <= start <= stop <= length or wanted not in (None, stop - start):
            return None
        found.append((start, stop))
    return found[0], found[1]


class ProvenTransposed:
    """Which weights of a file a bias proves to be stored as (d_in, d_out).

    Parameters
    ----------
    names : collection of str
        All tensors of the base.
    shape : callable
        The shape of one.
    """

    def __init__(self, names: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> None:
        self._names = names
        self._shape = shape
        self._proven: dict[str, bool] = {}

    @cached_property
    def _families(self) -> dict[str, list[str]]:
        """The weights by their last two components, found in one walk: a base may have as many families as tensors."""
        found: dict[str, list[str]] = {}
        for name in self._names:
            if name.endswith(".weight"):
                found.setdefault(_family(name), []).append(name)
        return found

    def __call__(self, name: str) -> bool:
        """Whether some weight of this last name is longer than wide and its bias runs along its columns."""
        family = _family(name)
        if family not in self._proven:
            self._proven[family] = any(map(self._bias_runs_along_columns, self._families.get(family, ())))
        return self._proven[family]

    def _bias_runs_along_columns(self, name: str) -> bool:
        bias = name.removesuffix("weight") + "bias"
        if bias not in self._names:
            return False
        shape = self._shape(name)
        return len(shape) == 2 and shape[0] != shape[1] and self._shape(bias) == shape[1:]


def _family(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])
