"""The demo: LoRA at several ranks and two seeds on a real model and task, and the paper's analyses of it.

``run_demo`` makes a study directory (``study.execution``) that stands by itself, with::

    runs/<run>/   PEFT adapter, initial A, run.json with settings and losses, every held-out outcome
    plan.json, tasks.json, classifier-….safetensors    the runs, the texts' digest and groups, the fixed head
    tables/       Parquet and CSV
    figures/      PNG and PDF
    findings.txt  the ten lines it prints

Training and analysis are apart: ``analyse`` makes tables, figures and findings from the directory and the
pretrained weights alone.
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from lora_analysis import plots
from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.measures.spectrum import effective_rank
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.execution import bfloat16_pays, execute_plan
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.statistics import Difference, paired_difference
from lora_analysis.tables import amplification_table, similarity_table, spectrum_table, write_table
from lora_analysis.tables.pool import available_cores
from lora_analysis.update import factors

TASK = "docstrings"
_BOTH = ("q", "v")
_LARGEST = 64
_FAMILY = 0.05
"""Error rate over the modules of a comparison, by Bonferroni."""


def demo_plan(*, quick: bool = False) -> Plan:
    """Query and value at five ranks, query alone at two, two seeds each; quick, what the figures need and no more.

    The scale is rsLoRA's, so that one learning rate serves every rank: it was tuned at r = 8 on training paragraphs
    held back.
    """
    recipe = Recipe(
        steps=20 if quick else 160,
        batch_size=32,
        lr={"lora": 5e-3},
        alpha=6.0,
        max_grad_norm=None,
        bfloat16=bfloat16_pays(),
    )
    sizes = {"held_out_per_class": 200, "train_per_class": 200} if quick else {}
    return Plan(
        setting={"kind": "classification", "tasks": {TASK: sizes}},
        task=TASK,
        recipe=recipe,
        target_sets=(_BOTH,),
        ranks=(8, _LARGEST) if quick else (1, 2, 4, 8, _LARGEST),
        seeds=(0, 1),
        budget=() if quick else ((("q",), 8), (("q",), 1)),
        controls=(),
        crossing="paired",
    )


class Results(NamedTuple):
    """Everything the findings are drawn from."""

    runs: pd.DataFrame
    spectrum: pd.DataFrame
    ranks: pd.DataFrame
    ranks_grid: pd.DataFrame
    seeds: pd.DataFrame
    seeds_grid: pd.DataFrame
    seeds_of_a: pd.DataFrame
    amplification: pd.DataFrame


def run_demo(out: Path, *, quick: bool = False) -> list[str]:
    """Train the demo's adapters, analyse them, and print what was found.

    Parameters
    ----------
    out : Path
        Directory to make; adapters that an earlier demo left there are replaced.
    quick : bool
        Four adapters of 20 steps, for the impatient.

    Returns
    -------
    list of str
        The ten findings, as printed.
    """
    say = _Clock(time.perf_counter())
    execute_plan(demo_plan(quick=quick), out, processes=available_cores(), say=say)
    say("analysing")
    lines = analyse(out)
    say("done")
    print("\n".join(_wrapped(lines)))
    return lines


def analyse(out: Path) -> list[str]:
    """Tables, figures and findings of a demo's directory, from its adapters and the pretrained weights.

    Parameters
    ----------
    out : Path
        A directory that ``run_demo`` has made.

    Returns
    -------
    list of str
        The ten findings, also written to ``findings.txt``.
    """
    study = open_study(out)
    adapters = {name: study.adapter(name) for name in study.find(method="lora")}
    results = _measured(adapters, _runs_table(study), study.base)
    for name, table in results._asdict().items():
        # Whole grids are some hundred thousand rows: ten times smaller and faster to read as Parquet.
        for suffix in (".parquet",) if name.endswith("_grid") else (".parquet", ".csv"):
            write_table(table, out / "tables" / f"{name}{suffix}")
    _draw(results, _frozen(study), out / "figures")
    lines = _findings(results, study, adapters)
    (out / "findings.txt").write_text("\n".join(_wrapped(lines)) + "\n", encoding="utf-8")
    return lines


def _runs_table(study: Study) -> pd.DataFrame:
    """One row per adapter: accuracy, and how far it is from the frozen model's, paired over paragraphs."""
    table = study.runs[study.runs["method"] == "lora"].copy()
    gains = [_gain(study, [name]) for name in table["run"]]
    table["source"] = [study.adapter(name).source for name in table["run"]]
    table["seed"] = table["init_seed"]
    table["gain"] = [gain.mean for gain in gains]
    table["gain_half_width"] = [gain.half_width for gain in gains]
    table["a_moved"] = [_moved(study, name) for name in table["run"]]
    return table


def _frozen(study: Study) -> float:
    """The accuracy of the frozen model."""
    return float(study.runs.loc[study.runs["method"] == "frozen", "accuracy"].iloc[0])


def _right(study: Study, runs: list[str]) -> list[float]:
    """How often each held-out paragraph is classified rightly, averaged over runs."""
    return torch.stack([study.correct(name).double() for name in runs]).mean(0).tolist()


def _gain(study: Study, runs: list[str], than: list[str] | None = None) -> Difference:
    """The mean of some runs less that of others, of the frozen model by default, paired over paragraphs."""
    frozen = study.find(method="frozen")
    groups = study.tasks["tasks"][TASK]["groups"]
    return paired_difference(_right(study, runs), _right(study, than or frozen), groups)


def _moved(study: Study, run: str) -> float:
    """How far training moved A from its initialisation, ``‖A - A0‖ / ‖A0‖`` over all modules together."""
    adapter, initial = study.adapter(run), study.initial(run)
    moved = start = 0.0
    for module in adapter:
        _, down = factors(adapter[module])
        first = initial[module].double()
        moved += float((down.double() - first).square().sum())
        start += float(first.square().sum())
    return math.sqrt(moved / start)


def _measured(adapters: dict[str, Adapter], runs: pd.DataFrame, base: BaseWeights) -> Results:
    seed0, seed1, small = _name(_LARGEST, 0), _name(_LARGEST, 1), _name(8, 0)
    return Results(
        runs=runs,
        spectrum=spectrum_table(list(adapters.values())),
        ranks=similarity_table(adapters[small], adapters[seed0]),
        ranks_grid=similarity_table(adapters[small], adapters[seed0], cells="all"),
        seeds=similarity_table(adapters[seed0], adapters[seed1]),
        seeds_grid=similarity_table(adapters[seed0], adapters[seed1], cells="all"),
        seeds_of_a=similarity_table(adapters[seed0], adapters[seed1], target="A"),
        amplification=amplification_table(list(adapters.values()), base),
    )


def _name(r: int, seed: int) -> str:
    return Run(TASK, "lora", _BOTH, r, seed, seed).name


def _draw(results: Results, frozen: float, folder: Path) -> None:
    """The paper's figures, as PNG and PDF."""
    layers = len(_cell(results.ranks, "in", 1, 1)) // 2
    middle = [(m, m) for m in results.ranks["module_a"].unique() if f".{layers // 2}." in m]
    both = results.runs[results.runs["targets"] == "+".join(_BOTH)]
    at_64 = both.loc[both["r"] == 64, "source"].iloc[0]
    gains = results.amplification[results.amplification["adapter"] == at_64]
    figures = {
        "rank_ablation": plots.rank_ablation(results.runs, baseline=frozen).figure,
        "similarity_ranks": plots.figure_ranks(results.ranks_grid, middle),
        "similarity_seeds": plots.figure_seeds(results.seeds_grid, middle),
        "amplification": plots.amplification_points(gains, module=middle[0][0]).figure,
        "gain_by_layer": plots.gain_by_layer(gains, k=4).figure,
        "spectra": plots.spectra(results.spectrum[results.spectrum["adapter"] == at_64]).figure,
    }
    for name, figure in figures.items():
        for suffix in (".png", ".pdf"):
            plots.save_figure(figure, folder / f"{name}{suffix}")


def _findings(results: Results, study: Study, adapters: dict[str, Adapter]) -> list[str]:
    runs, out, about = results.runs, study.directory, study.tasks["tasks"][TASK]
    count, groups = len(about["groups"]), len(set(about["groups"]))
    both, alone = _by_rank(runs, "q+v"), _by_rank(runs, "q")
    gains = {r: _gain(study, names) for r, names in both.items()}
    # Fixed beforehand, not the best of them: that would be chosen on the paragraphs it is measured on.
    least, most = min(gains), max(gains)
    lead = _gain(study, both[most], than=both[least])
    return [
        f"Task: from which of {len(about['classes'])} libraries does a docstring paragraph come? {count:,} held-out "
        f"paragraphs from {groups} folders that no training text shares. Chance {about['chance']:.1%}; "
        f"the frozen all-MiniLM-L6-v2 with a fixed classifier gets {_frozen(study):.1%}.",
        f"LoRA on query and value gains over it, in points: {_points(gains)} (mean of the seeds; ± is the paired "
        f"95 % interval over paragraphs, clustered by folder).",
        f"r = {least} reaches {_ratio(gains[least].mean, gains[most].mean)} of the gain of r = {most}, the largest, "
        f"which is {100 * lead.mean:+.1f} ± {100 * lead.half_width:.1f} points from it.",
        f"Query alone gains: {_points({r: _gain(study, names) for r, names in alone.items()})}."
        if alone
        else f"The training loss went from {runs['train_loss_first'].mean():.3f} to "
        f"{runs['train_loss_last'].mean():.3f} in {study.plan.recipe.steps} steps.",
        _used_rank(results, adapters),
        "r = 8 against r = 64, which saw the texts in one order: " + _overlap(results.ranks),
        "Two seeds at r = 64, of initial A and of order: " + _overlap(results.seeds),
        f"A at r = 64 moved by {runs.loc[runs['r'] == _LARGEST, 'a_moved'].mean():.0%} of the norm it started with. "
        f"Two seeds' A share φ(1,1) = {_cell(results.seeds_of_a, 'in', 1, 1)['phi'].median():.2g} in the median "
        f"(chance {_cell(results.seeds_of_a, 'in', 1, 1)['null_mean'].iloc[0]:.2g}), but the order of A's directions "
        "depends on how ΔW is factored; the figures above, on ΔW, do not.",
        _amplified(results),
        f"Adapters, tables, figures and these lines are in {out}/; all of it can be recomputed from "
        f"{out}/runs and the pretrained weights.",
    ]


def _by_rank(runs: pd.DataFrame, targets: str) -> dict[int, list[str]]:
    """By rank, the names of the runs of a target set."""
    chosen = runs[runs["targets"] == targets]
    return {int(str(r)): list(rows["run"]) for r, rows in chosen.groupby("r")}


def _points(gains: dict[int, Difference]) -> str:
    return ", ".join(f"r = {r}: {100 * g.mean:+.1f} ± {100 * g.half_width:.1f}" for r, g in sorted(gains.items()))


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "no share (nothing was gained)"


def _used_rank(results: Results, adapters: dict[str, Adapter]) -> str:
    adapter = adapters[_name(_LARGEST, 0)]
    used = results.spectrum.loc[results.spectrum["adapter"] == adapter.source, "effective_rank"]
    shape = next(iter(adapter.modules.values())).shape
    chance = torch.tensor([effective_rank(S) for S in spectrum_null(shape, 64, draws=200)]).median()
    return (
        f"At r = 64 the effective rank of ΔW is {used.median():.1f} in the median over {len(used)} modules "
        f"({used.min():.1f} to {used.max():.1f}); random factors of that shape give {chance:.1f}."
    )


def _cell(table: pd.DataFrame, side: str, i: int, j: int) -> pd.DataFrame:
    return table[(table["side"] == side) & (table["i"] == i) & (table["j"] == j)]


def _overlap(table: pd.DataFrame) -> str:
    """The top directions, and the whole subspaces, on the input side and the output side."""
    i, j = int(table["i"].max()), int(table["j"].max())
    parts = []
    for side in ("in", "out"):
        top, whole = _cell(table, side, 1, 1), _cell(table, side, i, j)
        found = int((top["p"] < _FAMILY / len(top)).sum())
        parts.append(
            f"{side}put side φ(1,1) = {top['phi'].median():.2f} in the median, {top['phi'].max():.2f} at most "
            f"(chance {top['null_mean'].iloc[0]:.4f}; {found} of {len(top)} modules beyond it), "
            f"φ({i},{j}) = {whole['phi'].median():.2f} (chance {whole['null_mean'].iloc[0]:.2f})"
        )
    return "; ".join(parts) + "."


def _amplified(results: Results) -> str:
    table = results.amplification.merge(results.runs[["source", "targets", "r"]], left_on="adapter", right_on="source")
    whole = table[(table["k"] == table["r"]) & (table["targets"] == "+".join(_BOTH))]
    known = sorted(set(whole["r"]))
    ranks = [4, 64] if 4 in known else known
    parts = []
    for r in ranks:
        rows = whole[whole["r"] == r]
        parts.append(
            f"at k = r = {r} the factor ‖ΔW‖/‖UᵀWV‖ is {rows['amplification'].median():.2g} (random directions: "
            f"{rows['amplification_null'].median():.2g}), so the gain over random is {rows['gain'].median():.2f} "
            f"(p < 0.05/{len(rows)} in {int((rows['p'] < _FAMILY / len(rows)).sum())} of {len(rows)}) and "
            f"{rows['ceiling_fraction'].median():.0%} of the ceiling"
        )
    return "Amplification, medians: " + "; ".join(parts) + "."


def _wrapped(lines: list[str]) -> list[str]:
    return [
        textwrap.fill(line, 80, initial_indent=f"{number:2d}. ", subsequent_indent="    ", break_on_hyphens=False)
        for number, line in enumerate(lines, start=1)
    ]


class _Clock:
    """Says on stderr what goes on, and how long it has been."""

    def __init__(self, started: float) -> None:
        self._started = started

    def __call__(self, what: str) -> None:
        print(f"[{time.perf_counter() - self._started:4.0f} s] {what}", file=sys.stderr, flush=True)
