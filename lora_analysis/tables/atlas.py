"""A shelf of adapters of one base: who is like whom, what they all share, and who stands apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError
from lora_analysis.measures.shared_start import SHARED
from lora_analysis.tables.atlas_result import Atlas, Matrix
from lora_analysis.tables.directions import usable_svd
from lora_analysis.tables.pool import over_modules
from lora_analysis.tables.starts import rows_shared
from lora_analysis.update import Svd

TOP = 16
"""Directions whose share of all adapters' energy is given."""


def atlas(
    adapters: Sequence[Adapter],
    *,
    sampled: int = 8,
    draws: int = 5,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> Atlas:
    """Similarity of every two of many adapters, from products of their small factors.

    One module of all adapters is in memory for each thread: ``N r (d_out + d_in)`` numbers of float64, and ``(N r)²``.

    Parameters
    ----------
    adapters : sequence of Adapter
        Of one base; a module that one lacks counts as zero.
    sampled : int
        Modules, spread evenly, by which starts and growth are told: they take time by the square of N and more. Cosines
        and norms are of all.
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
        If there are no adapters, or ``sampled`` is below 1 or ``draws`` below 0.
    LoraAnalysisError
        If they have no modules, or some of one name and different shapes.
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
    >>> la.atlas(shelf).cosine.round(12).tolist()
    [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    from scipy.sparse.csgraph import connected_components  # a third of a second to import, and not needed by most

    if not adapters or sampled < 1 or draws < 0:
        raise ValueError(
            f"expected at least one adapter, sampled of 1 and draws of 0, got {len(adapters)}, {sampled} and {draws}."
        )
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    if not names:
        raise LoraAnalysisError(f"{adapters[0].source}: expected modules, got none.")
    shapes = {name: _shape(adapters, name) for name in names}
    found = over_modules(
        lambda name: _inner(_directions(adapters, name, shapes[name])),
        names,
        workers=workers,
        progress=progress,
        description="Atlas",
    )
    inner = np.sum(found, axis=0)
    norms = np.sqrt(np.diagonal(inner))
    lengths = np.outer(norms, norms)
    squares = (np.outer(np.diagonal(own), np.diagonal(own)) for own in found)
    variance = np.sum([square / math.prod(shapes[name]) for name, square in zip(names, squares, strict=True)], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine, sd = np.clip(inner / lengths, -1, 1), np.sqrt(variance) / lengths
    chosen = [names[i] for i in sorted({round(x) for x in np.linspace(0, len(names) - 1, min(sampled, len(names)))})]
    shared = over_modules(
        lambda name: _shared(adapters, name), chosen, workers=workers, progress=progress, description="Starts"
    )
    start = connected_components(_mean_known(shared) >= SHARED, directed=False)[1].astype(np.int64)
    firsts = [int(np.flatnonzero(start == group)[0]) for group in range(start.max() + 1)]
    groups = {"all": list(adapters)}
    if 1 < len(firsts) < len(adapters):
        groups["one of each start"] = [adapters[number] for number in firsts]
    growth = []
    for label, some in groups.items():
        grown = partial(_growth_of, some, shapes=shapes, draws=draws, seed=seed)
        parts = over_modules(grown, chosen, workers=workers, progress=progress, description="Growth")
        growth += [row | {"adapters": label} for part in parts for row in part]
    energy = float(np.trace(inner))
    return Atlas(
        sources=tuple(adapter.source for adapter in adapters),
        cosine=cosine,
        cosine_null_sd=sd,
        norm=norms,
        start=start,
        linkage=_linkage(cosine),
        growth=_mean_growth(growth),
        mean_share=float(inner.sum()) / len(adapters) / energy if energy > 0 else math.nan,
    )


def _shape(adapters: Sequence[Adapter], name: str) -> tuple[int, int]:
    shapes = {adapter.modules[name].shape for adapter in adapters if name in adapter}
    if len(shapes) != 1:
        raise LoraAnalysisError(
            f"{name!r}: expected one shape in all adapters, got {sorted(shapes)}. Compare adapters of one base."
        )
    return shapes.pop()


def _directions(adapters: Sequence[Adapter], name: str, shape: tuple[int, int]) -> list[Svd]:
    """The updates of one module, of no directions where an adapter lacks it."""
    none = torch.zeros(0, dtype=torch.float64)
    svds = []
    for adapter in adapters:
        if name not in adapter:
            svds.append(Svd(none.new_zeros(shape[0], 0), none, none.new_zeros(0, shape[1])))
            continue
        svd, flags = usable_svd(adapter.modules[name], scale_bound=True, leading_only=True)
        if svd is None:
            known = "finite numbers, got NaN or infinities." if "nonfinite" in flags else "a known scale, got none. "
            cure = "" if "nonfinite" in flags else "Pass alpha= when loading the adapter."
            raise UndefinedUpdateError(f"{adapter.source}: {name!r}: expected {known}{cure}")
        svds.append(svd)
    return svds


def _inner(svds: Sequence[Svd]) -> Matrix:
    """Frobenius inner products of every two updates."""
    U, V = torch.hstack([svd.U * svd.S for svd in svds]), torch.hstack([svd.V for svd in svds])
    products = (U.mT @ U) * (V.mT @ V)
    owner = torch.repeat_interleave(torch.arange(len(svds)), torch.tensor([len(svd.S) for svd in svds]))
    member = torch.nn.functional.one_hot(owner, len(svds)).double()
    inner: Matrix = (member.mT @ products @ member).numpy()
    return inner


def _shared(adapters: Sequence[Adapter], name: str) -> Matrix:
    """Share of rows of A in common, of every two adapters; NaN where it cannot be told."""
    shared = np.full((len(adapters), len(adapters)), np.nan)
    np.fill_diagonal(shared, 1.0)
    for a, b in itertools.combinations(range(len(adapters)), 2):
        if name in adapters[a] and name in adapters[b]:
            shared[a, b] = shared[b, a] = rows_shared(adapters[a].modules[name], adapters[b].modules[name])
    return shared


def _mean_known(matrices: Sequence[Matrix]) -> Matrix:
    """The mean of what is known, 0 where nothing is."""
    stacked = np.stack(matrices)
    counts = np.isfinite(stacked).sum(axis=0)
    mean: Matrix = np.nan_to_num(stacked).sum(axis=0) / np.maximum(counts, 1)
    return mean


def _growth_of(
    adapters: Sequence[Adapter], name: str, *, shapes: Mapping[str, tuple[int, int]], draws: int, seed: int
) -> list[dict[str, float | str]]:
    return _growth(_directions(adapters, name, shapes[name]), shapes[name], draws, seed)


def _growth(svds: Sequence[Svd], shape: tuple[int, int], draws: int, seed: int) -> list[dict[str, float | str]]:
    """Directions that hold 90 % of the energy of the first n updates, on either side, and what random ones need."""
    generator = torch.Generator().manual_seed(seed)
    counts = sorted({*(2**i for i in range(len(svds).bit_length()) if 2**i <= len(svds)), len(svds)})
    rows: list[dict[str, float | str]] = []
    for side, d in (("in", shape[1]), ("out", shape[0])):
        own = [(svd.V if side == "in" else svd.U) * svd.S for svd in svds]
        turned = [[_turned(svd.S, d, generator) for svd in svds] for _ in range(draws)]
        for n in counts:
            k90, share = _held(own[:n])
            chance = np.array([_held(one[:n]) for one in turned]).reshape(-1, 2)
            expected = chance.mean(axis=0) if draws else (math.nan, math.nan)
            rows.append(
                {
                    "count": float(n),
                    "side": side,
                    "k90": k90,
                    "k90_chance": float(expected[0]),
                    "top_share": share,
                    "top_share_chance": float(expected[1]),
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
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(cosine) < 2:
        return np.empty((0, 4))
    distance = np.clip(1 - np.nan_to_num(cosine), 0, 2)
    np.fill_diagonal(distance, 0.0)
    found: Matrix = hierarchy.linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    return found
