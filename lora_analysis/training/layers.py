"""What stands in a model in the place of an adapted weight: a layer beside its base, or a parametrised tensor.

Conventions
-----------
``LoraLayer`` stands for a layer that the model calls, and leaves the layer's own weight alone. ``LoraParameter`` is
one of ``torch.nn.utils.parametrize``: it adds ΔW to a tensor whenever the model reads it, whatever it does with it
then. Either is a *site*, and holds any number of named adapters of which those that are active act.

Values
------
``LoraLayer``, ``LoraParameter``, ``Site``; ``lora_layers``, ``sites``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3; DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3
(the norms are constants to the gradient).
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.training.added_low_rank import added_low_rank
from lora_analysis.training.factors import Adapters, LoraFactors
from lora_analysis.training.kinds import CONV1D, LINEAR, kind_of
from lora_analysis.training.storage import Storage


class LoraLayer(nn.Module):
    """A layer with trainable low-rank updates beside it.

    ``y = base(x) + sum_a weight_a · scale_a · B_a (A_a dropout(x))`` over the active adapters; ``y = base(x)`` once
    merged, or with none active.

    Parameters
    ----------
    base_layer : Module
        A ``torch.nn.Linear``, ``Embedding``, ``Conv1d``, ``Conv2d`` or ``Conv3d``, or transformers' ``Conv1D``. Named
        as in PEFT: its tensors are ``<module>.base_layer.weight`` in the state dict.

    Attributes
    ----------
    adapters : Adapters
        Adapter names to their factors: ``<module>.adapters.<name>.lora_A`` in the state dict.
    storage : Storage
        How the base stores its matrix.
    original : Tensor or None
        The base's weight as it was, while updates are merged into it.
    weight, bias : Parameter
        The base's own.

    Raises
    ------
    TypeError
        If the layer is of another kind.

    Examples
    --------
    >>> base = torch.nn.Linear(3, 2)
    >>> layer = LoraLayer(base)
    >>> layer.add("default", LoraFactors(torch.ones(1, 3), torch.zeros(2, 1), d_out=2, alpha=2.0, scale=2.0))
    >>> bool((layer(torch.ones(3)) == base(torch.ones(3))).all())
    True
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        kind = kind_of(base_layer)
        if kind is None:
            raise TypeError(f"expected a layer that LoRA can be put beside, got {type(base_layer).__name__}.")
        self.kind = kind
        self.storage = kind.storage(base_layer)
        self.base_layer = base_layer
        self.adapters = Adapters()
        self.original: Tensor | None = None
        _tell_merged_states_apart(self)
        self.train(base_layer.training)

    def add(self, name: str, factors: LoraFactors) -> None:
        """Put an adapter beside the others, and let it alone act."""
        self.adapters[name] = factors
        self.adapters.active = {name: 1.0}

    def __getattr__(self, name: str) -> Any:
        """An attribute of the base layer, such as ``in_features``, where the model asks for one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the base layer, as it stores it."""
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the base layer."""
        return cast("nn.Parameter | None", getattr(self.base_layer, "bias", None))

    @property
    def factors(self) -> LoraFactors:
        """The factors of the one adapter there is."""
        return self.adapters.only()

    @property
    def merged(self) -> bool:
        """Whether updates are part of the base weight now."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer, in the dtype the base gives."""
        acting = [] if self.merged else self.adapters.acting()
        if not acting:
            return cast(Tensor, self.base_layer(x))
        if len(acting) == 1 and self._is_plain(acting[0][0], x):
            factors, weight = acting[0]
            matrix = self.weight.mT if self.kind is CONV1D else self.weight
            return added_low_rank(x, matrix, self.bias, factors.down, factors.up, scale=weight * factors.scale)
        y: Tensor = self.base_layer(x)
        out = y
        for factors, weight in acting:
            out = out + weight * self._change(factors, x, y)
        return out.to(y.dtype)

    def _is_plain(self, factors: LoraFactors, x: Tensor) -> bool:
        """Whether layer and update are one product of factors in one dtype, and nobody watches the base layer."""
        base, weight = self.base_layer, self.weight
        # accelerate, for one, sets a forward on the layer itself.
        watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            self.kind in (LINEAR, CONV1D)
            and factors.lora_magnitude is None
            and not factors.less_initial
            and not (self.training and factors.dropout > 0)
            and x.dtype == weight.dtype == factors.lora_A.dtype
            and not (weight.requires_grad or watched or "forward" in vars(base))
            and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()  # vmap and jvp know composed operations alone
        )

    def _change(self, factors: LoraFactors, x: Tensor, y: Tensor) -> Tensor:
        """What one adapter adds to the output ``y`` of the base."""
        dropping = self.training and factors.dropout > 0 and self.kind.dropout
        kept = F.dropout(x, factors.dropout) if dropping else x
        # The base may be of 16 bits, in which steps of training are lost; the factors never are.
        inputs = kept.to(factors.lora_A.dtype) if self.kind.dropout else kept
        # The scale goes onto the r columns between the factors, the cheapest place for it.
        change = self.kind.apply(self.base_layer, inputs, factors.down * factors.scale, factors.up)
        if factors.less_initial:
            up, down = factors.initial
            change = change - self.kind.apply(self.base_layer, inputs, down * factors.scale, up)
        if factors.lora_magnitude is None:
            return change
        ratio = _per_output(factors.lora_magnitude / row_norms(self.weight, self.storage, factors), self.storage)
        of_base = self.base_layer(kept) if dropping else y
        if self.bias is not None:
            of_base = of_base - _per_output(self.bias, self.storage)
        return (ratio - 1) * of_base + ratio * change


class LoraParameter(nn.Module):
    """A parametrisation that adds low-rank updates to a tensor: ``W + sum_a weight_a · ΔW_a``.

    For tensors that a model reads without calling a layer: packed attention projections, stacked experts.

    Parameters
    ----------
    storage : Storage
        How the tensor stores its matrix or matrices.

    Attributes
    ----------
    adapters : Adapters
    storage : Storage
    original : Tensor or None
        The tensor as it was, while updates are merged into it.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.adapters = Adapters()
        self.original: Tensor | None = None
        _tell_merged_states_apart(self)

    def add(self, name: str, factors: LoraFactors) -> None:
        """Put an adapter beside the others, and let it alone act."""
        self.adapters[name] = factors
        self.adapters.active = {name: 1.0}

    @property
    def factors(self) -> LoraFactors:
        """The factors of the one adapter there is."""
        return self.adapters.only()

    @property
    def merged(self) -> bool:
        """Whether updates are part of the tensor now."""
        return self.original is not None

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor with the updates added, in its dtype."""
        acting = [] if self.merged else self.adapters.acting()
        total = tensor
        for factors, weight in acting:
            total = total + self.storage.stored(weight * factors.differentiable_delta_w())
        return total.to(tensor.dtype)


Site = LoraLayer | LoraParameter
"""What stands in the place of an adapted weight."""


_MERGED = "merged"
"""What a state dict has of a site, below its name, where updates are part of its weight."""


def _tell_merged_states_apart(site: Site) -> None:
    """See that the state of a merged site is not loaded into an unmerged one, where its update would count twice."""
    site.register_state_dict_post_hook(_mark_merged)  # type: ignore[no-untyped-call]
    site.register_load_state_dict_pre_hook(_require_alike)  # type: ignore[no-untyped-call]


def _mark_merged(site: Site, state: dict[str, Any], prefix: str, _: Any) -> None:
    if site.merged:
        state[f"{prefix}{_MERGED}"] = torch.tensor(True)


def _require_alike(
    site: Site,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: list[str],
) -> None:
    # Taken out, or loading would call it unexpected: what is wrong with it is said here.
    merged = bool(state.pop(f"{prefix}{_MERGED}", False))
    if merged != site.merged and any(key.startswith(prefix) for key in state):
        there, here = ("merged", "unmerged") if merged else ("unmerged", "merged")
        errors.append(
            f"{prefix.removesuffix('.')!r}: expected the state of {here} layers, got that of {there} ones, whose "
            "weights hold other updates. Call unmerge before saving, or merge_and_unload for a plain model."
        )


def row_norms(weight: Tensor, storage: Storage, factors: LoraFactors) -> Tensor:
    """``‖W + ΔW‖`` of each output, shape (d_out,), without gradients: DoRA's denominators."""
    with torch.no_grad():
        whole = storage.matrix(weight).to(factors.lora_A.dtype) + factors.differentiable_delta_w()
        norms: Tensor = torch.linalg.vector_norm(whole, dim=1)
        return norms


def _per_output(vector: Tensor, storage: Storage) -> Tensor:
    """A vector over the outputs, to multiply a layer's output with: channels come before space in a convolution's."""
    return vector.view(-1, *(1 for _ in storage.kernel))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of a model by name, in the order of ``model.named_modules()``.

    A layer that sits under several names comes once, under the first. Empty if no layer is adapted; parameters that
    are adapted without a layer are in ``sites``.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def sites(model: nn.Module) -> dict[str, Site]:
    """Every adapted weight of a model, named as in the model's state dict without ``.weight``.

    Examples
    --------
    >>> from lora_analysis.training import inject
    >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 3)})
    >>> inject(model, ["head"], parameters=["in_proj_weight"], r=1)
    ['head', 'attention.in_proj_weight']
    >>> list(sites(model))
    ['attention.in_proj_weight', 'head']
    """
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found[name] = module
        elif isinstance(module, LoraParameter):
            tensor = _PARAMETRIZED.sub("", name)
            found[tensor.removesuffix(".weight")] = module
    return found


_PARAMETRIZED = re.compile(r"(?:(?<=\.)|^)parametrizations\.(?=[^.]+\.\d+\Z)|\.\d+\Z")
"""What ``torch.nn.utils.parametrize`` puts round the name of a tensor."""
