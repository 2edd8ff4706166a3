"""Where along the whole spectrum of each base matrix its update lies, tenth by tenth, beside chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights
from lora_analysis.measures.deciles import SpectrumOverlap, part_null_draws, part_sizes, spectrum_overlap
from lora_analysis.measures.triples import Triples, leading_triples
from lora_analysis.tables.base_matrices import Rows, over_base_matrices
from lora_analysis.tables.directions import last_k, usable_svd
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import as_adapters, frame

COLUMNS = (
    "adapter", "module", "side", "k", "part", "first", "last",
    "overlap", "null_mean", "null_sd", "z", "p", "q",
    "energy_share", "energy_null_sd", "energy_z", "energy_p", "energy_q",
    "flags",
)  # fmt: skip


def spectrum_overlap_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights,
    *,
    ks: Sequence[int] | None = None,
    parts: int = 10,
    draws: int = 999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Shares of each update in every tenth of its base matrix's singular directions, on both sides.

    All of W is decomposed, once for all adapters: about 1 s for a smaller side of 1024, a minute for 4096.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    base : BaseWeights
    ks : sequence of int, optional
        How many of the update's top directions; 1 and r by default (64 for a matrix without an r of its own).
    parts : int
        How many runs of singular directions W is cut into; as many as it has, if those are fewer.
    draws, seed : int
        Of the Monte Carlo p for k > 1, at least 1 / (draws + 1); 0 leaves it out.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module, side (``out`` for left singular vectors, ``in`` for right ones), k and part, from 1 at the
        largest singular values; ``first`` and ``last`` count W's directions from 1. On the longer side of a rectangular
        W one more part is what W does not reach, flagged ``outside-base``. ``overlap`` counts each of the k directions
        alike, ``energy_share`` by its singular value squared; both have the mean ``null_mean`` by chance and are
        scale-free; the q of each p is adjusted for the number of modules. Rows with k beyond the numerical rank are
        NaN, flagged ``beyond-rank``; where W = 0 there is no spectrum, flagged ``zero-base``.

    Raises
    ------
    ValueError
        If a k, ``parts`` or ``draws`` is none.
    BaseWeightsError
        If the base lacks a matrix that an adapter updates, or its shape does not fit.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, figure 8, of the top only; Staats, Thamm and Rosenow 2024, arXiv:2410.17770.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> last = torch.eye(10)[9:]
    >>> adapter = la.Adapter({"m": la.LowRankUpdate(last.mT, last, scale=1.0)})
    >>> base = la.load_base({"m.weight": torch.diag(torch.arange(10.0, 0.0, -1.0))})
    >>> table = la.spectrum_overlap_table(adapter, base, parts=2)
    >>> table[["side", "part", "overlap", "null_mean"]].values.tolist()
    [['out', 1, 0.0, 0.5], ['out', 2, 1.0, 0.5], ['in', 1, 0.0, 0.5], ['in', 2, 1.0, 0.5]]
    """
    if ks is not None:
        ks = sorted({int(k) for k in ks})
        if not ks or ks[0] < 1:
            raise ValueError(f"ks: expected positive integers, got {ks}.")
    if parts < 1:
        raise ValueError(f"parts: expected at least 1, got {parts}.")
    if draws < 0:
        raise ValueError(f"draws: expected 0 or more, got {draws}.")
    adapters = as_adapters(adapter)
    wanted = {module.shape: 1 for item in adapters for module in item.modules.values()}
    for item in adapters:
        for module in item.modules.values():
            fitting = [k for k in ks or [last_k(module)] if k <= min(module.shape)]
            wanted[module.shape] = max([wanted[module.shape], *fitting])
    # One set of draws serves every module and k of a side; shapes that share one need that of the largest k.
    largest: dict[tuple[int, int], int] = {}
    for shape, most in wanted.items():
        for d in shape:
            largest[d, min(shape)] = max(most, largest.get((d, min(shape)), 1))
    nulls = {
        (d, p): {n: part_null_draws(d, n, most, draws=draws, seed=seed) for n in part_sizes(d, p, min(parts, p))}
        for (d, p), most in largest.items()
        if draws and most > 1
    }

    def rows_of_matrix(weight: Tensor, modules: list[Module]) -> list[Rows]:
        p = min(weight.shape)
        whole = leading_triples(weight, p, complete=True) if p else None
        return [_rows(module, whole, ks or sorted({1, last_k(module)}), min(parts, p), nulls) for module in modules]

    rows = over_base_matrices(
        rows_of_matrix, adapters, base, workers=workers, progress=progress, description="Spectrum overlap"
    )
    family = ["adapter", "side", "k", "part"]
    return with_discoveries(frame(rows, COLUMNS), {"p": family, "energy_p": family})


def _rows(
    module: Module,
    whole: Triples | None,
    ks: Sequence[int],
    parts: int,
    nulls: Mapping[tuple[int, int], Mapping[int, Tensor]],
) -> Rows:
    """The rows of one module of one adapter."""
    svd, flags = usable_svd(module, max(ks), scale_bound=False)
    if whole is None:
        return []
    no_spectrum = float(whole.svd.S[0]) == 0
    flags += ["zero-base"] * no_spectrum
    usable = 0 if svd is None or no_spectrum else len(svd.S)
    p = len(whole.svd.S)
    rows: Rows = []
    for side, d in (("out", module.shape[0]), ("in", module.shape[1])):
        for k in ks:
            found: SpectrumOverlap | None = None
            if svd is not None and k <= usable:
                top = svd.top(k)
                vectors, basis = (top.U, whole.svd.U) if side == "out" else (top.V, whole.svd.V)
                found = spectrum_overlap(vectors, top.S, basis, parts=parts, null_draws=nulls.get((d, p)))
            last = 0
            for part, size in enumerate(part_sizes(d, p, parts)):
                words = [*flags, *["beyond-rank"] * (k > usable), *["outside-base"] * (part == parts)]
                values: dict[str, Any] = dict.fromkeys(SpectrumOverlap._fields[1:], math.nan)
                if found is not None:
                    values = {field: float(getattr(found, field)[part]) for field in values}
                rows.append(
                    {"side": side, "k": k, "part": part + 1, "first": last + 1, "last": last + size}
                    | values
                    | {"flags": " ".join(words)}
                )
                last += size
    return rows
