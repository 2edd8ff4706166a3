"""Row order of q and k: rotary positions turn interleaved pairs of rows, or the two halves of a head.

Conventions
-----------
Of a head of d rows, rotary position embedding turns d/2 pairs. *Interleaved*, as Meta, torchtune and llama.cpp's
llama have it, pair i is rows 2i and 2i + 1; *half-split*, as Hugging Face models have it, rows i and i + d/2. The
same attention scores come from the same rows in the other order, so a converter permutes the rows of q and k, and
with them those of their LoRA up factors. Singular values and the input side of an update do not notice.

Facts from torchtune ``models/convert_weights.py`` and llama.cpp ``conversion/llama.py`` (``permute``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_split_order(rows: int, n_heads: int) -> Tensor:
    """Where each row of the half-split order lies in the interleaved one: ``half_split = interleaved[order]``.

    Parameters
    ----------
    rows : int
        Output rows of q or k, all heads.
    n_heads : int
        Heads they belong to.

    Returns
    -------
    Tensor, shape (rows,)
        A permutation, int64.

    Raises
    ------
    ValueError
        If the rows are not ``n_heads`` heads of an even size.

    Examples
    --------
    >>> half_split_order(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if n_heads < 1 or rows % (2 * n_heads):
        raise ValueError(f"expected the rows of {n_heads} heads of an even size, got {rows} rows.")
    return torch.arange(rows).view(n_heads, rows // n_heads // 2, 2).mT.reshape(-1)


def interleaved_order(rows: int, n_heads: int) -> Tensor:
    """The inverse of ``half_split_order``: ``interleaved = half_split[order]``.

    Examples
    --------
    >>> rows = torch.arange(12)
    >>> bool((rows[half_split_order(12, 2)][interleaved_order(12, 2)] == rows).all())
    True
    """
    return half_split_order(rows, n_heads).argsort()
