"""Reading the updates of a live model out, as an adapter like one read from a file.

Values
------
``extract``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import nn

from lora_analysis.adapter import Adapter, Contents, Module, Origin, Target
from lora_analysis.formats.peft.lora import LOW_RANK_PART
from lora_analysis.formats.products import true_update
from lora_analysis.training.factors import LoraFactors
from lora_analysis.training.kinds import EMBEDDING
from lora_analysis.training.layers import LoraLayer, Site, sites
from lora_analysis.training.merging import parametrized, stored_weight
from lora_analysis.training.peft_model import extract_peft
from lora_analysis.training.switching import chosen_adapter
from lora_analysis.training.targets import peft_layers
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update

Given = TypeVar("Given")

Dora = Literal["update", "factors"]
"""What of DoRA: all it changes of the weight, or its factors and magnitudes apart, as files hold them."""


def extract(
    model: nn.Module,
    *,
    source: str = "model",
    name: str | None = None,
    initial: Adapter | None = None,
    dora: Dora = "update",
) -> Adapter:
    """The updates of a model's LoRA layers, as an adapter like one read from a file.

    The factors are copies, on the model's device; later training does not move them. A merged model
    gives the same updates as an unmerged one. An update that is less what it began with (PiSSA) has twice the r.
    Biases and modules that trained in full beside the factors are no updates; ``training.export.save_peft`` writes
    those too.

    Parameters
    ----------
    model : Module
        A model adapted by ``inject`` or ``attach``, or by peft's LoRA. In peft's the layers' own scales count,
        also where they were changed (``set_scale``), and the live base is taken for what needs one.
    source : str
        What to call it in tables.
    name : str, optional
        Which adapter, in a model with several.
    initial : Adapter, optional
        The factors that training started from, where peft subtracted them from the base (PiSSA and its like). Taken
        before training with ``initial=Adapter({})``, which subtracts nothing. Not needed for this package's layers.
    dora : {"update", "factors"}
        All that DoRA changes of the weight, a full matrix; or its low-rank part, magnitudes beside it, which
        ``save_adapter`` writes. Of this package's layers.

    Returns
    -------
    Adapter
        One update per module, named as in the state dict of the model before it was adapted: ``<module>.<block>`` for
        blocks of a fused weight, ``<module>.<number>`` for experts.

    Raises
    ------
    ValueError
        If the model has no LoRA layers, or not the adapter asked for.
    UnsupportedAdapterError
        If it has layers of peft of another kind.
    BaseWeightsError
        If peft's DoRA needs a base that has updates merged into it.
    """
    if peft_layers(model):
        return extract_peft(model, name=name, source=source, initial=initial)
    if initial is not None:
        raise ValueError(f"{source}: initial= is for models of peft, and this is none. Leave it out.")
    chosen = chosen_adapter(model, name, source=source)
    modules: dict[str, Module] = {}
    for where, site in sites(model).items():
        if chosen in site.adapters:
            modules |= _modules(model, where, site, site.adapters.named()[chosen], dora)
    return _adapter(modules, source)


def _adapter(modules: dict[str, Module], source: str) -> Adapter:
    return Adapter.from_contents(
        Contents(modules), source=source, format="memory", origin=Origin(_adapter, (modules, source))
    )


def _modules(model: nn.Module, where: str, site: Site, factors: LoraFactors, dora: Dora) -> dict[str, Module]:
    """The module of a site, or one for each block or expert."""
    storage, target = site.storage, _target(model, where, site)
    if storage.view is not None:
        stored = storage.stored(factors.delta_w()).flatten(1)
        return {where: _module(DenseUpdate(stored, declared_r=factors.r, stored_eps=math.nan), target)}
    if storage.experts is not None:
        updates = _products(factors)
        return {f"{where}.{e}": _module(one, replace(target, expert=e)) for e, one in enumerate(updates)}
    if factors.blocks:
        return {
            f"{where}.{block.name}": _module(one, replace(target, rows=(block.start, block.stop)))
            for block, one in zip(factors.blocks, _products(factors), strict=True)
        }
    (update,) = _products(factors)
    if factors.lora_magnitude is None:
        embedding = isinstance(site, LoraLayer) and site.kind is EMBEDDING
        return {where: replace(_module(update, target), embedding=embedding)}
    magnitude = factors.lora_magnitude.detach().clone()
    if dora == "factors":
        made = replace(_module(update, target), magnitude=partial(_given, magnitude), flags=(LOW_RANK_PART,))
        return {where: made}
    weight = stored_weight(model, site) if site.original is None else site.original
    return {where: _module(true_update(update, storage.matrix(weight.detach()), magnitude), target)}


def _products(factors: LoraFactors) -> list[LowRankUpdate]:
    """The update of the whole matrix, or those of its blocks, or of the experts, in their order."""
    with torch.no_grad():
        pairs = factors.pairs()
        if factors.less_initial:
            first = factors.pairs(initial=True)
            pairs = [
                (torch.cat([A, A0]), torch.cat([B, -B0], -1)) for (A, B), (A0, B0) in zip(pairs, first, strict=True)
            ]
        return [LowRankUpdate(up=B.clone(), down=A.clone(), scale=factors.scale) for A, B in pairs]


def _module(update: Update, target: Target) -> Module:
    return Module(update.shape, update.r, update.scale, "caller", target, (), partial(_given, update))


def _given(value: Given) -> Given:
    return value


def _target(model: nn.Module, where: str, site: Site) -> Target:
    storage = site.storage
    if isinstance(site, LoraLayer):
        tensor = f"{where}.weight"
    else:
        _, attribute = parametrized(model, site)
        tensor = f"{where}.weight" if attribute == "weight" else where
    return Target(tensor, transposed=storage.transposed, kernel=storage.shape[2:] if storage.experts is None else ())
