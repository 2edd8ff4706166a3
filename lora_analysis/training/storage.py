"""How a tensor of a model stores the matrix (d_out, d_in) that an update is added to.

Conventions
-----------
An update is always (d_out, d_in); what is stored may be turned (transformers' ``Conv1D``, embeddings), unfolded (a
convolution's kernel, (out, in/groups, k, …)), a stack of matrices (experts, the first axis), or viewed: its numbers
in memory order taken as a matrix of another shape, as in loralib's convolutions.

Values
------
``Storage``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Storage:
    """Where in a tensor its matrix lies.

    Parameters
    ----------
    shape : tuple of int
        Of the tensor.
    transposed : bool
        Whether the last two axes are (d_in, d_out).
    experts : int, optional
        Matrices stacked along the first axis of a tensor of three.
    view : (int, int), optional
        The matrix is the tensor's numbers in memory order, in this shape.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    experts: int | None = None
    view: tuple[int, int] | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_out, d_in), of one expert where there are several."""
        if self.view is not None:
            return self.view
        rows, *rest = self.shape if self.experts is None else self.shape[1:]
        columns = math.prod(rest)
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The spatial size of a convolution's kernel; () of anything else."""
        return () if self.view is not None or self.experts is not None else self.shape[2:]

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of factors: (experts,), or () for one matrix."""
        return () if self.experts is None else (self.experts,)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as (d_out, d_in), or (experts, d_out, d_in)."""
        if self.view is not None:
            return tensor.reshape(self.view)
        flat = tensor if self.experts is not None else tensor.flatten(1)
        return flat.mT if self.transposed else flat

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (d_out, d_in), or a stack of them, in the shape of the tensor."""
        return (matrix.mT if self.transposed else matrix).reshape(self.shape)
