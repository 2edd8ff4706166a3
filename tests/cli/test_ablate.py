"""``lora-analysis ablate`` as users call it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from command_line import run
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lora_analysis.cli.study_options import chosen_plan
from lora_analysis.study.minilm import minilm_path
from lora_analysis.study.plan import Plan
from lora_analysis.study.tuning import tuned_plan


def ablate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("ablate", *arguments)


def test_the_plan_is_listed_without_running_anything(tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = ablate(str(out), "--plan-only", "--ranks", "1,4", "--targets", "q,qv,intermediate.dense", "--seeds", "2")
    assert done.returncode == 0
    names = done.stdout.split()
    assert "docstrings-intermediate.dense-r4-init1-data1" in names
    assert len(names) == len(set(names))
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1,x"], "expected positive integers, got 'x'"),
        (["--setting", "gpt"], "expected minilm"),
        (["--setting", "generation"], "expected minilm"),
        (["--scaling", "lora"], "lora needs a learning rate for each rank; pass --tune"),
        (["--scaling", "none"], "expected rslora or lora, got 'none'"),
        (["--seeds", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_usage_is_told_in_a_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = ablate(str(tmp_path / "study"), "--plan-only", *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_targets_and_ranks_are_taken_once_and_in_the_papers_order(tmp_path: Path) -> None:
    once = ablate(str(tmp_path), "--plan-only", "--ranks", "1,4", "--targets", "q,qv", "--quick")
    twice = ablate(str(tmp_path), "--plan-only", "--ranks", "1,4,4", "--targets", "q,vq,qv,qq", "--quick")
    assert twice.returncode == 0, twice.stderr[-500:]
    assert once.stdout == twice.stdout


def test_paths_are_absolute_and_files_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    plan = chosen_plan("minilm", "model", [Path("a/one.csv"), Path("two.csv")], True, {}, steps=None, lr=None)
    assert plan.setting["model"] == str(tmp_path / "model")
    assert plan.setting["tasks"]["one"]["file"] == str(tmp_path / "a" / "one.csv")
    hub = chosen_plan("minilm", "someone/model", [Path("one.csv")], True, {}, steps=None, lr=None)
    assert hub.setting["model"] == "someone/model"
    for paths in ([Path("a/one.csv"), Path("b/one.csv")], [Path("docstrings.csv")]):
        with pytest.raises(typer.BadParameter, match="expected files of different names"):
            chosen_plan("minilm", None, paths, True, {}, steps=None, lr=None)


def test_what_is_printed_is_the_claims(quick_study: Path) -> None:
    again = ablate(str(quick_study), "--setting", "decoder", "--quick")
    assert again.returncode == 0
    assert "0 left" in again.stderr
    assert again.stdout == (quick_study / "claims.txt").read_text("utf-8")
    assert max(map(len, again.stdout.splitlines())) <= 80
    claims = json.loads(ablate(str(quick_study), "--setting", "decoder", "--quick", "--json").stdout)["claims"]
    assert claims == json.loads((quick_study / "claims.json").read_text("utf-8"))["claims"]


def test_any_transformers_encoder_and_any_labelled_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(minilm_path().parent / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    texts = tmp_path / "texts.csv"
    rows = [f"the {color} {thing} number {i},{color}" for i in range(8) for color in ("red", "blue") for thing in "ab"]
    texts.write_text("\n".join(["text,label", *rows]) + "\n")
    out = tmp_path / "study"
    options = ["--model", str(model), "--task", str(texts), "--quick", "--ranks", "1,2", "--steps", "2", "--tune"]
    done = ablate(str(out), *options, "--scaling", "lora", "--processes", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["setting"]["model"] == str(model)
    assert {"lora-r1", "lora-r2"} <= set(plan["recipe"]["lr"])
    assert "learning rate tuned at each rank" in " ".join(done.stdout.split())
    assert (out / "claims.json").exists()
    # Called again, it would take the rates it has tuned.
    begun = Plan.from_json(plan)
    untuned = replace(begun, recipe=replace(begun.recipe, lr={**begun.recipe.lr, "lora-r1": 1.0, "lora-r2": 1.0}))
    assert tuned_plan(untuned, out, processes=1) == begun


def test_a_model_that_is_not_there_is_a_named_error(tmp_path: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(40)))
    done = ablate(str(tmp_path / "study"), "--model", str(tmp_path / "none"), "--task", str(texts), "--quick")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lora-analysis: ")
    assert "expected a transformers model" in done.stderr
