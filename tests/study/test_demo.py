"""The demo from end to end, and that what it prints follows from what it leaves behind."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import lora_analysis as la
from lora_analysis import training
from lora_analysis.study import minilm
from lora_analysis.study.demo import FULL, QUICK, analyse
from lora_analysis.study.docstrings import docstring_task
from lora_analysis.study.runs import correct_predictions


def test_it_prints_ten_findings_and_leaves_what_it_promises(quick_demo):
    lines = (quick_demo / "findings.txt").read_text(encoding="utf-8").splitlines()
    assert [line[:2] for line in lines if line[1] != " "] == [f"{n:2d}" for n in range(1, 11)]
    assert max(map(len, lines)) <= 80
    for run in QUICK:
        files = {path.name for path in (quick_demo / "adapters" / run.name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "initial.safetensors", "run.json"}
    tables = {path.name for path in (quick_demo / "tables").iterdir()}
    assert {"runs.csv", "spectrum.parquet", "amplification.csv", "ranks_grid.parquet", "seeds.csv"} <= tables
    figures = {path.name for path in (quick_demo / "figures").iterdir()}
    names = ("rank_ablation", "similarity_ranks", "similarity_seeds", "amplification", "gain_by_layer", "spectra")
    assert figures == {name + suffix for name in names for suffix in (".png", ".pdf")}


def test_analysing_again_gives_the_same_findings(quick_demo):
    before = (quick_demo / "findings.txt").read_text(encoding="utf-8")
    tables = {path: path.read_bytes() for path in (quick_demo / "tables").glob("*.csv")}
    analyse(quick_demo)
    assert (quick_demo / "findings.txt").read_text(encoding="utf-8") == before
    assert tables
    assert all(path.read_bytes() == content for path, content in tables.items())


def test_accuracies_follow_from_the_saved_adapter_the_base_and_the_classifier(quick_demo):
    task = docstring_task()
    assert task.digest == json.loads((quick_demo / "task.json").read_text())["sha256"]
    means = load_file(quick_demo / "classifier.safetensors")["means"]
    name = QUICK[-1].name
    record = json.loads((quick_demo / "adapters" / name / "run.json").read_text())
    model = minilm.load_minilm()
    training.attach(model.model, la.load_adapter(quick_demo / "adapters" / name))
    dtype = torch.bfloat16 if record["bfloat16"] else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the demo's processes: the order of sums, and so a rare prediction, depends on it
    try:
        correct = correct_predictions(model, task, means, autocast=dtype)
    finally:
        torch.set_num_threads(threads)
    assert correct.int().tolist() == record["correct"]
    assert float(correct.double().mean()) == record["accuracy"]


def test_training_lowered_the_loss_and_moved_only_the_adapter(quick_demo):
    runs = pd.read_csv(quick_demo / "tables" / "runs.csv")
    assert (runs["loss_last"] < runs["loss_first"]).all()
    assert (runs["a_moved"] > 0).all()
    adapter = la.load_adapter(quick_demo / "adapters" / QUICK[0].name)
    assert len(adapter) == 12
    assert adapter.unused == ()
    # The scale is rsLoRA's, 6 / sqrt(64), whatever the file calls its alpha.
    assert {module.scale for module in adapter.modules.values()} == {0.75}


def test_seeds_differ_in_initialisation_and_ranks_share_none(quick_demo):
    starts = {run.name: load_file(quick_demo / "adapters" / run.name / "initial.safetensors") for run in QUICK}
    module = "encoder.layer.0.attention.self.query.lora_A0"
    seed0, seed1, small = (starts[run.name][module].double() for run in QUICK)
    for a, b in ((seed0, seed1), (seed0[:8], small)):
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert abs(cosine) < 5 / a.numel() ** 0.5


def test_the_plan_is_the_papers():
    assert {(run.targets, run.r) for run in FULL} == {(("query", "value"), r) for r in (1, 2, 4, 8, 64)} | {
        (("query",), r) for r in (1, 8)
    }
    assert {run.seed for run in FULL} == {0, 1}


def test_a_directory_that_is_no_demo_is_named(tmp_path):
    with pytest.raises(la.CheckpointError, match=r"task\.json: no such file"):
        analyse(tmp_path)
