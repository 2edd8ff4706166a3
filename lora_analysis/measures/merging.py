"""Merging updates of one matrix exactly, in the small basis they share.

Conventions
-----------
``ΔW_t``, t = 1 … T, of one shape, with weights w_t; every method gives one update as an ``Svd`` of at most R = Σ r_t
triples, and forms no large matrix.

=========  =============================================================================================
sum        ``Σ w_t ΔW_t``: task arithmetic; with weights 1 / T their mean
tsv        each task's leading share of its directions, those of all tasks made orthonormal together
iso-c      the singular vectors of the sum, each with the mean of its singular values
knots      ``[ΔW_1 … ΔW_T] = U S [V_1 … V_T].T``; the V_t trimmed, a sign elected for each entry, and averaged
=========  =============================================================================================

TIES and DARE on whole matrices are dense, and PEFT has them.

Measures
--------
``merged_svd``.

References
----------
Ilharco et al. 2022, arXiv:2212.04089 (sum); Gargiulo et al. 2024, arXiv:2412.00081, section 4 (TSV-M); Marczak et al.
2025, arXiv:2502.04959, algorithm 1 (Iso-C); Stoica et al. 2024, arXiv:2410.19735 (KnOTS), with the trimming and
election of Yadav et al. 2023, arXiv:2306.01708 (TIES); Panariello et al. 2025, arXiv:2509.17786 (core space).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_analysis.measures.shared_basis import shared_basis
from lora_analysis.update import Svd

_ROUNDING = 8 * torch.finfo(torch.float64).eps
_TIE = 1e-12
"""Of the sum of absolute values: a sum below it has no sign to elect."""

Method = Literal["sum", "tsv", "iso-c", "knots"]
"""How updates are merged."""


def merged_svd(
    svds: Sequence[Svd],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "sum",
    density: float = 0.2,
    keep: float | None = None,
) -> Svd:
    """Several updates as one.

    Parameters
    ----------
    svds : sequence of Svd
        Of one shape.
    weights : sequence of float, optional
        Of each update; 1 by default, and 0 leaves it out.
    method : {"sum", "tsv", "iso-c", "knots"}
    density : float
        Of knots: the share of entries of each V_t that trimming leaves, in (0, 1].
    keep : float, optional
        Of tsv: the share of each update's directions that is used, in (0, 1]; 1 / T by default, as in the paper, T
        counting updates that have any and are not left out.

    Returns
    -------
    Svd
        With no more triples than the directions of all updates together.

    Raises
    ------
    ValueError
        If an argument is out of range, or the shapes differ.

    Examples
    --------
    >>> e = torch.eye(9, dtype=torch.float64)
    >>> svds = [Svd(e[:, i : i + 1], torch.tensor([i + 1.0]), e[i : i + 1]) for i in (0, 1)]
    >>> [round(x, 6) for x in merged_svd(svds).S.tolist()], merged_svd(svds, method="iso-c").S.tolist()
    ([2.0, 1.0], [1.5, 1.5])
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}.")
    factors = [1.0] * len(svds) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(svds):
        raise ValueError(f"weights: expected one of each of {len(svds)} updates, got {len(factors)}.")
    used = [(svd, factor) for svd, factor in zip(svds, factors, strict=True) if len(svd.S) and factor]
    keep = 1 / max(1, len(used)) if keep is None else keep
    for name, value in (("density", density), ("keep", keep)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected in (0, 1], got {value}.")
    shapes = {(svd.U.shape[0], svd.Vh.shape[1]) for svd in svds}
    if len(shapes) != 1:
        raise ValueError(f"svds: expected at least one update and all of one shape, got {sorted(shapes)}.")
    if not used:
        return svds[0].top(0)
    basis = shared_basis([svd for svd, _ in used])
    cores = torch.stack([factor * core for core, (_, factor) in zip(basis.cores, used, strict=True)])
    if method == "knots":
        return _knots(cores, basis.Q_out, basis.Q_in, density)
    core = _task_singular_vectors(cores, [len(svd.S) for svd, _ in used], keep) if method == "tsv" else cores.sum(0)
    U, S, Vh = _compact(core, largest=max(float(svd.S[0].double()) * abs(factor) for svd, factor in used))
    if method == "iso-c" and len(S):
        S = torch.full_like(S, float(S.mean()))
    return Svd(basis.Q_out @ U, S, Vh @ basis.Q_in.mT)


def _compact(matrix: Tensor, *, largest: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD without the directions of singular values that are rounding: those vectors would be arbitrary.

    Updates that share directions, or cancel, leave their basis with more dimensions than their sum has. ``largest`` is
    the largest singular value of what was summed, whose rounding is in the sum.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = max(float(S[0]), largest) * _ROUNDING * max(matrix.shape) if len(S) else 0.0
    rank = int((rounding < S).sum())
    return U[:, :rank], S[:rank], Vh[:rank]


def _task_singular_vectors(cores: Tensor, ranks: Sequence[int], keep: float) -> Tensor:
    """``U⊥ S V⊥.T``, U⊥ and V⊥ being the nearest orthonormal matrices to all tasks' singular vectors side by side."""
    parts = []
    for core, r in zip(cores, ranks, strict=True):
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        k = max(1, int(keep * r + 1e-9)) if r else 0  # a task without directions has none to keep
        parts.append((U[:, :k], S[:k], Vh[:k].mT))
    U, V = torch.hstack([part[0] for part in parts]), torch.hstack([part[2] for part in parts])
    return (_nearest_orthonormal(U) * torch.cat([part[1] for part in parts])) @ _nearest_orthonormal(V).mT


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The polar factor; where columns depend on each other, a partial isometry, which is unique."""
    left, _, right = _compact(matrix)
    return left @ right


def _knots(cores: Tensor, Q_out: Tensor, Q_in: Tensor, density: float) -> Svd:
    """Entries of ``V_t`` trimmed, elected and averaged as TIES does it with whole matrices."""
    T, _, q = cores.shape
    U, S, Vh = _compact(torch.hstack(list(cores)))
    if not len(S):
        return Svd(Q_out[:, :0], S, Q_in[:, :0].mT)
    parts = torch.stack([Vh[:, t * q : (t + 1) * q] @ Q_in.mT for t in range(T)])
    kept = max(1, round(density * parts[0].numel()))
    threshold = parts.abs().flatten(1).kthvalue(parts[0].numel() - kept + 1, dim=1).values
    trimmed = torch.where(parts.abs() >= threshold[:, None, None], parts, 0.0)
    elected = trimmed.sum(0)
    # Entries that cancel elect no sign: that of what rounding leaves would be another on another machine.
    sign = torch.where(elected.abs() > _TIE * trimmed.abs().sum(0), elected.sign(), 0.0)
    agreeing = torch.where(trimmed.sign() * sign > 0, trimmed, 0.0)
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)
    left, values, right = _compact(S[:, None] * merged)
    return Svd(Q_out @ (U @ left), values, right)
