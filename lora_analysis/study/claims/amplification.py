"""What do updates do to the base, and where in it do they lie? Section 7.3 and appendix H.4 (C9-C13).

Conventions
-----------
A replicate is a run, its cells are modules (and sides), see ``replicates``. Chance is "ΔW's directions have nothing to
do with W". ``gain`` is how much more of W they hold than random ones would, so that amplification relative to chance
is ``1 / gain``: the two are one number. Ranks are compared at the same truncation k alone.

Values
------
One function (tables, plan) -> Claim for each: ``aligned_with_base`` (C9), ``not_the_top`` (C10),
``amplification_factor`` (C11), ``amplified_signs`` (C11b), ``falling_with_rank`` (C12), ``more_of_the_top`` (C13).

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3, table 7; appendix H.4; figure 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lora_analysis.study.claims.claim import Claim, Verdict
from lora_analysis.study.claims.overlap import Tables, any_in_every, resolved, shares_of
from lora_analysis.study.claims.replicates import (
    FEWEST,
    Replicate,
    extent,
    in_every,
    interval,
    limited_by_seeds,
    replicate,
    sign_test,
    span,
    summary,
    unattempted,
)
from lora_analysis.study.compared import amplified_ranks, top_directions_shape
from lora_analysis.study.plan import Plan

PRINTED_FACTOR = 21.5
"""The paper's amplification factor at r = 4 (appendix H.4)."""


def whole_updates(tables: Tables, plan: Plan) -> pd.DataFrame:
    """Rows at k = r of the two ranks that amplification is judged at."""
    table = tables.get("amplification")
    if table is None or table.empty:
        return pd.DataFrame(columns=["run", "k"])
    return table[(table["k"] == table["r"]) & table["r"].isin(amplified_ranks(plan))]


def aligned_with_base(tables: Tables, plan: Plan) -> Claim:
    """C9."""
    about = (
        "C9",
        "ΔW is more aligned with W than random directions are (section 7.3, table 7)",
        "gain = ||UᵀWV||_F · sqrt(mn) / (r ||W||_F), 1 by chance, median over modules; dimensionless",
    )
    rows = whole_updates(tables, plan)
    if rows.empty:
        return unattempted(*about, _needed(plan))
    found = _replicates(rows, "gain", "p", plan)
    # Of the same draws: those that stay below, where p counts those that reach.
    lower = _replicates(
        rows.assign(lower=(1 - rows["p"] + 1 / (rows["draws"] + 1)).clip(upper=1)), "gain", "lower", plan
    )
    level = 1 - plan.margins.confidence
    verdict = _replicated(in_every([item.p for item in found], [item.p for item in lower], level=level), rows, plan)
    if not resolved(rows, found, level):
        verdict = "not_testable_at_this_scale"
    numbers = summary(found, plan.margins.confidence)
    why = (
        f"Median gain {numbers['estimate']:.3g} ({_extent(found, plan)} of r = {_ranks(rows)} "
        f"{span(numbers['interval'])}), 1 by chance; Holm-p < {level:.2g} in {shares_of(found)} of {numbers['cells']} "
        f"modules, p from {int(rows['draws'].min())} exact draws. {_by_rank(rows, 'gain')}"
    )
    return Claim(*about, verdict, why, **numbers, null_mean=1.0)


def not_the_top(tables: Tables, plan: Plan) -> Claim:
    """C10."""
    about = (
        "C10",
        "ΔW amplifies directions that W does not emphasise: it does not lie in W's top ones (section 7.3)",
        "||UᵀWV||_F as a share of what W's top r directions hold, median over modules; in [0, 1]",
    )
    rows = whole_updates(tables, plan)
    if rows.empty:
        return unattempted(*about, _needed(plan))
    found = _replicates(rows, "ceiling_fraction", "p", plan)
    numbers, bound = summary(found, plan.margins.confidence), plan.margins.ceiling
    effects = [item.effect for item in found]
    gate = aligned_with_base(tables, plan).verdict
    verdict: Verdict = "not_reproduced"
    if min(effects) > bound and len(found) >= FEWEST:
        verdict = _replicated("contradicted", rows, plan)
    elif max(effects) < bound and gate in ("reproduced", "consistent_underpowered"):
        verdict = gate
    moot = "" if gate == "reproduced" else " Alignment is not shown (C9), and random directions do as much."
    null = float(rows["null_ceiling"].median())
    why = (
        f"Median share of the ceiling {numbers['estimate']:.3g} ({_extent(found, plan)} "
        f"{span(numbers['interval'])}) against the margin of {bound:g}; random directions hold {null:.2g}. "
        f"{_by_rank(rows, 'ceiling_fraction')}{moot}"
    )
    return Claim(*about, verdict, why, **{**numbers, "p": None}, null_mean=null)


def amplification_factor(tables: Tables, plan: Plan) -> Claim:
    """C11."""
    about = (
        "C11",
        f"The amplification factor is large, {PRINTED_FACTOR} at r = 4 (section 7.3, appendix H.4)",
        "||ΔW||_F / ||UᵀWV||_F, median over modules; and the same over that of random directions, which is 1 / gain",
    )
    rows = whole_updates(tables, plan)
    if rows.empty:
        return unattempted(*about, _needed(plan))
    small = rows[rows["r"] == amplified_ranks(plan)[0]]
    rows = small if len(small) else rows
    found = _replicates(rows, "amplification", "p", plan)
    numbers = summary(found, plan.margins.confidence)
    null, gain = float(rows["amplification_null"].median()), float(rows["gain"].median())
    d = math.sqrt(float((rows["d_out"] * rows["d_in"]).median()))
    why = (
        f"At r = {_ranks(rows)} the median factor is {numbers['estimate']:.3g} ({_extent(found, plan)} "
        f"{span(numbers['interval'])}), where random directions have {null:.3g}, so 1/gain = {1 / gain:.3g}. Chance "
        f"alone scales as ||ΔW|| d / (r ||W||), with d = {d:.0f} here and 12288 in the paper, whose own null is 343: "
        "the literal factor says nothing at this width, and C9 tests what it stands for."
    )
    return Claim(*about, "not_testable_at_this_scale", why, **{**numbers, "p": None}, null_mean=null)


def amplified_signs(tables: Tables, plan: Plan) -> Claim:
    """C11b."""
    about = (
        "C11b",
        "ΔW amplifies what W does in its directions (section 7.3), rather than suppress it",
        "share of directions with u_kᵀWv_k > 0 over the modules of a run, 1/2 by chance; and cosine of ΔW and W",
    )
    rows = whole_updates(tables, plan)
    if rows.empty:
        return unattempted(*about, _needed(plan))
    above, below, shares, scores, cosines = [], [], [], [], []
    for _, cells in rows.groupby("run", sort=True):
        positive, total = round((cells["signed_positive"] * cells["k"]).sum()), int(cells["k"].sum())
        score = float((cells["cosine"] * np.sqrt(cells["d_out"] * cells["d_in"])).sum() / math.sqrt(len(cells)))
        above.append(float(stats.binom.sf(positive - 1, total, 0.5)))
        below.append(float(stats.binom.cdf(positive, total, 0.5)))
        shares.append(positive / total)
        scores.append(score)
        cosines.append(float(cells["cosine"].median()))
    level = 1 - plan.margins.confidence
    verdict = _replicated(in_every(above, below, level=level), rows, plan)
    # The cosine, which weighs the directions, has to agree with their signs.
    if (verdict == "reproduced" and min(scores) <= 0) or (verdict == "contradicted" and max(scores) >= 0):
        verdict = "not_reproduced"
    bounds = interval(shares, plan.margins.confidence)
    why = (
        f"Median share of positive signs {np.median(shares):.3g} "
        f"({extent(len(shares), 'run', 'runs', plan.margins.confidence)} {span(bounds)}), 1/2 by chance, "
        f"largest binomial p {max(above):.2g} for amplification and {max(below):.2g} for suppression; "
        f"median cosine of ΔW and W {np.median(cosines):.2g}, its standard score over the modules of a run "
        f"{min(scores):.2g} to {max(scores):.2g}. {_by_rank(rows, 'signed_positive')}"
    )
    return Claim(
        *about,
        verdict,
        why,
        estimate=float(np.median(shares)),
        interval=bounds,
        null_mean=0.5,
        p=max(above),
        runs=len(shares),
        cells=int(rows.groupby("run").size().max()),
    )


def falling_with_rank(tables: Tables, plan: Plan) -> Claim:
    """C12."""
    small, most = amplified_ranks(plan)
    about = (
        "C12",
        "The amplification factor falls as r grows (appendix H.4)",
        "log of gain_k of the largest r over gain_k of the small one, equal k; positive where amplification falls",
    )
    table = tables.get("amplification")
    if small == most or table is None or table.empty:
        return unattempted(*about, _needed(plan))
    rows = table[(table["k"] == small) & table["r"].isin((small, most))]
    seeds = {run.name: run.init_seed for run in plan.runs()}
    log_gain = np.log(rows["gain"].clip(lower=1e-12))
    wide = rows.assign(seed=rows["run"].map(seeds), value=log_gain).pivot_table(
        index=["seed", "module"], columns="r", values="value"
    )
    if wide.shape[1] < 2 or wide.dropna().empty:
        return unattempted(*about, _needed(plan))
    ratios = (wide[most] - wide[small]).dropna()
    tests = [sign_test(values) for _, values in ratios.groupby("seed")]
    effects = [float(values.median()) for _, values in ratios.groupby("seed")]
    modules, level = int(ratios.groupby("seed").size().max()), 1 - plan.margins.confidence
    verdict: Verdict = "not_testable_at_this_scale"
    if 0.5**modules < level:
        verdict = in_every([above for above, _ in tests], [below for _, below in tests], level=level)
        verdict = limited_by_seeds(verdict, len(tests), level=level)
    whole = whole_updates(tables, plan)
    told = any(any_in_every(_replicates(whole[whole["r"] == r], "gain", "p", plan)) for r in (small, most))
    moot = ""
    if not told and verdict in ("reproduced", "contradicted"):
        verdict, moot = "not_reproduced", " Gains are not told from chance (C9), so their ratio says nothing."
    bounds = interval(effects, plan.margins.confidence)
    why = (
        f"gain_{small} is {rows[rows['r'] == small]['gain'].median():.3g} at r = {small} and "
        f"{rows[rows['r'] == most]['gain'].median():.3g} at r = {most}; median log ratio {np.median(effects):.3g} "
        f"({extent(len(effects), 'seed', 'seeds', plan.margins.confidence)} {span(bounds)}), sign tests over {modules} "
        f"modules: largest p {max(test[0] for test in tests):.2g} for a fall and "
        f"{max(test[1] for test in tests):.2g} for a rise{_dependence(len(effects))}.{moot}"
    )
    return Claim(
        *about,
        verdict,
        why,
        estimate=float(np.median(effects)),
        interval=bounds,
        null_mean=0.0,
        p=max(above for above, _ in tests),
        runs=2 * len(effects),
        cells=modules,
    )


def more_of_the_top(tables: Tables, plan: Plan) -> Claim:
    """C13."""
    share, j = plan.margins.top_share, top_directions_shape(plan)
    about = (
        "C13",
        "ΔW of larger r picks up more of W's top directions, and is not contained in them (appendix H.3, figure 8)",
        f"phi(W, ΔW, {share:g} d, {j}) / {share:g}: 1 by chance, {1 / share:g} where contained; dimensionless",
    )
    table = tables.get("top_directions")
    if table is None or table.empty or table["r"].nunique() < 2:
        return unattempted(*about, f"two ranks from {j} on, targets {'+'.join(plan.main)}, for two seeds")
    rows = table.assign(ratio=table["phi"] * table["d"] / table["i"])
    low, high = int(rows["r"].min()), int(rows["r"].max())
    found = _replicates(rows, "ratio", "p", plan)
    seeds = {run.name: run.init_seed for run in plan.runs()}
    # Both sides of a module come from one update: their mean is one sign, not two.
    wide = rows.assign(seed=rows["run"].map(seeds)).pivot_table(index=["seed", "module"], columns="r", values="ratio")
    rises = (wide[high] - wide[low]).dropna()
    tests = [sign_test(values) for _, values in rises.groupby("seed")]
    level, contained = 1 - plan.margins.confidence, plan.margins.ceiling / share
    modules = max((len(values) for _, values in rises.groupby("seed")), default=0)
    rising: Verdict = "not_testable_at_this_scale"
    if 0.5**modules < level:
        rising = in_every([above for above, _ in tests], [below for _, below in tests], level=level)
        rising = limited_by_seeds(rising, len(tests), level=level)
    beyond = in_every([item.p for item in found], [1.0] * len(found), level=level)
    verdict: Verdict = "not_reproduced"
    if not resolved(rows, found, level):
        verdict = "not_testable_at_this_scale"
    elif rising == "contradicted" or (min(item.effect for item in found) > contained and len(found) >= FEWEST):
        verdict = _replicated("contradicted", rows, plan)
    elif max(item.effect for item in found) < contained and beyond in ("reproduced", "consistent_underpowered"):
        verdict = rising
    numbers = summary(found, plan.margins.confidence)
    why = (
        f"{_by_rank(rows, 'ratio')} Beyond chance (Holm-p < {level:.2g}) in {shares_of(found)} of {numbers['cells']} "
        f"cells of {numbers['runs']} runs. From r = {low} to r = {high} it rises in {float((rises > 0).mean()):.0%} of "
        f"modules; sign tests of {len(tests)} seeds over {modules} modules: largest p "
        f"{max((test[0] for test in tests), default=1.0):.2g} for a rise{_dependence(len(tests))}. "
        f"Contained would be {1 / share:g}, and from {contained:g} on counts so."
    )
    p = max([item.p for item in found] + [above for above, _ in tests])
    return Claim(*about, verdict, why, **{**numbers, "p": p}, null_mean=1.0)


def _replicates(rows: pd.DataFrame, effect: str, p: str, plan: Plan) -> list[Replicate]:
    level = 1 - plan.margins.confidence
    return [
        replicate([str(run)], cells[effect], cells[p], level=level) for run, cells in rows.groupby("run", sort=True)
    ]


def _replicated(verdict: Verdict, rows: pd.DataFrame, plan: Plan) -> Verdict:
    """The verdict, lowered where all runs are of one seed: those of its ranks share the order of the data."""
    seeds = {run.name: run.init_seed for run in plan.runs()}
    if len({seeds[str(name)] for name in rows["run"].unique()}) >= FEWEST:
        return verdict
    lowered: dict[Verdict, Verdict] = {"reproduced": "consistent_underpowered", "contradicted": "not_reproduced"}
    return lowered.get(verdict, verdict)


def _extent(found: Sequence[Replicate], plan: Plan) -> str:
    return extent(len(found), "run", "runs", plan.margins.confidence)


def _dependence(seeds: int) -> str:
    """What a sign test over modules takes for granted, and what is left without it."""
    return f" if modules are independent; were they not, {seeds} seeds agree by chance in {0.5**seeds:.2g}"


def _by_rank(rows: pd.DataFrame, column: str) -> str:
    """Medians over runs and modules by rank, as a sentence."""
    parts = [f"{values[column].median():.3g} at r = {r}" for r, values in rows.groupby("r")]
    return f"Median by rank: {', '.join(parts)}."


def _ranks(rows: pd.DataFrame) -> str:
    return " and ".join(str(r) for r in sorted(rows["r"].unique()))


def _needed(plan: Plan) -> str:
    ranks = sorted(set(amplified_ranks(plan)))
    if len(ranks) == 1:
        return f"runs of r = {ranks[0]} and another rank from 2 on, targets {'+'.join(plan.main)}, for two seeds"
    return f"runs of r = {ranks[0]} and r = {ranks[1]}, targets {'+'.join(plan.main)}, for two seeds"
