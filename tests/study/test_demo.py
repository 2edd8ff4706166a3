"""The demo from end to end, and that what it prints follows from what it leaves behind."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import run as command
from safetensors.torch import load_file

import lora_analysis as la
from lora_analysis import training
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.demo import analyse, demo_plan
from lora_analysis.study.evidence import open_study
from lora_analysis.study.setting import open_setting

SEED_0, SEED_1, SMALL = (f"docstrings-q-v-{name}" for name in ("r64-init0-data0", "r64-init1-data1", "r8-init0-data0"))


def test_it_prints_ten_findings_and_leaves_what_it_promises(quick_demo):
    lines = (quick_demo / "findings.txt").read_text(encoding="utf-8").splitlines()
    assert [line[:2] for line in lines if line[1] != " "] == [f"{n:2d}" for n in range(1, 11)]
    assert max(map(len, lines)) <= 80
    for run in open_study(quick_demo).plan.runs():
        files = {path.name for path in (quick_demo / "runs" / run.name).iterdir()}
        adapter = {"adapter_config.json", "adapter_model.safetensors", "initial.safetensors"}
        assert files == {"run.json", "outcomes.safetensors"} | (adapter if run.method == "lora" else set())
    tables = {path.name for path in (quick_demo / "tables").iterdir()}
    assert {"runs.csv", "spectrum.parquet", "amplification.csv", "ranks_grid.parquet", "seeds.csv"} <= tables
    figures = {path.name for path in (quick_demo / "figures").iterdir()}
    names = ("rank_ablation", "similarity_ranks", "similarity_seeds", "amplification", "gain_by_layer", "spectra")
    assert figures == {name + suffix for name in names for suffix in (".png", ".pdf")}


def test_asked_again_it_trains_nothing_and_gives_the_same_findings(quick_demo):
    before = (quick_demo / "findings.txt").read_text(encoding="utf-8")
    tables = {path: path.read_bytes() for path in (quick_demo / "tables").glob("*.csv")}
    found = command("demo", "--quick", "--out", quick_demo, "--json")
    assert found.returncode == 0, found.stderr
    assert "0 left" in found.stderr
    said = json.loads(found.stdout)
    assert len(said["findings"]) == 10
    assert all("".join(finding.split()) in "".join(before.split()) for finding in said["findings"])
    assert Path(said["base"]).is_file()
    assert (quick_demo / "findings.txt").read_text(encoding="utf-8") == before
    assert tables
    assert all(path.read_bytes() == content for path, content in tables.items())


def test_accuracies_follow_from_the_saved_adapter_the_base_and_the_classifier(quick_demo):
    study = open_study(quick_demo)
    setting = open_setting(study.plan.setting, folder=quick_demo)
    assert setting.record()["docstrings"]["sha256"] == study.tasks["tasks"]["docstrings"]["sha256"]
    model = setting.model()
    training.attach(model, study.adapter(SMALL))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the demo's processes: the order of sums, and so a rare prediction, depends on it
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=study.plan.recipe.bfloat16):
            outcomes = setting.outcomes("docstrings", model)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes.correct, study.correct(SMALL))
    assert study.record(SMALL)["accuracy"] == float(outcomes.correct.double().mean())


def test_training_lowered_the_loss_and_moved_only_the_adapter(quick_demo):
    runs = pd.read_csv(quick_demo / "tables" / "runs.csv")
    assert (runs["train_loss_last"] < runs["train_loss_first"]).all()
    assert (runs["a_moved"] > 0).all()
    adapter = la.load_adapter(quick_demo / "runs" / SEED_0)
    assert len(adapter) == 12
    assert adapter.unused == ()
    # The scale is rsLoRA's, 6 / sqrt(64), whatever the file calls its alpha.
    assert {module.scale for module in adapter.modules.values()} == {0.75}


def test_seeds_differ_in_initialisation_and_ranks_share_none(quick_demo):
    starts = [load_file(quick_demo / "runs" / name / "initial.safetensors") for name in (SEED_0, SEED_1, SMALL)]
    module = "encoder.layer.0.attention.self.query.lora_A0"
    seed0, seed1, small = (start[module].double() for start in starts)
    for a, b in ((seed0, seed1), (seed0[:8], small)):
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert abs(cosine) < 5 / a.numel() ** 0.5


def test_the_plan_is_the_papers():
    runs = [run for run in demo_plan().runs() if run.method == "lora"]
    assert {(run.targets, run.r) for run in runs} == {(("q", "v"), r) for r in (1, 2, 4, 8, 64)} | {
        (("q",), r) for r in (1, 8)
    }
    assert {(run.init_seed, run.data_seed) for run in runs} == {(0, 0), (1, 1)}


def test_a_directory_that_is_no_demo_is_named(tmp_path):
    with pytest.raises(LoraAnalysisError, match=r"expected a study directory with plan\.json, got none"):
        analyse(tmp_path)
