"""Help that can be typed: every example runs, and so does what each command suggests as the next."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis import cli
from lora_analysis.cli.suggestions import NEXT, next_line

COMMANDS = {command.__name__: (command, short) for command, short in cli.COMMANDS}
LONG = ("train", "ablate", "demo")
"""Commands that train, whose examples are those of their own tests."""
NAMES = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qk"]
SHAPES = {name: (64 if "q_proj" in name else 16, 64) for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for name in ("r8", "r64", "mnli", "agnews", "seed0", "seed1", "r8-seed0", "r8-seed1", "dora"):
        r = 12 if name == "r64" else 8
        updates = {module: la.LowRankUpdate(random(d, r), random(r, 64), 0.5) for module, (d, _) in SHAPES.items()}
        la.save_adapter(la.Adapter(updates), folder / "runs" / name)
    weights = {f"{module}.weight": random(*shape) for module, shape in SHAPES.items()}
    weights["model.embed_tokens.weight"] = random(20, 64)
    (folder / "models" / "llama").mkdir(parents=True)
    for place in ("model.safetensors", "base.safetensors", "models/llama/model.safetensors"):
        save_file(weights, folder / place)
    save_file({name: weight + 0.1 * random(*weight.shape) for name, weight in weights.items()},
              folder / "tuned.safetensors")  # fmt: skip
    words = {f"word{number}": number for number in range(20)}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                 "pre_tokenizer": None, "post_processor": None, "decoder": None,
                 "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"}}  # fmt: skip
    (folder / "models" / "llama" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    words = shlex.split(line)
    assert words[0] == "lora-analysis"
    expanded = [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
    monkeypatch.setattr(sys, "argv", expanded)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def example(name: str) -> str:
    found = re.findall(r"^ *Example: (.*)$", COMMANDS[name][0].__doc__ or "", re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_line_in_the_list_and_an_example(name: str) -> None:
    command = name.replace("_", "-")
    assert example(name).startswith(f"lora-analysis {command} ")
    short = COMMANDS[name][1]
    assert short.endswith((".", "?", ")"))
    assert len(short) <= 58  # or the list would cut it


def test_every_command_has_json() -> None:
    for name, (command, _) in COMMANDS.items():
        assert "as_json" in inspect.signature(command).parameters, name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in LONG])
def test_the_example_runs(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, example(name)) in ((0, 3) if name == "lint" else (0,))


def test_the_list_of_commands_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lora-analysis", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = capsys.readouterr().out.splitlines()
    assert max(map(len, listed)) <= 80
    for name, (_, short) in COMMANDS.items():
        assert any(line.split() == [name.replace("_", "-"), *short.split()] for line in listed), name


ARGUMENTS = {
    "adapters": ["runs/r8", "runs/r64"],
    "adapter_a": None,
    "base": "model.safetensors",
    "format": "peft",
    "alpha": 16.0,
}
OWN = {
    "inspect": {"adapter": "runs/r8"},
    "lint": {"adapter": "runs/r8"},
    "convert": {"adapter": "runs/r8", "destination": "runs/seed0"},
    "resize": {"adapter": "runs/r8", "out": "runs/seed0"},
    "merge": {"out": "runs/seed0"},
    "compare": {"adapter_a": "runs/r8", "adapter_b": "runs/r64"},
    "same": {"adapter_a": "runs/r8", "adapter_b": "runs/r64"},
    "layers": {"adapter": "runs/r8"},
    "train": {"out": "runs/seed0"},
}


@pytest.mark.parametrize("name", [name for name in NEXT if name not in ("ablate", "demo")])
def test_what_is_suggested_runs(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {**ARGUMENTS, **({"adapters": []} if name in OWN and name != "merge" else {}), **OWN.get(name, {})}
    line = next_line(name, one)
    assert line is not None
    assert "{" not in line
    assert run(monkeypatch, line) in ((0, 3) if " lint " in line else (0,))


def test_nothing_is_suggested_where_there_is_nothing_to_name() -> None:
    assert set(NEXT) < set(COMMANDS)
    assert next_line("same", {"adapter_a": "runs/r8", "adapter_b": None}) is None  # one alone has no interference
    assert next_line("tokens", ARGUMENTS) is None
    assert next_line("spectrum", {**ARGUMENTS, "out": "table.csv"}) is None
    assert next_line("ablate", {"out": Path("study")}) == "lora-analysis figure ablation study --out ablation.pdf"


@pytest.mark.parametrize(("terminal", "extra", "said"), [(True, "", True), (False, "", False), (True, "--json", False)])
def test_suggestions_are_for_people_at_a_terminal(
    terminal: bool,
    extra: str,
    said: bool,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert run(monkeypatch, f"lora-analysis inspect runs/r8 {extra}") == 0
    assert ("Next: lora-analysis lint runs/r8" in capsys.readouterr().out) == said
