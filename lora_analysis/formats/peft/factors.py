"""The update of one module, read from its factors when asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.checkpoint.protocol import rows
from lora_analysis.formats.products import low_rank, true_update
from lora_analysis.update import LowRankUpdate, Update


@dataclass(frozen=True, slots=True)
class Expert:
    """Which part of the factors of stacked experts is one expert's.

    A is (r·count, in) with the expert slowest, B (out, r·count) with the expert fastest.
    """

    index: int
    count: int
    r: int
    turned: bool
    """Whether ΔW is the transpose of B_e·A_e: factors whose A belongs to the side of outputs."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that reading one update takes.

    Parameters
    ----------
    checkpoint : Checkpoint
    down, up : str
        Keys of A and B.
    scale : float
    device : torch.device
    expert : Expert, optional
    initial : partial of LowRankUpdate, optional
        Reads the product that training started from and that was taken off the base.
    rows : (int, int), optional
        The rows of a fused weight's ΔW that are one of its slots.
    magnitude : str, optional
        Key of DoRA's magnitudes.
    base : BaseWeights, optional
        The base, where DoRA's true update is wanted.
    target : Target, optional
        Where on the base.
    """

    checkpoint: Checkpoint
    down: str
    up: str
    scale: float
    device: torch.device
    expert: Expert | None = None
    initial: partial[LowRankUpdate] | None = None
    rows: tuple[int, int] | None = None
    magnitude: str | None = None
    base: BaseWeights | None = None
    target: Target | None = None


def read_update(recipe: Recipe) -> Update:
    """``s·B·A``, less the initial product where there is one; with magnitudes and a base, what DoRA makes of it."""
    if recipe.expert is None:
        down, up = recipe.checkpoint[recipe.down], recipe.checkpoint[recipe.up]
    else:
        down, up = _of_expert(recipe, recipe.expert)
    down, up = down.to(recipe.device), up.to(recipe.device)
    update = low_rank(up, down, recipe.scale)
    if recipe.initial is not None:
        update = difference(update, recipe.initial())
    if recipe.rows is not None:
        update = LowRankUpdate(update.up[slice(*recipe.rows)], update.down, update.scale, update.stored_eps)
    if recipe.magnitude is None or recipe.base is None or recipe.target is None:
        return update
    weight = recipe.base.matrix(recipe.target, update.shape).to(recipe.device)
    return true_update(update, weight, read_magnitude(recipe))


def read_magnitude(recipe: Recipe) -> Tensor:
    """DoRA's magnitudes, one for each output, whatever shape they are stored in."""
    assert recipe.magnitude is not None
    flat = recipe.checkpoint[recipe.magnitude].to(recipe.device).flatten()
    return flat if recipe.rows is None else flat[slice(*recipe.rows)]


def difference(update: LowRankUpdate, initial: LowRankUpdate) -> LowRankUpdate:
    """``update - initial`` as one product, its inner dimension the sum of both.

    The scale is that of ``update``, not zero unless both are. Where ``initial`` has another, its B takes up their
    quotient; where either is unknown they are the same, one training's.
    """
    unknown = math.isnan(update.scale) or math.isnan(initial.scale)
    alike = unknown or update.scale == initial.scale
    quotient = 1.0 if alike else initial.scale / update.scale
    ups, downs = [update.up, -initial.up.to(update.up.device)], [update.down, initial.down.to(update.down.device)]
    if not alike or len({factor.dtype for factor in ups + downs}) > 1:
        # One dtype for all, without a rounding that the files do not have.
        ups, downs = [factor.double() for factor in ups], [factor.double() for factor in downs]
        ups[1] = quotient * ups[1]
    eps = max(update.eps, initial.eps)
    return LowRankUpdate(torch.cat(ups, dim=1), torch.cat(downs, dim=0), update.scale, stored_eps=eps)


def _of_expert(recipe: Recipe, expert: Expert) -> tuple[Tensor, Tensor]:
    first = expert.index * expert.r
    down = rows(recipe.checkpoint, recipe.down, first, first + expert.r)
    up = recipe.checkpoint[recipe.up][:, expert.index :: expert.count]
    return (up.mT, down.mT) if expert.turned else (down, up)
