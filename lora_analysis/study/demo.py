"""The demo: LoRA at several ranks and two seeds on a real model and task, and the paper's analyses of it.

``run_demo`` makes a directory that stands by itself::

    adapters/<run>/   PEFT adapter, initial A, run.json with settings, losses and every prediction
    task.json, classifier.safetensors    the texts' digest and groups, the frozen model's predictions, the fixed head
    tables/           Parquet and CSV
    figures/          PNG and PDF
    findings.txt      the ten lines it prints

Training and analysis are apart: ``analyse`` makes tables, figures and findings from the directory and the
pretrained weights alone.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save_file

from lora_analysis import plots
from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint import open_checkpoint, read_json
from lora_analysis.formats import load_adapter
from lora_analysis.measures.spectrum import effective_rank
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.study import minilm
from lora_analysis.study.docstrings import docstring_task
from lora_analysis.study.runs import Run, Settings, bfloat16_pays, correct_predictions, execute_all
from lora_analysis.study.statistics import Difference, paired_difference
from lora_analysis.tables import amplification_table, similarity_table, spectrum_table, write_table
from lora_analysis.tables.pool import available_cores
from lora_analysis.update import factors

_BOTH = ("query", "value")
FULL = tuple(Run(_BOTH, r, seed) for r in (64, 8, 4, 2, 1) for seed in (0, 1)) + tuple(
    Run(("query",), r, seed) for r in (8, 1) for seed in (0, 1)
)
"""Query and value at five ranks, query alone at two, two seeds each."""
QUICK = (Run(_BOTH, 64, 0), Run(_BOTH, 64, 1), Run(_BOTH, 8, 0))
"""What the figures on ranks and on seeds need, and no more."""
_FAMILY = 0.05
"""Error rate over the modules of a comparison, by Bonferroni."""


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
        Three adapters of 25 steps, for the impatient.

    Returns
    -------
    list of str
        The ten findings, as printed.
    """
    started = time.perf_counter()
    runs, steps = (QUICK, 25) if quick else (FULL, 160)
    say = _Clock(started)
    say("collecting docstring paragraphs")
    task = docstring_task()
    model = minilm.load_minilm()
    settings = Settings(steps=steps, bfloat16=bfloat16_pays())
    say(f"embedding {len(task.train_texts) + len(task.held_out_texts):,} paragraphs with the frozen model")
    dtype = torch.bfloat16 if settings.bfloat16 else None
    known = minilm.embeddings(model, task.train_texts, autocast=dtype)
    means = minilm.class_means(known, task.train_labels, len(task.classes))
    frozen = correct_predictions(model, task, means, autocast=dtype)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "classes": task.classes,
        "sha256": task.digest,
        "sources": {library: asdict(source) for library, source in task.sources.items()},
        "held_out_groups": task.held_out_groups,
        "held_out_labels": task.held_out_labels,
        "frozen_correct": frozen.int().tolist(),
        "runs": [run.name for run in runs],
    }
    (out / "task.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    save_file({"means": means}, out / "classifier.safetensors")
    say(f"training {len(runs)} adapters of {settings.steps} steps in {available_cores()} processes")
    done = execute_all(list(runs), settings, task, means, out / "adapters", processes=available_cores())
    for number, run in enumerate(done, start=1):
        accuracies = f"accuracy {run['accuracy']:.1%}, frozen {frozen.double().mean():.1%}"
        say(f"{number} of {len(runs)}: {run['name']}, {accuracies}")
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
    task = read_json(out / "task.json")
    base = load_base(minilm.minilm_path())
    adapters = {name: load_adapter(out / "adapters" / name) for name in task["runs"]}
    runs = _runs_table(out, task)
    results = _measured(adapters, runs, base)
    for name, table in results._asdict().items():
        # Whole grids are some hundred thousand rows: ten times smaller and faster to read as Parquet.
        for suffix in (".parquet",) if name.endswith("_grid") else (".parquet", ".csv"):
            write_table(table, out / "tables" / f"{name}{suffix}")
    _draw(results, task, out / "figures")
    lines = _findings(results, task, out, adapters)
    (out / "findings.txt").write_text("\n".join(_wrapped(lines)) + "\n", encoding="utf-8")
    return lines


def _runs_table(out: Path, task: dict[str, Any]) -> pd.DataFrame:
    """One row per run: accuracy, and how far it is from the frozen model's, paired over paragraphs."""
    rows = []
    for name in task["runs"]:
        run = read_json(out / "adapters" / name / "run.json")
        gain = paired_difference(run["correct"], task["frozen_correct"], task["held_out_groups"])
        rows.append(
            {
                "run": name,
                "source": str(out / "adapters" / name),
                "targets": "+".join(run["targets"]),
                "r": run["r"],
                "seed": run["seed"],
                "accuracy": run["accuracy"],
                "gain": gain.mean,
                "gain_half_width": gain.half_width,
                "loss_first": sum(run["losses"][:5]) / len(run["losses"][:5]),
                "loss_last": sum(run["losses"][-5:]) / len(run["losses"][-5:]),
                "a_moved": _moved(out / "adapters" / name),
                "steps": run["steps"],
                "bfloat16": run["bfloat16"],
                "seconds_training": run["seconds_training"],
            }
        )
    return pd.DataFrame(rows)


def _moved(directory: Path) -> float:
    """How far training moved A from its initialisation, ``‖A - A0‖ / ‖A0‖`` over all modules together."""
    initial = open_checkpoint(directory / "initial.safetensors")
    adapter = load_adapter(directory)
    moved = start = 0.0
    for module in adapter:
        _, down = factors(adapter[module])
        first = initial[f"{module}.lora_A0"].double()
        moved += float((down.double() - first).square().sum())
        start += float(first.square().sum())
    return math.sqrt(moved / start)


def _measured(adapters: dict[str, Adapter], runs: pd.DataFrame, base: BaseWeights) -> Results:
    seed0, seed1 = Run(_BOTH, 64, 0).name, Run(_BOTH, 64, 1).name
    return Results(
        runs=runs,
        spectrum=spectrum_table(list(adapters.values())),
        ranks=similarity_table(adapters[Run(_BOTH, 8, 0).name], adapters[seed0]),
        ranks_grid=similarity_table(adapters[Run(_BOTH, 8, 0).name], adapters[seed0], cells="all"),
        seeds=similarity_table(adapters[seed0], adapters[seed1]),
        seeds_grid=similarity_table(adapters[seed0], adapters[seed1], cells="all"),
        seeds_of_a=similarity_table(adapters[seed0], adapters[seed1], target="A"),
        amplification=amplification_table(list(adapters.values()), base),
    )


def _draw(results: Results, task: dict[str, Any], folder: Path) -> None:
    """The paper's figures, as PNG and PDF."""
    layers = len(_cell(results.ranks, "in", 1, 1)) // 2
    middle = [(m, m) for m in results.ranks["module_a"].unique() if f".{layers // 2}." in m]
    both = results.runs[results.runs["targets"] == "+".join(_BOTH)]
    at_64 = both.loc[both["r"] == 64, "source"].iloc[0]
    frozen = sum(task["frozen_correct"]) / len(task["frozen_correct"])
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


def _findings(results: Results, task: dict[str, Any], out: Path, adapters: dict[str, Adapter]) -> list[str]:
    runs = results.runs
    frozen = sum(task["frozen_correct"]) / len(task["frozen_correct"])
    count, groups = len(task["frozen_correct"]), len(set(task["held_out_groups"]))
    both = _by_rank(out, runs, "+".join(_BOTH))
    alone = _by_rank(out, runs, "query")
    gains = {
        r: paired_difference(correct, task["frozen_correct"], task["held_out_groups"]) for r, correct in both.items()
    }
    # Fixed beforehand, not the best of them: that would be chosen on the paragraphs it is measured on.
    least, most = min(gains), max(gains)
    lead = paired_difference(both[most], both[least], task["held_out_groups"])
    return [
        f"Task: from which of {len(task['classes'])} libraries does a docstring paragraph come? {count:,} held-out "
        f"paragraphs from {groups} folders that no training text shares. Chance {1 / len(task['classes']):.1%}; "
        f"the frozen all-MiniLM-L6-v2 with a fixed classifier gets {frozen:.1%}.",
        f"LoRA on query and value gains over it, in points: {_points(gains)} (mean of the seeds; ± is the paired "
        f"95 % interval over paragraphs, clustered by folder).",
        f"r = {least} reaches {_ratio(gains[least].mean, gains[most].mean)} of the gain of r = {most}, the largest, "
        f"which is {100 * lead.mean:+.1f} ± {100 * lead.half_width:.1f} points from it.",
        "Query alone gains: "
        + _points({r: paired_difference(c, task["frozen_correct"], task["held_out_groups"]) for r, c in alone.items()})
        + "."
        if alone
        else f"The training loss went from {runs['loss_first'].mean():.3f} to {runs['loss_last'].mean():.3f} "
        f"in {runs['steps'].max()} steps.",
        _used_rank(results, adapters),
        "r = 8 against r = 64, which saw the texts in one order: " + _overlap(results.ranks),
        "Two seeds at r = 64, of initial A and of order: " + _overlap(results.seeds),
        f"A at r = 64 moved by {runs.loc[runs['r'] == 64, 'a_moved'].mean():.0%} of the norm it started with. Two "
        f"seeds' A share φ(1,1) = {_cell(results.seeds_of_a, 'in', 1, 1)['phi'].median():.2g} in the median (chance "
        f"{_cell(results.seeds_of_a, 'in', 1, 1)['null_mean'].iloc[0]:.2g}), but the order of A's directions depends "
        "on how ΔW is factored; the figures above, on ΔW, do not.",
        _amplified(results),
        f"Adapters, tables, figures and these lines are in {out}/; all of it can be recomputed from "
        f"{out}/adapters and the pretrained weights.",
    ]


def _by_rank(out: Path, runs: pd.DataFrame, targets: str) -> dict[int, list[float]]:
    """By rank, how often each held-out paragraph is classified rightly, averaged over the seeds."""
    found = {}
    for r, rows in runs[runs["targets"] == targets].groupby("r"):
        correct = [read_json(out / "adapters" / name / "run.json")["correct"] for name in rows["run"]]
        found[int(str(r))] = torch.tensor(correct, dtype=torch.float64).mean(0).tolist()
    return found


def _points(gains: dict[int, Difference]) -> str:
    return ", ".join(f"r = {r}: {100 * g.mean:+.1f} ± {100 * g.half_width:.1f}" for r, g in sorted(gains.items()))


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "no share (nothing was gained)"


def _used_rank(results: Results, adapters: dict[str, Adapter]) -> str:
    name = Run(_BOTH, 64, 0).name
    adapter = adapters[name]
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
