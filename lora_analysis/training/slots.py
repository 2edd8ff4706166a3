"""The blocks of rows of fused weights, such as q and v of a packed projection, that are adapted one by one.

Values
------
``BlocksGiven``, ``blocks_of``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_analysis.formats.options import parse_split
from lora_analysis.training.factors import Block
from lora_analysis.training.kinds import CONVOLUTION, EMBEDDING
from lora_analysis.training.spots import Spot

BlocksGiven = str | Sequence[bool] | Mapping[str, tuple[int, int]]
"""Slots of a fused weight: ``"q,v"`` or ``[True, False, True]`` of equal blocks, or names to half-open row ranges."""


def blocks_of(spots: Sequence[Spot], slots: Mapping[str, BlocksGiven]) -> dict[str, tuple[Block, ...]]:
    """Module to the blocks of its rows that are adapted."""
    found: dict[str, tuple[Block, ...]] = {}
    for key, given in slots.items():
        hits = [spot for spot in spots if spot.name == key or spot.name.endswith(f".{key}")]
        if not hits:
            raise ValueError(f"slots: expected an adapted weight named {key!r}, got none.")
        for spot in hits:
            if spot.storage.experts is not None or spot.storage.view or spot.kind in (EMBEDDING, CONVOLUTION):
                raise ValueError(f"slots: {spot.name!r}: expected a fused linear weight, got another kind.")
            found[spot.name] = _of_spot(spot, given)
    return found


def _of_spot(spot: Spot, given: BlocksGiven) -> tuple[Block, ...]:
    d_out = spot.storage.matrix_shape[0]
    if isinstance(given, Mapping):
        blocks = tuple(sorted((Block(name, *rows) for name, rows in given.items()), key=lambda block: block.start))
        bounds = [0, *(edge for block in blocks for edge in block[1:]), d_out]
        if (
            not blocks
            or bounds != sorted(bounds)
            or any(b.start == b.stop or not b.name or "." in b.name for b in blocks)
        ):
            raise ValueError(
                f"slots: {spot.name!r}: expected names without dots and ranges of its {d_out} rows that do not "
                f"overlap, got {dict(given)}."
            )
        return blocks
    chosen = parse_split(given if isinstance(given, str) else list(given))
    assert chosen is not None
    if d_out % chosen.total:
        raise ValueError(f"slots: {spot.name!r}: expected {chosen.total} equal blocks, got {d_out} rows. Give ranges.")
    height = d_out // chosen.total
    return tuple(
        Block(name, index * height, (index + 1) * height)
        for name, index in zip(chosen.names, chosen.indices, strict=True)
    )
