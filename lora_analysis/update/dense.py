"""An update held as a full matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.update.protocol import Svd, all_finite, require_known_scale, require_matrix, rounding_error

_MANY = 1024
"""Smaller side up to which the whole decomposition is computed, in a second or so."""

_FEW = 8
"""Share of the triples, one in so many, up to which Lanczos iterations are the shorter way."""

_ACCURACY = 1e-12
"""Largest residual of a singular triple, in units of the largest singular value."""


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
        return all_finite(self.matrix)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self._finite_matrix().norm())

    def singular_values(self) -> Tensor:
        """Singular values, shape (min(d_out, d_in),), descending, float64."""
        S: Tensor = torch.linalg.svdvals(self._finite_matrix())
        return S

    def svd(self, k: int | None = None) -> Svd:
        """Compact SVD in float64, the first k triples if k is given.

        Few triples of a large matrix come from Lanczos iterations, to the accuracy of the whole decomposition: of 4096
        columns the first 65 in a sixth of the time. Where these do not get there, everything is computed.
        """
        matrix = self._finite_matrix()
        if k is not None and min(matrix.shape) > _MANY and _FEW * k <= min(matrix.shape) and not matrix.is_cuda:
            top = _top_triples(matrix, k)
            if top is not None:
                return top
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return Svd(U[:, :k], S[:k], Vh[:k])

    def dense(self) -> Tensor:
        """The matrix, scaled, in float64."""
        require_known_scale(self.scale)
        return self.scale * self.matrix.detach().double()

    def _finite_matrix(self) -> Tensor:
        if not self.finite:
            raise UndefinedUpdateError("the matrix of this update holds NaN or infinities.")
        return self.dense()


def _top_triples(matrix: Tensor, k: int) -> Svd | None:
    """The first k singular triples by Lanczos and one Rayleigh-Ritz step; None where a residual is too large."""
    from scipy.sparse.linalg import ArpackError, svds  # takes a third of a second to import

    start = torch.randn(min(matrix.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        *_, rows = svds(matrix.numpy(), k=k, v0=start.numpy())
    except ArpackError:
        return None
    basis = torch.linalg.qr(torch.from_numpy(rows.copy()).mT).Q
    U, S, Zh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    V = basis @ Zh.mT
    residuals = (matrix.mT @ U - V * S).norm(dim=0)
    # A comparison that is false of NaN, too.
    return Svd(U, S, V.mT) if bool((residuals <= _ACCURACY * S[0]).all()) else None
