"""How two subspaces lie to each other: the paper's phi, principal angles, Grassmann distances.

Conventions
-----------
A basis has shape (d, k), k orthonormal columns ordered by descending singular value, such as ``svd.U`` and
``svd.V``. Everything is computed in float64. ``theta_1 <= ... <= theta_p`` are the principal angles, with
p = min(m, n). Bases whose columns are not orthonormal are refused: they would give phi above 1. The check
multiplies ``basis.T @ basis`` with one fixed generic vector, at a hundredth of the cost of the whole
product; it tolerates 1e-5, because a float32 SVD leaves about 1e-6.

What chance alone gives is in ``null``: a similarity means nothing without it.

Measures
--------
``subspace_similarity``, ``corrected_similarity``, ``principal_angles``, ``projection_metric``,
``grassmann_distance``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2 and appendix G.
Björck and Golub, *Numerical methods for computing angles between linear subspaces*, Math. Comp. 27, 1973.
Hamm and Lee, *Grassmann discriminant analysis*, ICML 2008.
Ye and Lim, *Schubert varieties and distances between subspaces of different dimensions*, arXiv:1407.0900.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

GrassmannKind = Literal[
    "geodesic",
    "chordal",
    "procrustes",
    "fubini-study",
    "binet-cauchy",
    "martin",
    "asimov",
    "projection",
    "spectral",
]
"""The distances ``grassmann_distance`` knows."""

_ORTHONORMAL_TOLERANCE = 1e-5
"""Largest entry of ``(basis.T @ basis - I) @ x`` that still counts as rounding, x of size 1 to 2."""


def subspace_similarity(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Normalised overlap of the top-i and top-j subspaces, for every i and j.

    ``phi[i-1, j-1] = ||A_i.T @ B_j||_F^2 / min(i, j)``, A_i being the first i columns of ``basis_a``.
    Invariant to the signs of the columns, not to their order. One product and two cumulative sums give the
    whole grid; the sums are of nonnegative numbers, so nothing cancels.

    Parameters
    ----------
    basis_a : Tensor, shape (d, m)
    basis_b : Tensor, shape (d, n)
        Orthonormal columns, by descending singular value.

    Returns
    -------
    Tensor, shape (m, n)
        Dimensionless, in [0, 1]: 1 where one subspace contains the other; chance is max(i, j) / d.

    Raises
    ------
    ValueError
        If the bases have different numbers of rows, or columns that are not orthonormal.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2, eq. 4. The paper takes the right-singular vectors of A.

    Examples
    --------
    >>> e = torch.eye(4)
    >>> subspace_similarity(e[:, :2], e[:, 1:4]).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    """
    basis_a, basis_b = _checked_bases(basis_a, basis_b)
    overlap = (basis_a.mT @ basis_b).square_().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, device=overlap.device)
    j = torch.arange(1, overlap.shape[1] + 1, device=overlap.device)
    # Orthonormality has been checked, so what exceeds 1 is rounding of the bases.
    return (overlap / torch.minimum(i[:, None], j)).clamp_(max=1.0)


def corrected_similarity(phi: Tensor, mean: Tensor) -> Tensor:
    """Similarity on a scale where 0 is chance and 1 is containment.

    ``(phi - mean) / (1 - mean)``, like Cohen's kappa.

    Parameters
    ----------
    phi : Tensor, shape (m, n)
        From ``subspace_similarity``.
    mean : Tensor, shape (m, n)
        Its expectation under chance, ``similarity_null(d, m, n).mean``.

    Returns
    -------
    Tensor, shape (m, n)
        Dimensionless, at most 1, negative below chance; NaN where the mean is 1, for there one subspace is
        the whole space.

    Examples
    --------
    >>> corrected_similarity(torch.tensor([0.625]), torch.tensor([0.25])).tolist()
    [0.5]
    """
    phi, mean = phi.double(), mean.double()
    return torch.where(mean < 1.0, (phi - mean) / (1.0 - mean), math.nan)


def principal_angles(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Principal angles between two subspaces, the smallest first.

    ``cos(theta_k)`` are the singular values of ``A.T @ B``; small angles are taken from their sines, the
    singular values of ``B - A @ A.T @ B``, because the arc cosine loses half the digits there.

    Parameters
    ----------
    basis_a : Tensor, shape (d, m)
    basis_b : Tensor, shape (d, n)
        Orthonormal columns.

    Returns
    -------
    Tensor, shape (min(m, n),)
        Radians, ascending, in [0, pi/2]; absolute error about 1e-15. ``scipy.linalg.subspace_angles`` gives
        the same angles in descending order.

    Raises
    ------
    ValueError
        If the bases have different numbers of rows, or columns that are not orthonormal.

    References
    ----------
    Björck and Golub 1973.

    Examples
    --------
    >>> line = torch.tensor([[0.6], [0.8]])
    >>> torch.rad2deg(principal_angles(torch.eye(2)[:, :1], line)).round(decimals=3).tolist()
    [53.13]
    """
    sines, cosines = _sines_and_cosines(basis_a, basis_b)
    # Both are accurate to rounding, so the arc tangent is at every angle.
    return torch.atan2(sines, cosines)


def projection_metric(basis_a: Tensor, basis_b: Tensor) -> float:
    """Projection metric of Hamm and Lee, the distance behind the paper's phi.

    ``d_P = sqrt(sum(sin(theta_k)**2)) = sqrt(p - sum(cos(theta_k)**2))`` with p = min(m, n): the chordal
    distance of the smaller subspace to the nearest subspace of its size inside the larger.

    ``phi = 1 - d_P**2 / p``. Appendix G of the paper prints ``(1 - d_P**2) / p`` for it, a slip of algebra:
    for equal subspaces that would be 1/p, and phi is 1.

    Parameters
    ----------
    basis_a : Tensor, shape (d, m)
    basis_b : Tensor, shape (d, n)
        Orthonormal columns.

    Returns
    -------
    float
        Dimensionless, in [0, sqrt(p)]; 0 where one subspace contains the other.

    Raises
    ------
    ValueError
        If the bases have different numbers of rows, or columns that are not orthonormal.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, appendix G, corrected. Hamm and Lee 2008.

    Examples
    --------
    >>> e = torch.eye(6)
    >>> round(projection_metric(e[:, :3], e[:, 3:]) ** 2, 12)
    3.0
    """
    larger, smaller = _checked_bases(basis_a, basis_b)
    if larger.shape[1] < smaller.shape[1]:
        larger, smaller = smaller, larger
    return float((smaller - larger @ (larger.mT @ smaller)).norm())


def grassmann_distance(
    basis_a: Tensor, basis_b: Tensor, *, kind: GrassmannKind = "chordal", containment: bool = False
) -> float:
    """Distance between two subspaces, of equal or different dimensions.

    With the principal angles theta::

        geodesic      sqrt(sum(theta**2))               the Grassmann distance
        chordal       sqrt(sum(sin(theta)**2))          the projection F-norm
        procrustes    2 sqrt(sum(sin(theta / 2)**2))    the chordal F-norm
        fubini-study  arccos(prod(cos(theta)))
        binet-cauchy  sqrt(1 - prod(cos(theta)**2))
        martin        sqrt(-2 sum(log(cos(theta))))     not a metric: no triangle inequality
        asimov        max(theta)
        projection    sin(max(theta))                   the projection 2-norm
        spectral      2 sin(max(theta) / 2)

    Subspaces of different dimensions are, by default, |m - n| right angles further apart, which makes a
    metric over all dimensions: geodesic, chordal and procrustes add |m - n| times (pi/2)², 1 and 2 to their
    squares; the others go to their maxima, pi/2, 1, inf, pi/2, 1 and sqrt(2). With ``containment`` only the
    min(m, n) principal angles count: the distance to the nearest subspace of equal dimension contained in
    the larger (or containing the smaller), 0 where one subspace lies in the other.

    Fubini-Study, Binet-Cauchy and Martin follow the worst angle: any two random 8-dimensional subspaces of a
    model's width are at their maximum. Prefer chordal, which phi is made of.

    Parameters
    ----------
    basis_a : Tensor, shape (d, m)
    basis_b : Tensor, shape (d, n)
        Orthonormal columns.
    kind : str
        One of the names above.
    containment : bool
        Compare the smaller subspace with the nearest part of the larger.

    Returns
    -------
    float
        Radians for geodesic, fubini-study and asimov, else dimensionless; nonnegative, and infinite only for
        martin, where a cosine is zero to rounding.

    Raises
    ------
    ValueError
        If the kind is unknown, the bases have different numbers of rows, or columns that are not
        orthonormal.

    References
    ----------
    Edelman, Arias and Smith 1998, arXiv:physics/9806030; Hamm and Lee 2008; Ye and Lim, arXiv:1407.0900
    (different dimensions).

    Examples
    --------
    >>> e = torch.eye(4)
    >>> round(grassmann_distance(e[:, :2], e[:, 1:4]) ** 2, 12)
    2.0
    >>> grassmann_distance(e[:, :2], e[:, 1:4], containment=True)
    1.0
    """
    if kind not in get_args(GrassmannKind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(GrassmannKind))}, got {kind!r}.")
    sines, cosines = _sines_and_cosines(basis_a, basis_b)
    missing = 0 if containment else abs(basis_a.shape[1] - basis_b.shape[1])
    sines = torch.cat([sines, sines.new_ones(missing)])
    cosines = torch.cat([cosines, cosines.new_zeros(missing)])
    if not sines.numel():
        return 0.0
    angles = torch.atan2(sines, cosines)
    if kind == "geodesic":
        return float(angles.norm())
    if kind == "chordal":
        return float(sines.norm())
    if kind == "procrustes":
        return 2.0 * float((angles / 2).sin().norm())
    if kind == "asimov":
        return float(angles[-1])
    if kind == "projection":
        return float(sines[-1])
    if kind == "spectral":
        return 2.0 * math.sin(float(angles[-1]) / 2)
    # The other three are functions of prod(cos²); its logarithm is taken from whichever of sine and cosine
    # keeps its digits, so that close subspaces have distances and not rounding errors.
    log_product = float(torch.where(sines < 0.5, torch.log1p(-sines.square()), 2 * cosines.log()).sum())
    if kind == "martin":
        return math.sqrt(-log_product) if log_product < 0 else 0.0
    binet_cauchy = math.sqrt(-math.expm1(log_product)) if log_product < 0 else 0.0
    if kind == "binet-cauchy":
        return binet_cauchy
    return math.atan2(binet_cauchy, math.exp(log_product / 2))


def _sines_and_cosines(basis_a: Tensor, basis_b: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the principal angles, by ascending angle."""
    larger, smaller = _checked_bases(basis_a, basis_b)
    if larger.shape[1] < smaller.shape[1]:
        larger, smaller = smaller, larger
    overlap = larger.mT @ smaller
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(smaller - larger @ overlap).flip(0).clamp(max=1.0)
    # A cosine within its own rounding error is a right angle; martin would make a number of the noise.
    rounding = smaller.shape[0] * torch.finfo(torch.float64).eps
    return sines, torch.where(cosines > rounding, cosines, 0.0)


def _checked_bases(basis_a: Tensor, basis_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both bases in float64, once they are known to be bases of subspaces of one space."""
    a, b = _checked_basis("basis_a", basis_a), _checked_basis("basis_b", basis_b)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"basis_a, basis_b: expected bases of subspaces of one space, (d, m) and (d, n), got "
            f"{tuple(a.shape)} and {tuple(b.shape)}. Compare input sides (V) with input sides, output sides "
            "(U) with output sides."
        )
    return a, b


def _checked_basis(name: str, basis: Tensor) -> Tensor:
    if basis.ndim != 2:
        raise ValueError(f"{name}: expected a basis of shape (d, k), got shape {tuple(basis.shape)}.")
    columns = basis.detach().double()
    # Away from 0, so that no column goes unseen, and irregular, so that no two errors cancel.
    probe = 1.0 + torch.rand(columns.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probe = probe.to(columns.device)
    deviation = (columns.mT @ (columns @ probe) - probe).abs()
    # Not >, or NaN would pass.
    if not bool((deviation <= _ORTHONORMAL_TOLERANCE).all()):
        raise ValueError(
            f"{name}: expected orthonormal columns, got a basis of shape {tuple(basis.shape)} whose Gram matrix "
            f"differs from the identity by about {float(deviation.max()):.2g}. Pass svd.U or svd.V of the "
            "update, or the Q of torch.linalg.qr."
        )
    return columns
