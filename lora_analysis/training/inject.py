"""Putting LoRA layers into a model: which modules, and how the factors begin.

Conventions
-----------
B begins at zero, so an adapted model begins as its base. A is drawn Kaiming-uniform from a generator
that belongs to (seed, module name, r): the same on every device and dtype, independent of the other
modules and of the order of drawing, and never a prefix of the draw for a larger r. Two adapters that
share a seed share A at the start; comparisons of A between them say so little else that seeds must differ.

Values
------
``inject``, ``initial_down``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1. The bound of A is loralib's and PEFT's,
``kaiming_uniform_(A, a=sqrt(5))``. Scale of rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from lora_analysis.training.layers import LoraLayer, lora_layers


class Place(NamedTuple):
    """A module of a model and every name it goes by, the first being its own."""

    names: tuple[str, ...]
    module: nn.Module


def inject(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    r: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Freeze a model and wrap some of its linear layers in trainable LoRA layers, in place.

    Parameters
    ----------
    model : Module
        Any model; its ``torch.nn.Linear`` and transformers' ``Conv1D`` layers can be adapted.
    targets : str or iterable of str
        As PEFT's ``target_modules``. A list holds full names or dotted suffixes (``"query"``,
        ``"attn.c_proj"``); unlike in PEFT, each must match. A string is a regular expression for the
        whole name, or ``"all-linear"``: every linear layer but the output embedding of a language model.
    r : int
        Inner dimension, at least 1; may exceed the sides of a matrix.
    alpha : float
        The scale is alpha / r.
    seed : int
        With the module's name and r, determines the initial A.
    dropout : float
        On the input of A while training, in [0, 1).
    rslora : bool
        Scale alpha / sqrt(r) instead.

    Returns
    -------
    list of str
        Names of the adapted modules. The model trains nothing but their factors.

    Raises
    ------
    ValueError
        If an argument is out of range, a target matches nothing or something that cannot be adapted, or
        the model has LoRA layers already. The model is left as it was.

    Examples
    --------
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    >>> inject(model, ["query"], r=2)
    ['query']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['query.lora_A', 'query.lora_B']
    """
    r, seed = operator.index(r), operator.index(seed)
    if r < 1:
        raise ValueError(f"r: expected at least 1, got {r}.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}.")
    require_dropout(dropout)
    require_unadapted(model)
    chosen = _matching(model, targets)
    for place in chosen:
        if (reason := refusal(model, place)) is not None:
            raise ValueError(reason)
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    model.requires_grad_(False)
    for place in chosen:
        d_out, d_in = matrix_shape(place.module)
        down = initial_down(d_in, r=r, module=place.names[0], seed=seed)
        up = down.new_zeros(d_out, r)
        layer = LoraLayer(place.module, down, up, alpha=alpha, scale=scale, dropout=dropout)
        put(model, place, layer)
    return [place.names[0] for place in chosen]


def initial_down(d_in: int, *, r: int, module: str, seed: int) -> Tensor:
    """A at the start: uniform in ``±1/sqrt(d_in)``, a function of (seed, module, r) alone.

    The global random state is neither read nor advanced. torch's CPU generator takes 32 bits of seed,
    here the first of a SHA-256, so two given draws coincide with probability 2⁻³².

    Parameters
    ----------
    d_in, r : int
    module : str
        Name of the adapted module.
    seed : int

    Returns
    -------
    Tensor, shape (r, d_in)
        Float32, on the CPU.

    Examples
    --------
    >>> small, large = (initial_down(16, r=r, module="query", seed=0) for r in (2, 4))
    >>> bool((small == large[:2]).any())
    False
    """
    digest = hashlib.sha256(f"{seed}\0{module}\0{r}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    down = torch.empty(r, d_in, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down


def places(model: nn.Module) -> list[Place]:
    """Every module of a model once, with all its names, in the order of ``named_modules``."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [Place(tuple(names[key]), module) for key, module in modules.items()]


def put(model: nn.Module, place: Place, layer: LoraLayer) -> None:
    """Set a LoRA layer in the place of its base, under every name that has it."""
    for name in place.names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a ``Linear`` or ``Conv1D``."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def refusal(model: nn.Module, place: Place) -> str | None:
    """Why a module cannot be adapted, as an error message; None if it can."""
    module, name = place.module, place.names[0]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not name:
        return f"expected a model that holds layers, got a bare {kind}. Wrap it in torch.nn.Sequential."
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            f"{name!r}: torch.nn.MultiheadAttention reads the weight of its {kind} without calling it, so a "
            "LoRA layer there would do nothing. Choose other modules."
        )
    if not _is_plain_linear(module):
        return (
            f"{name!r}: expected a torch.nn.Linear or transformers Conv1D whose forward is its own, "
            f"got {kind}. Choose other modules."
        )
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or is_lazy(weight) or not weight.is_floating_point():
        return (
            f"{name!r}: expected a {kind} whose weight is a plain floating-point parameter, got one that is "
            "lazy, parametrized, pruned or quantised. Make it plain first."
        )
    for alias in place.names:
        parent = model.get_submodule(alias.rpartition(".")[0])
        if type(parent).forward is nn.TransformerEncoderLayer.forward:
            return (
                f"{alias!r}: torch.nn.TransformerEncoderLayer reads this layer's weight without calling it "
                "in eval mode, where a LoRA layer would do nothing. Choose other modules."
            )
    return None


def require_unadapted(model: nn.Module) -> None:
    """Refuse a model that has LoRA layers, ours or peft's."""
    if layers := lora_layers(model):
        raise ValueError(
            f"{next(iter(layers))!r}: expected a model without LoRA layers, got one with {len(layers)}. "
            "Start from a fresh copy of the base model."
        )
    if foreign := peft_layers(model):
        raise ValueError(
            f"{foreign[0]!r}: expected a model without LoRA layers, got one with {len(foreign)} of peft. "
            "Take the base model out of it with its unload() first."
        )


def require_dropout(dropout: float) -> None:
    """Refuse what is not a probability below one."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}.")


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the layers that peft put into a model."""
    tuner = _loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    return [] if tuner is None else [n for n, m in model.named_modules() if isinstance(m, tuner)]


def _is_plain_linear(module: nn.Module) -> bool:
    """A ``Linear`` or ``Conv1D``, or a subclass of one that computes the same."""
    kinds = (nn.Linear, _loaded("transformers.pytorch_utils", "Conv1D"))
    return any(kind is not None and isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _loaded(module: str, name: str) -> Any:
    """A class of a library, if that is loaded: an instance cannot exist before its module does."""
    return getattr(sys.modules.get(module), name, None)


def _matching(model: nn.Module, targets: str | Iterable[str]) -> list[Place]:
    candidates = places(model)
    if not isinstance(targets, str):
        wanted = list(targets)
        for target in wanted:
            if not any(_has_suffix(place, target) for place in candidates):
                raise ValueError(_nothing_matches(model, f"a module named {target!r}"))
        if not wanted:
            raise ValueError(_nothing_matches(model, "at least one name"))
        return [place for place in candidates if any(_has_suffix(place, target) for target in wanted)]
    if targets == "all-linear":
        head = _output_embedding(model)
        found = [
            p
            for p in candidates
            if p.module is not head and (_is_plain_linear(p.module) or isinstance(p.module, nn.Linear))
        ]
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


def _has_suffix(place: Place, target: str) -> bool:
    return bool(target) and any(name == target or name.endswith(f".{target}") for name in place.names)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The head of a transformers language model, often tied to its embedding."""
    transformers_model = _loaded("transformers.modeling_utils", "PreTrainedModel")
    if transformers_model is None or not isinstance(model, transformers_model):
        return None
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _nothing_matches(model: nn.Module, expected: str) -> str:
    known = [p.names[0] for p in places(model) if refusal(model, p) is None]
    listed = ", ".join(repr(name) for name in known[:5]) + (", …" if len(known) > 5 else "")
    return f"targets: expected {expected} in {type(model).__name__}, got none. It has: {listed or 'nothing to adapt'}."
