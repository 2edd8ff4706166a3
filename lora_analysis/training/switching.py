"""Several adapters on one model: which act, with what weights, and taking some off.

Values
------
``adapters``, ``activate``, ``remove``, ``chosen_adapter``, ``trained_in_full``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import nn

from lora_analysis.training.layers import LoraLayer, sites
from lora_analysis.training.merging import require_sites, take_out
from lora_analysis.training.targets import places


def adapters(model: nn.Module) -> dict[str, list[str]]:
    """The adapters of a model, each with the names of the weights it is on; empty if there is none.

    Examples
    --------
    >>> from lora_analysis.training import inject
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    >>> inject(model, ["query"], adapter="a"), inject(model, ["query", "value"], adapter="b")
    (['query'], ['query', 'value'])
    >>> adapters(model)
    {'a': ['query'], 'b': ['query', 'value']}
    """
    found: dict[str, list[str]] = {}
    for name, site in sites(model).items():
        for adapter in site.adapters:
            found.setdefault(adapter, []).append(name)
    return found


def activate(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Say which adapters act, and with what weights; those alone take gradients, and what trains in full beside them.

    Parameters
    ----------
    model : Module
    which : str, mapping of str to float, or None
        An adapter; several with their weights, ``ΔW = sum_a weight_a · ΔW_a``; or None, where the model is its base.
        Biases and modules that trained in full have no second copy, and stay as they were trained.

    Raises
    ------
    ValueError
        If the model has no such adapter, is merged, a weight is not finite, or DoRA is to act together with another
        adapter or with a weight other than 1: its magnitudes rescale the base, which no sum can express.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.training import inject
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> for name in ("a", "b"):
    ...     _ = inject(model, ["0"], adapter=name)
    >>> activate(model, {"a": 0.7, "b": 0.3})
    """
    weights = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    found = require_sites(model)
    known = adapters(model)
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"expected an adapter named {name!r}, got {', '.join(map(repr, known))}.")
        if not math.isfinite(weight):
            raise ValueError(f"{name!r}: expected a finite weight, got {weight}.")
    for where, site in found.items():
        if site.merged:
            raise ValueError(f"{where!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
        here = {name: weight for name, weight in weights.items() if name in site.adapters}
        dora = [name for name in here if site.adapters.named()[name].lora_magnitude is not None]
        if dora and (len(here) > 1 or here[dora[0]] != 1):
            raise ValueError(
                f"{where!r}: {dora[0]!r} is DoRA, whose magnitudes rescale the base: it acts alone, with weight 1."
            )
    for site in found.values():
        site.adapters.active = {name: weight for name, weight in weights.items() if name in site.adapters}
        for name, factors in site.adapters.named().items():
            factors.trainable(name in weights)
    for name in sorted(known, key=weights.__contains__):  # those that act last, for two may share a module
        for parameter in trained_in_full(model, name).values():
            parameter.requires_grad_(name in weights)


def remove(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Take an adapter off a model, or all of them.

    A weight without adapters is the model's own again. No other adapter takes its place: call ``activate``. What
    trained in full beside it stays as it is, frozen.

    Parameters
    ----------
    model : Module
    adapter : str, optional
        All adapters by default.

    Returns
    -------
    list of str
        Names of the weights it was on.

    Raises
    ------
    ValueError
        If there is none, or something is merged.
    """
    found = require_sites(model)
    known = adapters(model)
    if adapter is not None and adapter not in known:
        raise ValueError(f"expected an adapter named {adapter!r}, got {', '.join(map(repr, known))}.")
    if merged := [name for name, site in found.items() if site.merged]:
        raise ValueError(f"{merged[0]!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
    for departing in known if adapter is None else [adapter]:
        for parameter in trained_in_full(model, departing).values():
            parameter.requires_grad_(False)
    gone = []
    for name, site in found.items():
        leaving = [one for one in site.adapters if adapter in (None, one)]
        for one in leaving:
            del site.adapters[one]
            site.adapters.active.pop(one, None)
        if leaving:
            gone.append(name)
        if not site.adapters:
            take_out(model, site)
    return gone


def trained_in_full(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters that train beside the factors of an adapter, by their names in the plain model.

    Biases are parameters called ``bias``, ``bias_…`` or ``…_bias``, of torch's recurrent and attention layers.
    """
    beside = next((s.adapters.named()[adapter].beside for s in sites(model).values() if adapter in s.adapters), None)
    if beside is None or (beside.bias == "none" and not beside.modules):
        return {}
    found: dict[str, nn.Parameter] = {}
    for place in places(model):
        adapted = isinstance(place.module, LoraLayer) and adapter in place.module.adapters
        whole = any(place.names[0] == name or place.names[0].startswith(f"{name}.") for name in beside.modules)
        biases = beside.bias == "all" or (beside.bias == "lora_only" and adapted)
        for name, parameter in place.base.named_parameters(recurse=False):
            if whole or (biases and _BIAS.fullmatch(name)):
                found[f"{place.names[0]}.{name}".removeprefix(".")] = parameter
    return found


_BIAS = re.compile(r"bias(_.*)?|.*_bias")


def chosen_adapter(model: nn.Module, name: str | None, *, source: str = "model") -> str:
    """The adapter of this name, or the only one.

    Raises
    ------
    ValueError
        If the model has none, not this one, or several and none is named.
    """
    known = adapters(model)
    if not known:
        raise ValueError(
            f"{source}: expected a model with LoRA layers, got none. Call training.inject or attach first."
        )
    if name is None and len(known) > 1:
        raise ValueError(f"{source}: expected one adapter, got {', '.join(map(repr, known))}. Pass name= with one.")
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        raise ValueError(f"{source}: expected an adapter named {chosen!r}, got {', '.join(map(repr, known))}.")
    return chosen


def require_new(model: nn.Module, adapter: str) -> None:
    """Refuse a model that has an adapter of this name, or is merged."""
    if names := adapters(model).get(adapter):
        raise ValueError(
            f"{names[0]!r}: expected a model without an adapter named {adapter!r}, got one on {len(names)} weights. "
            "Pass another adapter=, or start from a fresh copy of the base model."
        )
    if merged := next((name for name, site in sites(model).items() if site.merged), None):
        raise ValueError(f"{merged!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
