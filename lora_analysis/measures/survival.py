"""How much of an update is left when it is added to a weight and the sum is rounded to the weight's dtype.

Conventions
-----------
``merged = round(W + ΔW)`` and ``change = merged - round(W)``: what the model really becomes. An entry of ΔW below half
the spacing of W's entry is lost, or becomes a whole spacing. bfloat16 has 8 bits, and rounds a weight by a relative
1.66e-3 (rms): an update of half a percent of ‖W‖ is three times that.

Measures
--------
``merge_survival``, a ``MergeSurvival``.

References
----------
Widrow and Kollár 2008, *Quantization Noise* (rounding as noise). Derived here for updates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.update import Update, rounding_error, rows_of

_BLOCK_ROWS = 256


class MergeSurvival(NamedTuple):
    """What a merge keeps of an update; dimensionless.

    Attributes
    ----------
    signal_to_noise : float
        ``‖ΔW‖_F / (eps ‖W‖_F)``, eps being the rounding error (rms) of the dtype: what to expect.
    kept : float
        ``<change, ΔW> / ‖ΔW‖²``: 1 where the update arrives, 0 where nothing of it does. Rounding that is fair keeps
        it near 1 however noisy the change.
    error : float
        ``‖change - ΔW‖_F / ‖ΔW‖_F``. Where W is in the dtype already it is near 1 / signal_to_noise while that is
        small, and at most about 1: what is too small to change W is lost whole. Where W is more precise, its own
        rounding is in it too.
    changed : float
        Share of the entries of W that differ after the merge, in [0, 1].
    """

    signal_to_noise: float
    kept: float
    error: float
    changed: float


def merge_survival(update: Update, weight: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> MergeSurvival:
    """Merge and round, block by block, and compare what became of the weight with the update.

    Parameters
    ----------
    update : Update
    weight : Tensor, shape (d_out, d_in)
        W, in any floating dtype.
    dtype : torch.dtype
        What the merged weight is stored in.

    Returns
    -------
    MergeSurvival
        NaN but for ``changed`` where ΔW is 0; ``error`` is infinite where a merged weight is beyond the dtype.

    Raises
    ------
    BaseWeightsError
        If the shapes differ, or W holds NaN or infinities.
    UndefinedUpdateError
        If the scale is unknown, or the update holds NaN or infinities.

    Examples
    --------
    >>> from lora_analysis.update import DenseUpdate
    >>> weight = torch.ones(2, 2)  # bfloat16's next number is 1.0078
    >>> merge_survival(DenseUpdate(torch.full((2, 2), 1e-3)), weight).kept
    0.0
    """
    if tuple(weight.shape) != tuple(update.shape):
        raise BaseWeightsError(
            f"expected a base weight of the update's (d_out, d_in) = {tuple(update.shape)}, got {tuple(weight.shape)}."
        )
    norm = update.norm()  # raises what an unknown scale or a NaN deserves
    product = square = base = changed = 0.0
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        W = weight[rows].double()
        delta = rows_of(update, rows).to(W.device)
        # float32 first, as merging libraries do: a float64 sum rounded once would differ in the last bit only.
        total = W + delta if dtype == torch.float64 else (W.float() + delta.float()).to(dtype).double()
        change = total - W.to(dtype).double()
        product += float((change * delta).sum())
        square += float((change - delta).square().sum())
        base += float(W.square().sum())
        changed += float((change != 0).sum())
    if not math.isfinite(base):
        raise BaseWeightsError("the base weight holds NaN or infinities, so nothing can be merged into it.")
    noise = rounding_error(dtype) * math.sqrt(base)
    share = changed / max(1, weight.numel())
    if math.isnan(square) or math.isinf(square):
        return MergeSurvival(norm / noise if noise else math.inf, math.nan, math.inf, share)
    if norm == 0:
        return MergeSurvival(math.nan, math.nan, math.nan, share)
    snr = norm / noise if noise else math.inf
    return MergeSurvival(snr, product / norm**2, math.sqrt(square) / norm, share)
