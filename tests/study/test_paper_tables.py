"""The paper's tables of a study: their numbers are those of the runs, the paper's stand apart, and gaps are said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from random_study import LAYERS, RECIPE, SHAPES, module, without, write_study
from safetensors.torch import load_file

from lora_analysis.study import printed
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.paper import TABLES, write_paper
from lora_analysis.study.paper_runs import Unavailable, nearest
from lora_analysis.study.paper_tables import equal_budget, metric_by_parameters, metric_by_rank, projections, rank_sweep
from lora_analysis.study.paper_text import table_text
from lora_analysis.study.plan import Plan, Run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_study(tmp_path_factory.mktemp("study") / "whole")


@pytest.fixture(scope="module")
def study(directory: Path) -> Study:
    return open_study(directory)


def expected(study: Study, targets: tuple[str, ...], r: int) -> tuple[list[float], list[float]]:
    """Losses and accuracies by seed, from the records."""
    records = [
        json.loads((study.directory / "runs" / Run("near", "lora", targets, r, s, s).name / "run.json").read_text())
        for s in study.plan.seeds
    ]
    return [record["held_out_loss"] for record in records], [record["accuracy"] for record in records]


def check_metrics(study: Study, row: pd.Series, targets: tuple[str, ...], r: int) -> None:
    losses, accuracies = expected(study, targets, r)
    frozen = json.loads((study.directory / "runs" / "near-frozen" / "run.json").read_text())
    assert row["loss_seeds"] == tuple(losses)
    assert row["accuracy_seeds"] == tuple(accuracies)
    assert row["loss_mean"] == pytest.approx(np.mean(losses), rel=1e-14)
    assert row["loss_gain"] == pytest.approx(frozen["held_out_loss"] - np.mean(losses), rel=1e-12)
    assert row["accuracy_gain"] == pytest.approx(np.mean(accuracies) - frozen["accuracy"], rel=1e-12)
    assert row["bleu_mean"] == pytest.approx(100 * np.mean(accuracies), rel=1e-14)


def test_rank_sweep_has_every_setting_of_the_grid_with_the_means_of_its_runs(study: Study) -> None:
    table = rank_sweep(study)
    settings = [(targets, r) for targets in study.plan.target_sets for r in study.plan.ranks]
    assert list(zip(table["targets"], table["r"], strict=True)) == [("+".join(t), r) for t, r in settings]
    for (targets, r), (_, row) in zip(settings, table.iterrows(), strict=True):
        check_metrics(study, row, targets, r)
        assert row["parameters"] == LAYERS * r * sum(sum(SHAPES[letter]) for letter in targets)


def test_rank_sweep_has_the_papers_number_at_the_same_targets_and_rank_only(study: Study) -> None:
    table = rank_sweep(study).set_index(["targets", "r"])
    assert table.loc[("q+v", 8), "paper_wikisql"] == 73.8
    assert table.loc[("q+k+v+o", 1), "paper_multinli"] == 91.2
    assert table.loc[("q", 2), "paper_multinli"] == 90.9


def test_runs_of_crossed_seeds_fewer_items_and_other_tasks_are_in_no_mean(study: Study) -> None:
    row = rank_sweep(study).set_index(["targets", "r"]).loc[("q+v", 8)]
    assert len(study.find(method="lora", targets="q+v", r=8, task="near")) == 5
    check_metrics(study, row, ("q", "v"), 8)


def test_equal_budgets_are_those_of_the_plan_and_what_else_of_the_grid_spends_as_much(study: Study) -> None:
    table = equal_budget(study)
    assert list(zip(table["targets"], table["r"], strict=True)) == [("q", 2), ("k", 2), ("v", 2), ("q+v", 1)]
    for _, row in table.iterrows():
        check_metrics(study, row, tuple(row["targets"].split("+")), row["r"])
    assert table["paper_r"].tolist() == [8, 8, 8, 4]
    assert table["paper_wikisql"].tolist() == [70.4, 70.0, 73.0, 73.7]


def test_a_plan_without_budgets_compares_those_that_its_grid_has(tmp_path: Path) -> None:
    plan = Plan({"kind": "classification"}, "near", RECIPE, ranks=(1, 2, 4), seeds=(0,), controls=())
    table = equal_budget(open_study(write_study(tmp_path / "s", plan)))
    assert list(zip(table["targets"], table["r"], strict=True)) == [("q", 4), ("q+v", 2), ("q+k+v+o", 1)]


def test_without_equal_budgets_there_is_no_table_5(tmp_path: Path) -> None:
    plan = Plan({"kind": "classification"}, "near", RECIPE, (("q",), ("q", "v")), (1, 8), (0,), controls=())
    with pytest.raises(Unavailable, match="no two target sets"):
        equal_budget(open_study(write_study(tmp_path / "s", plan)))


def test_methods_are_in_order_of_their_parameters(study: Study) -> None:
    table = metric_by_parameters(study)
    assert table["method"].tolist()[0] == "frozen"
    assert table["parameters"].is_monotonic_increasing
    assert {"frozen", "head", "bitfit", "full", "lora"} == set(table["method"])
    full = table[table["method"] == "full"].iloc[0]
    values = [study.record(f"near-full-init{s}-data{s}") for s in study.plan.seeds]
    assert full["loss_seeds"] == tuple(record["held_out_loss"] for record in values if record is not None)
    assert (full["paper_millions"], full["paper_multinli"]) == (175_000.0, 89.5)
    check_metrics(study, table.set_index(["targets", "r"]).loc[("q+v", 8)], ("q", "v"), 8)
    frozen = table.iloc[0]
    assert frozen["loss_gain"] == 0
    assert len(frozen["loss_seeds"]) == 1


def test_metric_by_rank_is_of_the_main_target_set_beside_gpt_2(study: Study) -> None:
    table = metric_by_rank(study)
    assert table["r"].tolist() == [1, 2, 8]
    for _, row in table.iterrows():
        check_metrics(study, row, ("q", "v"), row["r"])
    assert table["paper_loss"].tolist() == [1.23, 1.21, 1.17]
    assert table["paper_bleu"].tolist() == [68.72, 69.17, 69.57]


def dense_projections(study: Study, run: str, name: str, r: int) -> dict[str, float]:
    """One half of table 7 by dense numpy."""
    W = load_file(study.base_path)[f"{name}.weight"].double().numpy()
    dense = study.adapter(run)[name].dense().double().numpy()
    U, S, Vh = np.linalg.svd(dense)
    inside = np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
    random = np.linalg.norm(W) * r / math.sqrt(W.size)
    top = np.linalg.norm(np.linalg.svd(W)[1][:r])
    return {
        "projected": inside,
        "projected_top": top,
        "projected_null_rms": random,
        "norm_base": np.linalg.norm(W),
        "norm_update": np.linalg.norm(S),
        "gain": inside / random,
        "ceiling_fraction": inside / top,
        "amplification": np.linalg.norm(S) / inside,
        "amplification_null": np.linalg.norm(S) / random,
    }


def test_projections_are_those_of_dense_matrices(study: Study) -> None:
    table = projections(study)
    assert table["r"].unique().tolist() == [2, 8]
    for r in (2, 8):
        by_module: dict[str, list[dict[str, float]]] = {"q": [], "v": []}
        for seed in study.plan.seeds:
            run = Run("near", "lora", ("q", "v"), r, seed, seed).name
            row = table[(table["r"] == r) & (table["seeds"] == str(seed))].iloc[0]
            assert row["module"] == module("q", 1)
            for column, value in dense_projections(study, run, module("q", 1), r).items():
                assert row[column] == pytest.approx(value, rel=1e-6), column
            for letter, found in by_module.items():
                found += [dense_projections(study, run, module(letter, layer), r) for layer in range(LAYERS)]
        for letter, found in by_module.items():
            row = table[(table["r"] == r) & (table["module"] == f"median of 3 {letter}")].iloc[0]
            assert row["seeds"] == "0 1 2"
            for column in found[0]:
                assert row[column] == pytest.approx(np.median([item[column] for item in found]), rel=1e-6), column
            assert pd.isna(row["paper_r"])


def test_projections_have_the_papers_row_of_the_rank_they_stand_for(study: Study) -> None:
    table = projections(study).groupby("r").first()
    assert table["paper_r"].tolist() == [4, 64]
    assert table["paper_projected"].tolist() == [0.32, 1.90]
    assert table["paper_random"].tolist() == [0.02, 0.33]
    assert table["paper_gain"].tolist() == pytest.approx([15.9, 5.9], abs=0.05)
    assert table["paper_ceiling_fraction"].tolist() == pytest.approx([0.0148, 0.0504], abs=5e-5)
    assert table["paper_amplification"].tolist() == pytest.approx([21.59, 1.88], abs=5e-3)


def test_a_run_that_has_not_finished_is_a_gap_among_the_seeds_and_not_in_the_mean(study: Study, tmp_path: Path) -> None:
    short = without(study, tmp_path / "short", "near-q-v-r8-init1-data1")
    row = rank_sweep(short).set_index(["targets", "r"]).loc[("q+v", 8)]
    losses, _ = expected(study, ("q", "v"), 8)
    assert math.isnan(row["loss_seeds"][1])
    assert row["loss_mean"] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-14)
    assert " - " in table_text(rank_sweep(short), title="t")
    assert projections(short).query("r == 8")["seeds"].tolist() == ["0", "2", "0 2", "0 2"]


def test_a_setting_without_any_run_is_left_out(study: Study, tmp_path: Path) -> None:
    gone = [Run("near", "lora", ("q", "v"), 8, a, b).name for a, b in ((0, 0), (1, 1), (2, 2), (0, 2), (2, 0))]
    short = without(study, tmp_path / "short", *gone)
    assert ("q+v", 8) not in set(zip(rank_sweep(short)["targets"], rank_sweep(short)["r"], strict=True))
    assert metric_by_rank(short)["r"].tolist() == [1, 2]
    assert projections(short)["r"].unique().tolist() == [2]


def test_without_the_frozen_model_there_is_no_gain(study: Study, tmp_path: Path) -> None:
    assert rank_sweep(without(study, tmp_path / "short", "near-frozen"))["loss_gain"].isna().all()


def test_without_the_weights_there_is_no_table_7(study: Study, tmp_path: Path) -> None:
    elsewhere = Study(study.directory, study.plan, study.tasks, tmp_path / "none.safetensors")
    with pytest.raises(Unavailable, match="pretrained weights are not at"):
        projections(elsewhere)


def test_every_table_is_written_within_eighty_columns_with_the_paper_apart(study: Study) -> None:
    for title, note, make in TABLES.values():
        text = table_text(make(study), title=title, notes=note)
        assert max(map(len, text.splitlines())) <= 80
        assert "paper" in text


def test_many_seeds_are_written_as_the_least_and_the_greatest() -> None:
    table = pd.DataFrame(
        {"targets": ["q"], "r": [1], "loss_mean": [1.5], "loss_seeds": [(1.0, math.nan, 2.0, 1.5, 1.2)]}
    )
    assert "1.0000 to 2.0000" in table_text(table, title="t")


def test_everything_is_written_and_what_is_missing_is_said(study: Study, tmp_path: Path) -> None:
    gone = [run.name for run in study.plan.runs() if run.targets == ("q", "v") and run.data_seed != 0]
    said: list[str] = []
    short = without(study, tmp_path / "short", *gone)
    (short.directory / "base.safetensors").unlink()
    paths = write_paper(short, tmp_path / "paper", target="A", say=said.append)
    assert all(path.stat().st_size > 0 for path in paths)
    names = {path.name for path in paths}
    assert {"tables.txt", "table_5.csv", "table_6.csv", "table_15.csv", "table_18.csv"} < names
    assert {f"figure_{number}_A.{end}" for number in (3, 6) for end in ("png", "pdf")} < names
    assert [line.split(":")[0] for line in said] == [
        "table_7",
        "figure_4_A",
        "figure_7_A",
        "figure_8_in",
        "figure_8_out",
    ]
    text = (tmp_path / "paper" / "tables.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80
    assert "figure_4_A: runs of two seeds at r = 8 are wanted" in text
    back = pd.read_csv(tmp_path / "paper" / "table_6.csv")
    assert [float(value) for value in back["loss_seeds"][0].split()] == list(rank_sweep(short)["loss_seeds"][0])


def test_nearest_rank_is_by_ratio() -> None:
    assert [nearest(wanted, [1, 4, 16]) for wanted in (4, 8, 64, 1)] == [4, 4, 16, 1]
    assert nearest(64, [8, 100]) == 100
    assert nearest(8, [1, 16]) == 16


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_the_papers_accuracies_are_as_printed() -> None:
    five = list(printed.TABLE_5.values())
    assert [row.wikisql for row in five] == numbers("70.4 70.0 73.0 73.2 71.4 73.7 73.7")
    assert [row.multinli for row in five] == numbers("91.0 90.8 91.0 91.3 91.3 91.3 91.7")
    assert list(printed.TABLE_5) == [
        ("q", 8), ("k", 8), ("v", 8), ("o", 8), ("q+k", 4), ("q+v", 4), ("q+k+v+o", 2),
    ]  # fmt: skip
    by_rank = {
        "q": ("68.8 69.6 70.5 70.4 70.0", "90.7 90.9 91.1 90.7 90.7"),
        "q+v": ("73.4 73.3 73.7 73.8 73.5", "91.3 91.4 91.3 91.6 91.4"),
        "q+k+v+o": ("74.1 73.7 74.0 74.0 73.9", "91.2 91.7 91.7 91.5 91.4"),
    }
    assert len(printed.TABLE_6) == 15
    for targets, (wikisql, multinli) in by_rank.items():
        rows = [printed.TABLE_6[targets, r] for r in (1, 2, 4, 8, 64)]
        assert [row.wikisql for row in rows] == numbers(wikisql)
        assert [row.multinli for row in rows] == numbers(multinli)


def test_the_papers_projections_are_as_printed_and_random_is_the_closed_form() -> None:
    assert printed.TABLE_7[4] == (0.32, 21.67, 0.02, 61.95, 6.91)
    assert printed.TABLE_7[64] == (1.90, 37.71, 0.33, 61.95, 3.57)
    for r, row in printed.TABLE_7.items():
        assert row.norm_weight * r / 12288 == pytest.approx(row.random, abs=0.008)


def test_the_papers_parameters_are_two_factors_of_width_12288_in_96_layers() -> None:
    for (method, targets, r), row in printed.TABLE_15.items():
        if method == "lora":
            assert 96 * 2 * 12288 * r * len(targets.split("+")) / 1e6 == pytest.approx(row.millions, abs=0.2)
    assert printed.TABLE_15["lora", "q+v", 64][1:] == (73.6, 91.4)
    assert printed.TABLE_15["lora", "v", 2][1:] == (73.4, 91.7)


def test_the_papers_losses_and_scores_by_rank_are_as_printed() -> None:
    rows = printed.TABLE_18
    assert list(rows) == [2**power for power in range(11)]
    assert [row.loss for row in rows.values()] == numbers("1.23 1.21 1.18 1.17 1.16 1.16 1.16 1.16 1.16 1.16 1.17")
    assert [row.bleu for row in rows.values()] == numbers(
        "68.72 69.17 70.38 69.57 69.61 69.33 69.24 68.73 68.92 68.78 69.37"
    )
    best = {
        name: max(rows, key=lambda r: getattr(rows[r], name)) for name in ("bleu", "nist", "meteor", "rouge_l", "cider")
    }
    assert best == {"bleu": 4, "nist": 4, "meteor": 4, "rouge_l": 8, "cider": 4}
