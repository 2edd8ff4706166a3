"""Whether A is still what training started from, so that its subspaces say nothing about what was learned.

Conventions
-----------
LoRA's A begins uniform on ±1/√d_in in PEFT, loralib, kohya, LyCORIS, MLX and torchtune: a distribution with an edge,
so that training carries some of many numbers beyond it. How far A may have moved unseen follows from how many numbers
it has. A normal initialisation has no edge, and cannot be told from a trained A; an orthogonal one is told from rows
that are still orthogonal, where the configuration says that it was one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.lint.finding import Finding
from lora_analysis.update import LowRankUpdate, Update

ORTHOGONAL = ("orthogonal", "eva")
"""Initialisations of PEFT's whose A has orthogonal rows of one length."""

_FEWEST = 256
"""Numbers of A below which its distribution says too little."""

_SAMPLED = 20_000
"""Numbers that are held against the distribution; enough to see a density that is off by a hundredth."""

_BEYOND = 5.0
"""Numbers beyond the edge to be expected, from which their absence is no chance."""


class Edge(NamedTuple):
    """How A lies to the edge of its initialisation, ±1/√d_in."""

    numbers: int
    """How many A has."""
    largest: float
    """The largest, in units of the edge."""
    initial: bool
    """Whether all of it is what the initialisation gives."""


def edge_of(update: Update) -> Edge | None:
    """How an update's A lies to the edge; None for other kinds, and where it has too few numbers."""
    if not isinstance(update, LowRankUpdate) or update.down.numel() < _FEWEST:
        return None
    down = update.down.detach()
    wide = down.float() if down.dtype.itemsize == 1 else down
    return Edge(down.numel(), float(wide.abs().max()) * math.sqrt(down.shape[1]), looks_initial(down))


def initial_findings(edges: Mapping[str, Edge]) -> Iterator[Finding]:
    """The modules whose A has not moved, in view of how far the others' has.

    A small A that moved little may by chance have no number beyond the edge. Where other modules of the adapter
    moved, one counts as initial only if as much would have shown.
    """
    moved = sorted(abs(edge.largest - 1) for edge in edges.values() if not edge.initial)
    typical = moved[len(moved) // 2] if moved else math.inf
    for name, edge in edges.items():
        # Of numbers that each move by a share of the edge, up or down, a quarter of that share passes it.
        if edge.initial and edge.numbers * typical / 4 >= _BEYOND:
            yield Finding(
                "adapter-init",
                "warning",
                name,
                "A is still at its initialisation, uniform on ±1/√d_in to within what its numbers can tell: frozen "
                "(LoRA-FA) or hardly trained. Train it, or compare B alone: its row space is a random one.",
            )


def orthogonal_finding(name: str, update: Update) -> Finding | None:
    """A finding where A's rows are orthogonal and of one length, as training would not leave them."""
    if not isinstance(update, LowRankUpdate) or not 1 < update.r <= update.shape[1] or not update.finite:
        return None
    rows = update.down.detach().double()
    gram = rows @ rows.mT
    length = float(gram.diagonal().mean())
    off = float((gram - length * torch.eye(len(rows), dtype=gram.dtype, device=gram.device)).abs().max())
    tolerance = 16 * torch.finfo(update.down.dtype).eps
    if length == 0 or off > tolerance * length:
        return None
    return Finding(
        "adapter-init",
        "warning",
        name,
        "A's rows are still the orthogonal ones of its initialisation: frozen or hardly trained. Train it, or compare "
        "B alone: its row space is that of the initialisation.",
    )


def looks_initial(down: Tensor) -> bool:
    """Whether A is what LoRA starts from: uniform on ±1/√d_in, ``kaiming_uniform_(a=sqrt(5))``.

    Not one number may lie outside, the largest must come as close to the edge as that of uniform numbers does, and
    their distribution must be uniform. Training that moves every number by a share δ of the edge is seen from about
    20/δ numbers on.

    Parameters
    ----------
    down : Tensor, shape (r, d_in)

    Examples
    --------
    >>> A = torch.empty(8, 64).uniform_(-1 / 8, 1 / 8, generator=torch.Generator().manual_seed(0))
    >>> looks_initial(A), looks_initial(A + 1e-3)
    (True, False)
    """
    if down.numel() < _FEWEST:
        return False
    bound = 1 / math.sqrt(down.shape[1])
    # The edge as this dtype rounds it, and what rounding in the initialisation may add.
    edge = float(torch.tensor(bound).to(down.dtype).double())
    rounding = float(torch.finfo(down.dtype).eps)
    wide = down.detach().float() if down.dtype.itemsize == 1 else down.detach()
    largest = float(wide.abs().max())
    # Of n uniform numbers, none comes within 20/n of the bound with probability exp(-20).
    if not bound * (1 - 20 / down.numel() - rounding) <= largest <= max(edge, bound * (1 + 1e-6)):
        return False
    from scipy import stats  # a third of a second to import, and not needed by most

    sample = wide.flatten()[:: max(1, down.numel() // _SAMPLED)].double().numpy(force=True) / bound
    found = stats.kstest(sample, "uniform", args=(-1, 2))
    # Numbers of two bytes lie on steps, which alone make this much of a difference.
    return bool(found.pvalue > 1e-3 or found.statistic < 2 * rounding)
