"""What a study says: every claim, judged again from the stored evidence."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from lora_analysis.study.analysis import (
    ORDER,
    SAYS,
    analyse_study,
    claims_table,
    claims_text,
    read_evidence,
    stored_claims,
    study_claims,
)
from lora_analysis.study.claims.claim import Claim, Verdict, directional, equivalent, holm
from lora_analysis.study.controls import control_lines
from lora_analysis.study.presets import minilm_plan

FIGURES = Path(__file__).parents[2] / "figures"
PUBLISHED = sorted(path.parent for path in FIGURES.glob("*/claims.json"))


def test_every_claim_is_there_whatever_its_outcome(quick_study: Path) -> None:
    claims = stored_claims(quick_study)
    assert [claim.id for claim in claims] == list(ORDER)
    assert {f"C{i}" for i in range(1, 18)} <= set(ORDER)
    assert all(claim.verdict in get_args(Verdict) and claim.why and claim.text for claim in claims)
    assert set(SAYS) == set(get_args(Verdict))
    # The calibration of the tool itself has to hold, and a literal factor never can at this width.
    by_id = {claim.id: claim for claim in claims}
    assert by_id["C7"].verdict in ("reproduced", "consistent_underpowered")
    assert by_id["C11"].verdict == "not_testable_at_this_scale"


def test_verdicts_are_those_of_the_stored_tables(quick_study: Path) -> None:
    tables, plan = read_evidence(quick_study)
    assert study_claims(tables, plan) == stored_claims(quick_study)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_published_verdicts_are_those_of_the_published_tables(folder: Path) -> None:
    tables, plan = read_evidence(folder)
    for found, stored in zip(study_claims(tables, plan), stored_claims(folder), strict=True):
        # Of the numbers the last digits are the machine's; those that are printed are in ``why``, to the letter.
        for name, value in asdict(stored).items():
            approximately = pytest.approx(value, rel=1e-9) if isinstance(value, float | tuple) else value
            assert getattr(found, name) == approximately, (stored.id, name)
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))["tasks"]
    lines = [*claims_text(stored_claims(folder), plan), "", *control_lines(tables["runs"], tasks, plan)]
    assert (folder / "claims.txt").read_text("utf-8").splitlines() == lines


def test_published_estimates_are_those_of_plain_means() -> None:
    folder = FIGURES / "study-decoder"
    claims = {claim.id: claim for claim in stored_claims(folder)}
    runs = pd.read_parquet(folder / "tables" / "runs.parquet")
    mine = runs[(runs["task"] == "near") & runs["size"].isna() & (runs["init_seed"] == runs["data_seed"])]
    frozen = mine.loc[mine["method"] == "frozen", "held_out_loss"].item()

    def gain(targets: str, r: int) -> float:
        losses = mine.loc[(mine["targets"] == targets) & (mine["r"] == r), "held_out_loss"]
        assert len(losses) == 3
        return frozen - float(losses.mean())

    assert claims["C1"].estimate == pytest.approx(gain("q+v", 4) - gain("o", 8), rel=1e-9)
    assert claims["C2"].estimate == pytest.approx(gain("q", 8) - gain("q+v", 4), rel=1e-9)
    assert claims["C3"].estimate == pytest.approx(gain("q+v", 1) / gain("q+v", 64), rel=1e-9)
    assert claims["C14"].estimate == pytest.approx(gain("q+v", 64) - gain("q+v", 4), rel=1e-9)


def test_a_study_that_is_not_finished_is_analysed_with_what_is_there(quick_study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(quick_study, copy)
    shutil.rmtree(copy / "paper")
    for folder in (copy / "runs").glob("near-q-*"):
        shutil.rmtree(folder)
    for folder in (copy / "runs").glob("*-full-*"):
        shutil.rmtree(folder)
    lines = analyse_study(copy)
    claims = {claim.id: claim for claim in stored_claims(copy)}
    assert claims["C16"].verdict == "not_attempted"
    assert list(claims) == list(ORDER)
    assert (copy / "claims.txt").read_text("utf-8").splitlines() == lines
    assert all(len(line) <= 80 for line in lines)
    assert (copy / "paper" / "tables.txt").exists()


def test_the_claims_come_as_a_table_and_as_text() -> None:
    claims = [
        Claim("C1", "text", "statistic", "reproduced", "because", estimate=1.0, interval=(0.5, 1.5), p=0.01, runs=3),
        Claim("C2", "text " * 30, "statistic", "not_attempted", "there were no runs " * 10),
    ]
    table = claims_table(claims)
    assert list(table["id"]) == ["C1", "C2"]
    assert table.loc[0, ["interval_low", "interval_high"]].tolist() == [0.5, 1.5]
    assert pd.isna(table.loc[1, "estimate"])
    lines = claims_text(claims, minilm_plan())
    assert "2 claims of the LoRA paper on 'docstrings': 1 reproduced, 1 not attempted." in " ".join(lines)
    assert "rsLoRA's scale" in " ".join(lines)
    trained = [run for run in minilm_plan().runs() if run.method != "frozen"]
    assert f"{len(trained)} training runs of 100 steps" in " ".join(lines)
    # A line may end at a hyphen.
    assert "its loss the cross-entropy of its label. Each claim is" in " ".join(lines).replace("- ", "-")
    assert "judged at its own level of 5 %" in " ".join(lines)
    assert max(map(len, lines)) <= 80


def test_rules_are_symmetric() -> None:
    for above in (True, False):
        sign = 1 if above else -1

        def verdict(low: float, high: float, mde: float, *, above: bool = above, sign: int = sign) -> str:
            bounds = sorted((sign * low, sign * high))
            middle = sign * (low + high) / 2
            return directional(middle, (bounds[0], bounds[1]), threshold=0.0, above=above, mde=mde, effect=0.5)

        assert verdict(0.1, 0.3, 0.1) == "reproduced"
        assert verdict(-0.3, -0.1, 0.1) == "contradicted"
        assert verdict(-0.1, 0.3, 0.6) == "consistent_underpowered"
        assert verdict(-0.1, 0.3, 0.4) == "not_reproduced"
        assert verdict(-0.3, 0.1, 0.6) == "not_reproduced"
    nan = float("nan")
    assert directional(nan, (nan, nan), threshold=0, above=True, mde=1, effect=1) == "not_testable_at_this_scale"
    assert equivalent((nan, 1.0), margin=1.0) == "not_testable_at_this_scale"


def test_holm_is_statsmodels_by_hand() -> None:
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([]) == []


def test_controls_are_said_beside_what_needs_no_model(quick_study: Path) -> None:
    tables, plan = read_evidence(quick_study)
    tasks = json.loads((quick_study / "tasks.json").read_text("utf-8"))["tasks"]
    lines = control_lines(tables["runs"], tasks, plan)
    text = " ".join(" ".join(lines).split())
    runs = tables["runs"].set_index("run")
    assert f"near: frozen {runs.loc['near-frozen', 'held_out_loss']:.3f};" in text
    full = runs[runs["method"] == "full"]["held_out_loss"]
    assert f"full fine-tuning {full.mean():.3f} ({full.min():.3f} to {full.max():.3f})" in text
    assert "permuted: frozen" in text
    assert text.count("bigrams of the training bytes") == len(tasks) > 1
    assert max(map(len, lines)) <= 80
