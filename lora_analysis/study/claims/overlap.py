"""Do updates of two ranks share their directions? The paper's claims of section 7.2: C4, C4b, C5 and C8.

Conventions
-----------
A replicate is a pair of runs, its cells are modules (ΔW on the side that the margins fix), see ``replicates``. Chance
is independent uniformly random directions. That it is rejected says "not independent", no more: inputs that hardly vary
do it too, and so does one order of the data; the controls in each ``why`` say how far. A pair that shares its start
without meaning to makes every claim on its kind untestable.

Values
------
One function (tables, plan) -> Claim for each: ``shared_top_direction`` (C4), ``unshared_tail`` (C4b),
``mutual_inclusion`` (C5), ``all_layers`` (C8); and what ``calibration`` and ``seeds`` need of the same tables.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2, figures 3, 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from lora_analysis.study.claims.claim import Claim, Verdict
from lora_analysis.study.claims.initialisation import shared_starts
from lora_analysis.study.claims.replicates import (
    FEWEST,
    Replicate,
    distinct_runs,
    extent,
    in_every,
    interval,
    replicate,
    span,
    summary,
    unattempted,
)
from lora_analysis.study.compared import rank_pair
from lora_analysis.study.plan import Plan

Tables = Mapping[str, pd.DataFrame]


def pairs_of(tables: Tables, kind: str, *, target: str = "update", side: str | None = None) -> pd.DataFrame:
    """The overlaps of one kind of pair."""
    table = tables.get("overlaps")
    if table is None or table.empty:
        return pd.DataFrame(columns=["kind", "run_a", "run_b"])
    chosen = table[(table["kind"] == kind) & (table["target"] == target)]
    return chosen if side is None else chosen[chosen["side"] == side]


def judged(tables: Tables, kind: str, plan: Plan) -> pd.DataFrame:
    """The overlaps that claims are judged by: those of ΔW on the side that the plan's margins fix."""
    return pairs_of(tables, kind, side=plan.margins.side)


def replicates_of(
    rows: pd.DataFrame,
    effect: str | Callable[[pd.DataFrame], pd.Series],
    p: str | Callable[[pd.DataFrame], pd.Series],
    plan: Plan,
) -> list[Replicate]:
    """One replicate for each pair of runs."""
    level = 1 - plan.margins.confidence
    return [
        replicate(
            [str(run) for run in pair],
            cells[effect] if isinstance(effect, str) else effect(cells),
            cells[p] if isinstance(p, str) else p(cells),
            level=level,
        )
        for pair, cells in rows.groupby(["run_a", "run_b"], sort=True)
    ]


def untestable(tables: Tables, kinds: tuple[str, ...], identifier: str, text: str, statistic: str) -> Claim | None:
    """The verdict where runs that should differ began alike."""
    found = shared_starts(tables.get("initialisation"), kinds)
    if not found:
        return None
    why = f"Runs that should have begun apart share their initial A: {'; '.join(found[:3])}"
    return Claim(
        identifier,
        text,
        statistic,
        "not_testable_at_this_scale",
        f"{why}{' and others' if len(found) > 3 else ''}. Their likeness is the initialisation's, not the training's.",
    )


def medians(tables: Tables, kind: str, column: str) -> str:
    """Medians of a column by what is compared, in words."""
    parts = []
    for name, target, side in (("V", "update", "in"), ("U", "update", "out"), ("A", "A", "in"), ("A-A0", "A-A0", "in")):
        rows = pairs_of(tables, kind, target=target, side=side)
        if len(rows):
            parts.append(f"{name} {rows[column].median():.3g}")
    return ", ".join(parts)


def median(rows: pd.DataFrame, column: str) -> str:
    """The median of a column in words."""
    return f"{rows[column].median():.3g}" if len(rows) else "not run"


def share_range(shares: list[float]) -> str:
    """The smallest and the largest share."""
    low, high = (f"{share:.0%}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def shares_of(found: list[Replicate]) -> str:
    """In which share of their cells replicates go beyond chance."""
    return share_range([item.share for item in found])


def over_pairs(found: list[Replicate], plan: Plan) -> str:
    """What the interval over pairs of runs is."""
    return extent(len(found), "pair of runs", "pairs of runs", plan.margins.confidence)


def any_in_every(found: list[Replicate]) -> bool:
    """Whether every replicate has a cell beyond chance: the least to ask for before two of them are compared."""
    return bool(found) and min(item.share for item in found) > 0


def resolved(rows: pd.DataFrame, found: list[Replicate], level: float) -> bool:
    """Whether Monte Carlo p-values of these draws could pass Holm's correction at all."""
    return max(item.cells for item in found) / (float(rows["draws"].min()) + 1) < level


def shared_top_direction(tables: Tables, plan: Plan) -> Claim:
    """C4."""
    about = (
        "C4",
        "The top singular direction is shared by updates of small and large r (section 7.2, figure 3)",
        "phi(1, 1) of ΔW between two ranks, median over modules and sides, then over pairs of runs; dimensionless",
    )
    if claim := untestable(tables, ("ranks",), *about):
        return claim
    rows = judged(tables, "ranks", plan)
    if rows.empty:
        return unattempted(*about, _ranks_needed(plan))
    found = replicates_of(rows, "phi_11", "p_11", plan)
    level = 1 - plan.margins.confidence
    verdict = in_every([item.p for item in found], [1.0] * len(found), level=level)
    numbers, d = summary(found, plan.margins.confidence), float(rows["d"].median())
    edge = float(stats.beta.isf(level / numbers["cells"], 0.5, (d - 1) / 2))
    why = (
        f"Median phi(1,1) {numbers['estimate']:.3g} ({over_pairs(found, plan)} "
        f"{span(numbers['interval'])}), by chance {1 / d:.2g}; Holm-p < {level:.2g} in "
        f"{shares_of(found)} of {numbers['cells']} cells. By target: "
        f"{medians(tables, 'ranks', 'phi_11')}; without a common order of the data "
        f"{median(judged(tables, 'ranks_crossed', plan), 'phi_11')}. The paper's figure exceeds 0.5."
    )
    sd = float(stats.beta.std(0.5, (d - 1) / 2))
    return Claim(*about, verdict, why, **numbers, null_mean=1 / d, null_sd=sd, mde=edge - 1 / d)


def unshared_tail(tables: Tables, plan: Plan) -> Claim:
    """C4b."""
    about = (
        "C4b",
        "Beside the top direction, the others are not shared between ranks (section 7.2, figure 3)",
        "T = d · mean squared cosine of the directions after the first, 1 by chance; dimensionless",
    )
    if claim := untestable(tables, ("ranks",), *about):
        return claim
    rows = judged(tables, "ranks", plan)
    if rows.empty:
        return unattempted(*about, _ranks_needed(plan))
    rows = rows[rows["tail"].notna()]
    if rows.empty:
        why = f"The smaller of the compared ranks {rank_pair(plan)} has no direction after the first."
        return Claim(*about, "not_testable_at_this_scale", why)
    found = replicates_of(rows, "tail", "p_tail", plan)
    numbers, level = summary(found, plan.margins.confidence), 1 - plan.margins.confidence
    top = shared_top_direction(tables, plan).verdict
    small = [item.effect < plan.margins.tail_ratio and item.share <= 0.5 for item in found]
    large = [item.effect >= plan.margins.tail_ratio and item.p < level for item in found]
    verdict: Verdict = "not_reproduced"
    if all(large) and len(found) >= FEWEST:
        verdict = "contradicted"
    elif all(small) and top in ("reproduced", "consistent_underpowered"):
        verdict = top
    moot = "" if top == "reproduced" else " The top direction is not shown to be shared (C4), so nothing stands out."
    why = (
        f"Median T {numbers['estimate']:.3g} ({over_pairs(found, plan)} {span(numbers['interval'])}), by "
        f"chance 1; from {plan.margins.tail_ratio:g} on it would count as shared. Holm-p < {level:.2g} in "
        f"{shares_of(found)} of {numbers['cells']} cells. By target: {medians(tables, 'ranks', 'tail')}.{moot}"
    )
    # p is that of overlap, not of its absence.
    return Claim(*about, verdict, why, **{**numbers, "p": None}, null_mean=1.0, mde=plan.margins.tail_ratio - 1)


def mutual_inclusion(tables: Tables, plan: Plan) -> Claim:
    """C5."""
    about = (
        "C5",
        "The top direction of the small r lies in the subspace of the large r, and vice versa (section 7.2)",
        "min(phi(1, r'), phi(r, 1)) of ΔW between two ranks, median over modules and sides; dimensionless",
    )
    if claim := untestable(tables, ("ranks",), *about):
        return claim
    rows = judged(tables, "ranks", plan)
    if rows.empty:
        return unattempted(*about, _ranks_needed(plan))
    found = replicates_of(
        rows,
        lambda cells: cells[["phi_1n", "phi_m1"]].min(axis=1),
        lambda cells: cells[["p_1n", "p_m1"]].max(axis=1),
        plan,
    )
    level = 1 - plan.margins.confidence
    verdict = in_every([item.p for item in found], [1.0] * len(found), level=level)
    numbers = summary(found, plan.margins.confidence)
    chance_1n, chance_m1 = (float((rows[size] / rows["d"]).median()) for size in ("n", "m"))
    why = (
        f"Median phi(1,r') {rows['phi_1n'].median():.3g} (by chance {chance_1n:.2g}) and phi(r,1) "
        f"{rows['phi_m1'].median():.3g} (by chance {chance_m1:.2g}) over {len(found)} pairs of runs; both beyond "
        f"chance at Holm-p < {level:.2g} in {shares_of(found)} of {numbers['cells']} cells."
    )
    return Claim(*about, verdict, why, **numbers, null_mean=min(chance_1n, chance_m1))


def all_layers(tables: Tables, plan: Plan) -> Claim:
    """C8."""
    about = (
        "C8",
        "What holds of one layer holds across layers (figures 6 and 7)",
        "share of modules and sides whose overlap has Holm-p below the level, between ranks and between seeds",
    )
    if claim := untestable(tables, ("ranks", "seeds"), *about):
        return claim
    by_kind = {
        kind: replicates_of(judged(tables, kind, plan), p, p, plan)
        for kind, p in (("ranks", "p_11"), ("seeds", "p_largest"))
    }
    found = [item for kind in by_kind.values() for item in kind]
    if not found:
        return unattempted(*about, _ranks_needed(plan))
    level = 1 - plan.margins.confidence
    seeds_rows = judged(tables, "seeds", plan)
    layers = sorted(set(judged(tables, "ranks", plan).get("layer", [])) | set(seeds_rows.get("layer", [])))
    shares = [item.share for item in found]
    verdict: Verdict = "reproduced" if min(shares) >= plan.margins.layers_share else "not_reproduced"
    seeds = by_kind["seeds"]
    coarse = bool(seeds) and not resolved(seeds_rows, seeds, level)
    if len(layers) < 3 or coarse:
        verdict = "not_testable_at_this_scale"
    elif verdict == "reproduced" and min(map(len, by_kind.values())) < FEWEST:
        verdict = "consistent_underpowered"
    why = (
        f"{share_range(shares)} of {max(item.cells for item in found)} cells in {len(layers)} layers have "
        f"Holm-p < {level:.2g}, over {len(found)} pairs of runs; {plan.margins.layers_share:.0%} in every pair were "
        "asked for. A cell without it may share less than the test can see."
        f"{' No p of so few draws passes the correction for so many cells.' if coarse else ''}"
    )
    return Claim(
        *about,
        verdict,
        why,
        estimate=float(np.median(shares)),
        interval=interval(shares, plan.margins.confidence),
        null_mean=0.0,
        runs=distinct_runs(found),
        cells=max(item.cells for item in found),
    )


def _ranks_needed(plan: Plan) -> str:
    pair = rank_pair(plan)
    if pair is None:
        return "two ranks in the plan, one of them at most 8"
    return f"runs of r = {pair[0]} and r = {pair[1]}, targets {'+'.join(plan.main)}, for two seeds"
