"""What resizing did, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Resized(NamedTuple):
    """What became of one module."""

    before: int
    """Numbers it was held as."""
    after: int
    raised: int
    """Columns that begin at zero."""
    norm: float
    """Frobenius norm of ΔW / scale."""
    error: float
    """That of what was cut off."""
    scale: float
    """Absolute value; NaN where it is unknown."""

    @property
    def relative_error(self) -> float:
        """Dimensionless; 0 of a ΔW of zero."""
        return self.error / self.norm if self.error else 0.0


def summary(criterion: str, found: Mapping[str, Resized], magnitudes: Sequence[str]) -> list[str]:
    """Parameters and errors in sum, and what is special about modules.

    Parameters
    ----------
    criterion : str
        What was asked for.
    found : mapping of str to Resized
    magnitudes : sequence of str
        Modules that are low-rank parts of DoRA.
    """
    if not found:
        return []
    before, after = (sum(getattr(one, side) for one in found.values()) for side in ("before", "after"))
    worst = max(found, key=lambda name: found[name].relative_error)
    # A Kronecker product has fewer numbers than its best product of two factors.
    parameters = f"kept {after:,} of {before:,}" if after <= before else f"{after:,} in place of {before:,}"
    notes = [
        f"resized by {criterion}: {parameters} parameters, ‖error‖_F / ‖ΔW‖_F = {_overall(found)} over "
        f"all {len(found)} modules; largest in {worst!r}, {found[worst].relative_error:.2g}."
    ]
    if empty := [name for name, one in found.items() if not one.after]:
        notes.append(
            f"{len(empty)} of {len(found)} modules have r = 0, which no format holds: they are left out when saved "
            f"(first: {empty[0]!r})."
        )
    if raised := [name for name, one in found.items() if one.raised]:
        notes.append(
            f"{len(raised)} of {len(found)} modules have columns that change nothing until they are trained (first: "
            f"{raised[0]!r}, {found[raised[0]].raised} of them)."
        )
    if magnitudes:
        notes.append(
            f"{len(magnitudes)} of {len(found)} modules are low-rank parts of DoRA (first: {magnitudes[0]!r}): errors "
            "are those of the products, before magnitudes act on them."
        )
    return notes


def _overall(found: Mapping[str, Resized]) -> str:
    """Relative error of all modules together; with unknown scales only where nothing was cut."""
    error = math.hypot(*(one.scale * one.error if one.error else 0.0 for one in found.values()))
    norm = math.hypot(*(one.scale * one.norm for one in found.values()))
    if not error:
        return "0"
    return "unknown, as scales are," if math.isnan(error / norm) else f"{error / norm:.2g}"
