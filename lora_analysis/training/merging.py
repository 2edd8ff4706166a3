"""Folding updates into the weights of a model, and taking them out again bit for bit.

Conventions
-----------
Merged is ``W' = W + sum_a weight_a · ΔW_a`` over the adapters that act, or DoRA's ``m · (W + ΔW) / ‖W + ΔW‖``: computed
in float64 and converted once to the dtype of the weight. Weights change in place, so references to them stay valid,
and what they were is kept beside them: nothing is subtracted again. All sites are merged, or none.

Values
------
``merge``, ``unmerge``, ``merge_and_unload``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.training.layers import LoraLayer, LoraParameter, Site, sites
from lora_analysis.training.targets import parents_of

_ROWS = 64
"""Rows of a weight merged at a time: 2 MB of float64 at a width of 4096."""


def merge(model: nn.Module) -> None:
    """Fold the active updates into their weights; a merged layer adds nothing to what its base costs.

    Parameters
    ----------
    model : Module
        A model adapted by ``inject`` or ``attach``.

    Raises
    ------
    ValueError
        If the model is not adapted, something is merged already (an update is never added twice), or a weight is tied
        to another module's, which would change with it.
    UndefinedUpdateError
        If a merged weight would hold NaN or infinities. The model is left as it was.
    """
    found = require_sites(model)
    for name, site in found.items():
        if site.merged:
            raise ValueError(f"{name!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
    weights = {name: stored_weight(model, site) for name, site in found.items()}
    _require_untied(model, found, weights)
    try:
        for name, site in found.items():
            weight = weights[name].data
            site.original = weight.clone()
            if not _write_merged(site, weight):
                raise UndefinedUpdateError(
                    f"{name!r}: expected a finite merged weight, got NaN or infinities in {weight.dtype}. "
                    "Check the factors, or convert the model to a wider dtype."
                )
    except BaseException:  # memory may run out, or the user interrupt
        for earlier, written in found.items():
            if written.merged:
                _restore(written, weights[earlier])
        raise


def unmerge(model: nn.Module) -> None:
    """Put every weight back as it was before ``merge``, bit for bit.

    Raises
    ------
    ValueError
        If the model is not adapted, or something is not merged.
    """
    found = require_sites(model)
    for name, site in found.items():
        if not site.merged:
            raise ValueError(f"{name!r}: expected a merged layer, got an unmerged one. Call merge first.")
    for site in found.values():
        _restore(site, stored_weight(model, site))


def merge_and_unload(model: nn.Module) -> list[str]:
    """Fold the active updates into their weights for good, and take everything of LoRA out of the model.

    The model has its own layers again, with no trace of adapters and the same cost; which parameters take gradients
    is left as it is.

    Returns
    -------
    list of str
        Names of the modules that were adapted.

    Raises
    ------
    ValueError, UndefinedUpdateError
        As ``merge``; the model is left as it was. One that is merged already is only unloaded.

    Examples
    --------
    >>> from lora_analysis.training import inject
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> inject(model, ["0"], r=1), merge_and_unload(model)
    (['0'], ['0'])
    >>> model
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    found = require_sites(model)
    if not all(site.merged for site in found.values()):
        merge(model)
    for site in found.values():
        take_out(model, site)
    return list(found)


def take_out(model: nn.Module, site: Site) -> None:
    """Put the base in the place of a site, under every name that has it."""
    if isinstance(site, LoraLayer):
        for parent, attribute in parents_of(model, site):
            setattr(parent, attribute, site.base_layer)
        return
    owner, attribute = parametrized(model, site)
    parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)


def require_sites(model: nn.Module) -> dict[str, Site]:
    """The sites of a model that is adapted.

    Raises
    ------
    ValueError
        If it is not.
    """
    found = sites(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__}: expected a model with LoRA layers, got none. Call inject or attach first."
        )
    return found


def stored_weight(model: nn.Module, site: Site) -> nn.Parameter:
    """The base's tensor of a site, without any update that acts on it."""
    if isinstance(site, LoraLayer):
        return site.weight
    owner, attribute = parametrized(model, site)
    return cast(nn.Parameter, cast(nn.ModuleDict, owner.parametrizations)[attribute].original)


def parametrized(model: nn.Module, site: LoraParameter) -> tuple[nn.Module, str]:
    """The module that has a parametrised tensor, and what the tensor is called there."""
    for owner in model.modules():
        if parametrize.is_parametrized(owner):
            for attribute, steps in cast(nn.ModuleDict, owner.parametrizations).items():
                if any(step is site for step in cast(parametrize.ParametrizationList, steps)):
                    return owner, attribute
    raise ValueError("expected a parametrisation of this model, got one of another.")


def _restore(site: Site, weight: nn.Parameter) -> None:
    assert site.original is not None
    weight.data.copy_(site.original)
    site.original = None


def _write_merged(site: Site, weight: Tensor) -> bool:
    """Write ``W + ΔW`` over a weight, and whether all of it is finite."""
    acting = site.adapters.acting()
    if not acting:
        return True
    products = [factors.product() for factors, _ in acting]
    up = torch.cat([up for up, _ in products], -1)
    scaled = zip(acting, products, strict=True)
    down = torch.cat([part * factors.scale * down for (factors, part), (_, down) in scaled], -2)
    storage, magnitude = site.storage, acting[0][0].lora_magnitude
    if storage.experts is not None:
        return all(_add(part, up[e], down[e], transposed=storage.transposed) for e, part in enumerate(weight))
    if magnitude is None and len(storage.shape) == 2 and storage.view is None:
        return _add(weight, up, down, transposed=storage.transposed)
    whole = storage.matrix(weight.double()) + up @ down
    if magnitude is not None:
        whole = (magnitude.detach().double() / torch.linalg.vector_norm(whole, dim=1))[:, None] * whole
    weight.copy_(storage.stored(whole).to(weight.dtype))
    return _finite(whole, weight.dtype)


def _add(weight: Tensor, up: Tensor, down: Tensor, *, transposed: bool) -> bool:
    """Add a product to a matrix, by blocks of rows that stay in cache: no float64 copy of it is made."""
    left, right = (down.mT, up.mT) if transposed else (up, down)
    for start in range(0, len(weight), _ROWS):
        block = slice(start, start + _ROWS)
        merged = torch.addmm(weight[block].double(), left[block], right)
        if not _finite(merged, weight.dtype):
            return False
        weight[block] = merged.to(weight.dtype)
    return True


def _finite(matrix: Tensor, dtype: torch.dtype) -> bool:
    return float(torch.linalg.vector_norm(matrix, torch.inf)) <= torch.finfo(dtype).max


def _require_untied(model: nn.Module, found: dict[str, Site], weights: dict[str, nn.Parameter]) -> None:
    users: dict[int, set[int]] = {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))
            names.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for name, site in found.items():
        key = id(weights[name])
        if len(users[key]) > 1:
            own = name.rpartition(".")[0] if isinstance(site, LoraParameter) else name
            other = next((user for user in names[key] if user not in (name, own)), names[key][-1])
            raise ValueError(
                f"{name!r}: its weight is tied to that of {other!r}, which merging would change too. "
                "Give the layer its own copy of the weight, or leave the model unmerged."
            )
