"""How close the top singular vectors of W + ΔW are to those of W, and what chance gives.

Conventions
-----------
``out`` is the side of left singular vectors, ``in`` of right ones. Closeness of a vector y is the largest cosine
``max_j |<y, u_j>|`` with any of W's p = min(d_out, d_in) singular vectors on its side.

Where all of these are known the answers are those of the definition. Where only the top K are, every cosine is
bracketed: from below by the closest of the K; from above by the larger of that and of what the K leave of the
vector, whose length is ``sqrt(1 - sum(<y, u_j>**2 for j <= K))``, or, where that does not decide, the
``largest_cosine_bound`` of what they leave. All allow for the errors of the vectors themselves.

The control has updates of the same singular values and random (Haar) directions on both sides, independent of W:
its law depends on W through its singular values only.

Measures
--------
``adapted_directions`` (``AdaptedDirections``: a ``Bracket`` a side), ``random_directions`` (the control).

References
----------
Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_analysis.measures.spectral_measure import largest_cosine_bound, reached_part
from lora_analysis.measures.triples import Triples, coordinates, core_triples, leading_triples
from lora_analysis.update import Svd

Side = Literal["out", "in"]
SIDES: tuple[Side, Side] = ("out", "in")

_SURE = 1e-3
"""Error of a singular vector of W up to which it counts as known."""


class Bracket(NamedTuple):
    """Bounds of the largest cosine of each direction with W's singular vectors on one side."""

    lower: Tensor
    """Shape (k,)."""
    upper: Tensor
    """Shape (k,); equal to ``lower`` but for rounding where all of W's vectors are known."""


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedDirections:
    """The top k singular values of W + ΔW, and how close its singular vectors are to those of W.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Descending, in the unit of W.
    cosines : dict of str to Bracket
        By side, ``out`` and ``in``.
    """

    S: Tensor
    cosines: dict[Side, Bracket]


def adapted_directions(
    weight: Tensor,
    base: Triples,
    update: Svd,
    k: int,
    *,
    thresholds: Sequence[float] = (0.5,),
    steps: int = 64,
    seed: int = 0,
) -> AdaptedDirections:
    """The top k directions of W + ΔW against all of W's, without a decomposition of W + ΔW.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
        Not read where ``base`` is complete.
    base : Triples
        Of W, all of them or the top K; ``leading_triples(weight, K)``. One serves every update of W.
    update : Svd
        Of ΔW, all of its triples.
    k : int
        At most min(d_out, d_in).
    thresholds : sequence of float
        What the brackets should decide; more work is done only for vectors that no simple bound decides.
    steps : int
        Of that work, per vector: two passes over W each.
    seed : int
        Of the solver's start vector.

    Returns
    -------
    AdaptedDirections

    Raises
    ------
    BaseWeightsError
        If W is not of the update's shape.

    Examples
    --------
    An old direction made strong is no intruder (SCIENCE's oracle O15b):

    >>> weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))
    >>> fifth = torch.eye(5)[:, 4:]
    >>> update = Svd(fifth, torch.tensor([10.0]), fifth.mT)
    >>> found = adapted_directions(weight, leading_triples(weight, 5), update, 1)
    >>> round(float(found.cosines["out"].lower), 9)
    1.0
    """
    if base.complete:
        left, right = coordinates(base.svd, update)
        found = core_triples(base.svd.S, left, update.S, right, k, seed=seed)
        p = len(base.svd.S)
        cosines = {side: _known(found, side, p) for side in SIDES}
        return AdaptedDirections(found.svd.S, cosines)
    found = leading_triples(weight, k, update=update, seed=seed, complete=False)
    cosines = {
        side: _bracket(weight if side == "out" else weight.mT, base, found, k, side, thresholds, steps)
        for side in SIDES
    }
    return AdaptedDirections(found.svd.S[:k], cosines)


def random_directions(
    base: Triples, norm: float, shape: tuple[int, int], S: Tensor, k: int, *, draws: int = 10, seed: int = 0
) -> list[AdaptedDirections]:
    """The same for random updates with these singular values: the control of ``adapted_directions``.

    Each draw has independent Haar directions on both sides, in W's own singular bases, which change nothing in their
    law. Where the base is not complete, the unknown rest of W's spectrum is taken as flat, with its exact energy.

    Parameters
    ----------
    base : Triples
        Of W.
    norm : float
        Frobenius norm of W.
    shape : (int, int)
        (d_out, d_in).
    S : Tensor, shape (r,)
        The singular values of ΔW.
    k : int
        At most min(d_out, d_in).
    draws, seed : int
        Of a generator of its own; no global state is touched.

    Returns
    -------
    list of AdaptedDirections
        One a draw.

    Examples
    --------
    >>> base = leading_triples(torch.diag(torch.arange(64.0, 0.0, -1.0)), 1)
    >>> strong = random_directions(base, 299.0, (64, 64), torch.tensor([1000.0]), 1, draws=3)
    >>> [bool(draw.cosines["in"].upper < 0.5) for draw in strong]
    [True, True, True]
    """
    p, known = min(shape), base.svd.S.double().cpu()
    rest = math.sqrt(max(norm**2 - float(known.square().sum()), 0.0) / max(p - len(known), 1))
    sigma = torch.cat([known, torch.full((p - len(known),), min(rest, float(known[-1])), dtype=torch.float64)])
    S = S.double().cpu()
    S = S[S > 0]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(draws):
        left, right = (_haar(d, p, len(S), generator) for d in shape)
        triples = core_triples(sigma, left, S, right, k, seed=number)
        found.append(AdaptedDirections(triples.svd.S, {side: _known(triples, side, p) for side in SIDES}))
    return found


def _known(found: Triples, side: Side, p: int) -> Bracket:
    """The cosines of vectors that are given in W's own singular basis."""
    vectors = found.svd.U if side == "out" else found.svd.V
    cosines = vectors[:p].abs().amax(dim=0)
    return Bracket((cosines - found.errors).clamp(min=0.0), (cosines + found.errors).clamp(max=1.0))


def _bracket(
    weight: Tensor, base: Triples, found: Triples, k: int, side: Side, thresholds: Sequence[float], steps: int
) -> Bracket:
    """Bounds where only the top K of W are known; ``weight`` is turned so that this side is its output."""
    known, vectors = (base.svd.U, found.svd.U[:, :k]) if side == "out" else (base.svd.V, found.svd.V[:, :k])
    errors = found.errors[:k]
    cosines = (known.mT @ vectors).abs()
    lower = ((cosines - base.errors[:, None]).amax(dim=0) - errors).clamp(min=0.0)
    # Vectors of W that are well known are taken out; the others, and those not known, share what is left.
    sure = base.errors < _SURE
    cosines, slack = cosines[sure], base.errors[sure, None]
    among = (cosines + slack).amax(dim=0) if len(slack) else torch.zeros_like(lower)
    rest = vectors - known[:, sure] @ (known[:, sure].mT @ vectors)
    slip = (cosines * slack).sum(dim=0) + errors
    upper = torch.maximum(among + errors, rest.norm(dim=0) + slip).clamp(max=1.0)
    # To decide all thresholds above the lower bound, the upper one must fall below the smallest of them.
    levels = torch.tensor([*sorted(thresholds), 0.0], dtype=torch.float64)
    goal = levels[(lower[:, None] >= levels[:-1]).sum(dim=1)]
    open_ = torch.nonzero((upper >= goal) & (among + errors < goal) & (slip < goal)).flatten()
    if len(open_) and steps:
        left, slip, among = rest[:, open_], slip[open_], (among + errors)[open_]
        if weight.shape[0] > weight.shape[1]:
            # What W does not reach is no direction of it, and must not be mistaken for one.
            reached = reached_part(weight, left, float(base.svd.S[0]))
            if reached is not None:
                left, slip = reached[0], slip + reached[1]
        bound = largest_cosine_bound(weight, left, enough=goal[open_] - slip, steps=steps)
        upper[open_] = torch.minimum(upper[open_], torch.maximum(among, bound + slip))
    return Bracket(lower, torch.maximum(lower, upper))


def _haar(d: int, p: int, r: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns in the form of ``coordinates``: p rows, and what is left of the other d - p."""
    Q, R = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))
    frame: Tensor = Q * R.diagonal().sign()  # LAPACK's own signs are not fair: both sides would share them
    if d == p:
        return frame
    rest = torch.linalg.qr(frame[p:], mode="r").R
    return torch.cat([frame[:p], rest])
