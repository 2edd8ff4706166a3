"""How the updates of a study lie to each other and to the base, as tables small enough to be kept with it.

Conventions
-----------
``kind`` says why two runs are compared, see ``compared``; ``gaussian`` are random factors of the shapes of ``ranks``
and ``seeds``, which share nothing. ``target`` is ``update`` (singular vectors of ΔW; sides in and out), ``A`` (the
paper's, side in) or ``A-A0``. In names of columns 1 is the first direction, m all of ``run_a`` and n all of ``run_b``:
``phi_1n`` is how much of the first direction of the one lies in all of the other. ``p_11``, ``p_1n`` and ``p_m1`` are
exact; ``p_mn``, ``p_tail`` and ``p_largest`` are Monte Carlo of ``draws`` exact draws. ``tail`` is ``d`` times the mean
squared cosine of the directions after the first, 1 by chance; ``shared`` the number of principal cosines above the
99 % quantile of the largest by chance.

Values
------
``subspace_tables``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2, figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.measures.shared_start import shared_rows
from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.study.amplification_evidence import amplification_rows, top_direction_rows
from lora_analysis.study.chance import Nulls
from lora_analysis.study.compared import compared_pairs, grid, rank_pair
from lora_analysis.study.evidence import Study
from lora_analysis.study.plan import Run
from lora_analysis.study.projections import layer_of, projection_of
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, factors

GAUSSIAN_PAIRS = 3
"""Pairs of random factors for each module and shape."""

OVERLAPS = (
    *("kind", "run_a", "run_b", "module", "layer", "projection", "target", "side", "d", "m", "n"),
    *("phi_11", "phi_1n", "phi_m1", "phi_mn", "p_11", "p_1n", "p_m1", "p_mn", "z_mn"),
    *("tail", "p_tail", "largest_cosine", "p_largest", "shared", "draws"),
)
INITIALISATION = ("kind", "run_a", "run_b", "module", "source", "r_a", "r_b", "rows_shared", "expected")
Bases = dict[str, dict[tuple[str, str], Tensor]]
"""By module, then by target and side: orthonormal columns, by descending singular value."""

WITH_FACTORS = ("ranks", "seeds", "same_init", "same_order")
"""Kinds of pairs whose A is compared beside ΔW."""


def subspace_tables(study: Study, nulls: Nulls | None = None) -> dict[str, pd.DataFrame]:
    """Everything that the claims about subspaces and amplification are made from.

    Parameters
    ----------
    study : Study
    nulls : Nulls, optional
        Says draws and seed of the Monte Carlo p-values; its seed is also that of the random factors.

    Returns
    -------
    dict of str to DataFrame
        ``overlaps``, ``initialisation``, ``amplification``, ``top_directions``, without rows where runs are missing.
        All numbers are dimensionless.
    """
    nulls = nulls or Nulls()
    finished = set(study.find(method="lora"))
    runs = [run for run in grid(study.plan) if run.name in finished]
    return {
        **_pair_tables(study, finished, nulls),
        "amplification": amplification_rows(study, runs, draws=nulls.draws, seed=nulls.seed),
        "top_directions": top_direction_rows(study, runs, nulls),
    }


def _pair_tables(study: Study, finished: set[str], nulls: Nulls) -> dict[str, pd.DataFrame]:
    pairs = [(kind, a, b) for kind, a, b in compared_pairs(study.plan) if {a.name, b.name} <= finished]
    names = list(dict.fromkeys(run.name for _, *both in pairs for run in both))
    found = over_modules(lambda name: _directions(study.adapter(name), _initial(study, name)), names)
    bases = {name: own for name, (own, _) in zip(names, found, strict=True)}
    downs = {name: own for name, (_, own) in zip(names, found, strict=True)}
    measured = [(kind, a.name, b.name, bases[a.name], bases[b.name]) for kind, a, b in pairs]
    measured += _gaussian_pairs(study, finished, nulls.seed)
    rows = [row for rows in over_modules(lambda item: list(_overlaps(*item, nulls)), measured) for row in rows]
    starts = [row for rows in over_modules(lambda item: list(_starts(*item, downs)), pairs) for row in rows]
    return {
        "overlaps": _with_chance(pd.DataFrame(rows), nulls),
        "initialisation": pd.DataFrame(starts, columns=list(INITIALISATION)),
    }


def _initial(study: Study, run: str) -> Mapping[str, Tensor]:
    try:
        return study.initial(run)
    except FileNotFoundError:
        return {}


def _directions(
    adapter: Adapter, initial: Mapping[str, Tensor]
) -> tuple[Bases, dict[str, tuple[Tensor, Tensor | None]]]:
    """The bases of every module of a run, and its A with what that began as."""
    bases: Bases = {}
    downs = {}
    for name, module in adapter.modules.items():
        update = adapter[name]
        svd = update.svd()
        rank = numerical_rank(svd.S, module.shape)
        bases[name] = {("update", "in"): svd.V[:, :rank], ("update", "out"): svd.U[:, :rank]}
        down = factors(update)[1].double()
        start = _start(adapter, name, initial, len(down))
        bases[name]["A", "in"] = _row_space(down)
        if start is not None:
            bases[name]["A-A0", "in"] = _row_space(down - start)
        downs[name] = (down, start)
    return bases, downs


def _start(adapter: Adapter, name: str, initial: Mapping[str, Tensor], r: int) -> Tensor | None:
    """The A that a module began with; of a block of a fused weight its own rows of the whole one's."""
    if name in initial:
        return initial[name].double()
    whole = initial.get(name.rpartition(".")[0])
    tensor = adapter.modules[name].target.tensor
    blocks = [other for other, module in adapter.modules.items() if module.target.tensor == tensor]
    if whole is None or len(whole) != r * len(blocks):
        return None
    place = sorted(blocks, key=lambda other: adapter.modules[other].target.rows or (0, 0)).index(name)
    return whole[place * r : (place + 1) * r].double()


def _row_space(factor: Tensor) -> Tensor:
    _, S, Vh = torch.linalg.svd(factor, full_matrices=False)
    columns: Tensor = Vh[: numerical_rank(S, (factor.shape[0], factor.shape[1]))].mT
    return columns


def _gaussian_pairs(study: Study, finished: set[str], seed: int) -> list[tuple[str, str, str, Bases, Bases]]:
    plan, most = study.plan, max(study.plan.ranks)
    model = next((run for run in grid(plan) if run.name in finished), None)
    if model is None:
        return []
    shapes = {name: module.shape for name, module in study.adapter(model.name).modules.items()}
    generator = torch.Generator().manual_seed(seed)

    def drawn(r: int) -> dict[str, LowRankUpdate]:
        return {
            name: LowRankUpdate(
                torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator), 1
            )
            for name, (d_out, d_in) in shapes.items()
        }

    def bases(item: tuple[str, dict[str, LowRankUpdate]]) -> tuple[str, Bases]:
        found = {name: update.svd() for name, update in item[1].items()}
        return item[0], {name: {("update", "in"): svd.V, ("update", "out"): svd.U} for name, svd in found.items()}

    ranks = [(most, most)] if (pair := rank_pair(plan)) is None else [pair, (most, most)]
    factors_of = [
        (f"gaussian-{letter}{number}-r{r}", drawn(r))
        for number, both in enumerate(ranks * GAUSSIAN_PAIRS)
        for letter, r in zip("ab", both, strict=True)
    ]
    done = over_modules(bases, factors_of)
    return [("gaussian", a, b, own, other) for (a, own), (b, other) in zip(done[::2], done[1::2], strict=True)]


def _overlaps(kind: str, run_a: str, run_b: str, a: Bases, b: Bases, nulls: Nulls) -> Iterator[dict[str, Any]]:
    """The rows of one pair of runs, without their p-values."""
    for module in (name for name in a if name in b):
        for target, side in (key for key in a[module] if key in b[module]):
            if target != "update" and kind not in WITH_FACTORS:
                continue
            one, other = a[module][target, side], b[module][target, side]
            d, m, n = one.shape[0], one.shape[1], other.shape[1]
            if min(m, n) == 0 or other.shape[0] != d:
                continue
            phi = subspace_similarity(one, other)
            products = one.mT @ other
            cosines = torch.linalg.svdvals(products).clamp(max=1.0)
            tail = float(products[1:, 1:].square().mean()) * d if min(m, n) > 1 else float("nan")
            yield {
                "kind": kind,
                "run_a": run_a,
                "run_b": run_b,
                "module": module,
                "layer": layer_of(module),
                "projection": projection_of(module),
                "target": target,
                "side": side,
                "d": d,
                "m": m,
                "n": n,
                "phi_11": float(phi[0, 0]),
                "phi_1n": float(phi[0, -1]),
                "phi_m1": float(phi[-1, 0]),
                "phi_mn": float(phi[-1, -1]),
                "tail": tail,
                "largest_cosine": float(cosines[0]),
                "shared": int((cosines > nulls.shared_from(d, m, n)).sum()),
            }


def _with_chance(table: pd.DataFrame, nulls: Nulls) -> pd.DataFrame:
    """The p-values of overlaps, shape by shape."""
    if table.empty:
        return pd.DataFrame(columns=list(OVERLAPS))
    parts = []
    for _, part in table.groupby(["d", "m", "n"], sort=False):
        rows = part.copy()
        d, m, n = (int(rows[size].iloc[0]) for size in ("d", "m", "n"))
        for name, cell in {"11": (1, 1), "1n": (1, n), "m1": (m, 1), "mn": (m, n)}.items():
            rows[f"p_{name}"] = nulls.p(d, m, n, rows[f"phi_{name}"], cell)
        rows["z_mn"], rows["p_tail"] = nulls.z(d, m, n, rows["phi_mn"]), float("nan")
        if min(m, n) > 1:
            # The directions after the first are Haar's again: their overlap is phi of one column less on each side.
            phi = (rows["tail"] * max(m - 1, n - 1) / d).clip(upper=1.0)
            rows["p_tail"] = nulls.p(d, m - 1, n - 1, phi, (m - 1, n - 1))
        drawn = nulls.largest_cosine(d, m, n)
        reached = len(drawn) - np.searchsorted(drawn, rows["largest_cosine"].to_numpy(), side="left")
        rows["p_largest"] = (1 + reached) / (1 + len(drawn))
        rows["draws"] = nulls.draws
        parts.append(rows)
    return pd.concat(parts).sort_index()[list(OVERLAPS)]


def _starts(
    kind: str, a: Run, b: Run, downs: Mapping[str, Mapping[str, tuple[Tensor, Tensor | None]]]
) -> Iterator[dict[str, Any]]:
    for module, (down_a, start_a) in downs[a.name].items():
        if module not in downs[b.name]:
            continue
        down_b, start_b = downs[b.name][module]
        known = start_a is not None and start_b is not None
        share = shared_rows(start_a, start_b) if known else shared_rows(down_a, down_b, trained=True)  # type: ignore[arg-type]
        yield {
            "kind": kind,
            "run_a": a.name,
            "run_b": b.name,
            "module": module,
            "source": "A0" if known else "A",
            "r_a": len(down_a),
            "r_b": len(down_b),
            "rows_shared": share,
            "expected": kind == "same_init",
        }
