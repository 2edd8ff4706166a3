"""An update held as a full matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.update.protocol import Svd, require_known_scale, require_matrix, rounding_error


@dataclass(frozen=True, slots=True, eq=False)
class DenseUpdate:
    """An update held as a full matrix: the difference of two checkpoints, or DoRA's true update.

    Parameters
    ----------
    matrix : Tensor, shape (d_out, d_in)
    scale : float
        Multiplies the matrix; 1 for a plain difference.
    declared_r : int, optional
        The inner dimension its file declares, min(d_out, d_in) if there is none.
    stored_eps : float, optional
        Relative rounding error (rms) of the entries, where they were computed rather than read; NaN where their
        errors are not independent, or not relative to them. By default the dtype tells.
    """

    matrix: Tensor
    scale: float = 1.0
    declared_r: int | None = None
    stored_eps: float | None = None

    def __post_init__(self) -> None:
        require_matrix("matrix", self.matrix)

    def __repr__(self) -> str:
        d_out, d_in = self.shape
        return f"DenseUpdate({d_out}x{d_in}, scale={self.scale:g}, {self.matrix.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def r(self) -> int:
        """The declared inner dimension; the smaller side of the matrix if there is none."""
        return min(self.shape) if self.declared_r is None else self.declared_r

    @property
    def eps(self) -> float:
        """Relative rounding error (rms) of the stored numbers; NaN if unknown."""
        return rounding_error(self.matrix.dtype) if self.stored_eps is None else self.stored_eps

    @property
    def finite(self) -> bool:
        """Whether the matrix holds no NaN and no infinity."""
        return bool(self.matrix.isfinite().all())

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self._finite_matrix().norm())

    def singular_values(self) -> Tensor:
        """Singular values, shape (min(d_out, d_in),), descending, float64."""
        S: Tensor = torch.linalg.svdvals(self._finite_matrix())
        return S

    def svd(self, k: int | None = None) -> Svd:
        """Compact SVD in float64, the first k triples if k is given."""
        U, S, Vh = torch.linalg.svd(self._finite_matrix(), full_matrices=False)
        return Svd(U[:, :k], S[:k], Vh[:k])

    def dense(self) -> Tensor:
        """The matrix, scaled, in float64."""
        require_known_scale(self.scale)
        return self.scale * self.matrix.detach().double()

    def _finite_matrix(self) -> Tensor:
        if not self.finite:
            raise UndefinedUpdateError("the matrix of this update holds NaN or infinities.")
        return self.dense()
