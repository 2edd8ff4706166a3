"""Putting an adapter, of a file or of another model, onto a live model.

Values
------
``attach``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.training.factors import Block, LoraFactors
from lora_analysis.training.inject import require_adapter_name, require_dropout, require_no_peft
from lora_analysis.training.spots import Spot, place_factors, spots_of
from lora_analysis.training.switching import activate, require_new
from lora_analysis.training.targets import Place, places, refusal
from lora_analysis.update import LowRankUpdate


class _Member(NamedTuple):
    """One update of the adapter, on the weight it belongs to or a part of it."""

    module: str
    target: Target
    update: LowRankUpdate


def attach(model: nn.Module, adapter: Adapter, *, name: str = "default", dropout: float = 0.0) -> list[str]:
    """Freeze a model and put an adapter onto it as LoRA layers that go on training, in place.

    Factors are copied in the dtype ``inject`` would give them. Which way a weight is stored is read from
    the model; the adapter's ``transposed`` is not needed. What counts as initial is the adapter as it is given.

    Parameters
    ----------
    model : Module
        With or without other adapters; this one alone acts until ``activate`` says otherwise.
    adapter : Adapter
        Of low-rank updates with known scales. Blocks of a fused weight, experts and convolutions are put back where
        they belong; DoRA's magnitudes are, where the updates are its low-rank parts.
    name : str
        What to call it in the model.
    dropout : float
        On the input of A while training, in [0, 1).

    Returns
    -------
    list of str
        Names of the adapted weights, in the adapter's order.

    Raises
    ------
    BaseWeightsError
        If the model lacks a module, or its shape does not fit.
    UnsupportedAdapterError
        If an update is not one product of factors, acts on columns of a weight, or on a module that
        cannot be adapted, or if blocks or experts of one weight differ in r or scale.
    UndefinedUpdateError
        If a scale is unknown, or a factor holds NaN or infinities.
    ValueError
        If the adapter is empty, or the model has one of this name already. The model is always left as it was.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.training import extract
    >>> update = LowRankUpdate(torch.ones(2, 1), torch.ones(1, 3), scale=0.5)
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> attach(model, Adapter({"0": update}))
    ['0']
    >>> extract(model)["0"].dense().tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    require_dropout(dropout)
    require_adapter_name(name)
    require_no_peft(model)
    require_new(model, name)
    if not adapter:
        raise ValueError(f"{adapter.source}: expected an adapter with modules, got none.")
    members: dict[str, list[_Member]] = {}
    for module in adapter:
        target = adapter.targets[module]
        members.setdefault(target.tensor, []).append(_Member(module, target, _usable(adapter, module)))
    spots = _spots(model, adapter, members)
    made = [(spots[tensor], _factors(adapter, spots[tensor], some, dropout)) for tensor, some in members.items()]
    model.requires_grad_(False)
    for spot, factors in made:
        place_factors(model, spot, name, factors)
    activate(model, name)
    return [spot.name for spot, _ in made]


def _usable(adapter: Adapter, module: str) -> LowRankUpdate:
    where = f"{adapter.source}: {module!r}"
    if adapter.targets[module].columns is not None:
        raise UnsupportedAdapterError(f"{where}: an update of a slice of columns cannot be attached.")
    update = adapter[module]
    if not isinstance(update, LowRankUpdate):
        raise UnsupportedAdapterError(
            f"{where}: expected an update with factors A and B, got {update!r}. It cannot be trained as LoRA."
        )
    if math.isnan(update.scale):
        raise UndefinedUpdateError(f"{where}: expected a known scale, got none. Pass alpha= when loading the adapter.")
    if not (update.finite and math.isfinite(update.scale)):
        raise UndefinedUpdateError(f"{where}: expected finite factors and scale, got NaN or infinities.")
    return update


def _spots(model: nn.Module, adapter: Adapter, members: dict[str, list[_Member]]) -> dict[str, Spot]:
    """The weight of each of the adapter's tensors, each taken once."""
    by_name = {name: place for place in places(model) for name in place.names}
    found: dict[str, Spot] = {}
    taken: dict[tuple[int, str], str] = {}
    for tensor, some in members.items():
        module = tensor.removesuffix(".weight")
        place = by_name.get(module) if tensor.endswith(".weight") else None
        if place is not None and (refused := refusal(model, place)) is None:
            (spot,) = spots_of(model, [place.names[0]])
        elif _has_parameter(model, tensor) and not (place is not None and isinstance(place.base, nn.Embedding)):
            (spot,) = spots_of(model, (), [tensor])
        elif place is not None:
            raise UnsupportedAdapterError(f"{adapter.source}: {refused}")
        else:
            missing = [t for t in members if t.removesuffix(".weight") not in by_name and not _has_parameter(model, t)]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BaseWeightsError(
                f"{adapter.source}: expected a module {module!r}{more} in {type(model).__name__}, got none. "
                f"Its modules begin with {', '.join(repr(name) for name in list(by_name)[1:4])}."
            )
        # Not by the weight, which two modules may share, each with an update of its own.
        owner, attribute = (
            (spot.place.base, "weight") if isinstance(spot.place, Place) else (spot.place.owner, spot.place.attribute)
        )
        if (other := taken.setdefault((id(owner), attribute), some[0].module)) != some[0].module:
            raise UnsupportedAdapterError(
                f"{adapter.source}: expected one update per module of the model, got {other!r} and "
                f"{some[0].module!r} for {spot.name!r}."
            )
        found[tensor] = spot
    return found


def _has_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    try:
        return isinstance(getattr(model.get_submodule(owner), attribute, None), torch.Tensor)
    except AttributeError:
        return False


def _factors(adapter: Adapter, spot: Spot, members: Sequence[_Member], dropout: float) -> LoraFactors:
    """The factors of one weight, those of its blocks or experts put together."""
    first = members[0]
    where = f"{adapter.source}: {first.module!r}"
    if unlike := next(
        (m for m in members if (m.update.r, m.update.scale) != (first.update.r, first.update.scale)), None
    ):
        raise UnsupportedAdapterError(
            f"{where}: expected one r and one scale for the parts of {spot.name!r}, got {unlike.update!r} beside "
            f"{first.update!r}."
        )
    d_out, d_in = spot.storage.matrix_shape
    blocks: list[Block] = []
    if spot.storage.experts is None and (stray := next((m for m in members if m.target.expert is not None), None)):
        raise UnsupportedAdapterError(
            f"{adapter.source}: {stray.module!r}: expected stacked experts in {spot.name!r}, got one matrix."
        )
    if spot.storage.experts is not None:
        members = sorted(members, key=lambda member: -1 if member.target.expert is None else member.target.expert)
        if [member.target.expert for member in members] != list(range(spot.storage.experts)):
            raise UnsupportedAdapterError(
                f"{where}: expected an update of each of {spot.storage.experts} experts of {spot.name!r}, got "
                f"{len(members)}."
            )
    elif any(member.target.rows is not None for member in members):
        members = sorted(members, key=lambda member: member.target.rows or (0, d_out))
        blocks = [Block(m.module.rpartition(".")[2], *(m.target.rows or (0, d_out))) for m in members]
    for member in members:
        rows = d_out if member.target.rows is None else member.target.rows[1] - member.target.rows[0]
        if member.update.shape != (rows, d_in):
            raise BaseWeightsError(
                f"{adapter.source}: {member.module!r}: expected the update's (d_out, d_in) = {member.update.shape}, "
                f"got {(rows, d_in)} in the model. Attach it to the base it was trained on."
            )
    ends = [0, *(block.stop for block in blocks)]
    apart = all(block.start >= end for block, end in zip(blocks, ends, strict=False)) and ends[-1] <= d_out
    if not apart or (len(members) > 1 and not blocks and spot.storage.experts is None):
        raise UnsupportedAdapterError(
            f"{adapter.source}: expected one update for each part of a weight of the model, got {first.module!r} and "
            f"{members[-1].module!r} for {spot.name!r}."
        )
    join = torch.cat if spot.storage.experts is None else torch.stack
    magnitude = adapter.modules[first.module].magnitude
    if magnitude is not None and blocks:
        raise UnsupportedAdapterError(f"{where}: blocks with DoRA's magnitudes cannot be attached.")
    m = None if magnitude is None else magnitude().flatten()
    if m is not None and not bool(m.isfinite().all()):
        raise UndefinedUpdateError(f"{where}: expected finite magnitudes, got NaN or infinities.")
    return LoraFactors(
        join([member.update.down for member in members]),
        join([member.update.up for member in members]),
        d_out=d_out,
        scale=first.update.scale,
        alpha=first.update.scale * first.update.r,
        dropout=dropout,
        blocks=blocks,
        magnitude=m,
    )
