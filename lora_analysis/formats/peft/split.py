"""Cutting an ordinary LoRA on a fused weight of q, k and v into three, by written-out layouts.

The rows of ``ΔW = s·B·A`` are those of B, so each slot keeps A and takes its rows of B.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.places import Place

CONTIGUOUS = ("W_pack", "Wqkv", "c_attn", "in_proj_weight", "qkv", "qkv_proj", "to_qkv")
"""Last names of weights whose rows are all of q, then all of k, then all of v: GPT-2, Baichuan, MPT, ViT, Phi-3,
``torch.nn.MultiheadAttention``."""

INTERLEAVED = ("query_key_value",)
"""Of BLOOM, Falcon and GPT-NeoX: q, k and v of one head, then of the next."""


def slots(place: Place, options: ReadOptions) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and rows of each slot of a module's weight; nothing for a weight that is not fused.

    Raises
    ------
    UnsupportedAdapterError
        If the weight is fused in a way that has no rows of its own for each slot.
    AdapterFormatError
        If its rows are not three equal blocks, nor those that ``heads`` says.
    """
    last = place.name.rpartition(".")[2]
    where = f"{options.where}: {place.name!r}"
    if last in INTERLEAVED:
        raise UnsupportedAdapterError(
            f"{where}: split=: q, k and v of such a weight lie head by head, so that none has a range of rows. "
            "Leave split= out, or cut the matrix yourself."
        )
    if last not in CONTIGUOUS or place.expert is not None:
        return
    d_out, d_in = place.shape
    if options.heads is None:
        # Fewer heads of k and v than of q can also give a multiple of three.
        if d_out != 3 * d_in:
            raise AdapterFormatError(
                f"{where}: split=: expected 3·d_in = {3 * d_in} rows, three equal blocks, got {d_out}. Pass heads=, "
                "the numbers of query and of key-value heads."
            )
        sizes = (d_in, d_in, d_in)
    else:
        query, key = options.heads
        size, rest = divmod(d_out, query + 2 * key)
        if rest:
            raise AdapterFormatError(
                f"{where}: split=: expected rows in {query} + 2·{key} heads, as heads= says, got {d_out}."
            )
        sizes = (query * size, key * size, key * size)
    start = 0
    for name, size in zip(("q", "k", "v"), sizes, strict=True):
        yield name, (start, start + size)
        start += size


def require_all(options: ReadOptions) -> None:
    """Refuse to drop slots: an ordinary LoRA adapts them all.

    Raises
    ------
    AdapterFormatError
        If ``split`` names some of q, k and v only.
    """
    if options.split is not None and options.split.names != ("q", "k", "v"):
        raise AdapterFormatError(
            f"{options.where}: split=: an ordinary LoRA on a fused weight adapts q, k and v, got "
            f"{', '.join(options.split.names)}. Pass split='q,k,v', or leave split= out."
        )
