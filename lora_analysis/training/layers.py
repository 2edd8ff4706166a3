"""The LoRA layer, and merging it into its base weight.

Conventions
-----------
``lora_A`` (r, d_in) and ``lora_B`` (d_out, r) are the paper's A and B; the layer adds
``scale · B A x`` to what its base gives. The base is a ``torch.nn.Linear``, or transformers' ``Conv1D``,
which stores its weight as (d_in, d_out).

Values
------
``LoraLayer``, ``lora_layers``, ``merge``, ``unmerge``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.errors import UndefinedUpdateError

_MERGED_ROWS = 64
"""Rows of a weight merged at a time: 2 MB of float64 at a width of 4096."""


class LoraLayer(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    ``y = base(x) + scale · B @ A @ dropout(x)``; ``y = base(x)`` once merged.

    Parameters
    ----------
    base_layer : torch.nn.Linear or transformers' Conv1D
        Named as in PEFT: its tensors are ``<module>.base_layer.weight`` in the state dict.
    lora_A : Tensor, shape (r, d_in)
        Copied to the device of the base and at least float32, whatever the base's dtype, since steps of
        training are lost in 16 bits.
    lora_B : Tensor, shape (d_out, r)
        Likewise.
    alpha : float
        What ``scale`` was made from; nothing is computed from it here.
    scale : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.
    dropout : float
        Probability of dropping an input of A while training, in [0, 1).

    Attributes
    ----------
    lora_A0 : Tensor, shape (r, d_in)
        A as it was at the start, for study; a buffer that is not saved.
    transposed : bool
        Whether the base stores its weight as (d_in, d_out).
    r, in_features, out_features : int
    weight, bias : Parameter
        The base's own.

    Examples
    --------
    >>> base = torch.nn.Linear(3, 2)
    >>> layer = LoraLayer(base, torch.ones(1, 3), torch.zeros(2, 1), alpha=2.0, scale=2.0)
    >>> bool((layer(torch.ones(3)) == base(torch.ones(3))).all())
    True
    """

    lora_A0: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        alpha: float,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.transposed = not isinstance(base_layer, nn.Linear)
        weight = cast(Tensor, base_layer.weight)
        d_out, d_in = weight.mT.shape if self.transposed else weight.shape
        if lora_A.shape[1:] != (d_in,) or lora_B.shape != (d_out, lora_A.shape[0]):
            raise ValueError(
                f"expected lora_A (r, {d_in}) and lora_B ({d_out}, r) for a weight of (d_out, d_in) = "
                f"({d_out}, {d_in}), got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
            )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(lora_A.detach().to(weight.device, dtype, copy=True))
        self.lora_B = nn.Parameter(lora_B.detach().to(weight.device, dtype, copy=True))
        self.register_buffer("lora_A0", self.lora_A.detach().clone(), persistent=False)
        self.in_features, self.out_features, self.r = d_in, d_out, lora_A.shape[0]
        self.alpha = alpha
        self.scale = scale
        self.dropout = dropout
        self._original: Tensor | None = None
        self.train(base_layer.training)

    def extra_repr(self) -> str:
        """The sizes and the scale, for ``print(model)``."""
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}, merged={self.merged}"

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the base layer, as it stores it."""
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the base layer."""
        return cast("nn.Parameter | None", self.base_layer.bias)

    @property
    def merged(self) -> bool:
        """Whether the update is part of the base weight now."""
        return self._original is not None

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer, shape (..., d_out), in the dtype the base gives."""
        base: Tensor = self.base_layer(x)
        if self.merged:
            return base
        x = x.to(self.lora_A.dtype)
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        # The scale goes onto the r numbers between the factors, the cheapest place for it.
        hidden = self.scale * F.linear(x, self.lora_A)
        return (base + F.linear(hidden, self.lora_B)).to(base.dtype)

    def delta_w(self) -> Tensor:
        """``ΔW = scale · B @ A``, shape (d_out, d_in), float64, whatever way the base is stored."""
        return self.scale * (self.lora_B.detach().double() @ self.lora_A.detach().double())

    def merge(self) -> None:
        """Fold the update into the base weight, in place: ``W' = W + ΔW``.

        The sum is taken in float64 and converted once, by ``Tensor.to``, to the dtype of the weight. The
        weight as it was is kept beside it for ``unmerge``, at the cost of its memory.

        Raises
        ------
        ValueError
            If it is merged already.
        UndefinedUpdateError
            If the merged weight would hold NaN or infinities; the weight is left as it was.
        """
        if self.merged:
            raise ValueError("expected an unmerged layer, got a merged one. Call unmerge first.")
        weight = self.weight.data
        original = weight.clone()
        up, down = self.lora_B.detach().double(), self.lora_A.detach().double()
        left, right = (down.mT, up.mT) if self.transposed else (up, down)
        right = self.scale * right
        # Row blocks that stay in cache: no float64 copy of the matrix is made.
        for start in range(0, len(weight), _MERGED_ROWS):
            block = slice(start, start + _MERGED_ROWS)
            merged = torch.addmm(original[block].double(), left[block], right)
            if not float(torch.linalg.vector_norm(merged, torch.inf)) <= torch.finfo(weight.dtype).max:
                weight.copy_(original)
                raise UndefinedUpdateError(
                    f"expected a finite merged weight, got NaN or infinities in {weight.dtype}. "
                    "Check the factors, or convert the model to a wider dtype."
                )
            weight[block] = merged.to(weight.dtype)
        self._original = original

    def unmerge(self) -> None:
        """Put the base weight back as it was before ``merge``, bit for bit.

        Raises
        ------
        ValueError
            If it is not merged.
        """
        if self._original is None:
            raise ValueError("expected a merged layer, got an unmerged one. Call merge first.")
        self.weight.data.copy_(self._original)
        self._original = None


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted modules of a model by name, in the order of ``model.named_modules()``.

    A module that sits under several names comes once, under the first. Empty if nothing is adapted.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merge(model: nn.Module) -> None:
    """Fold every update into its base weight: ``W' = W + ΔW``, the sum in float64, rounded once.

    The weights change in place, so references to them stay valid; a merged model costs what its base
    costs at inference. All layers are merged, or none.

    Parameters
    ----------
    model : Module
        A model adapted by ``inject`` or ``attach``.

    Raises
    ------
    ValueError
        If the model is not adapted, a layer is merged already (an update is never added twice), or a
        weight is tied to another module's, which would change with it.
    UndefinedUpdateError
        If a merged weight would hold NaN or infinities.
    """
    layers = _require_adapted(model)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name!r}: expected an unmerged layer, got a merged one. Call unmerge first.")
    _require_untied(model, layers)
    done: list[LoraLayer] = []
    for name, layer in layers.items():
        try:
            layer.merge()
        except UndefinedUpdateError as error:
            for earlier in done:
                earlier.unmerge()
            raise UndefinedUpdateError(f"{name!r}: {error}") from None
        done.append(layer)


def unmerge(model: nn.Module) -> None:
    """Put every base weight back as it was before ``merge``, bit for bit.

    Raises
    ------
    ValueError
        If the model is not adapted, or a layer is not merged.
    """
    layers = _require_adapted(model)
    for name, layer in layers.items():
        if not layer.merged:
            raise ValueError(f"{name!r}: expected a merged layer, got an unmerged one. Call merge first.")
    for layer in layers.values():
        layer.unmerge()


def _require_adapted(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: expected a model with LoRA layers, got none. Call inject or attach first."
        )
    return layers


def _require_untied(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for name, layer in layers.items():
        others = [user for user in users[id(layer.weight)] if user != name]
        if others:
            raise ValueError(
                f"{name!r}: its weight is tied to that of {others[0]!r}, which merging would change too. "
                "Give the layer its own copy of the weight, or leave the model unmerged."
            )
