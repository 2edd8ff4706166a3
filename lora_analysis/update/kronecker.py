"""A Kronecker product of two small matrices, and its decomposition from theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.update.dense import DenseUpdate
from lora_analysis.update.low_rank import LowRankUpdate
from lora_analysis.update.protocol import Svd, require_known_scale


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerUpdate:
    """A Kronecker product of two smaller matrices, ``ΔW = scale · kron(left, right)``.

    With SVDs ``left = Σ σ_i u_i v_iᵀ`` and ``right = Σ τ_j x_j y_jᵀ``, the singular values of ΔW are all the
    products ``|scale| σ_i τ_j``, with the vectors ``kron(u_i, x_j)`` and ``kron(v_i, y_j)``.

    Parameters
    ----------
    left : LowRankUpdate, DenseUpdate or Tensor, shape (m_left, n_left)
        LoKr's w1. A tensor is taken as a ``DenseUpdate``.
    right : LowRankUpdate, DenseUpdate or Tensor, shape (m_right, n_right)
        LoKr's w2, a convolution's kernel unfolded into its columns.
    scale : float
        Multiplies the product; NaN where it is unknown. The scales of ``left`` and ``right`` are 1.
    declared_r : int, optional
        The inner dimension its file declares; the product of those of the two sides if there is none.

    Raises
    ------
    ValueError, TypeError
        If a side is no floating-point matrix, or has a scale of its own.

    Examples
    --------
    >>> update = KroneckerUpdate(torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([5.0, 2.0])))
    >>> update.singular_values().tolist()
    [15.0, 6.0, 5.0, 2.0]
    >>> update.svd(1).U.abs().flatten().tolist()
    [1.0, 0.0, 0.0, 0.0]

    References
    ----------
    Horn and Johnson, *Topics in Matrix Analysis*, theorem 4.2.15.
    """

    left: LowRankUpdate | DenseUpdate
    right: LowRankUpdate | DenseUpdate
    scale: float
    declared_r: int | None

    def __init__(
        self,
        left: LowRankUpdate | DenseUpdate | Tensor,
        right: LowRankUpdate | DenseUpdate | Tensor,
        scale: float = 1.0,
        declared_r: int | None = None,
    ) -> None:
        # Written out, for it takes more than the fields hold; the class is frozen, hence the long way to set them.
        object.__setattr__(self, "left", _side("left", left))
        object.__setattr__(self, "right", _side("right", right))
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "declared_r", declared_r)

    def __repr__(self) -> str:
        (d_out, d_in), (m, n), (p, q) = self.shape, self.left.shape, self.right.shape
        return f"KroneckerUpdate({d_out}x{d_in} = {m}x{n} by {p}x{q}, scale={self.scale:g})"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    @property
    def r(self) -> int:
        """The declared inner dimension; without one, the product of those of the two sides."""
        return self.left.r * self.right.r if self.declared_r is None else self.declared_r

    @property
    def eps(self) -> float:
        """Relative rounding error (rms) of the coarser of the two sides; NaN if that of either is unknown."""
        left, right = self.left.eps, self.right.eps
        return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)

    @property
    def finite(self) -> bool:
        """Whether both sides hold no NaN and no infinity."""
        return self.left.finite and self.right.finite

    def norm(self) -> float:
        """Frobenius norm, ``|scale| ‖left‖ ‖right‖``."""
        require_known_scale(self.scale)
        return abs(self.scale) * self.left.norm() * self.right.norm()

    def singular_values(self) -> Tensor:
        """Singular values of ΔW, descending, float64.

        As many as the products of the sides' own: min(m, n) of each side, fewer of a thin product, so that
        all the others of ΔW are zero.
        """
        require_known_scale(self.scale)
        left, right = self.left.singular_values(), self.right.singular_values()
        return abs(self.scale) * torch.outer(left, right).flatten().sort(descending=True).values

    def svd(self, k: int | None = None) -> Svd:
        """Compact SVD of ΔW in float64, the first k triples if k is given.

        Two small decompositions; of the long vectors only those that are returned are formed.

        Raises
        ------
        UndefinedUpdateError
            If the scale is unknown or a side holds NaN or infinities.
        """
        require_known_scale(self.scale)
        left, right = self.left.svd(k), self.right.svd(k)
        products = torch.outer(left.S, right.S).flatten()
        # Stable: of equal products, first those of the greater left value, whatever k is.
        S, order = products.sort(descending=True, stable=True)
        S, order = S[:k], order[:k]
        i, j = order // max(len(right.S), 1), order % max(len(right.S), 1)
        sign = -1.0 if self.scale < 0 else 1.0
        return Svd(
            _columns_of_kron(sign * left.U[:, i], right.U[:, j]),
            abs(self.scale) * S,
            _columns_of_kron(left.V[:, i], right.V[:, j]).mT,
        )

    def dense(self) -> Tensor:
        """ΔW itself, shape (d_out, d_in), float64."""
        require_known_scale(self.scale)
        left, right = self.left.dense(), self.right.dense()
        # As torch.kron, which fails on transposed views with a side of 1.
        return self.scale * (left[:, None, :, None] * right[None, :, None, :]).reshape(self.shape)


def _columns_of_kron(a: Tensor, b: Tensor) -> Tensor:
    """Column by column the Kronecker products of two matrices (m, k) and (p, k), shape (m·p, k)."""
    return (a[:, None] * b[None]).reshape(a.shape[0] * b.shape[0], a.shape[1])


def _side(name: str, given: LowRankUpdate | DenseUpdate | Tensor) -> LowRankUpdate | DenseUpdate:
    if isinstance(given, Tensor):
        try:
            return DenseUpdate(given)
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("matrix:", f"{name}:", 1)) from None
    if not isinstance(given, LowRankUpdate | DenseUpdate):
        raise TypeError(
            f"{name}: expected a LowRankUpdate, a DenseUpdate or a tensor, got {type(given).__name__}. "
            "A product of three is a product of two, one of them computed."
        )
    if given.scale != 1.0:
        raise ValueError(
            f"{name}: expected a scale of 1, got {given.scale:g}. Put the scale of the whole product into scale=."
        )
    return given
