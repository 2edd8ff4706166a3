"""A shelf of adapters of one base: who is like whom, what they all share, and who stands apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.cluster import hierarchy
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError
from lora_analysis.measures.shared_start import shared_rows
from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.tables.directions import leading
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, Svd

Matrix = npt.NDArray[np.float64]

SHARED = 0.1
"""Share of A's rows from which two adapters count as begun alike."""

TOP = 16
"""Directions whose share of all adapters' energy is given."""

OUTLYING = 3.5
"""Robust standard scores from which an adapter counts as an outlier (Iglewicz and Hoaglin 1993)."""


@dataclass(frozen=True, slots=True, eq=False)
class Atlas:
    """What many adapters have in common.

    Parameters
    ----------
    sources : tuple of str, length N
    cosine : array, shape (N, N)
        Of the whole updates, all modules together; in [-1, 1], by chance 0.
    cosine_null_sd : array, shape (N, N)
        Standard deviation of that by chance.
    norm : array, shape (N,)
        Of the whole updates.
    start : array of int, shape (N,)
        Groups of adapters that began with the same A, by number; as far as trained A's tell.
    linkage : array, shape (N - 1, 4)
        Average linkage by ``1 - cosine``, as scipy's ``dendrogram`` takes it.
    growth : DataFrame
        How many directions hold 90 % of the energy of the first n adapters, beside chance: ``adapters`` ("all", or
        "one of each start"), ``count``, ``side``, ``k90``, ``k90_chance``, ``top_share`` (of the first 16 directions)
        and ``top_share_chance``, each the mean over modules.
    mean_share : float
        Energy of the mean update over the mean energy of updates: 1 where all are alike, 1 / N by chance.
    """

    sources: tuple[str, ...]
    cosine: Matrix
    cosine_null_sd: Matrix
    norm: Matrix
    start: npt.NDArray[np.int64]
    linkage: Matrix
    growth: pd.DataFrame
    mean_share: float

    def order(self) -> list[int]:
        """The adapters' numbers as the dendrogram orders its leaves, likest side by side."""
        if len(self.sources) < 2:
            return list(range(len(self.sources)))
        return [int(number) for number in hierarchy.leaves_list(self.linkage)]

    def clusters(self, cosine: float) -> npt.NDArray[np.int64]:
        """Numbers of clusters whose members are on average at least so like each other."""
        if len(self.sources) < 2:
            return np.ones(len(self.sources), dtype=np.int64)
        found: npt.NDArray[np.int64] = hierarchy.fcluster(self.linkage, 1 - cosine, criterion="distance").astype(
            np.int64
        )
        return found

    def adapters(self) -> pd.DataFrame:
        """One row per adapter: norm, cosines with the others, robust scores of both, and whether it stands apart."""
        count = len(self.sources)
        others = self.cosine.copy()
        np.fill_diagonal(others, np.nan)
        mean = np.nanmean(others, axis=1) if count > 1 else np.full(count, np.nan)
        nearest = [self.sources[int(np.nanargmax(row))] if count > 1 else "" for row in others]
        table = pd.DataFrame(
            {
                "adapter": list(self.sources),
                "norm": self.norm,
                "mean_cosine": mean,
                "nearest": nearest,
                "nearest_cosine": np.nanmax(others, axis=1) if count > 1 else np.full(count, np.nan),
                "start": self.start,
                "norm_score": _robust_scores(np.log(np.maximum(self.norm, 1e-300))),
                "cosine_score": _robust_scores(mean),
            }
        )
        table["outlier"] = (table[["norm_score", "cosine_score"]].abs() > OUTLYING).any(axis=1)
        return table

    def pairs(self) -> pd.DataFrame:
        """One row per pair of adapters, the likest first."""
        rows = [
            {
                "adapter_a": self.sources[a],
                "adapter_b": self.sources[b],
                "cosine": self.cosine[a, b],
                "cosine_null_sd": self.cosine_null_sd[a, b],
                "same_start": bool(self.start[a] == self.start[b]),
            }
            for a, b in itertools.combinations(range(len(self.sources)), 2)
        ]
        columns = ["adapter_a", "adapter_b", "cosine", "cosine_null_sd", "same_start"]
        return pd.DataFrame(rows, columns=columns).sort_values("cosine", ascending=False, ignore_index=True)


@dataclass(slots=True)
class _Module:
    """Sums over the adapters of one module."""

    inner: Matrix
    shared: Matrix
    """Share of rows of A in common; NaN where it cannot be told."""
    shape: tuple[int, int]
    svds: list[Svd]


def atlas(
    adapters: Sequence[Adapter],
    *,
    draws: int = 5,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> Atlas:
    """Similarity of every two of many adapters, from products of their small factors.

    One module of all adapters is in memory for each thread, ``N r (d_out + d_in)`` numbers of float64.

    Parameters
    ----------
    adapters : sequence of Adapter
        Of one base; a module that one lacks counts as zero.
    draws : int
        Of what chance gives for directions in common, each a random rotation of every update.
    seed : int
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    Atlas

    Raises
    ------
    ValueError
        If there are no adapters.
    LoraAnalysisError
        If they have modules of one name and different shapes.
    UndefinedUpdateError
        If a scale is unknown, or an update holds NaN or infinities.

    References
    ----------
    Ilharco et al. 2022, arXiv:2212.04089 (cosines); Kaushik et al. 2025, arXiv:2512.05117 (shared directions), here
    against updates of the same strength in random directions and apart for adapters that began alike.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> e = torch.eye(64)
    >>> shelf = [la.Adapter({"q": la.LowRankUpdate(e[:, i : i + 2], e[i : i + 2], scale=1.0)}) for i in (0, 1, 8)]
    >>> atlas(shelf).cosine.round(12).tolist()
    [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if not adapters:
        raise ValueError("adapters: expected at least one, got none.")
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    count = len(adapters)
    counts = sorted({*(2**i for i in range(count.bit_length()) if 2**i <= count), count})

    def summed(name: str) -> tuple[_Module, list[dict[str, float | str]]]:
        module = _module(adapters, name)
        module_rows = _growth(module.svds, module.shape, counts, draws, seed)
        module.svds = []
        return module, module_rows

    found = over_modules(summed, names, workers=workers, progress=progress, description="Atlas")
    inner = np.sum([module.inner for module, _ in found], axis=0)
    norms = np.sqrt(np.diagonal(inner))
    lengths = np.outer(norms, norms)
    squares = [np.outer(np.diagonal(module.inner), np.diagonal(module.inner)) for module, _ in found]
    variance = np.sum(
        [square / math.prod(module.shape) for square, (module, _) in zip(squares, found, strict=True)], axis=0
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine, sd = np.clip(inner / lengths, -1, 1), np.sqrt(variance) / lengths
    with np.errstate(invalid="ignore"):
        shared = np.nanmean(np.stack([module.shared for module, _ in found]), axis=0) if found else np.eye(count)
    start = connected_components(np.nan_to_num(shared) >= SHARED, directed=False)[1].astype(np.int64)
    growth = [row | {"adapters": "all"} for _, rows in found for row in rows]
    firsts = [int(np.flatnonzero(start == group)[0]) for group in range(start.max() + 1)]
    if 1 < len(firsts) < count:
        of_each = [adapters[number] for number in firsts]
        steps = sorted({*(2**i for i in range(len(firsts).bit_length()) if 2**i <= len(firsts)), len(firsts)})
        more = over_modules(
            lambda name: _growth_of(of_each, name, steps, draws, seed), names, workers=workers, progress=progress
        )
        growth += [row | {"adapters": "one of each start"} for rows in more for row in rows]
    energy = float(np.trace(inner))
    return Atlas(
        sources=tuple(adapter.source for adapter in adapters),
        cosine=cosine,
        cosine_null_sd=sd,
        norm=norms,
        start=start,
        linkage=_linkage(cosine),
        growth=_mean_growth(growth),
        mean_share=float(inner.sum()) / count / energy if energy > 0 else math.nan,
    )


def _module(adapters: Sequence[Adapter], name: str) -> _Module:
    shapes = {adapter.modules[name].shape for adapter in adapters if name in adapter}
    if len(shapes) != 1:
        raise LoraAnalysisError(
            f"{name!r}: expected one shape in all adapters, got {sorted(shapes)}. Compare adapters of one base."
        )
    shape = shapes.pop()
    svds, downs = [], []
    for adapter in adapters:
        svd, down = _decomposed(adapter, name, shape)
        svds.append(svd)
        downs.append(down)
    U, V = torch.hstack([svd.U * svd.S for svd in svds]), torch.hstack([svd.V for svd in svds])
    products = (U.mT @ U) * (V.mT @ V)
    owner = torch.repeat_interleave(torch.arange(len(svds)), torch.tensor([len(svd.S) for svd in svds]))
    member = torch.nn.functional.one_hot(owner, len(svds)).double()
    inner = (member.mT @ products @ member).numpy()
    shared = np.full((len(svds), len(svds)), np.nan)
    np.fill_diagonal(shared, 1.0)
    for a, b in itertools.combinations(range(len(svds)), 2):
        first, second = downs[a], downs[b]
        if first is not None and second is not None:
            shared[a, b] = shared[b, a] = shared_rows(first, second, trained=True)
    return _Module(inner, shared, shape, svds)


def _decomposed(adapter: Adapter, name: str, shape: tuple[int, int]) -> tuple[Svd, Tensor | None]:
    if name not in adapter:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Svd(nothing.new_zeros(shape[0], 0), nothing, nothing.new_zeros(0, shape[1])), None
    module, update = adapter.modules[name], adapter[name]
    if module.scale_source == "unknown":
        raise UndefinedUpdateError(
            f"{adapter.source}: {name!r}: expected a known scale, got none. Pass alpha= when loading the adapter."
        )
    svd = update.svd(leading(module, update))
    down = update.down if isinstance(update, LowRankUpdate) and not module.embedding else None
    return svd.top(numerical_rank(svd.S, shape)), down


def _growth_of(
    adapters: Sequence[Adapter], name: str, counts: Sequence[int], draws: int, seed: int
) -> list[dict[str, float | str]]:
    module = _module(adapters, name)
    return _growth(module.svds, module.shape, counts, draws, seed)


def _growth(
    svds: Sequence[Svd], shape: tuple[int, int], counts: Sequence[int], draws: int, seed: int
) -> list[dict[str, float | str]]:
    """Directions that hold 90 % of the energy of the first n updates, on either side, and what random ones need."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, float | str]] = []
    for side, d in (("in", shape[1]), ("out", shape[0])):
        own = [(svd.V if side == "in" else svd.U) * svd.S for svd in svds]
        turned = [[_turned(svd.S, d, generator) for svd in svds] for _ in range(draws)]
        for n in counts:
            k90, share = _held(own[:n])
            chance = [_held(one[:n]) for one in turned]
            rows.append(
                {
                    "count": float(n),
                    "side": side,
                    "k90": k90,
                    "k90_chance": float(np.mean([one[0] for one in chance])) if chance else math.nan,
                    "top_share": share,
                    "top_share_chance": float(np.mean([one[1] for one in chance])) if chance else math.nan,
                }
            )
    return rows


def _turned(S: Tensor, d: int, generator: torch.Generator) -> Tensor:
    basis = torch.randn(d, len(S), dtype=torch.float64, generator=generator)
    turned: Tensor = torch.linalg.qr(basis).Q * S
    return turned


def _held(parts: Sequence[Tensor]) -> tuple[float, float]:
    stacked = torch.hstack(list(parts))
    if not stacked.numel() or not bool(stacked.any()):
        return math.nan, math.nan
    small = stacked.mT @ stacked if stacked.shape[1] <= stacked.shape[0] else stacked @ stacked.mT
    energy = torch.linalg.eigvalsh(small).flip(0).clamp_min(0)
    held = energy.cumsum(0) / energy.sum()
    return float((held < 0.9 * (1 - 1e-12)).sum() + 1), float(held[min(TOP, len(held)) - 1])


def _mean_growth(rows: Sequence[dict[str, float | str]]) -> pd.DataFrame:
    columns = ["adapters", "count", "side", "k90", "k90_chance", "top_share", "top_share_chance"]
    table = pd.DataFrame(list(rows), columns=columns)
    grouped = table.groupby(["adapters", "side", "count"], sort=True).mean().reset_index()
    grouped["count"] = grouped["count"].astype(int)
    return grouped[columns]


def _linkage(cosine: Matrix) -> Matrix:
    if len(cosine) < 2:
        return np.empty((0, 4))
    distance = np.clip(1 - np.nan_to_num(cosine), 0, 2)
    np.fill_diagonal(distance, 0.0)
    found: Matrix = hierarchy.linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    return found


def _robust_scores(values: Matrix) -> Matrix:
    """``0.6745 (x - median) / MAD``; 0 where there is no spread."""
    middle = np.nanmedian(values) if len(values) else np.nan
    spread = np.nanmedian(np.abs(values - middle)) if len(values) else np.nan
    if not spread > 0:
        return np.zeros(len(values))
    scores: Matrix = 0.6745 * (values - middle) / spread
    return scores
