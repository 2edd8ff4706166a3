"""The LoRA layers that peft put into a live model, read as if from a file, and what only the layers know.

Scales that were changed by hand, the parameter a wrapper adapts and the way a weight is stored are taken from the
layers themselves. peft is not imported: a model of peft brings it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Origin
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint import StateDict
from lora_analysis.errors import BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft import lora
from lora_analysis.formats.peft.names import MAGNITUDE, module_name
from lora_analysis.formats.peft.places import Live


class Taken(NamedTuple):
    """What was taken out of a model: all that an adapter made of it needs, and what it pickles as."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    name: str
    live: Mapping[str, Live]
    base: Mapping[str, Tensor]
    source: str
    initial: Adapter | None


def extract_peft(model: nn.Module, *, name: str | None, source: str, initial: Adapter | None) -> Adapter:
    """The updates of one of peft's LoRA adapters in a live model.

    Raises
    ------
    ValueError
        If the adapter asked for is not there, or several are and none is asked for.
    UnsupportedAdapterError
        If it is no LoRA, or of a kind that is not read.
    BaseWeightsError
        If it is DoRA, whose update needs the base, and the base has updates merged into it.
    """
    name, config = _configuration(model, name, source)
    layers = {
        module_name(path): layer
        for path, layer in model.named_modules()
        # An attention may have a number called scaling.
        if hasattr(layer, "get_delta_weight") and name in layer.scaling
    }
    state = {key: tensor.detach() for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    tensors = {key: tensor.clone() for key, tensor in state.items() if _is_of(key, name)}
    base: dict[str, Tensor] = {}
    if any(MAGNITUDE.match(key) for key in tensors):
        if merged := [stem for stem, layer in layers.items() if getattr(layer, "merged", False)]:
            raise BaseWeightsError(
                f"{source}: {merged[0]!r}: expected the base's own weights, which DoRA's update needs, got weights "
                "with updates merged into them. Call unmerge_adapter() first."
            )
        if initial is not None and len(initial):
            raise UnsupportedAdapterError(
                f"{source}: DoRA on a base that the initial factors were taken off. Save the adapter, and read it with "
                "load_adapter, initial= and base=, the published one."
            )
        # By reference: the base of an adapter in training does not move, and peft merges DoRA into new tensors.
        base = {key: tensor for key, tensor in state.items() if key.endswith(".base_layer.weight")}
    live = {stem: _said(layer, name) for stem, layer in layers.items()}
    return _adapter(Taken(tensors, config, name, live, base, source, initial))


def _adapter(taken: Taken) -> Adapter:
    device = next((tensor.device for tensor in taken.tensors.values()), torch.device("cpu"))
    base = None
    if taken.base:
        stored = {f"{stem}.weight": layer.transposed for stem, layer in taken.live.items()}
        base = BaseWeights(
            StateDict(taken.base),
            source=taken.source,
            reopen=lambda: (load_base, (dict(taken.base),)),
            device=device,
            stored=stored,
        )
    options = ReadOptions(
        where=taken.source,
        alpha=None,
        base=base,
        split=None,
        device=device,
        name=taken.name,
        initial=taken.initial,
    )
    contents = lora.read(StateDict(taken.tensors), taken.config, options, taken.live)
    if not contents.modules:
        raise ValueError(f"{taken.source}: expected LoRA layers of the adapter {taken.name!r}, found none.")
    return Adapter.from_contents(
        contents, source=taken.source, format="peft", origin=Origin(_adapter, (taken,)), config=taken.config
    )


def _configuration(model: nn.Module, name: str | None, source: str) -> tuple[str, dict[str, Any]]:
    """The adapter's name, and its configuration as ``adapter_config.json`` would hold it."""
    configurations = next(
        (found for module in model.modules() if isinstance(found := getattr(module, "peft_config", None), dict)), {}
    )
    names = ", ".join(map(repr, configurations)) or "none"
    if name is None and len(configurations) != 1:
        raise ValueError(f"{source}: expected one adapter of peft, got {names}. Pass name= with one of them.")
    chosen = next(iter(configurations)) if name is None else name
    if chosen not in configurations:
        raise ValueError(f"{source}: expected an adapter named {chosen!r}, found {names}.")
    config = {key: _plain(value) for key, value in configurations[chosen].to_dict().items()}
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{source}: expected LoRA, got the adapter {chosen!r} of kind {config.get('peft_type')!r}. Save it with "
            "save_pretrained and read the directory with load_adapter."
        )
    return chosen, config


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def _is_of(key: str, name: str) -> bool:
    """Whether a tensor of the model belongs to this adapter."""
    components = key.split(".")
    marked = any(c.startswith("lora_") or c in ("modules_to_save", "trainable_tokens_delta") for c in components)
    return marked and name in components


def _said(layer: Any, name: str) -> Live:
    scale = float(layer.scaling[name])
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        embedding = name in layer.lora_embedding_A
        return Live(scale, transposed=embedding or bool(getattr(layer, "fan_in_fan_out", False)))
    stored = tuple(layer.get_param().shape)
    if len(stored) == 2:
        return Live(scale, False, parameter, stored)
    swapped = getattr(layer, "_did_swap_in_out_features", None)
    if swapped is not None:
        return Live(scale, not swapped, parameter, stored)
    # Before 0.19 A belonged to the second axis, whatever that was.
    return Live(scale, True, parameter, stored, bool(getattr(layer.get_base_layer(), "is_transposed", False)))
