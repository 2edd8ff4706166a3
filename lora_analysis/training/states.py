"""One module at one step of training: the numbers of its update, and the directions kept to compare it by.

Conventions
-----------
A row has the keys of ``COLUMNS``, NaN where there is nothing to say. k is the number of directions looked at: the
first so many, or as many as the update has. Between two steps ``phi`` is ``subspace_similarity`` of their top k
directions (of fewer, if the other has fewer) on either side, whose expectation by chance is k / d whatever the other
has. An update that is zero up to the rounding of float64 has norm 0, k 0 and no ranks.

Values
------
``COLUMNS``, ``Directions``, ``State``, ``Gains``; ``state_of``, ``similarity``, ``moved``, ``moves_of``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2, eq. 4 and section 7.3; ``‖A - A0‖ / ‖A0‖``: Zhu et al. 2024,
arXiv:2402.16842.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_analysis.adapter import Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures import amplification, spectrum
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.measures.weight import projected_weight, weight_norm
from lora_analysis.update import LowRankUpdate, Svd, Update, with_scale

COLUMNS = (
    "adapter",
    "step",
    "module",
    "loss",
    "d_out",
    "d_in",
    "r",
    "norm",
    "sigma_max",
    "stable_rank",
    "effective_rank",
    "k",
    "phi_previous_in",
    "phi_previous_out",
    "phi_final_in",
    "phi_final_out",
    "chance_in",
    "chance_out",
    "moved_A",
    "moved_B",
    "moved_from",
    "gain",
    "flags",
)
"""What a row says of a module at a step, in this order."""

_ROUNDING = 2.0**-52


class Directions(NamedTuple):
    """The top k singular directions of an update, compact: float32, on the CPU."""

    U: Tensor
    """Shape (d_out, k)."""
    V: Tensor
    """Shape (d_in, k)."""

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        return self.U.nbytes + self.V.nbytes


class State(NamedTuple):
    """What ``state_of`` finds."""

    row: dict[str, Any]
    directions: Directions
    top: Svd
    """The same k triples in float64."""


def state_of(module: Module, update: Update, *, directions: int) -> State:
    """Norm, ranks and top directions of an update, by one compact SVD.

    Parameters
    ----------
    module : Module
        As the adapter describes it.
    update : Update
    directions : int
        Most directions to keep.

    Returns
    -------
    State
        Its row has NaN for what needs another step or the base.

    Examples
    --------
    >>> from lora_analysis.adapter import Adapter
    >>> adapter = Adapter({"query": LowRankUpdate(torch.eye(3, 2), torch.eye(2, 5), scale=2.0)})
    >>> state = state_of(adapter.modules["query"], adapter["query"], directions=1)
    >>> {name: round(state.row[name], 4) for name in ("norm", "sigma_max", "stable_rank", "k", "chance_in")}
    {'norm': 2.8284, 'sigma_max': 2.0, 'stable_rank': 2.0, 'k': 1, 'chance_in': 0.2}
    """
    d_out, d_in = module.shape
    known = module.scale_source != "unknown"
    flags = ["unknown-scale"] * (not known) + ["r>d"] * (module.r > min(d_out, d_in)) + list(module.flags)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {"d_out": d_out, "d_in": d_in, "r": module.r, "k": 0}
    try:
        S, top = _decomposed(update if known else with_scale(update, 1.0), directions)
    except UndefinedUpdateError:
        nothing = Svd(torch.zeros(d_out, 0), torch.zeros(0), torch.zeros(0, d_in))
        return State(row | {"flags": " ".join([*flags, "nonfinite"])}, Directions(nothing.U, nothing.V), nothing)
    k = min(spectrum.numerical_rank(S, module.shape), len(top.S))
    top = top.top(k)
    row |= {
        "norm": float(S.norm()) if known else math.nan,
        "sigma_max": (float(S[0]) if len(S) else 0.0) if known else math.nan,
        "stable_rank": spectrum.stable_rank(S),
        "effective_rank": spectrum.effective_rank(S),
        "k": k,
        "chance_in": k / d_in if k else math.nan,
        "chance_out": k / d_out if k else math.nan,
        "flags": " ".join([*flags, "zero"] if k == 0 else flags),
    }
    return State(row, Directions(_compact(top.U), _compact(top.V)), top)


def similarity(a: Directions, b: Directions | None) -> tuple[float, float]:
    """``phi`` of two updates on the input and on the output side; NaN where either has no directions.

    The cell (i, j) of eq. 4 with i the directions of ``a`` and j those of ``b``, at most i.
    """
    i = a.V.shape[1]
    j = 0 if b is None else min(i, b.V.shape[1])
    if b is None or j == 0:
        return math.nan, math.nan
    pairs = ((a.V, b.V), (a.U, b.U))
    inside, outside = (float(subspace_similarity(mine, other[:, :j])[-1, -1]) for mine, other in pairs)
    return inside, outside


def moved(now: Tensor, first: Tensor | None) -> float:
    """How far a factor has come, ``‖now - first‖ / ‖first‖``; NaN where it began at zero or is of another shape.

    Examples
    --------
    >>> moved(torch.tensor([[3.0, 6.0]]), torch.tensor([[3.0, 4.0]])), moved(torch.ones(1, 1), torch.zeros(1, 1))
    (0.4, nan)
    """
    if first is None or now.shape != first.shape:
        return math.nan
    before = first.detach().to(now.device, torch.float64)
    length = float(before.norm())
    return float((now.detach().double() - before).norm()) / length if length > 0 else math.nan


def moves_of(update: Update, first: Update | None, since: str) -> dict[str, Any]:
    """The move of both factors of an update from those of the first, and what that is called.

    An update of twice the r of the first is one that the first product was taken off (PiSSA): of its factors those
    that are trained come before those that are not.
    """
    if not isinstance(first, LowRankUpdate) or not isinstance(update, LowRankUpdate):
        return {"moved_A": math.nan, "moved_B": math.nan, "moved_from": ""}
    r = first.r if update.r == 2 * first.r else update.r
    moves = {"moved_A": moved(update.down[:r], first.down), "moved_B": moved(update.up[:, :r], first.up)}
    return moves | {"moved_from": since}


class Gains:
    """The gain of updates over a base that stands still, each weight of which is read once a look.

    Parameters
    ----------
    base : BaseWeights
    """

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self._names: dict[str, str] = {}
        self._norms: dict[Target, float] = {}

    def of(self, modules: Mapping[str, Module], name: str, top: Svd) -> float:
        """``‖U.T @ W @ V‖_F`` over its root mean square for random directions; NaN without directions, or if W = 0.

        Raises
        ------
        BaseWeightsError
            If the base has no such weight, or its shape does not fit.
        """
        module, k = modules[name], len(top.S)
        if k == 0:
            return math.nan
        if module.target.tensor not in self._names:
            self._names |= self._base.find_all(other.target.tensor for other in modules.values())
        target = replace(module.target, tensor=self._names[module.target.tensor])
        weight = self._base.matrix(target, module.shape)
        projected = float(projected_weight(weight, top).norm())
        if target not in self._norms:
            self._norms[target] = weight_norm(weight)
        return amplification.gain(projected, self._norms[target], k, module.shape)


def _decomposed(update: Update, directions: int) -> tuple[Tensor, Svd]:
    """All singular values and the top triples."""
    if not isinstance(update, LowRankUpdate):
        return update.singular_values(), update.svd(directions)
    whole = update.svd()
    S = whole.S
    # What is left where a product and the one it began with cancel (PiSSA's first step) is rounding, not an update.
    lengths = update.up.detach().double().norm(dim=0) @ update.down.detach().double().norm(dim=1)
    if len(S) and float(S[0]) <= max(update.shape) * _ROUNDING * abs(update.scale) * float(lengths):
        S = torch.zeros_like(S)
    return S, whole.top(directions)


def _compact(basis: Tensor) -> Tensor:
    return basis.to("cpu", torch.float32).contiguous()
