"""The parts that an adapter is written as: its updates as products, blocks of one weight put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights
from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats.options import MAX_ALPHA
from lora_analysis.formats.writers.parts import Part, in_dtype, refactored, scaled
from lora_analysis.update import LowRankUpdate, Update


def parts_of(
    adapter: Adapter,
    *,
    r: int | None = None,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
) -> list[Part]:
    """The modules of an adapter as factors of whole matrices, without those of r = 0, which change nothing.

    Blocks of one fused weight are put together again, into factors whose r is the sum of theirs.

    Parameters
    ----------
    adapter : Adapter
    r : int, optional
        Cut updates that are not one product of at most r columns to their best rank-r part (Eckart-Young).
    dtype : torch.dtype, optional
        Of the factors. By default what is stored, and float32 for factors that had to be computed.
    base : BaseWeights, optional
        Says how many rows a fused weight has.

    Raises
    ------
    ValueError
        If there is nothing to save.
    UndefinedUpdateError
        If a scale is unknown, or an update holds NaN or infinities.
    UnsupportedAdapterError
        If an update is not a product of two factors and r is not given, has no place in a file of factors, or holds
        numbers beyond the dtype.
    """
    if r is not None and r < 1:
        raise ValueError(f"r: expected a positive integer, got {r}.")
    if not any(module.r for module in adapter.modules.values()):
        raise ValueError(f"{adapter.source}: expected an adapter with modules to save, got none of r > 0.")
    whole: dict[str, Part] = {}
    blocks: dict[str, list[Part]] = {}
    for name, module in adapter.modules.items():
        if module.r == 0:
            continue
        part = _part(adapter, name, module, r, dtype)
        if module.target.rows is None:
            whole[name] = part
        else:
            blocks.setdefault(module.target.tensor, []).append(part)
    for tensor, members in blocks.items():
        fused = _fused(adapter.source, tensor, members, base)
        if fused.name in whole:
            raise UnsupportedAdapterError(
                f"{adapter.source}: {fused.name!r}: expected one update of this weight to save, got one of the whole "
                f"and {len(members)} of blocks of its rows."
            )
        whole[fused.name] = fused
    return list(whole.values())


def _part(adapter: Adapter, name: str, module: Module, r: int | None, dtype: torch.dtype | None) -> Part:
    where = f"{adapter.source}: {name!r}"
    if math.isnan(module.scale):
        raise UndefinedUpdateError(f"{where}: expected a known scale to save, it is unknown. Pass alpha= when loading.")
    if module.target.expert is not None or module.target.columns is not None:
        kind = "one of many experts" if module.target.expert is not None else "a block of columns"
        raise UnsupportedAdapterError(
            f"{where}: expected an update of a whole matrix to save, got one of a slice of {module.target.tensor!r}, "
            f"{kind}: these are read, and not written in any format."
        )
    # By which every format's alpha is bounded when it is read.
    if math.isfinite(module.scale) and abs(module.scale) * module.r > MAX_ALPHA:
        raise UnsupportedAdapterError(
            f"{where}: expected a plausible scale to save, got {module.scale:g}. Multiply the factors by it and give "
            "them a scale of 1."
        )
    update = adapter[name]
    if not (math.isfinite(update.scale) and getattr(update, "finite", True)):
        raise UndefinedUpdateError(f"{where}: expected finite numbers to save, got NaN or infinities.")
    factored, error = _factored(where, update, r)
    # Of a true update, the magnitude has done its work.
    magnitude = module.magnitude() if module.magnitude and "dora-low-rank-part" in module.flags else None
    part = Part(
        name=name,
        target=module.target,
        up=factored.up.detach(),
        down=factored.down.detach(),
        scale=factored.scale,
        modules=(name,),
        magnitude=magnitude,
        magnitude_axis=module.magnitude_axis,
        embedding=module.embedding,
        truncation_error=error,
    )
    # Factors that are not as stored were computed in float64, which no consumer expects.
    wanted = dtype or (torch.float32 if factored.up.dtype == torch.float64 != _stored(update) else None)
    return part if wanted is None else in_dtype(adapter.source, part, wanted)


def _stored(update: Update) -> torch.dtype | None:
    """The dtype of factors that are as stored; None of computed ones."""
    if isinstance(update, LowRankUpdate) and update.stored_eps is None:
        return update.up.dtype
    return None


def _factored(where: str, update: Update, r: int | None) -> tuple[LowRankUpdate, float]:
    """The update as one product, and the exact error of cutting it to r."""
    if isinstance(update, LowRankUpdate) and (r is None or update.r <= r):
        return update, 0.0
    if r is None:
        raise UnsupportedAdapterError(
            f"{where}: expected a product of two factors to save, got {update!r}. Pass r= to cut it to its best "
            "rank-r part, with the error stated."
        )
    # The values again, for a Kronecker product has far more vectors than are wanted.
    kept, S = update.svd(r), update.singular_values()
    root = kept.S.sqrt()
    cut = LowRankUpdate(kept.U * root, root[:, None] * kept.Vh, 1.0, stored_eps=math.nan)
    return cut, float(S[r:].norm())


def _fused(source: str, tensor: str, members: Sequence[Part], base: BaseWeights | None) -> Part:
    """Blocks of rows of one weight as one update of the whole: stacked ``down``, block-diagonal ``up``."""
    module = tensor.removesuffix(".weight")
    if base is None:
        raise UnsupportedAdapterError(
            f"{source}: {module!r}: expected an update of a whole matrix to save, got {len(members)} blocks of its "
            "rows. Pass base=, which says how many rows it has."
        )
    if any(part.magnitude is not None for part in members):
        raise UnsupportedAdapterError(f"{source}: {module!r}: blocks with magnitudes cannot be put together.")
    target = replace(members[0].target, rows=None)
    # The first scale that divides; blocks of scale 0 are zero in any.
    scale = next((part.scale for part in members if part.scale != 0), 1.0)
    members = [
        part if part.scale == scale else refactored(source, part, scaled(part.up, part.scale / scale), part.down, scale)
        for part in members
    ]
    dtypes = {factor.dtype for part in members for factor in (part.up, part.down)}
    if len(dtypes) > 1:  # one that holds them all
        wanted = torch.float64 if torch.float64 in dtypes else torch.float32
        members = [in_dtype(source, part, wanted) for part in members]
    up = members[0].up.new_zeros(base.matrix(target).shape[0], sum(part.r for part in members))
    column = 0
    for part in members:
        up[slice(*(part.target.rows or ())), column : column + part.r] = part.up
        column += part.r
    return Part(
        name=module,
        target=target,
        up=up,
        down=torch.cat([part.down for part in members]),
        scale=scale,
        modules=tuple(name for part in members for name in part.modules),
        truncation_error=math.hypot(*(part.truncation_error for part in members)),
        rounding_error=math.hypot(*(part.rounding_error for part in members)),
    )
