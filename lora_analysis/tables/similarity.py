"""Similarity of the subspaces of updates: between two adapters, or between the modules of one.

Every phi carries its exact null mean and sd, a standard score where the null is not strongly skewed, and an
upper-tail p: see ``lora_analysis.measures.null`` for when that null is the wrong one (a shared initialisation
above all).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_analysis.adapter import Adapter, Module
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError
from lora_analysis.measures import precision, spectrum
from lora_analysis.measures.null import SimilarityNull, similarity_null
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.tables.directions import leading
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import module_flags
from lora_analysis.tables.pairs import Pairs, module_pairs
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, Update, factors, with_scale

Which = Literal["update", "A", "B"]
"""Whose subspaces: ΔW's (both sides), A's row space (in), or B's column space (out)."""

COLUMNS = (
    "adapter_a",
    "adapter_b",
    "module_a",
    "module_b",
    "target",
    "side",
    "i",
    "j",
    "phi",
    "null_mean",
    "null_sd",
    "z",
    "p",
    "q",
    "flags",
)
_TIE = 1e-12
"""Relative gap of neighbouring singular values that float64 itself cannot order."""


def similarity_table(
    a: Adapter,
    b: Adapter | None = None,
    *,
    target: Which = "update",
    pairs: Pairs = None,
    cells: Literal["landmarks", "all"] = "landmarks",
    draws: int = 2000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """phi(i, j) of module pairs with its exact null, on every side the pair has in common.

    Parameters
    ----------
    a, b : Adapter
        Without ``b``, modules of ``a`` against each other.
    target : {"update", "A", "B"}
        ``"update"``: singular vectors of ΔW, sides ``in`` and ``out``, whatever the gauge of the factors.
        ``"A"``: as in the paper, right singular vectors of A; depends on the gauge for i < r, and A is
        mostly its initialisation. ``"B"``: left singular vectors of B.
    pairs : {"same", "all"} or sequence of (str, str), optional
        Modules of like name (the default with ``b``); every module of ``a`` against every module of ``b``,
        or each pair within ``a`` once (the default without ``b``); or the pairs listed.
    cells : {"landmarks", "all"}
        (1, 1), (1, r'), (r, 1), (r, r') and the diagonal at powers of two; or the whole grid. Of an update whose rank
        no r bounds (LoHa, LoKr, a full difference, DoRA's true one) at most the first max(r, 64) directions are
        compared, and count as its r here.
    draws, seed : int
        Of the Monte Carlo p where no closed form exists; p is then at least 1 / (draws + 1).
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per pair, side and cell. ``phi`` is dimensionless, in [0, 1]; its chance level is
        ``null_mean`` = max(i, j) / d. ``z`` is NaN for i = 1 or j = 1, where the null is skewed; ``p`` is
        exact there, and ``q`` is p adjusted for the number of pairs, side by side and cell by cell
        (``tables.discoveries``). Cells beyond a numerical rank are NaN with the flag ``beyond-rank``.

    Raises
    ------
    LoraAnalysisError
        If there is nothing to compare: no module in common, no side of one dimension.

    Warns
    -----
    UserWarning
        If modules stay out of a comparison by name because one adapter lacks them, or pairs because they
        share no dimension.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2, eq. 4 and figures 3 and 4.
    """
    if target not in ("update", "A", "B"):
        raise ValueError(f"target: expected 'update', 'A' or 'B', got {target!r}.")
    if cells not in ("landmarks", "all"):
        raise ValueError(f"cells: expected 'landmarks' or 'all', got {cells!r}.")
    other = a if b is None else b
    listed = module_pairs(a, b, pairs)
    appearances = Counter(
        itertools.chain(((id(a), first) for first, _ in listed), ((id(other), second) for _, second in listed))
    )
    # Where modules recur, each is decomposed once and its bases kept until the table is done.
    recurring = [
        (adapter, name)
        for adapter in ([a] if other is a else [a, other])
        for name in adapter
        if appearances[id(adapter), name] > 1
    ]
    kept = dict(
        zip(
            ((id(adapter), name) for adapter, name in recurring),
            over_modules(
                lambda item: _subspaces(*item, target),
                recurring,
                workers=workers,
                progress=progress,
                description="Singular vectors",
            ),
            strict=True,
        )
    )

    def grids(pair: tuple[str, str]) -> list[_Grid]:
        first, second = (
            kept.get((id(adapter), name)) or _subspaces(adapter, name, target)
            for adapter, name in zip((a, other), pair, strict=True)
        )
        return _grids(first, second, cells)

    found = over_modules(grids, listed, workers=workers, progress=progress, description="Similarity")
    nulls: dict[tuple[int, int, int], SimilarityNull] = {}
    parts = []
    for pair, sides in zip(listed, found, strict=True):
        if not sides and not isinstance(pairs, str | None):
            raise LoraAnalysisError(
                f"{pair[0]!r} and {pair[1]!r}: expected modules that share d_in or d_out, they share neither."
            )
        parts += [_part(a, other, pair, target, grid, nulls, draws, seed) for grid in sides]
    if not parts:
        raise LoraAnalysisError(f"{a.source}: no two modules share a dimension on a side that {target!r} has.")
    if apart := sum(not sides for sides in found):
        warnings.warn(f"{apart} of {len(listed)} pairs share no dimension and have no rows.", stacklevel=2)
    return with_discoveries(pd.concat(parts, ignore_index=True), {"p": ["target", "side", "i", "j"]})


@dataclass(frozen=True, slots=True)
class _Subspaces:
    """The singular bases of one module, with what is known about their order."""

    bases: dict[str, Tensor]
    rank: int
    undetermined: np.ndarray
    """Whether a cut after the first i vectors is arbitrary, by i - 1."""
    noisy: np.ndarray
    """Whether σ_i is below the storage noise, by i - 1."""
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Grid:
    """The cells of one pair of modules on one side."""

    side: str
    d: int
    columns: tuple[int, int]
    i: np.ndarray
    j: np.ndarray
    phi: np.ndarray
    flags: list[str]


def _subspaces(adapter: Adapter, name: str, target: Which) -> _Subspaces:
    module = adapter.modules[name]
    flags = [word for word in module_flags(module) if target == "update" or word != "unknown-scale"]
    update = adapter[name]
    if module.scale_source == "unknown":
        update = with_scale(update, 1.0)
    try:
        bases, S, floors, following = _decomposed(module, update, target)
        rank = spectrum.numerical_rank(S, module.shape)
        flags += ["zero"] * (rank == 0)
    except UndefinedUpdateError:
        rank = 0
        flags.append("nonfinite")
    if rank == 0:
        return _no_subspaces(module.shape, min(module.r, *module.shape), target, flags)
    gaps = S - torch.cat([S[1:], S.new_full((1,), following)])[: len(S)]
    undetermined = gaps <= torch.clamp(precision.RESOLVED * floors, min=_TIE * float(S.max()))
    noisy = precision.RESOLVED * floors > S
    return _Subspaces(bases, rank, undetermined.cpu().numpy(), noisy.cpu().numpy(), tuple(flags))


def _no_subspaces(shape: tuple[int, int], k: int, target: Which, flags: list[str]) -> _Subspaces:
    """Bases of NaN, one column at least, so that a module without directions still has its flagged rows."""
    columns = max(k, 1)
    d_out, d_in = shape
    sides = {"update": {"in": d_in, "out": d_out}, "A": {"in": d_in}, "B": {"out": d_out}}[target]
    bases = {side: torch.full((d, columns), math.nan, dtype=torch.float64) for side, d in sides.items()}
    nothing = np.zeros(columns, dtype=bool)
    return _Subspaces(bases, 0, nothing, nothing, tuple(flags))


def _decomposed(module: Module, update: Update, target: Which) -> tuple[dict[str, Tensor], Tensor, Tensor, float]:
    """Bases by side, their singular values, the storage noise of each (0 where unknown), and the next value."""
    if target == "update":
        k = leading(module, update)
        whole = update.svd(k + 1)
        svd = whole.top(k)
        floors = torch.zeros_like(svd.S)
        if isinstance(update, LowRankUpdate) and not math.isnan(update.eps):
            floors = precision.noise_floors(*update.core(), scale=update.scale, eps=update.eps)[:k]
        return {"in": svd.V, "out": svd.U}, svd.S, floors, float(whole.S[k]) if len(whole.S) > k else 0.0
    up, down = factors(update)
    factor = (down.mT if target == "A" else up).double()
    if not bool(factor.isfinite().all()):
        raise UndefinedUpdateError(f"{target} holds NaN or infinities, so it has no singular vectors.")
    basis, S, _ = torch.linalg.svd(factor, full_matrices=False)
    # Independent errors of relative size eps reach a direction of r-space with this root mean square.
    floor = update.eps * float(factor.norm()) / math.sqrt(max(update.r, 1))
    floors = torch.full_like(S, 0.0 if math.isnan(floor) else floor)
    return {"in" if target == "A" else "out": basis}, S, floors, 0.0


def _grids(a: _Subspaces, b: _Subspaces, cells: str) -> list[_Grid]:
    """The chosen cells on every side where both modules have one dimension."""
    result = []
    for side, basis_a in a.bases.items():
        basis_b = b.bases[side]
        m, n = basis_a.shape[1], basis_b.shape[1]
        if basis_a.shape[0] != basis_b.shape[0]:
            continue
        i, j = _cells(m, n, cells)
        beyond = (i > a.rank) | (j > b.rank)
        phi = np.full(len(i), math.nan)
        if a.rank and b.rank:
            grid = subspace_similarity(basis_a[:, : a.rank], basis_b[:, : b.rank]).cpu().numpy()
            phi[~beyond] = grid[i[~beyond] - 1, j[~beyond] - 1]
        words = {
            "beyond-rank": beyond,
            "storage-noise": a.noisy[i - 1] | b.noisy[j - 1],
            "order-undetermined": (a.undetermined[i - 1] | b.undetermined[j - 1]) & ~beyond,
        }
        fixed = " ".join(dict.fromkeys(a.flags + b.flags))
        flags = [
            " ".join(filter(None, [fixed, *(word for word, where in words.items() if where[cell])]))
            for cell in range(len(i))
        ]
        result.append(_Grid(side, basis_a.shape[0], (m, n), i, j, phi, flags))
    return result


def _cells(m: int, n: int, cells: str) -> tuple[np.ndarray, np.ndarray]:
    if cells == "all":
        i, j = np.meshgrid(np.arange(1, m + 1), np.arange(1, n + 1), indexing="ij")
        return i.ravel(), j.ravel()
    diagonal = [2**power for power in range(min(m, n).bit_length())]
    chosen = sorted({(1, 1), (1, n), (m, 1), (m, n)} | {(k, k) for k in diagonal})
    i, j = np.array(chosen).T
    return i, j


def _part(
    a: Adapter,
    b: Adapter,
    pair: tuple[str, str],
    target: str,
    grid: _Grid,
    nulls: dict[tuple[int, int, int], SimilarityNull],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """The rows of one pair on one side. The null is made once per shape, and draws only where it must."""
    m, n = grid.columns
    null = nulls.setdefault((grid.d, m, n), similarity_null(grid.d, m, n, draws=draws, seed=seed))
    index = list(zip(grid.i.tolist(), grid.j.tolist(), strict=True))
    phi = torch.from_numpy(grid.phi)
    return pd.DataFrame(
        {
            "adapter_a": a.source,
            "adapter_b": b.source,
            "module_a": pair[0],
            "module_b": pair[1],
            "target": target,
            "side": grid.side,
            "i": grid.i,
            "j": grid.j,
            "phi": grid.phi,
            "null_mean": null.mean.numpy()[grid.i - 1, grid.j - 1],
            "null_sd": null.sd.numpy()[grid.i - 1, grid.j - 1],
            "z": null.z(phi, cells=index).numpy(),
            "p": null.p(phi, cells=index).numpy(),
            "q": math.nan,
            "flags": grid.flags,
        },
        columns=list(COLUMNS),
    )
