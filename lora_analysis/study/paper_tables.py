"""Tables 5, 6, 7, 15 and 18 of the paper from the runs of a study, the paper's own numbers in columns beside.

Conventions
-----------
One row for each setting; seeds are means with every seed's value after it, in the order of the plan, because two or
three of them make no interval. ``loss_mean`` is the mean held-out loss in nats and ``loss_gain`` what it lies *below*
the frozen model's; ``accuracy_gain`` is what accuracy, a share, lies above; so with other metrics, such as BLEU.
Columns that begin with ``paper_`` are printed in the paper: of another model and another task (``printed``).

Tables
------
``equal_budget`` (5), ``rank_sweep`` (6), ``projections`` (7), ``metric_by_parameters`` (15), ``metric_by_rank`` (18).

References
----------
Hu et al. 2021, arXiv:2106.09685v2, sections 7.1 to 7.3, appendices F.2 and H.2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lora_analysis.measures.amplification import amplification_factor, ceiling_fraction, gain
from lora_analysis.study import printed
from lora_analysis.study.evidence import Study
from lora_analysis.study.paper_runs import (
    Unavailable,
    grid_runs,
    kinds_of,
    layers_of,
    main_ranks,
    middle,
    module_at,
    nearest,
    require_base,
)
from lora_analysis.study.projections import projection_of
from lora_analysis.tables import amplification_table

_FACTORS = ("ceiling_fraction", "amplification", "amplification_null")
_METHODS = ("frozen", "head", "bitfit", "lora", "full")
_MEASURED = ("projected", "projected_top", "projected_null_rms", "norm_base", "norm_update", "gain", "z")


def equal_budget(study: Study) -> pd.DataFrame:
    """Table 5: target sets that train equally many parameters.

    The plan's ``budget``, with what else of the grid has that many ranks times matrices; without one, the budget
    that most target sets of the grid share.

    Returns
    -------
    DataFrame
        ``targets r parameters``, the metrics, and ``paper_r paper_wikisql paper_multinli``: the paper's row of these
        targets, at its own r.

    Raises
    ------
    Unavailable
        If no two target sets have equal budgets.
    """
    runs = grid_runs(study)
    pairs = dict.fromkeys((str(targets), int(r)) for targets, r in zip(runs["targets"], runs["r"], strict=True))
    budgets: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for targets, r in pairs:
        budgets[_budget(targets, r)].append((targets, r))
    planned = {_budget("+".join(targets), r) for targets, r in study.plan.budget}
    wanted = planned or {max(budgets, key=lambda budget: (len(budgets[budget]), budget), default=0)}
    chosen = [pair for budget in sorted(wanted) for pair in sorted(budgets.get(budget, []), key=_order)]
    if len(chosen) < 2:
        raise Unavailable("no two target sets of the finished runs have equally many parameters")
    paper = {targets: (r, row) for (targets, r), row in printed.TABLE_5.items()}
    rows = []
    for targets, r in chosen:
        paper_r, accuracies = paper.get(targets, (pd.NA, None))
        rows.append(
            {"targets": targets, "r": r, **_metrics(study, _at(runs, targets, r)), "paper_r": paper_r}
            | _accuracies(accuracies)
        )
    return _frame(rows, counts=("paper_r",))


def rank_sweep(study: Study) -> pd.DataFrame:
    """Table 6: every rank of every target set of the plan.

    Returns
    -------
    DataFrame
        ``targets r parameters``, the metrics, and ``paper_wikisql paper_multinli`` where the paper has these targets
        at this r. Settings without a finished run are left out.

    Raises
    ------
    Unavailable
        If none has finished.
    """
    runs = grid_runs(study)
    rows = []
    for targets in ("+".join(letters) for letters in study.plan.target_sets):
        for r in sorted(study.plan.ranks):
            mine = _at(runs, targets, r)
            if not mine.empty:
                row = {"targets": targets, "r": r, **_metrics(study, mine)}
                rows.append(row | _accuracies(printed.TABLE_6.get((targets, r))))
    if not rows:
        raise Unavailable("no run of a target set and rank has finished")
    return _frame(rows)


def projections(study: Study) -> pd.DataFrame:
    """Table 7: how much of W lies in the directions of ΔW, of W itself, and of random ones, at two ranks.

    The ranks are the nearest to the paper's 4 and 64, k = r. Rows are the middle layer's q for every seed, and medians
    over the modules of all seeds, each column's by itself. Random is the root mean square in closed form.

    Returns
    -------
    DataFrame
        ``r module seeds``; ``projected`` (``||U.T @ W @ V||_F`` of ΔW), ``projected_top`` (of W),
        ``projected_null_rms`` (random), ``norm_base``, ``norm_update``, in the unit of the weights; ``gain`` over
        random and its standard score ``z`` (none at k = 1), ``ceiling_fraction``, ``amplification`` =
        ``norm_update / projected`` and ``amplification_null``, what random directions give; of the paper its printed
        norms and what follows from them: ``paper_gain paper_ceiling_fraction paper_amplification``.

    Raises
    ------
    Unavailable
        If no run of the main target set has finished, or the pretrained weights are not there.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3 and appendix H.4.
    """
    ranks = main_ranks(study)
    base = require_base(study)
    runs = grid_runs(study)
    rows: list[dict[str, Any]] = []
    for paper_r, theirs in printed.TABLE_7.items():
        r = nearest(paper_r, ranks)
        if any(row["r"] == r for row in rows):
            continue
        mine = _at(runs, "+".join(study.plan.main), r)
        adapters = [study.adapter(str(name)) for name in mine["run"]]
        seeds = [str(seed) for seed in mine["init_seed"]]
        kinds = kinds_of(adapters[0])
        module = module_at(adapters[0], kinds[0], middle(layers_of(adapters[0])))
        tables = [amplification_table(adapter, base, ks=[r], draws=0) for adapter in adapters]
        for seed, table in zip(seeds, tables, strict=True):
            (row,) = table[table["module"] == module].to_dict("records")
            rows.append(
                {"r": r, "module": module, "seeds": seed, **_projected(row), **_paper_projected(paper_r, theirs)}
            )
        together = pd.concat(tables)
        letters = together["module"].map(projection_of)
        for kind in dict.fromkeys(letters):
            several = together[letters == kind]
            row = several[[*_MEASURED, *_FACTORS]].median().to_dict()
            name = f"median of {several['module'].nunique()} {kind}"
            rows.append({"r": r, "module": name, "seeds": " ".join(seeds), **_projected(row)})
    return _frame(rows, counts=("paper_r",))


def metric_by_parameters(study: Study) -> pd.DataFrame:
    """As table 15: every method of the study by its trainable parameters.

    Returns
    -------
    DataFrame
        ``method targets r parameters``, the metrics, and ``paper_millions paper_wikisql paper_multinli`` of the
        paper's row of this method, targets and r. By parameters, ascending.
    """
    runs = study.runs
    runs = runs[(runs["task"] == study.plan.task) & runs["size"].isna() & (runs["init_seed"] == runs["data_seed"])]
    runs = runs[runs["scaling"] == study.plan.recipe.scaling]
    if runs.empty:
        raise Unavailable(f"no run on {study.plan.task} has finished")
    rows = []
    for _, mine in runs.groupby(["method", "targets", "r"], sort=False):
        method, targets, r = str(mine["method"].iloc[0]), str(mine["targets"].iloc[0]), int(mine["r"].iloc[0])
        theirs = printed.TABLE_15.get((method, targets, r))
        row = {"method": method, "targets": targets, "r": r, **_metrics(study, mine)}
        row |= {"paper_millions": math.nan if theirs is None else theirs.millions}
        rows.append(row | _accuracies(theirs))
    rows.sort(key=lambda row: (row["parameters"], _METHODS.index(row["method"]), *_order((row["targets"], row["r"]))))
    return _frame(rows)


def metric_by_rank(study: Study) -> pd.DataFrame:
    """As table 18: the main target set by rank.

    Returns
    -------
    DataFrame
        ``targets r parameters``, the metrics, and ``paper_loss paper_bleu`` of the paper's GPT-2 at this r.
    """
    runs = grid_runs(study)
    targets = "+".join(study.plan.main)
    rows = []
    for r in main_ranks(study):
        theirs = printed.TABLE_18.get(r)
        row = {"targets": targets, "r": r, **_metrics(study, _at(runs, targets, r))}
        row |= {"paper_loss": math.nan if theirs is None else theirs.loss}
        rows.append(row | {"paper_bleu": math.nan if theirs is None else theirs.bleu})
    return _frame(rows)


def _metrics(study: Study, runs: pd.DataFrame) -> dict[str, Any]:
    """Parameters, and for each metric the mean over the seeds, what each gave, and the gain over the frozen model."""
    frozen = _values(study, study.find(task=study.plan.task, method="frozen"))
    by_seed = dict(zip(runs["init_seed"], runs["run"], strict=True))
    # The frozen model has no seeds, and its run says 0.
    seeds = tuple(by_seed) if set(runs["method"]) == {"frozen"} else study.plan.seeds
    row: dict[str, Any] = {"parameters": int(runs["trainable_parameters"].iloc[0])}
    for name, found in _values(study, [by_seed.get(seed) for seed in seeds]).items():
        finished = [value for value in found if not math.isnan(value)]
        mean = math.fsum(finished) / len(finished)
        before = frozen.get(name, [math.nan])[0]
        gain = before - mean if name == "loss" else mean - before
        row |= {f"{name}_mean": mean, f"{name}_seeds": tuple(found), f"{name}_gain": gain}
    return row


def _values(study: Study, names: Sequence[str | None]) -> dict[str, list[float]]:
    """What each of some runs came to, by metric; NaN for a run that has not finished."""
    values: dict[str, list[float]] = {}
    for place, name in enumerate(names):
        record = None if name is None else study.record(name)
        if record is None:
            continue
        found: Mapping[str, float | None] = {"loss": record["held_out_loss"], "accuracy": record["accuracy"]}
        for metric, value in {**found, **record.get("metrics", {})}.items():
            if value is not None:
                values.setdefault(metric, [math.nan] * len(names))[place] = float(value)
    return values


def _projected(row: Mapping[Any, Any]) -> dict[str, float]:
    return {name: float(row[name]) for name in (*_MEASURED, *_FACTORS)}


def _paper_projected(r: int, theirs: printed.Projected) -> dict[str, float]:
    return {
        "paper_r": r,
        "paper_projected": theirs.update,
        "paper_projected_top": theirs.weight,
        "paper_random": theirs.random,
        "paper_norm_base": theirs.norm_weight,
        "paper_norm_update": theirs.norm_update,
        "paper_gain": gain(theirs.update, theirs.norm_weight, r, printed.SHAPE_GPT_3),
        "paper_ceiling_fraction": ceiling_fraction(theirs.update, theirs.weight),
        "paper_amplification": amplification_factor(theirs.norm_update, theirs.update),
    }


def _accuracies(theirs: printed.Accuracies | printed.Tuned | None) -> dict[str, float]:
    wikisql, multinli = (math.nan, math.nan) if theirs is None else (theirs.wikisql, theirs.multinli)
    return {"paper_wikisql": wikisql, "paper_multinli": multinli}


def _at(runs: pd.DataFrame, targets: str, r: int) -> pd.DataFrame:
    return runs[(runs["targets"] == targets) & (runs["r"] == r)]


def _budget(targets: str, r: int) -> int:
    return (targets.count("+") + 1) * r


def _order(pair: tuple[str, int]) -> tuple[int, list[int], int]:
    """The paper's order of target sets: few first, then q, k, v, o."""
    targets, r = pair
    return targets.count("+"), ["qkvo".find(letter) for letter in targets.split("+")], r


def _frame(rows: list[dict[str, Any]], *, counts: tuple[str, ...] = ()) -> pd.DataFrame:
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))
