"""The layers that LoRA can be put beside, and how each applies a matrix of low rank to its input.

Conventions
-----------
``y = base(x) + scale · B (A x)``, where A x means what the layer does with its own weight: a product, a lookup, or a
convolution with its stride, padding, dilation and groups. A layer is of a kind if its ``forward`` is that kind's own;
a subclass that computes something else is not.

With groups every group of outputs sees the same A applied to its own inputs, so that ΔW = B A has the shape of the
weight, (out, in/groups·k·k).

Values
------
``Kind``, ``kind_of``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.training.storage import Storage

Apply = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""``(module, x, down, up)`` to ``up (down x)``, both factors whole matrices of the layer's storage."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of layer.

    Parameters
    ----------
    title : str
        What to call it in messages.
    transposed : bool
        Whether it stores its weight as (d_in, d_out).
    apply : callable
        ``(module, x, down, up) -> Tensor``.
    dropout : bool
        Whether its input is numbers, some of which can be dropped.
    random : {"down", "up"}
        The factor that begins random; the other begins at zero. B of an embedding: a lookup in a random A would give
        no gradient but to the rows looked up.
    """

    title: str
    transposed: bool
    apply: Apply
    dropout: bool = True
    random: str = "down"

    def storage(self, module: nn.Module) -> Storage:
        """How a layer of this kind stores its matrix."""
        return Storage(tuple(module.get_parameter("weight").shape), transposed=self.transposed)


def _linear(module: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def _embedding(module: nn.Embedding, ids: Tensor, down: Tensor, up: Tensor) -> Tensor:
    # Not sparse where the layer is: A is stored turned, and the gradient of a transpose cannot be sparse by rows.
    rows = F.embedding(ids, down.mT, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
    return F.linear(rows, up)


def _convolution(module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    groups, kernel = module.groups, module.weight.shape[1:]
    once = down.reshape(-1, *kernel)
    # The layer's own convolution, for its padding modes; it knows no batch-free product with another weight.
    hidden = module._conv_forward(x, once.repeat(groups, *(1 for _ in kernel)), None)
    pointwise = up.reshape(*up.shape, *(1 for _ in kernel[1:]))
    return _CONVOLUTIONS[len(kernel) - 1](hidden, pointwise, groups=groups)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

LINEAR = Kind("torch.nn.Linear", False, _linear)
CONV1D = Kind("transformers Conv1D", True, _linear)
EMBEDDING = Kind("torch.nn.Embedding", True, _embedding, dropout=False, random="up")
CONVOLUTION = Kind("torch.nn.Conv1d, Conv2d or Conv3d", False, _convolution)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, or None if LoRA cannot be put beside it."""
    conv1d = loaded("transformers.pytorch_utils", "Conv1D")
    for kind, classes in (
        (LINEAR, (nn.Linear,)),
        (EMBEDDING, (nn.Embedding,)),
        (CONVOLUTION, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        (CONV1D, () if conv1d is None else (conv1d,)),
    ):
        if any(isinstance(module, cls) and type(module).forward is cls.forward for cls in classes):
            return kind
    return None


def loaded(module: str, name: str) -> Any:
    """A class of a library, if that is loaded: an instance cannot exist before its module does."""
    return getattr(sys.modules.get(module), name, None)
