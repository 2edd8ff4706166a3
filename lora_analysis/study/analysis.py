"""What a study says: evidence tables, the claims with their verdicts, and the paper's tables and figures.

Conventions
-----------
``tables/`` holds the evidence as Parquet, small enough to keep beside a report; ``claims.json``, ``claims.csv`` and
``claims.txt`` are made from it and the plan alone, so that anyone can judge again without the adapters.

Values
------
``analyse_study``, ``study_claims``, ``read_evidence``, ``claims_table``, ``claims_text``.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd

from lora_analysis.checkpoint import read_json
from lora_analysis.study.claims.claim import Claim, holm
from lora_analysis.study.claims.performance import performance_claims
from lora_analysis.study.claims.subspaces import subspace_claims
from lora_analysis.study.controls import control_lines
from lora_analysis.study.evidence import open_study
from lora_analysis.study.execution import write_json
from lora_analysis.study.paper import write_paper
from lora_analysis.study.plan import Plan
from lora_analysis.study.setting import ITEMS
from lora_analysis.study.subspace_evidence import subspace_tables
from lora_analysis.tables import write_table

ORDER = (
    *("C1", "C2", "C3", "C3b", "C4", "C4b", "C5", "C6", "C6b", "C7", "C8", "C9"),
    *("C10", "C11", "C11b", "C12", "C13", "C14", "C15", "C16", "C17"),
)
"""Every claim there is, whatever its outcome."""

SAYS = {
    "reproduced": "reproduced",
    "consistent_underpowered": "consistent, underpowered",
    "not_reproduced": "not reproduced",
    "contradicted": "contradicted",
    "not_testable_at_this_scale": "not testable here",
    "not_attempted": "not attempted",
}
"""A verdict in print."""

_WIDTH = 80


def analyse_study(directory: Path, *, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Evidence, claims, tables and figures of a study directory, from its runs and the pretrained weights.

    Parameters
    ----------
    directory : Path
        In which ``execute_plan`` has left runs; those that are missing make claims ``not_attempted``.
    say : callable
        Is told what happens.

    Returns
    -------
    list of str
        The claims as lines of 80 columns, also in ``claims.txt``.
    """
    study = open_study(directory)
    say("measuring subspaces and amplification")
    tables = {"runs": study.runs, "outcomes": study.outcomes, **subspace_tables(study)}
    for name, table in tables.items():
        write_table(table, directory / "tables" / f"{name}.parquet")
    claims = study_claims(tables, study.plan)
    write_json(directory / "claims.json", {"claims": [asdict(claim) for claim in claims]})
    write_table(claims_table(claims), directory / "claims.csv")
    lines = claims_text(claims, study.plan)
    lines += ["", *control_lines(study.runs, study.tasks["tasks"], study.plan)]
    (directory / "claims.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("drawing the paper's tables and figures")
    write_paper(study, directory / "paper", say=say)
    return lines


def study_claims(tables: Mapping[str, pd.DataFrame], plan: Plan) -> list[Claim]:
    """Every claim C1 to C17, judged from the evidence, with Holm's correction over those that have a p.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        ``runs``, ``outcomes`` and those of ``subspace_tables``.
    plan : Plan

    Returns
    -------
    list of Claim
        In the order of ``ORDER``, each once.
    """
    runs = tables["runs"][tables["runs"]["scaling"] == plan.recipe.scaling]
    found = [*performance_claims(runs, tables["outcomes"], plan), *subspace_claims(tables, plan)]
    by_id = {claim.id: claim for claim in found}
    claims = [by_id[identifier] for identifier in ORDER]
    tested = [i for i, claim in enumerate(claims) if claim.p is not None]
    for i, adjusted in zip(tested, holm([float(claims[i].p or 0.0) for i in tested]), strict=True):
        claims[i] = replace(claims[i], p_holm=adjusted)
    return claims


def read_evidence(directory: Path) -> tuple[dict[str, pd.DataFrame], Plan]:
    """The evidence and the plan that a study, or a copy of its ``tables`` and ``plan.json``, holds."""
    tables = {path.stem: pd.read_parquet(path) for path in sorted((directory / "tables").glob("*.parquet"))}
    return tables, Plan.from_json(read_json(directory / "plan.json"))


def claims_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """One row for each claim, its interval in two columns; numbers as in ``Claim``, NaN where there is none."""
    rows = []
    for claim in claims:
        row = {field.name: getattr(claim, field.name) for field in fields(Claim)}
        low, high = row.pop("interval") or (None, None)
        rows.append({**row, "interval_low": low, "interval_high": high})
    columns = [field.name for field in fields(Claim) if field.name != "interval"]
    columns.insert(columns.index("estimate") + 1, "interval_low")
    columns.insert(columns.index("interval_low") + 1, "interval_high")
    return pd.DataFrame(rows)[columns]


def claims_text(claims: Sequence[Claim], plan: Plan) -> list[str]:
    """The claims as lines of 80 columns: the verdict of each, what the paper says, and what was found."""
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in SAYS}
    summary = ", ".join(f"{counts[verdict]} {words}" for verdict, words in SAYS.items() if counts[verdict])
    rate = plan.recipe.lr.get("lora", math.nan)
    scale = (
        f"rsLoRA's scale, alpha / sqrt(r), with one learning rate for all ranks, {rate:g}"
        if plan.recipe.scaling == "rslora"
        else "LoRA's scale, alpha / r, with a learning rate tuned at each rank"
    )
    trained = sum(run.method != "frozen" for run in plan.runs())
    lines = textwrap.wrap(
        f"{len(claims)} claims of the LoRA paper on {plan.task!r}: {summary}. {trained} training runs of "
        f"{plan.recipe.steps} steps, {len(plan.seeds)} seeds; {scale}. {ITEMS.get(plan.setting.get('kind', ''), '')} "
        f"Each claim is judged at its own level of {100 * (1 - plan.margins.confidence):g} %; p_holm in claims.csv "
        "corrects for there being several. This tests the claims in kind at this size, and reproduces no number of "
        "GPT-3.",
        _WIDTH,
    )
    for claim in claims:
        lines.append("")
        lines.append(f"{claim.id:<5}{SAYS[claim.verdict].upper()}")
        lines += textwrap.wrap(claim.text, _WIDTH, initial_indent="     ", subsequent_indent="     ")
        lines += textwrap.wrap(claim.why, _WIDTH, initial_indent="     -> ", subsequent_indent="        ")
    return lines


def stored_claims(directory: Path) -> list[Claim]:
    """The claims that ``claims.json`` holds."""
    content = json.loads((directory / "claims.json").read_text("utf-8"))
    return [
        Claim(**{**row, "interval": None if row["interval"] is None else tuple(row["interval"])})
        for row in content["claims"]
    ]
