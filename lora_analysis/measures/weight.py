"""The base matrix W: its singular values, its norm, and what it looks like from the directions of an update.

Conventions
-----------
``weight`` is W, (d_out, d_in), as in ``torch.nn.Linear.weight``, in any floating dtype and memory layout.
W is read in blocks of rows, in the order it is stored, each converted to float64 in one reused buffer, so
that norms and products need no copy of W; the spectrum takes one. All numbers are float64.

Measures
--------
``weight_rows`` (``U.T @ W``), ``projected_weight`` (``G = U.T @ W @ V``), ``weight_spectrum`` (the top of W's
singular values and two moments of all of them), ``weight_norm``, ``weight_product``; ``require_shape`` refuses a W
that is not the update's.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3.
Lanczos, Rayleigh-Ritz and residual bounds: Parlett, *The Symmetric Eigenvalue Problem*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.update import Svd

_BLOCK_ROWS = 128
"""Rows of W converted at a time: 128 rows of 4096 float64 numbers stay in the second-level cache."""

_DENSE_SIDE = 1024
"""Smaller side of W up to which its whole spectrum is computed (0.16 s there) rather than the top."""

_RESIDUAL = 1e-5
"""Largest residual bound, relative to its singular value, accepted from float32 products with W."""

_PROBES = 8
"""Hutchinson probes for the fourth moment of the spectrum that was not computed."""

_NON_FINITE = "the base weight holds NaN or infinities, so nothing can be projected on it."


@dataclass(frozen=True, slots=True, eq=False)
class WeightSpectrum:
    """The singular values of W that are needed, and two moments of all of them.

    Parameters
    ----------
    S : Tensor, shape (K,)
        The largest singular values, descending, float64; all min(d_out, d_in) if ``complete``.
    bound : float
        Some singular value of W lies within ``bound`` of each ``S[l]``; in the unit of W. It is a residual:
        that they are the *largest* is the solver's promise, not part of the bound.
    norm : float
        Frobenius norm of W.
    fourth_moment : float
        ``sum(sigma**4) = ||W.T @ W||_F**2``; estimated where the spectrum is not complete.
    complete : bool
        Whether S is the whole spectrum.
    """

    S: Tensor
    bound: float
    norm: float
    fourth_moment: float
    complete: bool


def weight_rows(weight: Tensor, svd: Svd) -> Tensor:
    """W in the output directions of an update, ``U.T @ W``.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    svd : Svd
        Of the update, k triples.

    Returns
    -------
    Tensor, shape (k, d_in)
        Float64, in the unit of W.

    Raises
    ------
    BaseWeightsError
        If W does not have the update's shape, or holds NaN or infinities.

    Examples
    --------
    >>> second = torch.eye(2, dtype=torch.float64)[:, 1:]
    >>> weight_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Svd(second, torch.ones(1), second.mT)).tolist()
    [[3.0, 4.0]]
    """
    require_shape(weight, svd)
    rows = weight_product(weight.mT, svd.U.to(weight.device, torch.float64)).mT
    if not bool(rows.isfinite().all()):
        raise BaseWeightsError(_NON_FINITE)
    return rows.to(svd.S.device)


def projected_weight(weight: Tensor, svd: Svd) -> Tensor:
    """W in the singular directions of an update, ``G = U.T @ W @ V``.

    W is read once, in blocks of rows (in the order it is stored) converted to float64: g_l is about
    ``||W||_F / d``, small against the terms it sums, and half-precision products would lose it. No copy of
    W is made.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
        In any floating dtype and any memory layout.
    svd : Svd
        Of the update, k triples.

    Returns
    -------
    Tensor, shape (k, k)
        Float64, in the unit of W; ``G[l, l]`` is positive where ΔW adds to what W does in direction l.

    Raises
    ------
    BaseWeightsError
        If W does not have the update's shape, or holds NaN or infinities.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3.

    Examples
    --------
    >>> weight = torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5]))
    >>> third = torch.eye(4, dtype=torch.float64)[:, 2:3]
    >>> projected_weight(weight, Svd(third, torch.tensor([2.0]), third.mT)).tolist()
    [[1.0]]
    """
    require_shape(weight, svd)
    U = svd.U.to(weight.device, torch.float64)
    G = U.mT @ weight_product(weight, svd.V.to(weight.device, torch.float64))
    if not bool(G.isfinite().all()):
        raise BaseWeightsError(_NON_FINITE)
    return G.to(svd.S.device)


def weight_spectrum(weight: Tensor, k: int, *, seed: int = 0) -> WeightSpectrum:
    """The top k singular values of W with a residual bound, and the moments that the nulls need.

    Up to min(d_out, d_in) = 1024, or where k exceeds a quarter of it, the whole spectrum by LAPACK. Beyond,
    Lanczos (ARPACK, float32 products with W, repeated in float64 unless the residuals are within 1e-5 of
    the values), then one Rayleigh-Ritz step in float64, whose error in the values is of second order. The
    fourth moment of the rest is Hutchinson's estimate ``E ||R.T @ R @ g||**2``, R being W without its top.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    k : int
        How many values at least. More of them make ``projection_null_draws`` closer to exact.
    seed : int
        Of the start vector and the probes.

    Returns
    -------
    WeightSpectrum
        ``bound`` is ``max sqrt((||W v - s u||**2 + ||W.T u - s v||**2) / 2)`` over the k triples, from
        residuals computed in float64; of the order of rounding where the spectrum is complete.

    Raises
    ------
    ValueError
        If k < 1.
    BaseWeightsError
        If W holds NaN or infinities.

    References
    ----------
    The bound: Parlett, *The Symmetric Eigenvalue Problem*, theorem 4.5.1, on ``[[0, W], [W.T, 0]]``.

    Examples
    --------
    >>> spectrum = weight_spectrum(torch.diag(torch.tensor([3.0, -4.0])), 1)
    >>> spectrum.S.tolist(), spectrum.norm, round(spectrum.fourth_moment, 9), spectrum.complete
    ([4.0, 3.0], 5.0, 337.0, True)
    """
    _require_weight(weight)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}.")
    norm = weight_norm(weight)
    # The spectrum is that of the transpose; ARPACK iterates on the smaller side, which is then V's.
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    p = tall.shape[1]
    if norm == 0:
        return WeightSpectrum(torch.zeros(p, dtype=torch.float64), 0.0, 0.0, 0.0, complete=True)
    if p > _DENSE_SIDE and 4 * k <= p:
        for dtype in (torch.float32, torch.float64):
            spectrum = _top_spectrum(tall, k, norm, dtype, seed)
            if spectrum is not None:
                return spectrum
    S = torch.linalg.svdvals(weight.double())
    bound = max(weight.shape) * torch.finfo(torch.float64).eps * float(S[0])
    return WeightSpectrum(S.cpu(), bound, norm, float((S**4).sum()), complete=True)


def weight_norm(weight: Tensor) -> float:
    """Frobenius norm of W in float64, without a copy of W.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)

    Returns
    -------
    float
        In the unit of W.

    Raises
    ------
    BaseWeightsError
        If W holds NaN or infinities.

    Examples
    --------
    >>> weight_norm(torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    6.0
    """
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in _row_blocks(weight)))
    if not math.isfinite(norm):
        raise BaseWeightsError(_NON_FINITE)
    return norm


def weight_product(weight: Tensor, X: Tensor) -> Tensor:
    """``W @ X`` in float64, reading W once, in the order it lies in memory, without a copy of it.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
        ``weight.mT`` gives ``W.T @ X`` as fast.
    X : Tensor, shape (d_in, k)
        Float64, on the device of W.

    Returns
    -------
    Tensor, shape (d_out, k)
        Float64, in the unit of W times that of X; not finite where W is not.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    >>> weight_product(weight, torch.ones(2, 1, dtype=torch.float64)).tolist()
    [[3.0], [7.0]]
    """
    if weight.stride(0) >= weight.stride(1):
        result = torch.empty(weight.shape[0], X.shape[1], dtype=torch.float64, device=weight.device)
        for rows, block in _row_blocks(weight):
            torch.matmul(block, X, out=result[rows])
        return result
    # Gathering the rows of a transposed view takes six times as long as reading it as it lies.
    turned = torch.zeros(X.shape[1], weight.shape[0], dtype=torch.float64, device=weight.device)
    for columns, block in _row_blocks(weight.mT):
        turned.addmm_(X[columns].mT, block)
    return turned.mT


def require_shape(weight: Tensor, svd: Svd) -> None:
    """Refuse a W that is not a floating-point matrix of the update's shape.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    svd : Svd
        Of the update.

    Raises
    ------
    ValueError, TypeError
        If W is no matrix, or not of floating-point numbers.
    BaseWeightsError
        If its shape is another.
    """
    _require_weight(weight)
    shape = (svd.U.shape[0], svd.Vh.shape[1])
    if tuple(weight.shape) != shape:
        raise BaseWeightsError(
            f"expected a base weight of the update's shape {shape}, got {tuple(weight.shape)}. "
            "Check that it belongs to this module and is not stored transposed."
        )


def _top_spectrum(tall: Tensor, k: int, norm: float, dtype: torch.dtype, seed: int) -> WeightSpectrum | None:
    """The top k of a tall W, products with it in ``dtype``; None if Lanczos does not get there."""
    from scipy.sparse.linalg import ArpackError, svds  # a third of a second to import, and not needed by most

    rng = np.random.default_rng(seed)
    p = tall.shape[1]
    matrix = tall.detach().to("cpu", dtype).numpy()
    try:
        _, _, rows = svds(matrix, k=k, v0=rng.standard_normal(p).astype(matrix.dtype))
    except ArpackError:
        return None
    basis = torch.linalg.qr(torch.from_numpy(rows.T.astype(np.float64)).to(tall.device)).Q
    probes = torch.from_numpy(rng.choice([-1.0, 1.0], size=(p, _PROBES))).to(tall.device)
    probes -= basis @ (basis.mT @ probes)
    products = weight_product(tall, torch.hstack([basis, probes]))
    U, S, Zh = torch.linalg.svd(products[:, :k], full_matrices=False)
    V = basis @ Zh.mT
    back = weight_product(tall.mT, torch.hstack([U, products[:, k:]]))
    left, right = products[:, :k] @ Zh.mT - U * S, back[:, :k] - V * S
    bounds = ((left.square().sum(dim=0) + right.square().sum(dim=0)) / 2).sqrt()
    if dtype == torch.float32 and bool((bounds > _RESIDUAL * S).any()):
        return None
    curvature = back[:, k:] - V @ (V.mT @ back[:, k:])
    energy = max(norm**2 - float(S.square().sum()), 0.0)
    # What p - k values of this energy and none above S[-1] can have, whatever the probes say.
    rest = float(curvature.square().sum(dim=0).mean())
    rest = min(max(rest, energy**2 / (p - k)), energy * float(S[-1]) ** 2)
    fourth = float((S**4).sum()) + rest
    return WeightSpectrum(S.cpu(), float(bounds.max()), norm, fourth, complete=False)


def _row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in float64, in one reused buffer: use each before asking for the next."""
    weight = weight.detach()
    rows, columns = weight.shape
    buffer = torch.empty(min(rows, _BLOCK_ROWS), columns, dtype=torch.float64, device=weight.device)
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        yield slice(start, stop), buffer[: stop - start].copy_(weight[start:stop])


def _require_weight(weight: Tensor) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}.")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected floating-point numbers, got {weight.dtype}. Dequantise it first.")
