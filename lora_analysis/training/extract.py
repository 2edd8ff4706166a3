"""Between a live model and an ``Adapter``: reading the LoRA layers out, and putting an adapter on.

Values
------
``extract``, ``attach``.
"""

from __future__ import annotations

import math

from torch import nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.training.inject import (
    Place,
    matrix_shape,
    peft_layers,
    places,
    put,
    refusal,
    require_dropout,
    require_unadapted,
)
from lora_analysis.training.layers import LoraLayer, lora_layers
from lora_analysis.training.peft_model import extract_peft
from lora_analysis.update import LowRankUpdate


def extract(
    model: nn.Module, *, source: str = "model", name: str | None = None, initial: Adapter | None = None
) -> Adapter:
    """The updates of a model's LoRA layers, as an adapter like one read from a file.

    The factors are copies, on the model's device; later training does not move them. A merged model
    gives the same updates as an unmerged one.

    Parameters
    ----------
    model : Module
        A model adapted by ``inject`` or ``attach``, or by peft's LoRA. In peft's the layers' own scales count,
        also where they were changed (``set_scale``), and the live base is taken for what needs one.
    source : str
        What to call it in tables.
    name : str, optional
        Which adapter, in a model of peft with several.
    initial : Adapter, optional
        The factors that training started from, where peft subtracted them from the base (PiSSA and its like). Taken
        before training with ``initial=Adapter({})``, which subtracts nothing.

    Returns
    -------
    Adapter
        One update per module, named as in the state dict of the model before it was adapted.

    Raises
    ------
    ValueError
        If the model has no LoRA layers, or not the adapter asked for.
    UnsupportedAdapterError
        If it has layers of peft of another kind.
    BaseWeightsError
        If DoRA's update would need a base that has updates merged into it.
    """
    if peft_layers(model):
        return extract_peft(model, name=name, source=source, initial=initial)
    if name is not None or initial is not None:
        raise ValueError(f"{source}: name= and initial= are for models of peft, and this is none. Leave them out.")
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{source}: expected a model with LoRA layers, got none. Call training.inject or attach first."
        )
    return Adapter(
        {
            name: LowRankUpdate(up=layer.lora_B.detach().clone(), down=layer.lora_A.detach().clone(), scale=layer.scale)
            for name, layer in layers.items()
        },
        targets={name: Target(f"{name}.weight", transposed=layer.transposed) for name, layer in layers.items()},
        source=source,
    )


def attach(model: nn.Module, adapter: Adapter, *, dropout: float = 0.0) -> list[str]:
    """Freeze a model and put an adapter onto it as LoRA layers that go on training, in place.

    Factors are copied in the dtype ``inject`` would give them. Which way a weight is stored is read from
    the model; the adapter's ``transposed`` is not needed. ``lora_A0`` is the A of the adapter.

    Parameters
    ----------
    model : Module
        A model without LoRA layers.
    adapter : Adapter
        Of low-rank updates with known scales, each on a whole ``Linear`` or ``Conv1D`` weight.
    dropout : float
        On the input of A while training, in [0, 1).

    Returns
    -------
    list of str
        Names of the adapted modules, in the adapter's order.

    Raises
    ------
    BaseWeightsError
        If the model lacks a module, or its shape does not fit.
    UnsupportedAdapterError
        If an update is not one product of factors, acts on a slice of a weight, or on a module that
        cannot be adapted.
    UndefinedUpdateError
        If a scale is unknown, or a factor holds NaN or infinities.
    ValueError
        If the adapter is empty or the model has LoRA layers already. The model is always left as it was.

    Examples
    --------
    >>> import torch
    >>> update = LowRankUpdate(torch.ones(2, 1), torch.ones(1, 3), scale=0.5)
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> attach(model, Adapter({"0": update}))
    ['0']
    >>> extract(model)["0"].dense().tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    require_dropout(dropout)
    require_unadapted(model)
    if not adapter:
        raise ValueError(f"{adapter.source}: expected an adapter with modules, got none.")
    found = _places_of(model, adapter)
    layers: list[LoraLayer] = []
    for module, place in found.items():
        update = adapter[module]
        where = f"{adapter.source}: {module!r}"
        if not isinstance(update, LowRankUpdate):
            raise UnsupportedAdapterError(
                f"{where}: expected an update with factors A and B, got {update!r}. It cannot be trained as LoRA."
            )
        if math.isnan(update.scale):
            raise UndefinedUpdateError(
                f"{where}: expected a known scale, got none. Pass alpha= when loading the adapter."
            )
        if not (update.finite and math.isfinite(update.scale)):
            raise UndefinedUpdateError(f"{where}: expected finite factors and scale, got NaN or infinities.")
        if update.shape != matrix_shape(place.module):
            raise BaseWeightsError(
                f"{where}: expected the update's (d_out, d_in) = {update.shape}, "
                f"got {matrix_shape(place.module)} in the model. Attach it to the base it was trained on."
            )
        layers.append(
            LoraLayer(
                place.module,
                update.down,
                update.up,
                alpha=update.scale * update.r,
                scale=update.scale,
                dropout=dropout,
            )
        )
    model.requires_grad_(False)
    for place, layer in zip(found.values(), layers, strict=True):
        put(model, place, layer)
    return [place.names[0] for place in found.values()]


def _places_of(model: nn.Module, adapter: Adapter) -> dict[str, Place]:
    """Where in the model each module of the adapter goes, each place taken once."""
    by_name = {name: place for place in places(model) for name in place.names}
    targets = adapter.targets
    for module, target in targets.items():
        if target.rows is not None or target.columns is not None or target.expert is not None:
            raise UnsupportedAdapterError(
                f"{adapter.source}: {module!r}: expected an update of a whole weight, got one of a slice of "
                f"{target.tensor!r}. Blocks of fused weights and experts cannot be attached."
            )
    names = {module: target.tensor.removesuffix(".weight") for module, target in targets.items()}
    missing = [name for name in names.values() if name not in by_name]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BaseWeightsError(
            f"{adapter.source}: expected a module {missing[0]!r}{more} in {type(model).__name__}, got none. "
            f"Its modules begin with {', '.join(repr(name) for name in list(by_name)[1:4])}."
        )
    found = {module: by_name[name] for module, name in names.items()}
    taken: dict[int, str] = {}
    for module, place in found.items():
        if (reason := refusal(model, place)) is not None:
            raise UnsupportedAdapterError(f"{adapter.source}: {reason}")
        if (other := taken.setdefault(id(place.module), module)) != module:
            raise UnsupportedAdapterError(
                f"{adapter.source}: expected one update per module of the model, got {other!r} and {module!r} "
                f"for {place.names[0]!r}."
            )
    return found
