"""How many parameters LoRA trains, of a model adapted or not, and the bytes of its checkpoint.

Conventions
-----------
Counts follow from shapes alone, so a model may sit on the "meta" device and take no memory. A parameter that
several modules share counts once; a quantised weight counts as the numbers it is stored in.

Values
------
``lora_count``, ``LoraCount``, ``MatrixCount``, ``parameter_count``, ``ParameterCount``, ``checkpoint_bytes``.

References
----------
Hu et al. 2021, arXiv:2106.09685, sections 4.2 and 5.1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_analysis.training.spots import spots_of
from lora_analysis.training.switching import adapters
from lora_analysis.training.targets import Targets


class MatrixCount(NamedTuple):
    """What LoRA adds to one matrix."""

    module: str
    d_out: int
    d_in: int
    r: int
    parameters: int
    """``r (d_in + d_out)``."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters that a model holds and that train.

    Parameters
    ----------
    total : int
        All of them, those of an adapter included.
    trainable : int
    trainable_tensors : int
        Tensors that the trainable ones are spread over; Adam counts steps in each.
    """

    total: int
    trainable: int
    trainable_tensors: int

    @property
    def frozen(self) -> int:
        """Parameters that do not train."""
        return self.total - self.trainable

    @property
    def reduction(self) -> float:
        """``total / trainable``, at least 1; infinite if nothing trains."""
        return self.total / self.trainable if self.trainable else math.inf


@dataclass(frozen=True, slots=True)
class LoraCount:
    """What LoRA would train on a model that is not adapted yet.

    Parameters
    ----------
    base : int
        Parameters of the model: what full fine-tuning trains.
    matrices : tuple of MatrixCount
        One for each adapted matrix, in the model's order.
    """

    base: int
    matrices: tuple[MatrixCount, ...]

    @property
    def trainable(self) -> int:
        """Parameters of all factors: ``sum of r (d_in + d_out)``."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def reduction(self) -> float:
        """``base / trainable``: how many times fewer parameters train than in full fine-tuning.

        One less than the ``reduction`` of ``adapted``, whose total counts the factors too.
        """
        return self.base / self.trainable

    @property
    def adapted(self) -> ParameterCount:
        """The ``parameter_count`` of the model once it is adapted."""
        return ParameterCount(self.base + self.trainable, self.trainable, 2 * len(self.matrices))

    def rows(self) -> list[dict[str, str | int]]:
        """One mapping for each matrix, as a table takes them."""
        return [matrix._asdict() for matrix in self.matrices]


def lora_count(model: nn.Module, targets: Targets, *, r: int) -> LoraCount:
    """Parameters that LoRA would train on a model, which is left as it is.

    ``r (d_in + d_out)`` for each matrix: A is (r, d_in), B is (d_out, r).

    Parameters
    ----------
    model : Module
        On any device, "meta" included.
    targets : str, type, or iterable of them
        As in ``inject``: a list of full names, dotted suffixes or types, a regular expression, or ``"all-linear"``.
    r : int
        Inner dimension, at least 1.

    Returns
    -------
    LoraCount

    Raises
    ------
    ValueError
        If r is out of range, a target matches nothing or something that cannot be adapted, the model has adapters
        already, or a parameter has no shape yet.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 5.1: ``|Θ| = 2 L d r`` for L square matrices.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16, device="meta"), nn.ReLU(), nn.Linear(16, 1, device="meta"))
    >>> count = lora_count(model, "all-linear", r=2)
    >>> count.matrices[0]
    MatrixCount(module='0', d_out=16, d_in=8, r=2, parameters=48)
    >>> count.trainable, count.base, f"{count.reduction:.2f}"
    (82, 161, '1.96')
    """
    r = operator.index(r)
    if r < 1:
        raise ValueError(f"r: expected at least 1, got {r}.")
    if known := adapters(model):
        raise ValueError(f"expected a model without adapters, got {', '.join(known)}. Count it with parameter_count.")
    base = parameter_count(model).total
    matrices = []
    for spot in spots_of(model, targets):
        d_out, d_in = spot.storage.matrix_shape
        matrices.append(MatrixCount(spot.name, d_out, d_in, r, r * (d_in + d_out)))
    return LoraCount(base, tuple(matrices))


def parameter_count(model: nn.Module) -> ParameterCount:
    """Parameters of a model as it is, those with ``requires_grad`` being trainable.

    Right for LoRA of this package and of others, for BitFit, and for full fine-tuning, which all say so there.

    Raises
    ------
    ValueError
        If a parameter is lazy and has no shape yet.

    Examples
    --------
    >>> model = nn.Linear(8, 16)
    >>> model.weight.requires_grad = False
    >>> parameter_count(model)
    ParameterCount(total=144, trainable=16, trainable_tensors=1)
    """
    total = trainable = tensors = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name!r}: expected a parameter with a shape, got a lazy one. Run the model once first.")
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
            tensors += 1
    return ParameterCount(total, trainable, tensors)


def checkpoint_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Bytes of so many numbers in a file, without the file's own header (names and shapes: some kB).

    Examples
    --------
    >>> checkpoint_bytes(96 * 2 * 2 * 12288 * 4, torch.float16)  # the paper's "35MB": GPT-3, Wq and Wv, r=4
    37748736
    """
    return parameters * dtype.itemsize
