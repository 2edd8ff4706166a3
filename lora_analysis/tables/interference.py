"""Will adapters merge? How their updates of every matrix lie to each other, beside chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.measures.activations import Activations
from lora_analysis.measures.interference import (
    sign_conflict,
    singular_task_interference,
    update_cosine,
    update_cosine_null_sd,
)
from lora_analysis.measures.shared_basis import (
    averaging_error,
    interference_null,
    shared_basis,
    subspace_alignment_ratio,
    union_rank,
)
from lora_analysis.tables.directions import usable_svd
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import frame
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, Svd

COLUMNS = (
    "module",
    "adapters",
    "cosine",
    "cosine_min",
    "cosine_max",
    "cosine_null_sd",
    "sti",
    "sigma_sum",
    "sti_relative",
    "sti_null",
    "sti_p",
    "sti_q",
    "alignment_ratio",
    "sign_conflict",
    "union_rank",
    "union_rank_in",
    "rank_sum",
    "averaging_error",
    "cross_activation",
    "flags",
)


def interference_table(
    adapters: Sequence[Adapter],
    *,
    activations: Activations | None = None,
    signs: bool = True,
    draws: int = 999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """How the updates of two or more adapters of one base get in each other's way, module by module.

    Parameters
    ----------
    adapters : sequence of Adapter
        Two or more. Modules that only one of them has interfere with nothing and have no row.
    activations : Activations, optional
        Of ``collect_activations`` for the same adapters on inputs of the first one's task.
    signs : bool
        Count sign conflicts, the one column that multiplies updates out, block by block.
    draws, seed : int
        Of the null of interference.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module; of several pairs the mean, over updates that are not zero. ``cosine`` of the updates, by
        chance 0 with standard deviation ``cosine_null_sd`` (take five of them for a finding). ``sti`` is singular task
        interference in the unit of the weights, ``sti_relative`` over ``sigma_sum``, the sum of all singular values;
        ``sti_null`` is its mean for updates of the same spectra turned at random, ``sti_p`` its upper tail and
        ``sti_q`` the same adjusted for the number of modules (``tables.discoveries``). ``alignment_ratio`` is the mean
        share of an update in the leading directions of the sum, ``sign_conflict`` that of entries on which updates
        disagree. ``union_rank`` counts the output directions that all span together, ``union_rank_in`` the input ones,
        beside ``rank_sum``, which they have where nothing is shared. ``averaging_error`` is how far averaging factors
        is from averaging updates. ``cross_activation`` is ``‖ΔW_b X‖ / ‖ΔW_a X‖``, a being the first adapter and X
        inputs of its task, the mean over the others: what they add where only the first should. All but ``sti``,
        ``sti_null`` and ``sigma_sum`` are dimensionless.

        None of these has been shown to decide whether a merge works: compare merges by them.

    Raises
    ------
    ValueError
        If there are fewer than two adapters.
    LoraAnalysisError
        If no module is in two of them, or one has different shapes.

    References
    ----------
    ``measures.interference``, ``measures.shared_basis``.

    Examples
    --------
    >>> import lora_analysis as la
    >>> e = torch.eye(64)
    >>> a, b = (la.Adapter({"q": la.LowRankUpdate(e[:, i : i + 2], e[i : i + 2], scale=1.0)}) for i in (0, 1))
    >>> row = interference_table([a, b]).iloc[0]
    >>> round(float(row["cosine"]), 12), int(row["union_rank"]), int(row["rank_sum"])
    (0.5, 3, 4)
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters: expected two or more, got {len(adapters)}.")
    owners: dict[str, list[int]] = {}
    for number, adapter in enumerate(adapters):
        for name in adapter:
            owners.setdefault(name, []).append(number)
    shared = {name: numbers for name, numbers in owners.items() if len(numbers) > 1}
    if not shared:
        raise LoraAnalysisError(f"{adapters[0].source}: expected modules that two adapters have, got none.")
    rows = over_modules(
        lambda item: _row(adapters, *item, activations, signs, draws, seed),
        list(shared.items()),
        workers=workers,
        progress=progress,
        description="Interference",
    )
    table = frame(rows, COLUMNS, counts=("union_rank", "union_rank_in", "rank_sum"))
    return with_discoveries(table, {"sti_p": []})


def _row(
    adapters: Sequence[Adapter],
    name: str,
    numbers: Sequence[int],
    activations: Activations | None,
    signs: bool,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    modules = [adapters[number].modules[name] for number in numbers]
    if len({module.shape for module in modules}) != 1:
        raise LoraAnalysisError(
            f"{name!r}: expected one shape in all adapters, got {[module.shape for module in modules]}. "
            "Compare adapters of one base."
        )
    shape = modules[0].shape
    found = [usable_svd(module, scale_bound=True, leading_only=True) for module in modules]
    flags = list(dict.fromkeys(word for _, words in found for word in words))
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
        "module": name,
        "adapters": len(numbers),
        "cosine_null_sd": update_cosine_null_sd(shape),
        "union_rank": pd.NA,
        "union_rank_in": pd.NA,
        "rank_sum": pd.NA,
    }
    svds = [svd for svd, _ in found if svd is not None]
    if len(svds) < len(found):
        return row | {"flags": " ".join(flags)}
    updates = [adapters[number][name] for number in numbers]
    cosines = [update_cosine(a, b) for a, b in itertools.combinations(updates, 2)]
    known = [cosine for cosine in cosines if not math.isnan(cosine)]  # that with a zero update is undefined
    if known:
        row |= {"cosine": _mean(known), "cosine_min": min(known), "cosine_max": max(known)}
    out, into = union_rank(svds)
    row |= {"union_rank": out, "union_rank_in": into, "rank_sum": sum(len(svd.S) for svd in svds)}
    row |= _interference(svds, shape, draws, seed)
    acting = [svd for svd in svds if len(svd.S)]
    if len(acting) > 1:
        row["alignment_ratio"] = _mean(subspace_alignment_ratio(shared_basis(acting).cores).tolist())
    if signs:
        row["sign_conflict"] = sign_conflict(updates)
    if all(isinstance(update, LowRankUpdate) for update in updates):
        row["averaging_error"] = averaging_error([u for u in updates if isinstance(u, LowRankUpdate)])
    if activations is not None:
        row["cross_activation"] = _cross_activation(activations, numbers, name)
    return row | {"flags": " ".join(flags)}


def _interference(svds: Sequence[Svd], shape: tuple[int, int], draws: int, seed: int) -> dict[str, float]:
    total = sum(float(svd.S.sum()) for svd in svds)
    if sum(len(svd.S) > 0 for svd in svds) < 2:  # one alone has nothing to interfere with
        return {}
    sti = singular_task_interference(svds)
    null = interference_null([svd.S for svd in svds], shape, draws=draws, seed=seed)
    p = (1 + int((null >= sti - 1e-12 * total).sum())) / (draws + 1)
    return {"sti": sti, "sigma_sum": total, "sti_relative": sti / total, "sti_null": float(null.mean()), "sti_p": p}


def _cross_activation(activations: Activations, numbers: Sequence[int], name: str) -> float:
    found = {n: activations.moments[n, name].update_square for n in numbers if (n, name) in activations.moments}
    own = found.pop(0, 0.0)
    return _mean([math.sqrt(other / own) for other in found.values()]) if own > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if len(values) else math.nan
