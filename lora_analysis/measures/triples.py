"""The leading singular triples of W, alone or with an update added, and how far each vector can be off.

Conventions
-----------
p = min(d_out, d_in). Decompositions are thin: W (d_out, d_in) has p singular vectors on either side, so on the
longer side they are no basis. Everything is float64. W + ΔW is never decomposed as a whole where p is large:

* Where *all* of W is decomposed, ``W = U diag(sigma) V.T``, W + ΔW is a diagonal plus a product of thin factors
  in W's own singular bases, and its top costs a few hundred products of O(p r) numbers, no pass over W
  (``core_triples``). What an adapted vector has in common with each vector of W is then one of its coordinates.
* Elsewhere Lanczos (ARPACK) on a float32 copy, then a Rayleigh-Ritz step in float64 (``leading_triples``).

A triple's vectors are off by at most twice the residual over the gap to the next singular value (Davis and
Kahan, on the symmetric ``[[0, W], [W.T, 0]]``). Where two singular values are closer than the residuals
the vectors are not determined, and the bound says 1. That the triples found are the *leading* ones is the
solver's promise, no part of the bound.

Measures
--------
``leading_triples``, ``core_triples``, ``coordinates``; a ``Triples`` is what the first two return.

References
----------
Davis and Kahan 1970, *The rotation of eigenvectors by a perturbation III*; Parlett, *The Symmetric Eigenvalue
Problem*, theorems 4.5.1 and 11.7.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.measures.weight import require_shape, weight_norm, weight_product
from lora_analysis.update import Svd

Array = npt.NDArray[Any]

DENSE_SIDE = 2048
"""Smaller side of W up to which all its singular vectors are computed unless asked otherwise (about 5 s there)."""

_CORE_SIDE = 192
"""Smaller side up to which LAPACK decomposes a diagonal plus a product faster than Lanczos does."""

_SPARE = 4
"""Triples computed beyond those asked for: the gap below the last one needs the next value."""

_RESIDUAL = 1e-5
"""Largest residual, relative to its singular value, accepted from float32 products."""


@dataclass(frozen=True, slots=True, eq=False)
class Triples:
    """Leading singular triples of a matrix.

    Parameters
    ----------
    svd : Svd
        K triples, float64.
    errors : Tensor, shape (K,)
        Each true singular vector, its sign chosen well, is at most this far from the one given, on both sides;
        in [0, 1]. 0 where LAPACK decomposed all of W: its vectors then *are* the definition, also where
        singular values are equal.
    complete : bool
        Whether these are all min(d_out, d_in) triples.
    """

    svd: Svd
    errors: Tensor
    complete: bool


def leading_triples(
    weight: Tensor, k: int, *, update: Svd | None = None, complete: bool | None = None, seed: int = 0
) -> Triples:
    """The top k singular triples of W, or of W + ΔW, from products with W.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    k : int
        At most min(d_out, d_in).
    update : Svd, optional
        Of ΔW.
    complete : bool, optional
        Whether to compute all triples by LAPACK, time by the cube of the smaller side. By default up to 2048 there,
        and where k is more than a quarter of it.
    seed : int
        Of the solver's start vector.

    Returns
    -------
    Triples

    Raises
    ------
    ValueError
        If k is not between 1 and the smaller side.
    BaseWeightsError
        If W holds NaN or infinities, or is not of the update's shape.

    Examples
    --------
    >>> found = leading_triples(torch.diag(torch.tensor([1.0, -4.0, 2.0])), 1)
    >>> found.svd.S.tolist(), found.complete
    ([4.0, 2.0, 1.0], True)
    """
    p = min(weight.shape)
    if not 1 <= k <= p:
        raise ValueError(f"k: expected 1 to {p} singular triples for shape {tuple(weight.shape)}, got {k}.")
    if update is not None:
        require_shape(weight, update)
    norm = weight_norm(weight)
    # ARPACK has nothing to iterate on in a zero matrix, and needs more columns than it is asked for.
    dense = 4 * (k + _SPARE) > p or norm == 0 or (p <= DENSE_SIDE if complete is None else complete)
    if not dense:
        for dtype in (torch.float32, torch.float64):
            found = _leading(weight, k, update, dtype, seed)
            if found is not None:
                return found
    whole = weight.detach().double()
    if update is not None:
        U, S, V = (part.to(weight.device, torch.float64) for part in (update.U, update.S, update.V))
        return _dense(whole + (U * S) @ V.mT, p)
    svd = Svd(*(part.cpu() for part in torch.linalg.svd(whole, full_matrices=False)))
    return Triples(svd, torch.zeros_like(svd.S), complete=True)


def coordinates(base: Svd, update: Svd) -> tuple[Tensor, Tensor]:
    """The singular vectors of an update in the bases that W's own span, and in what is left of the space.

    Parameters
    ----------
    base : Svd
        All p triples of W.
    update : Svd
        Of ΔW, r triples.

    Returns
    -------
    left : Tensor, shape (p + a, r)
        The first p rows are ``base.U.T @ update.U``; the others, min(r, d_out - p) of them, coordinates in an
        orthonormal basis of what the update has outside.
    right : Tensor, shape (p + b, r)
        The same on the input side.

    Examples
    --------
    >>> base = Svd(torch.eye(3, 2), torch.ones(2), torch.eye(2))
    >>> left, right = coordinates(base, Svd(torch.eye(3)[:, 2:], torch.ones(1), torch.eye(2)[:1]))
    >>> left.abs().tolist(), right.tolist()
    ([[0.0], [0.0], [1.0]], [[1.0], [0.0]])
    """
    return _in_basis(base.U, update.U), _in_basis(base.V, update.V)


def core_triples(sigma: Tensor, left: Tensor, S: Tensor, right: Tensor, k: int, *, seed: int = 0) -> Triples:
    """The top k singular triples of ``diag(sigma) + left @ diag(S) @ right.T``.

    Parameters
    ----------
    sigma : Tensor, shape (p,)
        The singular values of W.
    left : Tensor, shape (p + a, r)
    S : Tensor, shape (r,)
        The singular values of ΔW.
    right : Tensor, shape (p + b, r)
        From ``coordinates``; the diagonal is padded with zeros.
    k : int
        At most p.
    seed : int
        Of the solver's start vector.

    Returns
    -------
    Triples
        Of W + ΔW, ``U`` and ``V`` in those coordinates: row j, below p, is the cosine with W's vector j.

    Examples
    --------
    >>> flat = torch.full((16, 1), 0.25)
    >>> found = core_triples(torch.arange(16.0, 0.0, -1.0), flat, torch.tensor([10.0]), flat, 1)
    >>> round(float(found.svd.U[:, 0].abs().max()), 5)  # SCIENCE's oracle O15
    0.4972
    """
    p, wanted = len(sigma), min(k + _SPARE, len(sigma))
    sigma, left, S, right = (part.detach().to("cpu", torch.float64) for part in (sigma, left, S, right))
    if p > _CORE_SIDE and 4 * wanted <= p and 4 * len(S) <= p:
        found = _core_leading(sigma.numpy(), (left * S).numpy(), right.numpy(), wanted, seed)
        if found is not None:
            return Triples(found.svd.top(k), found.errors[:k], complete=False)
    whole = (left * S) @ right.mT
    whole.diagonal()[:p] += sigma
    return _dense(whole, k)


def _core_leading(sigma: Array, left: Array, right: Array, k: int, seed: int) -> Triples | None:
    """The top k of ``diag(sigma) + left @ right.T`` by Lanczos; None if it does not get there."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds  # a third of a second to import

    p, shape = len(sigma), (len(left), len(right))

    def product(X: Array, low: Array, high: Array) -> Array:
        result: Array = low @ (high.T @ X)
        result[:p] += sigma.reshape(-1, *[1] * (X.ndim - 1)) * X[:p]
        return result

    core = LinearOperator(
        shape,
        matvec=lambda x: product(x.ravel(), left, right),
        rmatvec=lambda x: product(x.ravel(), right, left),
        matmat=lambda X: product(X, left, right),
        rmatmat=lambda X: product(X, right, left),
        dtype=np.float64,
    )
    start = np.random.default_rng(seed).standard_normal(min(shape))
    try:
        U, values, Vh = svds(core, k=k, v0=start, ncv=min(3 * k, p - 1), tol=1e-12)
    except ArpackError:
        return None
    order = np.argsort(-values)
    U, values, Vh = U[:, order].copy(), values[order].copy(), Vh[order].copy()
    wrong = (product(Vh.T, left, right) - U * values, product(U, right, left) - Vh.T * values)
    svd = Svd(*(torch.from_numpy(part) for part in (U, values, Vh)))
    return Triples(svd, _errors(svd.S, _residuals(*(torch.from_numpy(part) for part in wrong))), complete=False)


def _dense(matrix: Tensor, k: int) -> Triples:
    """The top k by LAPACK, whose residuals are of the order of rounding."""
    svd = Svd(*(part.cpu() for part in torch.linalg.svd(matrix, full_matrices=False)))
    rounding = max(matrix.shape) * torch.finfo(torch.float64).eps * float(svd.S[0])
    return Triples(svd.top(k), _errors(svd.S, torch.full_like(svd.S, rounding))[:k], complete=k == len(svd.S))


def _leading(weight: Tensor, k: int, update: Svd | None, dtype: torch.dtype, seed: int) -> Triples | None:
    """The top k by Lanczos with products in ``dtype``; None if it does not get there."""
    from scipy.sparse.linalg import ArpackError, svds

    rng = np.random.default_rng(seed)
    wanted = k + _SPARE
    factors = None
    if update is not None:
        U, S, V = (part.to(weight.device, torch.float64) for part in (update.U, update.S, update.V))
        factors = (U * S, V)
    # One copy in the working precision: ARPACK asks for hundreds of single products.
    matrix = weight.detach().to(dtype, copy=True)
    if factors is not None:
        matrix.addmm_(factors[0].to(dtype), factors[1].mT.to(dtype))
    start = rng.standard_normal(min(weight.shape)).astype(np.float32 if dtype == torch.float32 else np.float64)
    try:
        _, _, rows = svds(matrix.cpu().numpy(), k=wanted, v0=start, ncv=max(20, 3 * wanted) if k < 20 else None)
    except ArpackError:
        return None
    del matrix
    basis = torch.linalg.qr(torch.from_numpy(rows.T.astype(np.float64)).to(weight.device)).Q
    product = _product(weight, basis, factors)
    U, S, Zh = torch.linalg.svd(product, full_matrices=False)
    V = basis @ Zh.mT
    back = _product(weight.mT, U, None if factors is None else factors[::-1])
    residuals = _residuals(product @ Zh.mT - U * S, back - V * S)
    if not bool(residuals.isfinite().all()):
        raise BaseWeightsError("the base weight or the update holds numbers too large to be multiplied.")
    if dtype == torch.float32 and bool((residuals > _RESIDUAL * S).any()):
        return None
    svd = Svd(*(part.cpu() for part in (U, S, V.mT)))
    return Triples(svd.top(k), _errors(svd.S, residuals.cpu())[:k], complete=False)


def _product(weight: Tensor, X: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """``(W + left @ right.T) @ X`` in float64."""
    result = weight_product(weight, X)
    return result if factors is None else result + factors[0] @ (factors[1].mT @ X)


def _residuals(left: Tensor, right: Tensor) -> Tensor:
    """Some singular value lies this close to each, by the symmetric matrix that holds W and its transpose."""
    return ((left.square().sum(dim=0) + right.square().sum(dim=0)) / 2).sqrt()


def _errors(S: Tensor, residuals: Tensor) -> Tensor:
    """How far the vectors of each triple can be off, from its residual and the gap to its neighbours.

    The dilated vector ``[u; v] / sqrt(2)`` has ``sin <= residual / gap``; each half moves by at most twice that.
    """
    gaps = S[:-1] - S[1:] - residuals[:-1] - residuals[1:]
    below, above = torch.full_like(S, math.inf), torch.full_like(S, math.inf)
    below[:-1], above[1:] = gaps, gaps
    gap = torch.minimum(below, above)
    return torch.where(gap > 0, 2 * residuals / gap, math.inf).clamp(max=1.0)


def _in_basis(basis: Tensor, vectors: Tensor) -> Tensor:
    basis, vectors = basis.to(torch.float64), vectors.to(basis.device, torch.float64)
    # In this order torch reads the large one as it lies; the other way took 50 times as long.
    inside = (vectors.mT @ basis).mT
    if basis.shape[0] == basis.shape[1]:
        return inside
    outside = torch.linalg.qr(vectors - basis @ inside, mode="r").R[: basis.shape[0] - basis.shape[1]]
    return torch.cat([inside, outside])
