"""The commands of the practitioner's questions: readable at 80 columns, the tables of their functions as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis import cli

MODULES = [f"encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for name, r in (("a", 4), ("b", 12)):
        updates = {
            module: la.LowRankUpdate(
                torch.randn(24, r, generator=generator), torch.randn(r, 16, generator=generator), 2.0
            )
            for module in MODULES
        }
        la.save_adapter(la.Adapter(updates), folder / name)
    weights = {f"{module}.weight": torch.randn(24, 16, generator=generator) for module in MODULES}
    save_file(weights | {"embeddings.word_embeddings.weight": torch.randn(30, 16)}, folder / "base.safetensors")
    words = {f"word{i}": i for i in range(30)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-analysis", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def call(folder: Path, command: str) -> list[object]:
    both = [folder / "a", folder / "b"]
    base = ["--base", folder / "base.safetensors"]
    return {
        "used-rank": [*both, "--draws", 50],
        "reproducible": [*both, "--draws", 50],
        "same": [*both, "--draws", 50],
        "strength": [*both, *base],
        "interference": [*both, "--draws", 20],
        "atlas": both,
        "tokens": [folder / "a", *base, "--draws", 20],
    }[command]


COMMANDS = ["used-rank", "reproducible", "same", "strength", "interference", "atlas", "tokens"]


@pytest.mark.parametrize("command", COMMANDS)
def test_they_print_80_columns_and_say_how_to_read_them(
    files: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, *call(files, command)) == 0
    printed = capsys.readouterr().out
    # Whole names may be longer than a line: each stands on one of its own.
    assert all(len(line) <= 80 for line in printed.splitlines() if str(files) not in line)
    assert "chance" in printed or "random" in printed or "merge S/N" in printed
    assert "nan" not in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_the_table_of_the_function(
    files: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, *call(files, command), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    a, b = la.load_adapter(files / "a"), la.load_adapter(files / "b")
    base = la.load_base(files / "base.safetensors")
    made = {
        "used-rank": lambda: la.used_rank_table([a, b], draws=50),
        "reproducible": lambda: la.reproducible_table([a, b], draws=50),
        "same": lambda: la.sameness_table(a, b, draws=50),
        "strength": lambda: la.strength_table([a, b], base),
        "interference": lambda: la.interference_table([a, b], draws=20),
        "atlas": lambda: la.atlas([a, b]).pairs(),
        "tokens": lambda: la.token_table(a, base, lambda i: f"word{i}", directions=1, draws=20),
    }[command]()
    assert len(rows) == len(made) > 0
    assert list(rows[0]) == list(made.columns)
    for column in made.select_dtypes("number"):
        got = [row[column] for row in rows]
        expected = [None if pd.isna(value) else value for value in made[column].astype(object)]
        assert got == pytest.approx(expected), column


def test_merged_adapters_are_written_and_read_back(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    code = run(monkeypatch, "merge", files / "a", files / "b", "--weights", "0.5,-1", "--out", out)
    assert code == 0
    assert "4 modules in" in capsys.readouterr().out
    merged, a, b = (la.load_adapter(folder) for folder in (out, files / "a", files / "b"))
    for module in MODULES:
        expected = 0.5 * a[module].dense() - b[module].dense()
        torch.testing.assert_close(merged[module].dense(), expected, rtol=1e-5, atol=1e-4)
    assert run(monkeypatch, "merge", files / "a", "--r", 2, "--out", tmp_path / "cut", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert all(0 < module["truncation_error_relative"] < 1 for module in content["modules"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "a", "--method", "ties", "--out", "x"], 2, "expected one of sum, tsv, iso-c, knots"),
        (["merge", "a", "--weights", "1,x", "--out", "x"], 2, "expected numbers, such as"),
        (["reproducible", "a"], 2, "expected two or more"),
        (["interference", "a"], 2, "expected two or more"),
        (["tokens", "a", "--base", "base.safetensors", "--tokenizer", "no.json"], 1, "expected a tokenizer"),
    ],
)
def test_mistakes_are_told_in_a_line(
    files: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert run(monkeypatch, *arguments) == code
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in told
