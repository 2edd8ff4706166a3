"""A linear layer and its low-rank update as one step of autograd, which saves passes over memory.

``y = x Wᵀ + b + (x Aᵀ · scale) Bᵀ``: the update is added into the output of the layer, and in the backward pass its
part of the input's gradient into that of the layer, in place; composed operations make a copy of either. Results are
those of the composed operations up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _AddedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        hidden = (rows @ down.mT).mul_(scale)
        y = F.linear(rows, weight, bias).addmm_(hidden, up.mT)
        return y.view(*x.shape[:-1], len(up)), hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, down, up, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, down, up, output[1])
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        grad = gradients[0].reshape(-1, len(up))
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, also through the hidden values
            hidden = rows @ down.mT * ctx.scale
        grad_x = grad_bias = grad_down = grad_up = None
        through = grad @ up
        through = through * ctx.scale if torch.is_grad_enabled() else through.mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(through, down).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if ctx.needs_input_grad[3]:
            grad_down = through.mT @ rows
        if ctx.needs_input_grad[4]:
            grad_up = grad.mT @ hidden
        return grad_x, None, grad_bias, grad_down, grad_up, None


def added_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, *, scale: float) -> Tensor:
    """``F.linear(x, weight, bias) + scale · F.linear(F.linear(x, down), up)``, all of one dtype.

    Parameters
    ----------
    x : Tensor, shape (..., d_in)
    weight : Tensor, shape (d_out, d_in)
        Frozen: it gets no gradient.
    bias : Tensor, optional, shape (d_out,)
    down : Tensor, shape (r, d_in)
    up : Tensor, shape (d_out, r)
    scale : float

    Returns
    -------
    Tensor, shape (..., d_out)

    Examples
    --------
    >>> x, down, up = torch.ones(3), torch.ones(1, 3), torch.ones(2, 1)
    >>> added_low_rank(x, torch.zeros(2, 3), None, down, up, scale=2.0)
    tensor([6., 6.])
    """
    y: Tensor = _AddedLowRank.apply(x, weight, bias, down, up, scale)[0]  # type: ignore[no-untyped-call]
    return y
