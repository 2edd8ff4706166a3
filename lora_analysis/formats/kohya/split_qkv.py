"""Fused weights that kohya's ``split_qkv`` trained block by block: q, k, v and, in Flux' single blocks, mlp.

Conventions
-----------
n adapters of one r were trained, one per block of rows, and are saved as one: ``lora_down`` (n·r, d_in) stacks theirs,
``lora_up`` (d_out, n·r) is zero but for block j of rows in block j of columns. Nothing else marks it, so ``lora_up``
of the layers that it can happen to is looked at (``_attn_qkv``, ``_linear1``). Blocks are equal thirds, or d_in rows
and two equal rests where queries share keys, or d_in each and the rest of ``linear1``.

alpha stays what it was, while r became n·r: training had alpha / r, and every consumer, kohya's own inference among
them, computes alpha / (n·r), n times weaker. The consumers' scale is given, and a note says so. Facts from sd-scripts'
``networks/lora_flux.py`` (``state_dict``, ``create_network_from_weights``) and ``lora_lumina.py``.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.checkpoint.protocol import rows
from lora_analysis.formats.kohya.algorithms import Product
from lora_analysis.update import LowRankUpdate, factors

_FUSED = re.compile(r".*[._](?P<kind>(?:img_|txt_)?attn[._]qkv|attention[._]qkv|linear1)\Z", re.DOTALL)
_NAMES = ("q", "k", "v", "mlp")


class Block(NamedTuple):
    """One block of a fused weight, and its part of the factors."""

    name: str
    rows: tuple[int, int]
    ranks: tuple[int, int]


def blocks_of(checkpoint: Checkpoint, stem: str, product: Product) -> tuple[Block, ...]:
    """The blocks that a module was trained in; none if it was trained as one."""
    match = _FUSED.match(stem)
    if match is None or product.parts != ("lora_up.weight", "lora_down.weight") or product.kernel:
        return ()
    layouts = [heights for heights in _layouts(match["kind"], *product.shape) if product.r % len(heights) == 0]
    if not layouts:
        return ()
    key = f"{stem}.lora_up.weight"
    candidates = [_blocks(heights, product.r // len(heights)) for heights in layouts]
    # The last row alone, which is zero but in the last block, tells most of those that were trained as one.
    last = rows(checkpoint, key, product.shape[0] - 1, product.shape[0]).float().flatten()
    candidates = [blocks for blocks in candidates if not last[: blocks[-1].ranks[0]].any()]
    if not candidates:
        return ()
    nonzero = (checkpoint[key].float() != 0).flatten(1)
    return next((blocks for blocks in candidates if _only_in(nonzero, blocks)), ())


def read_block(update: LowRankUpdate, block: Block) -> LowRankUpdate:
    """One block out of a whole module's update."""
    up, down = factors(update)
    ranks = slice(*block.ranks)
    return LowRankUpdate(up[slice(*block.rows), ranks], down[ranks], update.scale, update.stored_eps)


def _layouts(kind: str, d_out: int, d_in: int) -> list[tuple[int, ...]]:
    """Heights of the blocks that a fused weight of this name can have."""
    if kind == "linear1":
        return [(d_in, d_in, d_in, d_out - 3 * d_in)] if d_out > 3 * d_in else []
    thirds = [(d_out // 3,) * 3] if d_out % 3 == 0 else []
    rest = d_out - d_in
    shared = [(d_in, rest // 2, rest // 2)] if rest > 0 and rest % 2 == 0 else []
    return list(dict.fromkeys(thirds + shared))


def _blocks(heights: tuple[int, ...], r: int) -> tuple[Block, ...]:
    bounds = pairwise(accumulate(heights, initial=0))
    return tuple(
        Block(name, between, (number * r, (number + 1) * r))
        for number, (name, between) in enumerate(zip(_NAMES, bounds, strict=False))
    )


def _only_in(nonzero: Tensor, blocks: tuple[Block, ...]) -> bool:
    """Whether all numbers that are not zero, of which there are some, lie in the blocks."""
    inside = sum(int(nonzero[slice(*block.rows), slice(*block.ranks)].sum()) for block in blocks)
    return inside > 0 and inside == int(torch.count_nonzero(nonzero))
