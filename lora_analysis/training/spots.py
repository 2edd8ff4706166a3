"""The weights that an adapter is to be put on, and putting its factors there.

Values
------
``Spot``; ``spots_of``, ``place_factors``, ``to_weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_analysis.training.factors import LoraFactors
from lora_analysis.training.kinds import Kind, kind_of
from lora_analysis.training.layers import LoraLayer, LoraParameter
from lora_analysis.training.storage import Storage
from lora_analysis.training.targets import (
    OwnedParameter,
    Place,
    Targets,
    matching,
    matching_parameters,
    put,
    refusal,
)


class Spot(NamedTuple):
    """A weight that an adapter is to be put on, and what is known of it."""

    name: str
    storage: Storage
    weight: nn.Parameter
    kind: Kind | None
    place: Place | OwnedParameter


def spots_of(
    model: nn.Module, targets: Targets, parameters: Iterable[str] | Mapping[str, tuple[int, int] | None] = ()
) -> list[Spot]:
    """The weights that are meant, each checked to be one that can be adapted.

    Raises
    ------
    ValueError
        If nothing is meant, or something that cannot be adapted.
    """
    given = dict(parameters) if isinstance(parameters, Mapping) else dict.fromkeys(parameters)
    nothing = not isinstance(targets, str | type) and not (targets := list(targets))
    chosen = [] if nothing and given else matching(model, targets)
    spots = []
    for place in chosen:
        if (reason := refusal(model, place)) is not None:
            raise ValueError(reason)
        kind = cast(Kind, kind_of(place.base))
        spots.append(Spot(place.names[0], kind.storage(place.base), place.base.get_parameter("weight"), kind, place))
    for name, view in given.items():
        spots += [_parameter_spot(one, view) for one in matching_parameters(model, [name])]
    names = [spot.name for spot in spots]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r}: expected each weight once, got it as a module and as a parameter, or twice.")
    return spots


def to_weight(factors: LoraFactors, weight: Tensor) -> None:
    """Move factors to the device of a weight, in its dtype, or in float32 where that has 16 bits."""
    factors.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def place_factors(model: nn.Module, spot: Spot, adapter: str, factors: LoraFactors) -> None:
    """Put an adapter's factors onto a weight, beside those that are there, on its device and at least in float32."""
    to_weight(factors, spot.weight)
    if isinstance(spot.place, Place):
        module = spot.place.module
        if not isinstance(module, LoraLayer):
            layer = LoraLayer(module)
            put(model, spot.place, layer)
        else:
            layer = module
        layer.add(adapter, factors)
        factors.train(layer.training)
        return
    owner, attribute = spot.place.owner, spot.place.attribute
    site = _parameter_site(owner, attribute)
    if site is None:
        site = LoraParameter(spot.storage)
        parametrize.register_parametrization(owner, attribute, site)
    site.add(adapter, factors)


def _parameter_spot(one: OwnedParameter, view: tuple[int, int] | None) -> Spot:
    site = _parameter_site(one.owner, one.attribute)
    if site is None and parametrize.is_parametrized(one.owner, one.attribute):
        raise ValueError(f"{one.name!r}: expected a plain parameter, got one that is parametrized by something else.")
    if site is None:
        weight = one.owner.get_parameter(one.attribute)
        if not weight.is_floating_point() or weight.dim() < 2:
            raise ValueError(
                f"parameters: {one.name!r}: expected a floating-point tensor of at least two axes, got "
                f"{tuple(weight.shape)} in {weight.dtype}."
            )
        shape = tuple(weight.shape)
        if view is not None and math.prod(view) != weight.numel():
            raise ValueError(f"parameters: {one.name!r}: a tensor {shape} cannot be viewed as {tuple(view)}.")
        stacked = view is None and len(shape) == 3 and not isinstance(one.owner, nn.Conv1d)
        turned = view is None and (bool(getattr(one.owner, "is_transposed", False)) if stacked else _is_turned(one))
        storage = Storage(shape, transposed=turned, experts=shape[0] if stacked else None, view=view)
    else:
        storage = site.storage
        weight = cast(nn.Parameter, cast(Any, one.owner.parametrizations)[one.attribute].original)
    return Spot(one.name.removesuffix(".weight"), storage, weight, None, one)


def _is_turned(one: OwnedParameter) -> bool:
    kind = kind_of(one.owner)
    return kind is not None and kind.transposed and one.attribute == "weight"


def _parameter_site(owner: nn.Module, attribute: str) -> LoraParameter | None:
    if not parametrize.is_parametrized(owner, attribute):
        return None
    steps = list(cast(Any, owner.parametrizations)[attribute])
    return steps[0] if len(steps) == 1 and isinstance(steps[0], LoraParameter) else None
