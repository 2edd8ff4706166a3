"""Which modules and tensors of a model are to be adapted, and whether they can be.

Conventions
-----------
A module that sits in a model under several names is one *place*. A layer that is adapted already is the place of its
base; what LoRA has put below it is no place.

Values
------
``Place``; ``places``, ``matching``, ``matching_parameters``, ``refusal``, ``put``, ``parents_of``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lora_analysis.training.kinds import CONV1D, EMBEDDING, kind_of, loaded
from lora_analysis.training.layers import LoraLayer

Targets = str | type[nn.Module] | Iterable[str | type[nn.Module]]
"""Names, dotted suffixes and types; or one regular expression, one type, or ``"all-linear"``."""


class Place(NamedTuple):
    """A module of a model and every name it goes by, the first being its own."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def base(self) -> nn.Module:
        """The module, or the one that is adapted in it."""
        return self.module.base_layer if isinstance(self.module, LoraLayer) else self.module


class OwnedParameter(NamedTuple):
    """A parameter of a model: its module and what it is called there."""

    owner: nn.Module
    owner_name: str
    attribute: str

    @property
    def name(self) -> str:
        """As in the state dict."""
        return f"{self.owner_name}.{self.attribute}" if self.owner_name else self.attribute


def places(model: nn.Module) -> list[Place]:
    """Every module of a model once, with all its names, in the order of ``named_modules``."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = (*inside, f"{name}.")
        elif name.rpartition(".")[2] == "parametrizations":  # torch's, with the tensors they stand for
            inside = (*inside, f"{name}.")
            continue
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [Place(tuple(names[key]), module) for key, module in modules.items()]


def put(model: nn.Module, place: Place, layer: LoraLayer) -> None:
    """Set a LoRA layer in the place of its base, under every name that has it."""
    for name in place.names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def parents_of(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds this one, and under which attribute."""
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if child is module:
                yield parent, attribute


def matching(model: nn.Module, targets: Targets) -> list[Place]:
    """The places that targets name, in the order of the model.

    Raises
    ------
    ValueError
        If a target matches nothing, or a string is no regular expression.
    """
    candidates = places(model)
    if isinstance(targets, type):
        targets = [targets]
    if not isinstance(targets, str):
        wanted = list(targets)
        for target in wanted:
            if not any(_is_meant(place, target) for place in candidates):
                what = f"a module named {target!r}" if isinstance(target, str) else f"a {target.__name__}"
                raise ValueError(_nothing_matches(model, what))
        if not wanted:
            raise ValueError(_nothing_matches(model, "at least one name"))
        return [place for place in candidates if any(_is_meant(place, target) for target in wanted)]
    if targets == "all-linear":
        head = _output_embedding(model)
        found = [p for p in candidates if p.base is not head and _is_linear(p.base)]
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: expected a regular expression, got {targets!r}: {error}.") from None
        found = [p for p in candidates if any(name and pattern.fullmatch(name) for name in p.names)]
    if not found:
        raise ValueError(
            _nothing_matches(model, f"a module whose whole name matches {targets!r}")
            + f" A suffix goes into a list: [{targets!r}]."
        )
    return found


def matching_parameters(model: nn.Module, names: Iterable[str]) -> list[OwnedParameter]:
    """The parameters that these full names or dotted suffixes name, each once, in the order of the model.

    Raises
    ------
    ValueError
        If one matches nothing, or a tensor that cannot be adapted.
    """
    known = [
        OwnedParameter(place.module, place.names[0], attribute)
        for place in places(model)
        if not isinstance(place.module, LoraLayer)
        for attribute in _parameters_of(place.module)
    ]
    wanted = list(names)
    for name in wanted:
        if not any(_ends_in(tensor.name, name) for tensor in known):
            listed = ", ".join(repr(tensor.name) for tensor in known[:5]) + (", …" if len(known) > 5 else "")
            raise ValueError(
                f"parameters: expected a parameter named {name!r} in {type(model).__name__}, got none. "
                f"It has: {listed or 'none'}."
            )
    return [tensor for tensor in known if any(_ends_in(tensor.name, name) for name in wanted)]


def refusal(model: nn.Module, place: Place) -> str | None:
    """Why a module cannot be adapted, as an error message; None if it can."""
    module, name = place.base, place.names[0]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not name:
        return f"expected a model that holds layers, got a bare {kind}. Wrap it in torch.nn.Sequential."
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            f"{name!r}: torch.nn.MultiheadAttention reads the weight of its {kind} without calling it, so a "
            f"LoRA layer there would do nothing. Pass parameters=['{name}.weight'], or choose other modules."
        )
    known = kind_of(module)
    if known is None:
        return (
            f"{name!r}: expected a torch.nn.Linear, Embedding or ConvNd, or a transformers Conv1D, whose forward is "
            f"its own, got {kind}. Choose other modules."
        )
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or is_lazy(weight) or not weight.is_floating_point():
        return (
            f"{name!r}: expected a {kind} whose weight is a plain floating-point parameter, got one that is "
            "lazy, parametrized, pruned or quantised. Make it plain first."
        )
    if known is EMBEDDING and getattr(module, "max_norm", None) is not None:
        return f"{name!r}: expected an embedding without max_norm, which rescales the weight at every lookup."
    for alias in place.names:
        parent = model.get_submodule(alias.rpartition(".")[0])
        if type(parent).forward is nn.TransformerEncoderLayer.forward:
            return (
                f"{alias!r}: torch.nn.TransformerEncoderLayer reads this layer's weight without calling it "
                f"in eval mode, where a LoRA layer would do nothing. Pass parameters=['{alias}.weight'], or choose "
                "other modules."
            )
    return None


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the layers that peft put into a model."""
    tuner = loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    return [] if tuner is None else [n for n, m in model.named_modules() if isinstance(m, tuner)]


def _parameters_of(module: nn.Module) -> list[str]:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return own + (list(module.parametrizations) if parametrize.is_parametrized(module) else [])  # type: ignore[arg-type]


def _is_meant(place: Place, target: str | type[nn.Module]) -> bool:
    if isinstance(target, type):
        return isinstance(place.base, target)
    return any(_ends_in(name, target) for name in place.names)


def _ends_in(name: str, suffix: str) -> bool:
    return bool(suffix) and (name == suffix or name.endswith(f".{suffix}"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or kind_of(module) is CONV1D


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The head of a transformers language model, often tied to its embedding."""
    transformers_model = loaded("transformers.modeling_utils", "PreTrainedModel")
    if transformers_model is None or not isinstance(model, transformers_model):
        return None
    head: nn.Module | None = model.get_output_embeddings()
    return head.base_layer if isinstance(head, LoraLayer) else head


def _nothing_matches(model: nn.Module, expected: str) -> str:
    known = [p.names[0] for p in places(model) if refusal(model, p) is None]
    listed = ", ".join(repr(name) for name in known[:5]) + (", …" if len(known) > 5 else "")
    return f"targets: expected {expected} in {type(model).__name__}, got none. It has: {listed or 'nothing to adapt'}."
