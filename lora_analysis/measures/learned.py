"""How many input directions training has put into A: those that A's random start cannot account for.

Conventions
-----------
``down`` is A, (r, d_in), as it was trained: unlike ΔW it depends on the gauge, so a resized, balanced or merged
adapter says nothing here. A begins with independent entries of one variance, whose singular values fill the band
``sd · (sqrt(d_in) ± sqrt(r))``; a direction that training has made strong stands above it. Counted are the singular
values above the 99 % quantile of the *largest* of a random start of the same shape, so that a start without training
counts 0 but for one time in a hundred; after the first the count is conservative. A learned direction weaker than
``sd · sqrt(d_in) · (r / d_in)**(1/4)`` stays in the band and cannot be seen (Baik-Ben Arous-Péché).

The variance is taken as known, from the initialisation that PEFT, loralib and others share. Where that was another,
or weight decay or the noise of training has changed it, a singular value three quarters down the spectrum says so
(``bulk``, 1 as expected): fewer than that many learned directions do not reach it. Beside the count stands therefore
one that needs no variance, by the ratio of the others to that value, which is exact for a start of any; at r = 1 there
is none. Where most directions were learned neither tells.

Measures
--------
``learned_directions``, with ``initial_spectrum_null`` and ``kaiming_sd``.

References
----------
He et al. 2015, arXiv:1502.01852 (the initialisation: uniform, in PEFT and loralib with a = sqrt(5)); Baik, Ben Arous
and Péché 2005, *Phase transition of the largest eigenvalue for nonnull complex sample covariance matrices*, Ann.
Probab. 33; Benaych-Georges and Nadakuditi 2012, arXiv:1103.2221.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_analysis.measures.spectrum_null import triangular_factors

Law = Literal["uniform", "normal"]
"""Of the entries of a start: uniform (PEFT's default, loralib) or normal (PEFT's "gaussian")."""

LEVEL = 0.99
"""Quantile of the largest singular value of a start, above which a direction counts as learned."""

_CHUNK = 2**22


class LearnedDirections(NamedTuple):
    """What of A its start cannot account for.

    Attributes
    ----------
    learned : int
        Singular values above ``edge``.
    p : float
        Of the largest, by chance: (1 + draws at least as large) / (draws + 1).
    edge : float
        Quantile ``LEVEL`` of the largest singular value of a start, in the units of A.
    bulk : float
        The singular value three quarters down the spectrum over its expectation for a start; 1 where the variance is
        as assumed and not most directions were learned.
    bulk_p : float
        Two-sided p of that value.
    learned_rescaled : int
        Singular values whose ratio to that value is above the same quantile of a start's, whatever its variance.
    p_rescaled : float
        Of the largest of these ratios; 1 at r = 1.
    """

    learned: int
    p: float
    edge: float
    bulk: float
    bulk_p: float
    learned_rescaled: int
    p_rescaled: float


def kaiming_sd(d_in: int) -> float:
    """Standard deviation of the entries of A at the start, in PEFT and loralib: ``1 / sqrt(3 d_in)``.

    ``kaiming_uniform_(a=sqrt(5))`` draws from the uniform distribution on ``±1 / sqrt(d_in)``.

    Examples
    --------
    >>> round(kaiming_sd(4096), 5)
    0.00902
    """
    return 1 / math.sqrt(3 * d_in)


def initial_spectrum_null(r: int, d_in: int, *, law: Law = "uniform", draws: int = 999, seed: int = 0) -> Tensor:
    """Sample of the singular values of A at its start, in units of its entries' standard deviation.

    Normal entries enter by Bartlett's decomposition, at a cost that does not depend on d_in; uniform ones are drawn.

    Parameters
    ----------
    r, d_in : int
        Shape of A.
    law : {"uniform", "normal"}
    draws, seed : int

    Returns
    -------
    Tensor, shape (draws, min(r, d_in))
        Float64, each row descending.

    Raises
    ------
    ValueError
        If r, d_in or draws is below 1, or the law is unknown.

    Examples
    --------
    >>> S = initial_spectrum_null(64, 4096, law="normal", draws=99) / 4096**0.5
    >>> [round(x, 2) for x in (float(S[:, -1].mean()), float(S[:, 0].mean()))]  # 1 ± sqrt(64 / 4096)
    [0.88, 1.12]
    """
    if min(r, d_in, draws) < 1:
        raise ValueError(f"expected r, d_in and draws of at least 1, got r={r}, d_in={d_in}, draws={draws}.")
    if law not in ("uniform", "normal"):
        raise ValueError(f"law: expected 'uniform' or 'normal', got {law!r}.")
    rng = np.random.default_rng(seed)
    found = []
    if law == "normal":
        chunk = max(1, _CHUNK // r**2)
        for start in range(0, draws, chunk):
            factors = triangular_factors(rng, min(chunk, draws - start), d_in, r)
            found.append(torch.linalg.svdvals(factors))
        return torch.cat(found)
    chunk = max(1, _CHUNK // (r * d_in))
    for start in range(0, draws, chunk):
        # float32 is exact enough for singular values of a well-conditioned matrix, and twice as fast to draw.
        A = torch.from_numpy(rng.random((min(chunk, draws - start), r, d_in), dtype=np.float32)).sub_(0.5)
        small = (A @ A.mT if r <= d_in else A.mT @ A).double()
        found.append(torch.linalg.eigvalsh(small).flip(-1).clamp_min(0).mul_(12).sqrt_())
    return torch.cat(found)


def learned_directions(down: Tensor, null: Tensor, *, sd: float | None = None) -> LearnedDirections:
    """How many singular values of A are larger than its start explains.

    Parameters
    ----------
    down : Tensor, shape (r, d_in)
        A, as it was trained.
    null : Tensor, shape (draws, min(r, d_in))
        ``initial_spectrum_null`` of its shape.
    sd : float, optional
        Standard deviation of its entries at the start; ``kaiming_sd`` by default.

    Returns
    -------
    LearnedDirections

    Raises
    ------
    ValueError
        If the null is of another shape, ``sd`` is not positive, or A holds NaN or infinities.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> start = (2 * torch.rand(8, 512, generator=generator) - 1) / 512**0.5
    >>> null = initial_spectrum_null(8, 512)
    >>> learned_directions(start, null).learned
    0
    >>> learned = torch.outer(torch.ones(8), torch.ones(512)) / (8 * 512) ** 0.5  # of norm 1
    >>> learned_directions(start + learned, null).learned
    1
    """
    if down.dim() != 2 or null.dim() != 2 or null.shape[1] != min(down.shape):
        raise ValueError(f"null: expected (draws, {min(down.shape)}) for A of {tuple(down.shape)}, got {null.shape}.")
    if not bool(down.isfinite().all()):
        raise ValueError("down: expected finite numbers, got NaN or infinities.")
    sd = kaiming_sd(down.shape[1]) if sd is None else sd
    if not 0 < sd < math.inf:
        raise ValueError(f"sd: expected a positive number, got {sd}.")
    S = torch.linalg.svdvals(down.double()).cpu() / sd
    draws, low = len(null), min(len(S) - 1, 3 * len(S) // 4)
    largest, lower = null[:, 0].sort().values, null[:, low]
    ratios = (null[:, 0] / lower).sort().values
    quantile = min(draws - 1, math.ceil(LEVEL * (draws + 1)) - 1)
    edge, ratio_edge = float(largest[quantile]), float(ratios[quantile])
    above, below = int((lower >= S[low]).sum()), int((lower <= S[low]).sum())
    # A ratio to itself is 1 up to rounding, here as there.
    ratio = S / S[low] if float(S[low]) > 0 else torch.ones_like(S)
    return LearnedDirections(
        learned=int((edge < S).sum()),
        p=(1 + int((largest >= S[0]).sum())) / (draws + 1),
        edge=edge * sd,
        bulk=float(S[low]) / float(lower.mean()),
        bulk_p=min(1.0, 2 * (1 + min(above, below)) / (draws + 1)),
        learned_rescaled=int((ratio > ratio_edge).sum()),
        p_rescaled=(1 + int((ratios >= ratio[0]).sum())) / (draws + 1),
    )
