"""Do two seeds learn the same directions, of q more than of v, and two tasks others? C6, C6b and C17.

Conventions
-----------
As in ``overlap``. C17 compares pairs of runs of different seeds only, for runs of two tasks with one seed begin with
the same A. Its p is that of relabelling: within each seed the tasks change places, in every way there is, since
under the null a run's task makes no difference; pairs of runs share runs and are not relabelled themselves. With one
other task there are ``2**(seeds - 1)`` ways, 4 of three seeds, so that three seeds need two other tasks to tell.

Values
------
``shared_between_seeds`` (C6), ``query_shares_more`` (C6b), ``task_directions`` (C17).

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2, figure 4; appendix H.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lora_analysis.study.claims.claim import Claim, Verdict
from lora_analysis.study.claims.overlap import (
    Tables,
    any_in_every,
    judged,
    median,
    medians,
    over_pairs,
    pairs_of,
    replicates_of,
    resolved,
    shares_of,
    untestable,
)
from lora_analysis.study.claims.replicates import (
    extent,
    in_every,
    interval,
    limited_by_seeds,
    sign_test,
    span,
    summary,
    unattempted,
)
from lora_analysis.study.compared import task_rank
from lora_analysis.study.plan import Plan

MOST_LABELLINGS = 20_000
"""Ways of relabelling up to which all are tried; beyond, so many are drawn, the observed one among them."""


def shared_between_seeds(tables: Tables, plan: Plan) -> Claim:
    """C6."""
    about = (
        "C6",
        "Two seeds share directions of ΔW (section 7.2, figure 4)",
        "principal cosines above the null's 99 % quantile of the largest, median over modules and sides; a count",
    )
    if claim := untestable(tables, ("seeds",), *about):
        return claim
    rows = judged(tables, "seeds", plan)
    if rows.empty:
        return unattempted(*about, f"two seeds at r = {max(plan.ranks)}, targets {'+'.join(plan.main)}")
    found = replicates_of(rows, "shared", "p_largest", plan)
    level = 1 - plan.margins.confidence
    verdict = in_every([item.p for item in found], [1.0] * len(found), level=level)
    if not resolved(rows, found, level):
        verdict = "not_testable_at_this_scale"
    numbers = summary(found, plan.margins.confidence)
    controls = ", ".join(
        f"{words} {median(judged(tables, kind, plan), 'shared')}"
        for kind, words in (("same_init", "one start and two orders"), ("same_order", "two starts and one order"))
    )
    why = (
        f"A median of {numbers['estimate']:.3g} of {rows['m'].median():.0f} directions shared "
        f"({over_pairs(found, plan)}, of {numbers['runs']} runs, {span(numbers['interval'])}), "
        f"largest cosine beyond chance at Holm-p < "
        f"{level:.2g} in {shares_of(found)} of {numbers['cells']} cells. By target: "
        f"{medians(tables, 'seeds', 'shared')}; controls: {controls}."
    )
    return Claim(*about, verdict, why, **numbers, null_mean=0.01)


def query_shares_more(tables: Tables, plan: Plan) -> Claim:
    """C6b."""
    about = (
        "C6b",
        "Two seeds share more directions of ΔWq than of ΔWv, whose intrinsic rank is lower (section 7.2, figure 4)",
        "q minus v of the sum of squared cosines beyond chance, by layer; median over layers, in directions",
    )
    if claim := untestable(tables, ("seeds",), *about):
        return claim
    rows = judged(tables, "seeds", plan)
    rows = rows[rows["projection"].isin(["q", "v"])] if len(rows) else rows
    if rows.empty or rows["projection"].nunique() < 2:
        return unattempted(*about, f"two seeds of q+v at r = {max(plan.ranks)}")
    fewer, more = np.minimum(rows["m"], rows["n"]), np.maximum(rows["m"], rows["n"])
    excess = rows.assign(excess=(rows["phi_mn"] - more / rows["d"]) * fewer)
    by_pair = excess.groupby(["run_a", "run_b", "layer", "projection"])["excess"].mean().unstack("projection")
    differences = (by_pair["q"] - by_pair["v"]).groupby("layer").mean().dropna()
    every = (by_pair["q"] - by_pair["v"]).groupby(["run_a", "run_b"]).median().tolist()
    (above, below), level, layers = sign_test(differences), 1 - plan.margins.confidence, len(differences)
    shared = any_in_every(replicates_of(rows, "shared", "p_largest", plan))
    pairs = rows.groupby(["run_a", "run_b"]).ngroups
    verdict: Verdict = "not_reproduced"
    if 0.5**layers >= level:
        verdict = "not_testable_at_this_scale"
    elif shared and above < level and min(every) > 0:
        verdict = "reproduced"
    elif shared and below < level and max(every) < 0:
        verdict = "contradicted"
    runs = len(set(rows["run_a"]) | set(rows["run_b"]))
    verdict = limited_by_seeds(verdict, runs, level=level)
    moot = "" if shared else " Not every two seeds share a direction, so neither shares more."
    why = (
        f"q shares more than v in {int((differences > 0).sum())} of {layers} layers, averaged over pairs of runs: "
        f"sign test p = {above:.2g}, at best {0.5**layers:.2g}, if layers are independent; median difference "
        f"{differences.median():.3g} directions "
        f"({extent(pairs, 'pair of runs', 'pairs of runs', plan.margins.confidence)} "
        f"{span(interval(every, plan.margins.confidence))}).{moot}"
    )
    return Claim(
        *about,
        verdict,
        why,
        estimate=float(differences.median()),
        interval=interval(every, plan.margins.confidence),
        p=above,
        null_mean=0.0,
        runs=runs,
        cells=layers,
    )


def task_directions(tables: Tables, plan: Plan) -> Claim:
    """C17."""
    about = (
        "C17",
        "A different downstream task has a very different set of feature directions (appendix H.4)",
        "phi(r, r) corrected for chance, pairs of one task minus pairs of two, all of different seeds; dimensionless",
    )
    if claim := untestable(tables, ("tasks", "task_seeds"), *about):
        return claim
    rows = pd.concat([pairs_of(tables, "tasks"), pairs_of(tables, "task_seeds")])
    runs = {run.name: run for run in plan.runs()}
    rows = rows[rows["run_a"].isin(runs) & rows["run_b"].isin(runs)]
    held: dict[int, set[str]] = {}
    for name in set(rows["run_a"]) | set(rows["run_b"]):
        held.setdefault(runs[name].init_seed, set()).add(runs[name].task)
    tasks = sorted(set().union(*held.values()))
    seeds = [seed for seed in sorted(held) if held[seed] == set(tasks)]
    if len(tasks) < 2 or len(seeds) < 2:
        return unattempted(*about, f"another task and two seeds of every task at r = {task_rank(plan)}")
    chance = np.maximum(rows["m"], rows["n"]) / rows["d"]
    by_pair = rows.assign(phi=(rows["phi_mn"] - chance) / (1 - chance)).groupby(["run_a", "run_b"])["phi"].mean()
    order = [(seed, task) for seed in seeds for task in tasks]
    likeness = np.full((len(order), len(order)), np.nan)
    for run_a, run_b, value in by_pair.reset_index().itertuples(index=False):
        keys = [(runs[name].init_seed, runs[name].task) for name in (run_a, run_b)]
        if all(key in order for key in keys):
            i, j = map(order.index, keys)
            likeness[i, j] = likeness[j, i] = value
    differences = [_difference(likeness, labels) for labels in _labellings(len(tasks), len(seeds))]
    observed, null = differences[0], np.asarray(differences)
    above, below = (float(np.mean(null >= observed - 1e-12)), float(np.mean(null <= observed + 1e-12)))
    own = replicates_of(pairs_of(tables, "task_seeds"), "phi_mn", "p_mn", plan)
    level = 1 - plan.margins.confidence
    shared = any_in_every(own)
    verdict: Verdict = "not_reproduced"
    if shared and above < level:
        verdict = "reproduced"
    elif shared and below < level:
        verdict = "contradicted"
    elif shared and 1 / len(null) >= level:
        verdict = "consistent_underpowered" if observed > 0 and above <= 1 / len(null) + 1e-12 else verdict
    moot = (
        "" if shared else " Not every two seeds of a task share directions beyond chance, so tasks cannot share fewer."
    )
    labels = np.tile(np.arange(len(tasks)), len(seeds))
    same = labels[:, None] == labels
    within, between = (float(np.nanmean(likeness[where])) for where in (same, ~same))
    why = (
        f"Corrected phi {within:.3g} between seeds of a task and {between:.3g} between tasks (0 by chance), "
        f"{len(tasks)} tasks ({', '.join(tasks)}) at r = {task_rank(plan)} with {len(seeds)} seeds: "
        f"relabelling gives p = {above:.2g}, at "
        f"best {1 / len(null):.2g}.{moot}"
    )
    return Claim(
        *about,
        verdict,
        why,
        estimate=observed,
        p=above,
        null_mean=0.0,
        null_sd=float(null.std()),
        runs=len(order),
        cells=int(rows.groupby(["run_a", "run_b"]).size().max()),
    )


def _difference(likeness: np.ndarray, labels: Sequence[int]) -> float:
    """Mean likeness of pairs of one label minus that of pairs of two, over the pairs that are known."""
    same = np.asarray(labels)[:, None] == np.asarray(labels)
    return float(np.nanmean(likeness[same]) - np.nanmean(likeness[~same]))


def _labellings(tasks: int, seeds: int) -> Iterator[list[int]]:
    """Ways to give each seed's runs the tasks' labels, up to renaming; the first is the observed one."""
    ways = list(itertools.permutations(range(tasks)))
    if len(ways) ** (seeds - 1) <= MOST_LABELLINGS:
        for chosen in itertools.product(ways, repeat=seeds - 1):
            yield [*range(tasks), *itertools.chain.from_iterable(chosen)]
        return
    rng = np.random.default_rng(0)
    yield list(range(tasks)) * seeds
    for _ in range(MOST_LABELLINGS - 1):
        yield [label for _ in range(seeds) for label in rng.permutation(tasks).tolist()]
