"""A product of two thin factors, and its decomposition without the product.

The QR route is standard; the certified Gram route rests on Demmel's bound for Cholesky of a diagonally scaled
matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.update.protocol import Svd, Update, all_finite, require_known_scale, require_matrix, rounding_error

CERTIFIED_CONDITION = 1e3
"""Largest condition number of a column-scaled factor for which the Gram route is used: its relative
error is then about 2⁻⁵³ · 10⁶ = 1e-10."""

_ONE_ROUND = 30.0
"""Condition up to which one round of CholeskyQR is orthonormal to 1e-12 (7e-13 was seen at most)."""

_GRAM_BLOCK = 2**16
"""Numbers of a factor turned to float64 at a time, half a megabyte."""

_CANCELLATION = 1e-6
"""‖ΔW‖²/(Σ‖b_k‖‖a_k‖)² below which the Gram formula of the norm has lost digits and QR takes over."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """A product of two thin factors, ``ΔW = scale · up @ down``.

    Parameters
    ----------
    up : Tensor, shape (d_out, r)
        The paper's B, in the dtype it was stored in.
    down : Tensor, shape (r, d_in)
        The paper's A.
    scale : float
        alpha / r for LoRA, alpha / sqrt(r) for rsLoRA; NaN where it is unknown.
    stored_eps : float, optional
        Relative rounding error (rms) of the factors' entries, where they were computed rather than read; NaN where
        their errors are not those of independent entries, as of Khatri-Rao factors. By default their dtypes tell.

    Raises
    ------
    ValueError, TypeError
        If the factors are not floating-point matrices that share r.

    Examples
    --------
    >>> update = LowRankUpdate(torch.eye(3, 2), torch.eye(2, 3), scale=2.0)
    >>> update.singular_values().tolist()
    [2.0, 2.0]
    >>> round(update.norm(), 12)
    2.828427124746
    """

    up: Tensor
    down: Tensor
    scale: float
    stored_eps: float | None = None

    def __post_init__(self) -> None:
        require_matrix("up", self.up)
        require_matrix("down", self.down)
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"expected up (d_out, r) and down (r, d_in) to share r, "
                f"got {tuple(self.up.shape)} and {tuple(self.down.shape)}."
            )

    def __repr__(self) -> str:
        d_out, d_in = self.shape
        return f"LowRankUpdate({d_out}x{d_in}, r={self.r}, scale={self.scale:g}, {self.up.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def r(self) -> int:
        """The inner dimension of the product."""
        return self.up.shape[1]

    @property
    def eps(self) -> float:
        """Relative rounding error (rms) of the coarser of the two stored factors; NaN if unknown."""
        if self.stored_eps is not None:
            return self.stored_eps
        return max(rounding_error(self.up.dtype), rounding_error(self.down.dtype))

    @property
    def finite(self) -> bool:
        """Whether the factors hold no NaN and no infinity."""
        return all_finite(self.up) and all_finite(self.down)

    def norm(self) -> float:
        """Frobenius norm of ΔW.

        ``|scale| · sqrt(sum((up.T @ up) * (down @ down.T)))``, or the norm of the r x r core where that sum
        has cancelled.
        """
        gram_up, gram_down = self._grams()
        square = float((gram_up * gram_down).sum())
        bound = float((gram_up.diagonal() * gram_down.diagonal()).sqrt().sum()) ** 2
        if square > _CANCELLATION * bound:
            return abs(self.scale) * math.sqrt(square)
        r_up, r_down = (torch.linalg.qr(factor.double(), mode="r").R for factor in self._tall())
        return abs(self.scale) * float((r_up @ r_down.mT).norm())

    def core(self) -> tuple[Tensor, Tensor]:
        """Triangular factors of the product: ``ΔW = scale · Q_up R_up R_downᵀ Q_downᵀ``.

        Everything that ΔW's spectrum and the storage noise depend on, without its long sides. By Cholesky
        of the float64 Gram matrices while that is certified to keep ten digits, else by QR.

        Returns
        -------
        R_up : Tensor, shape (min(d_out, r), r)
        R_down : Tensor, shape (min(d_in, r), r)
            Float64. Column j is as long as column j of ``up``, and as row j of ``down``.
        """
        r_up, r_down = map(_triangular_factor, self._tall(), self._grams())
        return r_up, r_down

    def singular_values(self) -> Tensor:
        """Singular values of ΔW, shape (min(r, d_out, d_in),), descending, float64.

        The fast route of ``core``: the error of σ_k is about 1e-10 σ_k + 1e-15 σ_1.
        """
        r_up, r_down = self.core()
        S: Tensor = torch.linalg.svdvals(r_up @ r_down.mT)
        return abs(self.scale) * S

    def svd(self, k: int | None = None) -> Svd:
        """Compact SVD of ΔW in float64: thin QR of both factors and an SVD of the r x r core.

        The QR is CholeskyQR, matrix products alone, in one round or two as a bound on the condition asks,
        orthonormal to 1e-12; or Householder's, where the bound certifies neither. The error of all is relative
        to the length of each column, so it does not depend on how the gauge spreads lengths over the factors.

        Parameters
        ----------
        k : int, optional
            Keep the first k triples. All min(r, d_out, d_in) by default.

        Returns
        -------
        Svd
            The sign of the scale goes into ``U``; ``S`` is nonnegative.

        Raises
        ------
        UndefinedUpdateError
            If the scale is unknown or a factor holds NaN or infinities.

        References
        ----------
        Yamamoto et al. 2015, *Roundoff error analysis of the CholeskyQR2 algorithm*, ETNA 44.
        """
        (basis_up, mixing_up, r_up), (basis_down, mixing_down, r_down) = map(_thin_qr, self._tall(), self._grams())
        U, S, Vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        sign = -1.0 if self.scale < 0 else 1.0
        return Svd(
            basis_up @ (mixing_up @ (sign * U[:, :k])),
            abs(self.scale) * S[:k],
            (Vh[:k] @ mixing_down.mT) @ basis_down.mT,
        )

    def dense(self) -> Tensor:
        """ΔW itself, shape (d_out, d_in), float64."""
        require_known_scale(self.scale)
        up, down = self._tall()
        return self.scale * (up.double() @ down.mT.double())

    def _tall(self) -> tuple[Tensor, Tensor]:
        """Both factors upright, (d_out, r) and (d_in, r), without gradients: what is analysed is a value."""
        return self.up.detach(), self.down.detach().mT

    def _grams(self) -> tuple[Tensor, Tensor]:
        """``up.T @ up`` and ``down @ down.T`` in float64, of factors that have a spectrum."""
        require_known_scale(self.scale)
        gram_up, gram_down = (_gram(factor) for factor in self._tall())
        if not bool((gram_up.diagonal().isfinite() & gram_down.diagonal().isfinite()).all()):
            raise UndefinedUpdateError("the factors of this update hold NaN or infinities, so it has no spectrum.")
        return gram_up, gram_down


def _gram(factor: Tensor) -> Tensor:
    """``factor.T @ factor`` in float64, for a tall factor (d, r) of any dtype.

    A block of rows at a time, so that no float64 copy of the whole is made: fresh megabytes cost more than
    the product.
    """
    d, r = factor.shape
    gram = torch.zeros(r, r, dtype=torch.float64, device=factor.device)
    rows = max(1, _GRAM_BLOCK // max(r, 1))
    for start in range(0, d, rows):
        block = factor[start : start + rows].double()
        gram.addmm_(block.mT, block)
    return gram


class _Cholesky(NamedTuple):
    """R with ``R.T @ R`` a given Gram matrix, its inverse, and a bound on the condition of the directions."""

    R: Tensor
    inverse: Tensor
    condition: float


def _cholesky(gram: Tensor) -> _Cholesky | None:
    """The Cholesky factor of a Gram matrix, if its condition is certified."""
    size = gram.diagonal().sqrt()
    if not bool((size > 0).all()):
        return None
    # Scaling to a unit diagonal first makes the error depend on the condition of the directions alone, not on
    # how unevenly the gauge spreads their lengths.
    cosines = gram / (size * size[:, None])
    lower, info = torch.linalg.cholesky_ex(cosines)
    if int(info) != 0:
        return None
    identity = torch.eye(len(size), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    # ‖L‖₂² is at most the largest row sum of |L Lᵀ|, and ‖L⁻¹‖₂ at most its Frobenius norm.
    condition = math.sqrt(float(cosines.abs().sum(0).max())) * float(inverse.norm()) if len(size) else 1.0
    if condition > CERTIFIED_CONDITION:
        return None
    return _Cholesky(lower.mT * size, inverse.mT / size[:, None], condition)


def _triangular_factor(factor: Tensor, gram: Tensor) -> Tensor:
    """R with ``R.T @ R = factor.T @ factor``, for a factor (d, r) with that Gram matrix."""
    found = _cholesky(gram) if factor.shape[1] <= factor.shape[0] else None
    if found is not None:
        return found.R
    R: Tensor = torch.linalg.qr(factor.double(), mode="r").R
    return R


def _thin_qr(factor: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin QR of a factor in float64 as ``Q = basis @ mixing`` and R, mixing being small."""
    factor = factor.double()
    first = _cholesky(gram) if factor.shape[1] <= factor.shape[0] else None
    if first is not None and first.condition <= _ONE_ROUND:
        return factor, first.inverse, first.R
    if first is not None:
        # A second round on a basis that is almost orthonormal brings it from the condition squared to rounding.
        basis = factor @ first.inverse
        second = _cholesky(basis.mT @ basis)
        if second is not None:
            return basis, second.inverse, second.R @ first.R
    Q, R = torch.linalg.qr(factor)
    return Q, torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device), R


def factors(update: Update) -> tuple[Tensor, Tensor]:
    """``(up, down)`` of a low-rank update, the paper's B and A, as stored.

    Raises
    ------
    UnsupportedAdapterError
        If the update is not one product of two factors.
    """
    if not isinstance(update, LowRankUpdate):
        raise UnsupportedAdapterError(
            f"{update!r}: expected an update with factors A and B. Analyse it with target='update'."
        )
    return update.up, update.down


def distance(a: Update, b: Update) -> float:
    """Frobenius norm of the difference of two updates of one shape; of two products without forming either.

    Raises
    ------
    ValueError
        If their shapes differ.

    Examples
    --------
    >>> a, b = (LowRankUpdate(torch.ones(1, 1), torch.ones(1, 4), scale) for scale in (2.0, -1.0))
    >>> distance(a, b)
    6.0
    """
    if a.shape != b.shape:
        raise ValueError(f"expected two updates of one shape, got {a.shape} and {b.shape}.")
    if not isinstance(a, LowRankUpdate) or not isinstance(b, LowRankUpdate):
        return float((a.dense() - b.dense()).norm())
    require_known_scale(a.scale)
    require_known_scale(b.scale)
    up = torch.cat([a.scale * a.up.double(), -b.scale * b.up.double()], dim=1)
    return LowRankUpdate(up, torch.cat([a.down.double(), b.down.double()]), 1.0).norm()
