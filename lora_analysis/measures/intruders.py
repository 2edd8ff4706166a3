"""Which directions of the adapted model are new to it.

Conventions
-----------
Directions are unit columns of (d, k) matrices, signs ignored. A singular vector of W + ΔW among its top k is
called an *intruder* where no singular vector of W is close to it: where ``largest_cosine`` is below a threshold
(0.5). The basis is *all* p = min(d_out, d_in) singular vectors of W: against its top ones only, an old
direction that ΔW has made strong looks new. ``out`` is the side of left singular vectors, ``in`` of right ones.

Read it with chance in mind: *every* random direction is an intruder, its largest cosine being about
``sqrt(2 ln d / d)``, 0.06 at d = 4096, so a count says how strong ΔW is more than what it learned. Hence two
more numbers. ``energy_share`` is the share of ``sum(sigma_l(W + ΔW)**2 for l <= k)`` that the intruders carry. The
control is that share where ΔW has the same singular values and random (Haar) directions on both sides,
independent of W: its law depends on W through its singular values only. An update *below* its control keeps to
directions that the model has.

``adapted_directions`` gives the cosines, or brackets of them where W is known in part. A direction whose bracket
holds the threshold is *undecided*, never guessed.

What the numbers do not say: where neighbouring singular values of W or of W + ΔW are nearly equal their vectors
are arbitrary within the plane, and a rotation there makes false intruders. Whether intruders cause forgetting is
contested; see arXiv:2607.23711 for the strength at which one must appear.

Measures
--------
``largest_cosine``, the definition; ``intruders`` (``Intruders``: counts and shares at one threshold and k).

References
----------
Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228.
Xie 2026, *The Intruder Threshold*, arXiv:2607.23711.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lora_analysis.measures.adapted_directions import AdaptedDirections, Side


class Intruders(NamedTuple):
    """What the top k directions of W + ΔW are, at one threshold."""

    intruders: int
    """How many are certainly intruders, 0 to k."""
    undecided: int
    """How many may be."""
    energy_share: float
    """Share of the top k's energy in intruders, dimensionless, in [0, 1]."""
    undecided_share: float
    """And in the undecided."""
    max_cosine_min: float
    """The largest cosine of the newest direction, dimensionless; its upper bound where W is known in part."""


def largest_cosine(vectors: Tensor, basis: Tensor) -> Tensor:
    """The cosine of each vector with the closest of the basis, ``max_j |<y_k, u_j>|``.

    Parameters
    ----------
    vectors : Tensor, shape (d, k)
        Unit columns: singular vectors of W + ΔW.
    basis : Tensor, shape (d, n)
        Unit columns: singular vectors of W on the same side.

    Returns
    -------
    Tensor, shape (k,)
        Dimensionless, float64, in [0, 1]; at least ``1 / sqrt(d)`` where the basis is complete (n = d).

    Raises
    ------
    ValueError
        If the two have different numbers of rows, or the basis is empty.

    References
    ----------
    Shuttleworth et al. 2024, arXiv:2410.21228, the definition of an intruder dimension.

    Examples
    --------
    >>> import torch
    >>> largest_cosine(torch.tensor([[0.6], [-0.8]]), torch.eye(2)).tolist()
    [0.800000011920929]
    """
    if vectors.ndim != 2 or basis.ndim != 2 or vectors.shape[0] != basis.shape[0] or basis.shape[1] == 0:
        raise ValueError(
            "expected vectors (d, k) and a basis (d, n) of at least one column, "
            f"got {tuple(vectors.shape)} and {tuple(basis.shape)}."
        )
    cosines: Tensor = (basis.double().mT @ vectors.double()).abs().amax(dim=0)
    return cosines.clamp(max=1.0)


def intruders(directions: AdaptedDirections, side: Side, k: int, threshold: float) -> Intruders:
    """How many of the top k directions are intruders, and how much of the energy they carry.

    Parameters
    ----------
    directions : AdaptedDirections
        At least k of them.
    side : {"out", "in"}
    k : int
    threshold : float
        A direction is an intruder where its largest cosine is below this; 0 to 1.

    Returns
    -------
    Intruders

    Raises
    ------
    ValueError
        If there are fewer than k directions, or the threshold is not in (0, 1].

    References
    ----------
    Shuttleworth et al. 2024, arXiv:2410.21228.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.measures.adapted_directions import Bracket
    >>> bracket = Bracket(torch.tensor([0.9, 0.1, 0.2]), torch.tensor([0.9, 0.3, 0.7]))
    >>> found = AdaptedDirections(torch.tensor([2.0, 1.0, 1.0]), {"out": bracket, "in": bracket})
    >>> intruders(found, "out", 2, 0.5)[:3]
    (1, 0, 0.2)
    >>> intruders(found, "out", 3, 0.5).undecided
    1
    """
    if not 1 <= k <= len(directions.S):
        raise ValueError(f"k: expected 1 to {len(directions.S)} of the directions computed, got {k}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a cosine above 0 and up to 1, got {threshold}.")
    lower, upper = (bound[:k] for bound in directions.cosines[side])
    energy = directions.S[:k].double().square()
    total = float(energy.sum())
    new, unsure = upper < threshold, (lower < threshold) & (upper >= threshold)

    def carried(chosen: Tensor) -> float:
        return float(energy[chosen].sum()) / total if total > 0 else math.nan

    return Intruders(int(new.sum()), int(unsure.sum()), carried(new), carried(unsure), float(upper.min()))
