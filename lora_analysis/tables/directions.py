"""How many directions of an update the tables look at where nobody says.

A product of two factors has r of them. The rank of other kinds is not r: LoHa's reaches r², LoKr's the product of its
sides', a full difference and DoRA's true update have one for each row or column. Comparing all of these would cost
minutes a pair (the nulls take time by the cube of their number) and say little: they are no subspaces of low dimension.
"""

from __future__ import annotations

from lora_analysis.adapter import Module
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.tables.frames import module_flags
from lora_analysis.update import KroneckerUpdate, LowRankUpdate, Svd, Update, with_scale

WHOLE = 1e-10
"""Share of the energy that counts as rounding."""

MOST = 64
"""Leading directions of updates whose rank no r bounds, unless r itself is larger."""


def leading(module: Module, update: Update) -> int:
    """The leading directions that subspaces are compared by: r of a product, else all up to ``max(r, 64)``.

    An r that only says how long the smaller side of the matrix is counts as none.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis import Adapter, DenseUpdate
    >>> adapter = Adapter({"m": DenseUpdate(torch.zeros(500, 400))})
    >>> leading(adapter.modules["m"], adapter["m"])
    64
    """
    if isinstance(update, LowRankUpdate) and update.r == module.r:
        return min(module.r, *module.shape)
    chosen = module.r if module.r < min(module.shape) else 0
    return min(_columns(update), max(chosen, MOST))


def last_k(module: Module) -> int:
    """The last default k: r, or 64 where r only says how long the smaller side of the matrix is.

    At least 1: a module without rank still has its row, which says so. Reads the update only where r does not tell.
    """
    r = min(module.r, *module.shape)
    return max(1, min(r, leading(module, module.read())) if MOST < r == min(module.shape) else r)


def usable_svd(
    module: Module, k: int | None = None, *, scale_bound: bool, leading_only: bool = False
) -> tuple[Svd | None, list[str]]:
    """The SVD of a module's update up to its numerical rank, or none; and the flags of all its rows.

    Parameters
    ----------
    module : Module
    k : int, optional
        Keep at most k triples.
    scale_bound : bool
        Whether what is asked depends on the scale, so that there is no answer where it is unknown.
    leading_only : bool
        Keep at most those that ``leading`` counts; where these are not all, the flag says so.
    """
    flags = module_flags(module)
    unknown = module.scale_source == "unknown"
    if unknown and scale_bound:
        return None, flags
    update = module.read()
    if unknown:
        update = with_scale(update, 1.0)
    try:
        svd = update.svd(leading(module, update) if leading_only else k)
    except UndefinedUpdateError:
        return None, [*flags, "nonfinite"]
    rank = numerical_rank(svd.S, module.shape)
    top = svd.top(rank)
    flags += ["zero"] * (rank == 0)
    if leading_only and rank and energy_left(update, top) > WHOLE:
        flags.append("leading-only")
    return Svd(top.U.cpu(), top.S.cpu(), top.Vh.cpu()), flags


def energy_left(update: Update, svd: Svd) -> float:
    """The share of an update's energy that some of its triples leave out, in [0, 1]."""
    if isinstance(update, LowRankUpdate) and len(svd.S) == min(update.r, *update.shape):
        return 0.0
    whole = update.norm() ** 2
    return max(0.0, 1 - float(svd.S.square().sum()) / whole) if whole > 0 else 0.0


def _columns(update: Update) -> int:
    """What bounds the rank of an update, by the shapes of what it is made of."""
    if isinstance(update, KroneckerUpdate):
        return _columns(update.left) * _columns(update.right)
    return min(update.r, *update.shape) if isinstance(update, LowRankUpdate) else min(update.shape)
