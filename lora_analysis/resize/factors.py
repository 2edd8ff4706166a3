"""One update cut to fewer columns, or given more that change nothing yet."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update, distance


def truncated(update: Update, k: int) -> tuple[LowRankUpdate, float]:
    """The best part of at most k columns, and how far it is off.

    Parameters
    ----------
    update : Update
        Of scale 1.
    k : int

    Returns
    -------
    LowRankUpdate
        A copy of the update itself where that has no more than k columns. Else ``U sqrt(S)`` and ``sqrt(S) Vh`` of
        as many triples, k at most, as float64 can tell from zero.
    float
        ``‖ΔW - up @ down‖_F``, with the rounding of the factors.
    """
    if isinstance(update, LowRankUpdate) and update.r <= k:
        # In memory of their own: a view of a stack of experts would hold the whole of it.
        up, down = update.up.detach().clone(), update.down.detach().clone()
        return LowRankUpdate(up, down, 1.0, stored_eps=update.stored_eps), 0.0
    svd = update.svd(max(k, 1))  # where none is wanted, too: Lanczos iterations cannot look for none
    U, S, Vh = svd.top(min(k, numerical_rank(svd.S, update.shape)))
    up_dtype, down_dtype = _dtypes(update)
    up, down = (U * S.sqrt()).to(up_dtype), (S.sqrt()[:, None] * Vh).to(down_dtype)
    cut = LowRankUpdate(up, down, 1.0, stored_eps=math.nan)
    return cut, distance(update, cut) if cut.finite else math.inf


def widened(update: LowRankUpdate, r: int, *, module: str, seed: int, embedding: bool) -> LowRankUpdate:
    """The same ΔW in at least r columns: new ones begin as those of a fresh LoRA, half random and half zero."""
    missing = r - update.r
    if missing <= 0:
        return update
    from lora_analysis.training.initial import initial_factors  # the whole training core, for a few numbers

    d_out, d_in = update.shape
    random = "up" if embedding else "down"
    down, up = initial_factors(d_out, d_in, r=missing, module=module, seed=seed, init="kaiming", random=random)
    return replace(
        update,
        up=torch.cat([update.up, up.to(update.up)], dim=1),
        down=torch.cat([update.down, down.to(update.down)]),
    )


def numbers_of(update: Update) -> int:
    """How many numbers an update is held as."""
    return sum(part.numel() for part in _parts(update))


def _parts(update: Update) -> list[Tensor]:
    if isinstance(update, LowRankUpdate):
        return [update.up, update.down]
    if isinstance(update, DenseUpdate):
        return [update.matrix]
    return [part for side in ("left", "right") for part in _parts(getattr(update, side))]


def _dtypes(update: Update) -> tuple[torch.dtype, torch.dtype]:
    """Of the factors of a cut update: as stored, and float32 where what is cut was computed or is no product."""
    if isinstance(update, LowRankUpdate) and update.stored_eps is None:
        return update.up.dtype, update.down.dtype
    whole = isinstance(update, DenseUpdate) and update.stored_eps is None and update.matrix.dtype == torch.float64
    dtype = torch.float64 if whole else torch.float32
    return dtype, dtype
