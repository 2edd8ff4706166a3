"""What the ablation page says of a study: its metric against r, the paper's tables beside its own, the claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.report.columns import Column, Kind
from lora_analysis.report.data import rounded, shown
from lora_analysis.study import paper_tables
from lora_analysis.study.analysis import SAYS, claims_table, read_evidence, stored_claims
from lora_analysis.study.claims.gains import Config, Gains, held_out_gains
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.paper_runs import Unavailable
from lora_analysis.study.plan import Plan

_CLAIMS = (
    Column("id", "claim", "text", "Its number here."),
    Column("verdict", "verdict", "text", "By margins fixed before the first run."),
    Column("text", "the paper says", "text", "With its place."),
    Column("estimate", "estimate", "number", "Of the statistic."),
    Column("interval_low", "low", "number", "Lower end of its interval."),
    Column("interval_high", "high", "number", "Upper end."),
    Column("null_mean", "chance", "number", "What chance gives."),
    Column("p", "p", "p", "Of the test."),
    Column("p_holm", "p, Holm", "p", "Adjusted for the claims that have a p."),
    Column("runs", "runs", "count", "Training runs it rests on."),
    Column("mde", "detectable", "number", "Smallest effect that four of five such studies would find."),
    Column("why", "found", "text", "The numbers that decide, with their null."),
)
_TITLES = {
    "table_5": "Table 5: equally many parameters in different matrices",
    "table_6": "Table 6: ranks of each target set",
    "table_7": "Table 7: W in the directions of ΔW, of W itself, and of random ones",
    "table_15": "Table 15: every method by its trainable parameters",
    "table_18": "Table 18: the main target set by rank",
}
_MADE_HERE = {
    "table_5": paper_tables.equal_budget,
    "table_6": paper_tables.rank_sweep,
    "table_15": paper_tables.metric_by_parameters,
    "table_18": paper_tables.metric_by_rank,
}


def study_runs(directory: Path) -> pd.DataFrame:
    """The runs of a study: of the directory as trained, or of the tables that were kept of it.

    Raises
    ------
    LoraAnalysisError
        If it is no study directory, or has no finished runs.
    """
    return _evidence(directory)[0]


def ablation_data(directory: Path) -> dict[str, Any]:
    """The study as a page shows it.

    Raises
    ------
    LoraAnalysisError
        If it is no study directory, or has no finished runs.
    """
    runs, outcomes, plan, study = _evidence(directory)
    mine = runs[(runs["task"] == plan.task) & runs["size"].isna() & (runs["scaling"] == plan.recipe.scaling)]
    trained = mine[mine["method"] == "lora"]
    frozen = mine[mine["method"] == "frozen"]
    metrics = []
    for metric, column in (("accuracy", "accuracy"), ("loss", "held_out_loss")):
        if trained[column].notna().any():
            before = float(frozen[column].iloc[0]) if len(frozen) else float("nan")
            metrics.append(_metric(metric, column, trained, before, outcomes, mine, plan))
    return {
        "task": rounded(plan.task),
        "confidence": plan.margins.confidence,
        "runs": len(runs),
        "metrics": metrics,
        "tables": _paper(directory, study),
        "claims": _claims(directory),
    }


def _evidence(directory: Path) -> tuple[pd.DataFrame, pd.DataFrame | None, Plan, Study | None]:
    if (directory / "runs").is_dir():
        study = open_study(directory)
        return study.runs, study.outcomes, study.plan, study
    if not (directory / "plan.json").is_file() or not (directory / "tables" / "runs.parquet").is_file():
        raise LoraAnalysisError(
            f"{directory}: expected a study directory, with plan.json and runs/ or tables/runs.parquet. "
            "Make one with ablate or demo."
        )
    tables, plan = read_evidence(directory)
    return tables["runs"], tables.get("outcomes"), plan, None


def _metric(
    metric: Literal["accuracy", "loss"] | str,
    column: str,
    trained: pd.DataFrame,
    frozen: float,
    outcomes: pd.DataFrame | None,
    runs: pd.DataFrame,
    plan: Plan,
) -> dict[str, Any]:
    gains = None
    if outcomes is not None:
        gains = held_out_gains(runs, outcomes, plan, metric="accuracy" if metric == "accuracy" else "loss")
    series = []
    for targets, rows in trained.groupby("targets", sort=False):
        points = rows[["r", "init_seed", "data_seed", column]]
        bars = [
            _bar(str(targets), int(str(r)), part[column], gains, frozen, metric, plan) for r, part in rows.groupby("r")
        ]
        series.append({"targets": rounded(str(targets)), "points": rounded(points.to_numpy().tolist()), "bars": bars})
    return {"metric": metric, "frozen": rounded(frozen), "series": series}


def _bar(
    targets: str, r: int, values: pd.Series[float], gains: Gains | None, frozen: float, metric: str, plan: Plan
) -> dict[str, Any]:
    """The mean of the runs of one setting, and the interval of its gain over the frozen model, moved to the metric."""
    bar = {"r": r, "mean": rounded(float(values.mean())), "low": None, "high": None}
    config = Config("lora", targets, r)
    seeds = [] if gains is None else gains.seeds(config)
    if gains is None or len(seeds) < 2 or len(gains.items) < 2:
        return bar
    sign = 1.0 if metric == "accuracy" else -1.0
    estimate = gains.contrast({config: 1.0})
    ends = sorted(frozen + sign * end for end in estimate.interval(plan.margins.confidence))
    return bar | {"mean": rounded(frozen + sign * estimate.value), "low": rounded(ends[0]), "high": rounded(ends[1])}


def _paper(directory: Path, study: Study | None) -> list[dict[str, Any]]:
    found = []
    for name, title in _TITLES.items():
        path = directory / "paper" / f"{name}.csv"
        table = None
        if path.is_file():
            table = pd.read_csv(path)
        elif study is not None and name in _MADE_HERE:
            try:
                table = _MADE_HERE[name](study)
            except Unavailable:
                continue
        if table is not None:
            found.append({"title": title, **shown(_seeds_as_text(table), _columns(table), name)})
    return found


def _seeds_as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The values of seeds, which a CSV has with blanks between, in four digits."""
    shown_table = table.copy()
    for column in table:
        if str(column).endswith("_seeds"):
            shown_table[column] = [
                ", ".join(f"{float(part):.4g}" for part in (value.split() if isinstance(value, str) else value))
                for value in table[column]
            ]
    return shown_table


def _columns(table: pd.DataFrame) -> list[Column]:
    return [Column(str(name), str(name).replace("_", " "), _kind(table, str(name)), "") for name in table]


def _kind(table: pd.DataFrame, name: str) -> Kind:
    if not pd.api.types.is_numeric_dtype(table[name]):
        return "text"
    return "count" if pd.api.types.is_integer_dtype(table[name]) else "fine"


def _claims(directory: Path) -> dict[str, Any] | None:
    if not (directory / "claims.json").is_file():
        return None
    table = claims_table(stored_claims(directory))
    return shown(table.assign(verdict=table["verdict"].map(SAYS)), _CLAIMS, "claims")
