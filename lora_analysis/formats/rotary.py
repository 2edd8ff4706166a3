"""Rows of q and k turned to the order of Hugging Face models, where numbers of heads are known.

The caller gives them, or a base says them in its configuration or header; the caller's win.
"""

from __future__ import annotations

from torch import Tensor

from lora_analysis.checkpoint.rotary import half_split_order
from lora_analysis.errors import AdapterFormatError


def require_heads(where: str, module: str, rows: int, n_heads: int) -> None:
    """Refuse numbers of heads that the rows of a module cannot have.

    Raises
    ------
    AdapterFormatError
        If the rows are not ``n_heads`` heads of an even size.
    """
    try:
        half_split_order(rows, n_heads)
    except (ValueError, TypeError) as error:
        raise AdapterFormatError(
            f"{where}: {module!r}: taken for {n_heads} heads: {error} Pass heads=(n_heads, n_kv_heads) of the model."
        ) from error


def said_by_the_base(given: tuple[int, int] | None, counts: tuple[int, int] | None) -> list[str]:
    """Notes of what a base's numbers of heads did, or that the caller's are others.

    Examples
    --------
    >>> said_by_the_base((8, 8), (32, 8))
    ['heads= gives (8, 8), the base says (32, 8); the former are taken.']
    """
    if counts is None or given == counts:
        return []
    if given is None:
        return [f"the rows of q and k are turned by the base's numbers of heads, {counts}."]
    return [f"heads= gives {given}, the base says {counts}; the former are taken."]


def half_split(rows: Tensor, n_heads: int | None) -> Tensor:
    """Rows in interleaved rotary order, put into half-split order; as they are where ``n_heads`` is None.

    Parameters
    ----------
    rows : Tensor, shape (d_out, …)
    n_heads : int, optional

    Examples
    --------
    >>> import torch
    >>> half_split(torch.tensor([0, 10, 1, 11]), 1).tolist()
    [0, 1, 10, 11]
    """
    return rows if n_heads is None else rows[half_split_order(len(rows), n_heads).to(rows.device)]
