"""``lora-analysis train``: one adapter, in one process and in two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run as here

import lora_analysis as la
from lora_analysis.training import read_dynamics

OPTIONS = ["--setting", "decoder", "--quick", "--r", "4"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)


def test_one_process_and_two_give_the_same_adapter(tmp_path: Path, small_decoder_cache: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    single = run("lora_analysis", "train", str(one), *OPTIONS)
    assert single.returncode == 0, single.stderr[-2000:]
    # Without the --, the launcher's parser takes --r for the beginning of an option of its own.
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    double = run(*launcher, "lora_analysis", "train", str(two), *OPTIONS)
    assert double.returncode == 0, double.stderr[-2000:]
    records = [json.loads((folder / "run.json").read_text()) for folder in (one, two)]
    assert [record["processes"] for record in records] == [1, 2]
    # float32 sums of gradients in another order.
    assert records[1]["losses"] == pytest.approx(records[0]["losses"], rel=1e-5)
    assert records[1]["held_out_loss"] == pytest.approx(records[0]["held_out_loss"], rel=1e-5)
    assert single.stdout.count("gain") == double.stdout.count("gain") == 1
    adapter = la.load_adapter(one)
    assert {update.r for update in adapter.values()} == {4}
    assert len((one / "log.jsonl").read_text().splitlines()) == 8
    assert {row["step"] for row in read_dynamics(one / "dynamics.jsonl")} == set(range(9))
    # Called again, a finished run trains nothing and says the same.
    assert here("train", one, *OPTIONS).stdout == single.stdout
    assert json.loads(here("train", one, *OPTIONS, "--json").stdout) == records[0]
    # A run of other settings is not what is there: of these the state itself knows nothing.
    for other in (["--seed", "1"], ["--alpha", "60"], ["--init", "gaussian"]):
        refused = here("train", one, *OPTIONS, *other)
        assert refused.returncode == 1
        assert "that this run was begun with" in " ".join(refused.stderr.split())
    assert json.loads((one / "run.json").read_text()) == records[0]


def test_wrong_usage_is_told_in_a_line(tmp_path: Path) -> None:
    done = here("train", tmp_path / "x", "--init", "zeros")
    assert done.returncode == 2
    assert "expected one of kaiming, gaussian, orthogonal, pissa, got 'zeros'" in " ".join(done.stderr.split())


def test_a_file_of_the_users_is_what_is_trained_on(tmp_path: Path) -> None:
    texts = tmp_path / "intents.csv"
    rows = [f"please {verb} the {noun},{verb}" for verb in ("open", "close") for noun in "abcdefghijklmnopqrst"]
    texts.write_text("\n".join(["text,label", *rows]) + "\n")
    out = tmp_path / "one"
    done = here("train", str(out), "--task", str(texts), "--quick", "--steps", "2", "--r", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((out / "run.json").read_text())["run"]["task"] == "intents"
    assert done.stdout.startswith("intents-q-v-r2")
    twice = here("train", str(out), "--task", str(texts), "--task", str(texts))
    assert twice.returncode == 2
    assert "expected one file" in " ".join(twice.stderr.split())
