"""All of the paper's tables and figures that a study can give, as files.

Values
------
``write_paper``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lora_analysis.plots import save_figure
from lora_analysis.study import paper_figures as figures
from lora_analysis.study import paper_tables as tables
from lora_analysis.study.evidence import Study
from lora_analysis.study.paper_runs import Unavailable
from lora_analysis.study.paper_text import WIDTH, table_text
from lora_analysis.study.plan import Side
from lora_analysis.study.printed import GPT_2, GPT_3
from lora_analysis.study.setting import ITEMS
from lora_analysis.tables import write_table

TABLES: dict[str, tuple[str, str, Callable[[Study], pd.DataFrame]]] = {
    "table_5": (
        "Table 5: equally many parameters in different matrices",
        f"paper: validation accuracy in % of {GPT_3}, at the rank in its column r",
        tables.equal_budget,
    ),
    "table_6": (
        "Table 6: ranks of each target set",
        f"paper: validation accuracy in % of {GPT_3}, same targets and r",
        tables.rank_sweep,
    ),
    "table_7": (
        "Table 7: ||U'WV||, U and V the first r singular vectors of ΔW, of W, or random",
        f"gain: of ΔW over random; factor: |ΔW| / ||U'WV||. paper: W_q in layer 48 of {GPT_3}, at the rank in its "
        "column r; gain, share and factor follow from its norms. Another size of matrix: compare gain and share, not "
        "norms or factors. z: standard score of the gain, none at r = 1.",
        tables.projections,
    ),
    "table_15": (
        "As table 15: every method by its trainable parameters",
        f"paper: millions of parameters and validation accuracy in % of {GPT_3}, same method, targets and r",
        tables.metric_by_parameters,
    ),
    "table_18": (
        "As table 18: the main target set by rank",
        f"paper: validation loss and BLEU of {GPT_2}, same r",
        tables.metric_by_rank,
    ),
}
"""By name: title, note on the paper's columns, and what makes it."""


def write_paper(
    study: Study,
    directory: Path,
    *,
    target: figures.Which = "update",
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write every table as CSV and all in ``tables.txt``, every figure as PNG and PDF.

    What the finished runs cannot give is left out; ``tables.txt`` and ``say`` tell what and why.

    Parameters
    ----------
    study : Study
    directory : Path
        Made if need be.
    target : {"update", "A"}
        Whose subspaces figures 3, 4, 6 and 7 compare: of ΔW on both sides, or of A as in the paper.
    say : callable
        Is told what is left out and why.

    Returns
    -------
    list of Path
        The files written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    texts = [_preface(study)]
    missing: list[str] = []
    for name, (title, note, make) in TABLES.items():
        try:
            table = make(study)
        except Unavailable as reason:
            missing.append(f"{name}: {reason}.")
            continue
        written.append(write_table(_flat(table), directory / f"{name}.csv"))
        texts.append(table_text(table, title=title, notes=note if _has_paper(table) else ""))
    for name, draw in _figures(target).items():
        try:
            figure = draw(study)
        except Unavailable as reason:
            missing.append(f"{name}: {reason}.")
            continue
        # Laid out once, not twice for each file: that is most of the time a figure takes.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        written += [save_figure(figure, directory / f"{name}{suffix}") for suffix in (".png", ".pdf")]
    for line in missing:
        say(line)
    if missing:
        lines = (textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in missing)
        texts.append("\n".join(["Left out:", *lines]) + "\n")
    text = directory / "tables.txt"
    text.write_text("\n\n".join(texts), encoding="utf-8")
    return [text, *written]


def _figures(target: figures.Which) -> dict[str, Callable[[Study], Figure]]:
    drawn: dict[str, Callable[[Study], Figure]] = {}
    numbered = {3: figures.figure_3, 4: figures.figure_4, 6: figures.figure_6, 7: figures.figure_7}
    sides: tuple[Side, ...] = ("in", "out")
    for number, draw in numbered.items():
        for side in sides if target == "update" else sides[:1]:
            suffix = side if target == "update" else "A"
            drawn[f"figure_{number}_{suffix}"] = partial(draw, side=side, target=target)
    for side in sides:
        drawn[f"figure_8_{side}"] = partial(figures.figure_8, side=side)
    return drawn


def _preface(study: Study) -> str:
    """What the numbers are of."""
    frozen = study.find(task=study.plan.task, method="frozen")
    record = study.record(frozen[0]) if frozen else None
    items = ITEMS.get(study.plan.setting.get("kind", ""), "")
    lines = [
        f"Task {study.plan.task}, weights {study.base_path.name}, {len(study.runs)} of {len(study.plan.runs())} runs.",
        f"loss: mean held-out loss in nats; its gain is the frozen model's minus the run's. {items}".rstrip(),
        "acc.: share of held-out items that are right, in %; its gain in points is over the frozen model.",
        "A mean is over the seeds; beside it is what each seed gave, '-' where a run has not finished. Columns under "
        "'paper' are the paper's, of another model and other tasks.",
    ]
    if record is not None:
        accuracy = "" if record["accuracy"] is None else f", accuracy {record['accuracy']:.1%}"
        lines.append(f"The frozen model: loss {record['held_out_loss']:.4f}{accuracy}.")
    return "\n".join(textwrap.fill(line, WIDTH) for line in lines) + "\n"


def _has_paper(table: pd.DataFrame) -> bool:
    return any(column.startswith("paper_") and table[column].notna().any() for column in table.columns)


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Values by seed as numbers with spaces between, which every reader of CSV takes."""
    seeds = {column: table[column].map(_joined) for column in table.columns if column.endswith("_seeds")}
    return table.assign(**seeds)


def _joined(values: object) -> object:
    return " ".join(map(repr, values)) if isinstance(values, tuple) else values
