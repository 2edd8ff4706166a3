"""Some rows of an update, so that nothing of its whole size is held."""

from __future__ import annotations

from torch import Tensor

from lora_analysis.update.dense import DenseUpdate
from lora_analysis.update.low_rank import LowRankUpdate
from lora_analysis.update.protocol import Update


def rows_of(update: Update, rows: slice) -> Tensor:
    """Some rows of ΔW, float64; other kinds than products and matrices are formed as a whole for it.

    Examples
    --------
    >>> import torch
    >>> rows_of(LowRankUpdate(torch.eye(3, 1), torch.ones(1, 2), scale=2.0), slice(0, 2)).tolist()
    [[2.0, 2.0], [0.0, 0.0]]
    """
    if isinstance(update, LowRankUpdate):
        return update.scale * (update.up[rows].double() @ update.down.double())
    if isinstance(update, DenseUpdate):
        return update.scale * update.matrix[rows].double()
    return update.dense()[rows]
