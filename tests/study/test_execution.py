"""Runs of a study: what each leaves, that a killed study goes on, and that nothing is repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_analysis as la
from lora_analysis import training
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study import execution
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.execution import execute, execute_plan
from lora_analysis.study.plan import Plan, Run
from lora_analysis.study.projections import placement
from lora_analysis.study.setting import open_setting
from lora_analysis.training.initial import initial_down
from lora_analysis.update import factors


@pytest.fixture
def study(quick_study: Path) -> Study:
    return open_study(quick_study)


def test_every_run_leaves_what_it_takes_to_recompute_it(study: Study) -> None:
    assert list(study.runs["run"]) == [run.name for run in study.plan.runs()]
    for run in study.plan.runs():
        folder = study.directory / "runs" / run.name
        record = study.record(run.name)
        assert record is not None
        assert record["environment"]["torch"] == torch.__version__
        assert len(record["losses"]) == (0 if run.method == "frozen" else study.plan.recipe.steps)
        losses = load_file(folder / "outcomes.safetensors")["losses"]
        assert len(losses) == len(study.tasks["tasks"][run.task]["groups"])
        assert record["held_out_loss"] == pytest.approx(float(losses.mean()), rel=1e-12)
        assert (folder / "initial.safetensors").exists() == (run.method == "lora")
        assert (folder / "spectra.safetensors").exists() == (run.method == "full")
    assert not list((study.directory / "runs").glob(".*"))
    assert len(study.tasks["base_sha256"]) == 64


def test_the_factors_a_run_began_with_are_those_of_its_seed(study: Study) -> None:
    (name,) = study.find(task="near", targets="q+v", r=8, init_seed=1, data_seed=1)
    initial, adapter = study.initial(name), study.adapter(name)
    assert set(initial) == set(adapter)
    for module, A in initial.items():
        assert torch.equal(A, initial_down(A.shape[1], r=8, module=module, seed=1))
        assert not torch.equal(factors(adapter[module])[1], A)  # it has learned


def test_an_adapter_of_a_run_gives_the_losses_that_are_stored(study: Study) -> None:
    (name,) = study.find(task="near", targets="q+v", r=8, init_seed=0, data_seed=0)
    setting = open_setting(study.plan.setting, folder=study.directory)
    model = setting.model()
    training.attach(model, study.adapter(name))
    stored = load_file(study.directory / "runs" / name / "outcomes.safetensors")["losses"]
    torch.testing.assert_close(setting.outcomes("near", model).losses, stored, rtol=1e-5, atol=1e-6)
    assert "q" in placement(model, ("q",))["targets"][0]


def test_a_run_is_the_same_whenever_it_is_executed(study: Study, tmp_path: Path) -> None:
    run = Run("near", "lora", ("q", "v"), 8, 0, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        execute(run, study.plan.recipe, open_setting(study.plan.setting, folder=study.directory), tmp_path)
    finally:
        torch.set_num_threads(threads)
    for file in ("adapter_model.safetensors", "initial.safetensors", "outcomes.safetensors"):
        again, before = load_file(tmp_path / run.name / file), load_file(study.directory / "runs" / run.name / file)
        assert all(torch.equal(again[key], tensor) for key, tensor in before.items())


def test_outcomes_by_group_add_up_to_the_runs(study: Study) -> None:
    sums = study.outcomes.groupby("run").sum(numeric_only=True)
    for name, loss in zip(study.runs["run"], study.runs["held_out_loss"], strict=True):
        assert sums.loc[name, "loss_sum"] / sums.loc[name, "items"] == pytest.approx(loss, rel=1e-9)


def test_what_full_fine_tuning_changed_has_the_rank_of_a_full_matrix(study: Study) -> None:
    (name,) = study.find(method="full", init_seed=0)
    spectra = load_file(study.directory / "runs" / name / "spectra.safetensors")
    values = spectra["model.layers.0.self_attn.q_proj"].numpy()
    assert values.shape == (256,)
    assert int(np.sum(values > values[0] * 1e-6)) > 64


def test_a_finished_study_repeats_nothing_and_another_plan_is_refused(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.directory, copy)
    before = {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("*")}
    said: list[str] = []
    execute_plan(study.plan, copy, processes=1, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in (copy / "runs").rglob("*")} == before
    assert any("0 left" in text for text in said)
    with pytest.raises(LoraAnalysisError, match=r"plan.json: expected what this study was begun with, got another"):
        execute_plan(replace(study.plan, ranks=(1, 2)), copy, processes=1)
    tasks = json.loads((copy / "tasks.json").read_text())
    tasks["tasks"]["near"]["sha256"] = "0" * 64
    (copy / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(LoraAnalysisError, match=r"tasks.json: expected what this study was begun with, got other"):
        execute_plan(study.plan, copy, processes=1)


def test_a_study_that_is_killed_goes_on_without_repeating_what_is_done(
    tmp_path: Path, small_decoder_cache: Path, quick_study: Path
) -> None:
    out = tmp_path / "study"
    command = [sys.executable, "-m", "lora_analysis", "ablate", str(out), "--setting", "decoder", "--quick"]
    command += ["--targets", "q", "--ranks", "1", "--processes", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(out.glob("runs/*/run.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/run.json")}
    plan = Plan.from_json(json.loads((out / "plan.json").read_text()))
    assert 2 <= len(done) < len(plan.runs())
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"{len(plan.runs())} runs, {len(done)} of them done" in again.stderr
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())
    assert len(list(out.glob("runs/*/run.json"))) == len(plan.runs())


def test_runs_on_more_items_than_there_are_are_left_out(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be called runs on so many items, and be runs on all."""
    items = study.tasks["tasks"]["near"]["train_items"]
    plan = replace(study.plan, sizes=(100, items + 1))
    executed: list[Run] = []

    def execute_runs(runs: list[Run], *_: object, **__: object) -> list[dict[str, object]]:
        executed.extend(runs)
        return []

    monkeypatch.setattr(execution, "execute_runs", execute_runs)
    said: list[str] = []
    execute_plan(plan, tmp_path / "study", processes=1, say=said.append)
    assert {run.size for run in executed} == {None, 100}
    assert any("4 runs are left out" in text for text in said)


def test_the_digest_is_that_of_weights(tmp_path: Path) -> None:
    with pytest.raises(LoraAnalysisError, match=r"expected weights, .safetensors or .bin, got none"):
        execution._digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    one = execution._digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert execution._digest(tmp_path) != one


def test_directories_that_are_no_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraAnalysisError, match=r"expected a study directory with plan.json, got none"):
        open_study(tmp_path)


def test_the_spectrum_of_every_run_can_be_tabulated(study: Study) -> None:
    adapters = [study.adapter(name) for name in study.find(method="lora", task="near")]
    table = la.spectrum_table(adapters)
    assert bool((table["norm"] > 0).all())


def test_a_run_that_diverges_is_named(study: Study, tmp_path: Path) -> None:
    setting = open_setting(study.plan.setting, folder=study.directory)
    run = Run("near", "head", lr=1e36)
    with pytest.raises(LoraAnalysisError, match=r"near-head-init0-data0-lr1e\+36: step \d: expected a finite .*--tune"):
        execute(run, replace(study.plan.recipe, max_grad_norm=None), setting, tmp_path)
    assert not list(tmp_path.glob("*"))
