"""Findings about the numbers of one module's update: none at all, no numbers, directions that add nothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_analysis.adapter import Module
from lora_analysis.lint.finding import Finding
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Update


def number_findings(name: str, module: Module, update: Update) -> Iterator[Finding]:
    """What the numbers of one module show."""
    # The r of a Kronecker product is that of its sides, and of whole ones no inner dimension of anything.
    if module.r > min(module.shape) and not isinstance(update, KroneckerUpdate):
        d_out, d_in = module.shape
        yield Finding(
            "r-exceeds-d",
            "warning",
            name,
            f"r={module.r} exceeds the smaller side of {d_out}x{d_in}: the rank cannot pass {min(module.shape)}. "
            "Train with a smaller r, or store the product.",
        )
    if module.magnitude is not None and not is_finite(module.magnitude()):
        yield Finding(
            "nonfinite", "error", name, "DoRA's magnitudes hold NaN or infinities. Take an earlier checkpoint."
        )
    if not getattr(update, "finite", True):
        yield Finding("nonfinite", "error", name, f"{_where(update)} NaN or infinities. Take an earlier checkpoint.")
    elif is_zero(update):
        beside = "" if module.magnitude is None else "; only DoRA's magnitudes act"
        yield Finding(
            "zero-update",
            "warning",
            name,
            f"ΔW is exactly zero: never trained, or inert in training{beside}. Check target_modules, or leave it out.",
        )
    elif isinstance(update, LowRankUpdate) and update.r == module.r and (dead := int(dead_directions(update).sum())):
        yield Finding(
            "size-waste",
            "warning",
            name,
            f"{dead} of {update.r} directions are zero on one side, and add nothing. Cut them off.",
        )


def is_zero(update: Update) -> bool:
    """Whether ΔW is exactly zero, by a scale or a factor of zero, or because no direction has both its sides."""
    if update.scale == 0:
        return True
    if isinstance(update, LowRankUpdate):
        return bool(dead_directions(update).all())
    if isinstance(update, DenseUpdate):
        return not bool(_nonzero(update.matrix).any())
    if isinstance(update, KroneckerUpdate):
        return is_zero(update.left) or is_zero(update.right)
    return update.norm() == 0


def dead_directions(update: LowRankUpdate) -> Tensor:
    """Which columns of B or rows of A are zero, bool, shape (r,)."""
    return ~_nonzero(update.up).any(0) | ~_nonzero(update.down).any(1)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, in any floating dtype."""
    return bool(_wide(tensor).isfinite().all())


def _nonzero(tensor: Tensor) -> Tensor:
    return _wide(tensor.detach()) != 0


def _wide(tensor: Tensor) -> Tensor:
    """Numbers of one byte in float32, for torch compares none."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _where(update: Update) -> str:
    if not isinstance(update, LowRankUpdate):
        return "it holds"
    sides = [side for side, factor in (("A", update.down), ("B", update.up)) if not is_finite(factor)]
    return f"{' and '.join(sides)} {'holds' if len(sides) == 1 else 'hold'}"
