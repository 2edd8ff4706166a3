"""What an update is to everything that uses one: the protocol, and the decomposition it gives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError


class Svd(NamedTuple):
    """A compact singular value decomposition, named and oriented as ``torch.linalg.svd``'s."""

    U: Tensor
    """Shape (d_out, k): left singular vectors, the output side, as orthonormal columns."""
    S: Tensor
    """Shape (k,): singular values, descending."""
    Vh: Tensor
    """Shape (k, d_in): right singular vectors, the input side, as orthonormal *rows*."""

    @property
    def V(self) -> Tensor:
        """Shape (d_in, k): the right singular vectors as columns, a basis like ``U``."""
        return self.Vh.mT

    def top(self, k: int) -> Svd:
        """The first k singular triples: the best rank-k part (Eckart-Young)."""
        return Svd(self.U[:, :k], self.S[:k], self.Vh[:k])


class Update(Protocol):
    """What measures and tables rely on; nothing else."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @property
    def r(self) -> int:
        """The declared inner dimension; the rank of ΔW can be lower."""

    @property
    def scale(self) -> float:
        """The factor before the product; NaN where the file does not say."""

    @property
    def eps(self) -> float:
        """Relative rounding error (rms) of the stored numbers; NaN if unknown."""

    def norm(self) -> float:
        """Frobenius norm of ΔW, without an SVD."""

    def singular_values(self) -> Tensor:
        """Singular values of ΔW, shape (min(r, d_out, d_in),), descending, float64."""

    def svd(self, k: int | None = None) -> Svd:
        """Compact SVD of ΔW in float64, the first k triples if k is given."""

    def dense(self) -> Tensor:
        """ΔW itself, shape (d_out, d_in), float64."""


UpdateT = TypeVar("UpdateT", bound=Update)


def rounding_error(dtype: torch.dtype) -> float:
    """Relative rounding error (rms) of numbers stored in a floating dtype.

    ``eps · sqrt(3 / (8 ln 2) / 12)``: an error uniform over one spacing, relative to numbers whose
    mantissa is log-uniform. 1.66e-3 for bfloat16, 2.07e-4 for float16, 2.53e-8 for float32.

    Parameters
    ----------
    dtype : torch.dtype
        A floating dtype.

    Returns
    -------
    float
        Dimensionless.

    Examples
    --------
    >>> f"{rounding_error(torch.bfloat16):.3e}"
    '1.659e-03'
    """
    return torch.finfo(dtype).eps * math.sqrt(3 / (8 * math.log(2)) / 12)


def with_scale(update: UpdateT, scale: float) -> UpdateT:
    """The same update under another scale, sharing its tensors.

    With ``scale=1`` it gives the scale-free figures of an update whose scale is unknown.
    """
    return replace(update, scale=scale)  # type: ignore[type-var]  # every kind of update is a dataclass


def require_matrix(name: str, tensor: Tensor) -> None:
    """Refuse what is no floating-point matrix."""
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}.")


def require_known_scale(scale: float) -> None:
    """Refuse to compute with a scale that nobody stated."""
    if math.isnan(scale):
        raise UndefinedUpdateError(
            "the scale of this update is unknown, so its norm and singular values are too. Pass alpha= "
            "when loading it, or use with_scale(update, 1.0) for figures that do not depend on scale."
        )


def all_finite(numbers: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    # torch does not ask this of numbers of one byte (fp8), which float32 holds exactly.
    return bool((numbers.float() if numbers.dtype.itemsize == 1 else numbers).isfinite().all())
