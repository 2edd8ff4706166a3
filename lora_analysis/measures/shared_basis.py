"""Several updates of one matrix in one small basis: everything about their sum without a large matrix.

Conventions
-----------
``ΔW_t = U_t S_t V_t.T``, t = 1 … T, of one shape. Their outputs lie in the span of all U_t and their inputs in that of
all V_t, so that with orthonormal bases Q of both, ``ΔW_t = Q_out @ C_t @ Q_in.T`` exactly, C_t being at most R × R with
R the sum of their ranks. Merging methods, norms, sums and singular values act on the cores C_t.

Measures
--------
``shared_basis`` gives ``SharedBasis``; ``subspace_alignment_ratio``, ``union_rank``, ``interference_null``,
``averaging_error``.

References
----------
Panariello et al. 2025, *Accurate and Efficient Low-Rank Model Merging in Core Space*, arXiv:2509.17786 (the basis);
Marczak et al. 2025, *No Task Left Behind: Isotropic Model Merging*, arXiv:2502.04959 (alignment ratio); Gargiulo et al.
2024, arXiv:2412.00081 (interference).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.measures.haar_frames import Blocks, frame_products
from lora_analysis.update import LowRankUpdate, Svd


class SharedBasis(NamedTuple):
    """Updates in a basis of their own.

    Attributes
    ----------
    Q_out : Tensor, shape (d_out, p)
    Q_in : Tensor, shape (d_in, q)
        Orthonormal columns; p and q are at most R.
    cores : Tensor, shape (T, p, q)
        ``ΔW_t = Q_out @ cores[t] @ Q_in.T``.
    """

    Q_out: Tensor
    Q_in: Tensor
    cores: Tensor


def shared_basis(svds: Sequence[Svd]) -> SharedBasis:
    """The basis of several updates, and each update in it.

    Parameters
    ----------
    svds : sequence of Svd
        Of one shape (d_out, d_in).

    Raises
    ------
    ValueError
        If there are none, or their shapes differ.

    Examples
    --------
    >>> e = torch.eye(9, dtype=torch.float64)
    >>> svds = [Svd(e[:, i : i + 2], torch.ones(2), e[i : i + 2]) for i in (0, 1)]
    >>> basis = shared_basis(svds)
    >>> bool(torch.allclose(basis.Q_out @ basis.cores[1] @ basis.Q_in.mT, svds[1].U @ svds[1].Vh))
    True
    """
    shapes = {(svd.U.shape[0], svd.Vh.shape[1]) for svd in svds}
    if len(shapes) != 1:
        raise ValueError(f"svds: expected at least one update and all of one shape, got {sorted(shapes)}.")
    Q_out = torch.linalg.qr(torch.hstack([svd.U.double() for svd in svds])).Q
    Q_in = torch.linalg.qr(torch.hstack([svd.V.double() for svd in svds])).Q
    cores = [(Q_out.mT @ (svd.U.double() * svd.S.double())) @ (svd.Vh.double() @ Q_in) for svd in svds]
    return SharedBasis(Q_out, Q_in, torch.stack(cores))


def subspace_alignment_ratio(cores: Tensor, *, norm_share: float = 0.95) -> Tensor:
    """How much of each update lies in the leading output directions of their sum.

    ``‖U_k U_k.T ΔW_t‖_F / ‖ΔW_t‖_F``, U_k being the left singular vectors of ``Σ_t ΔW_t`` that hold ``norm_share`` of
    its *norm* (0.95, as the authors' code has it: 90.25 % of its energy). Higher ones went with better merges there.

    Parameters
    ----------
    cores : Tensor, shape (T, p, q)
        Of ``shared_basis``.
    norm_share : float
        In (0, 1].

    Returns
    -------
    Tensor, shape (T,)
        In [0, 1]; NaN where an update, or the sum, is 0.

    References
    ----------
    Marczak et al. 2025, arXiv:2502.04959, the subspace alignment ratio; here the least k with that
    norm, where public code takes one fewer.

    Examples
    --------
    >>> subspace_alignment_ratio(torch.diag_embed(torch.tensor([[3.0, 0.0], [0.0, 0.1]])))
    tensor([1., 0.], dtype=torch.float64)
    """
    if not 0 < norm_share <= 1:
        raise ValueError(f"norm_share: expected in (0, 1], got {norm_share}.")
    cores = cores.double()
    U, S, _ = torch.linalg.svd(cores.sum(0), full_matrices=False)
    # A sum whose terms cancel is 0 up to their rounding.
    rounding = 8 * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(cores).sum())
    if not len(S) or not S[0] > rounding:
        return torch.full((len(cores),), math.nan, dtype=torch.float64)
    lengths = S.square().cumsum(0).sqrt()
    k = int((lengths < norm_share * lengths[-1] * (1 - 1e-12)).sum()) + 1
    held = torch.linalg.matrix_norm(U[:, :k].mT @ cores)
    ratios: Tensor = held / torch.linalg.matrix_norm(cores)  # 0 / 0 is NaN
    return ratios


def union_rank(svds: Sequence[Svd], *, tolerance: float = 1e-6) -> tuple[int, int]:
    """Dimensions that all updates span together, on the output and on the input side.

    Directions within an angle of about ``tolerance`` of each other count once. Between the largest rank of one update
    and the sum of all: the sum where nothing is shared.

    Examples
    --------
    >>> e = torch.eye(9, dtype=torch.float64)
    >>> union_rank([Svd(e[:, :2], torch.ones(2), e[:2]), Svd(e[:, 1:3], torch.ones(2), e[5:7])])
    (3, 4)
    """
    sides = (torch.hstack([svd.U.double() for svd in svds]), torch.hstack([svd.V.double() for svd in svds]))
    out, into = (int((torch.linalg.svdvals(side) > tolerance).sum()) if side.shape[1] else 0 for side in sides)
    return out, into


def interference_null(spectra: Sequence[Tensor], shape: tuple[int, int], *, draws: int = 999, seed: int = 0) -> Tensor:
    """Sample of ``singular_task_interference`` (entrywise) of updates turned at random, with the spectra they have.

    Parameters
    ----------
    spectra : sequence of Tensor, shape (r_t,)
    shape : (int, int)
        (d_out, d_in).
    draws, seed : int

    Returns
    -------
    Tensor, shape (draws,)
        Ascending, in the unit of the spectra.

    Examples
    --------
    >>> wide = interference_null([torch.ones(4), torch.ones(4)], (4096, 4096))
    >>> narrow = interference_null([torch.ones(4), torch.ones(4)], (64, 64))
    >>> bool(wide.mean() < narrow.mean() < 8)
    True
    """
    if sum(len(S) > 0 for S in spectra) < 2:
        return torch.zeros(draws, dtype=torch.float64)
    sizes = [len(S) for S in spectra]
    left, right = (frame_products(d, sizes, draws=draws, seed=seed + side) for side, d in enumerate(shape))
    S = torch.cat([spectrum.double() for spectrum in spectra])
    found = [
        ((_whole(outputs, sizes) * S) @ _whole(inputs, sizes)).abs().sum((1, 2))
        for outputs, inputs in zip(left, right, strict=True)
    ]
    return torch.cat(found).sort().values


def _whole(products: Blocks, sizes: Sequence[int]) -> Tensor:
    """Draws of ``U.T @ U - I`` of all frames side by side."""
    draws = len(products[0, 1])
    whole = torch.zeros(draws, sum(sizes), sum(sizes), dtype=torch.float64)
    starts = [0, *itertools.accumulate(sizes)]
    for (s, t), block in products.items():
        whole[:, starts[s] : starts[s + 1], starts[t] : starts[t + 1]] = block
        whole[:, starts[t] : starts[t + 1], starts[s] : starts[s + 1]] = block.mT
    return whole


def averaging_error(updates: Sequence[LowRankUpdate]) -> float:
    """How far averaging the factors is from averaging the updates, ``‖s B̄ Ā - mean ΔW_t‖_F / ‖mean ΔW_t‖_F``.

    ``B̄`` and ``Ā`` are the means of the factors, which is what "linear" combination of adapters does where weights are
    alike; it adds the cross terms ``B_i A_j``. It depends on the gauge, as the method does.

    Parameters
    ----------
    updates : sequence of LowRankUpdate
        Of one shape, r and scale.

    Returns
    -------
    float
        Dimensionless; NaN where r or scale differ, or the mean is 0.

    Examples
    --------
    >>> e = torch.eye(2)
    >>> pair = [LowRankUpdate(e[:, i : i + 1], e[i : i + 1], scale=1.0) for i in (0, 1)]
    >>> round(averaging_error(pair) * 0.5**0.5, 6)  # the mean is diag(1/2, 1/2), the factors' product all 1/4
    0.5
    """
    if len({(update.r, update.scale) for update in updates}) != 1:
        return math.nan
    T = len(updates)
    ups, downs = [update.up.double() for update in updates], [update.down.double() for update in updates]
    mean = LowRankUpdate(torch.hstack(ups) / T, torch.vstack(downs), scale=updates[0].scale)
    B, A = torch.stack(ups).mean(0), torch.stack(downs).mean(0)
    difference = LowRankUpdate(torch.hstack([B, -mean.up]), torch.vstack([A, mean.down]), scale=mean.scale)
    norm = mean.norm()
    # Through singular values: the difference may be far smaller than its terms.
    return float(difference.svd().S.norm()) / norm if norm > 0 else math.nan
