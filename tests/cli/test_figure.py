"""Figures by name from the command line: they are drawn, and what is wrong is said in a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis import cli
from lora_analysis.cli.figure import METRICS, middle_modules

NAMES = [f"layers.{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qkv"]
PUBLISHED = Path(__file__).parents[2] / "figures" / "study-minilm"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for name, r in (("a", 4), ("b", 6)):
        down = {module: 2 * torch.rand(r, 20, generator=generator) - 1 for module in NAMES}  # as A begins
        updates = {module: la.LowRankUpdate(random(24, r), down[module] / 20**0.5, scale=0.5) for module in NAMES}
        la.save_adapter(la.Adapter(updates), folder / name)
    save_file({f"{module}.weight": random(24, 20) for module in NAMES}, folder / "base.safetensors")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-analysis", "figure", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


ONE, TWO, BASE = ("a",), ("a", "b"), ("a", "--base", "base.safetensors")
CALLS = [
    ("spectra", ONE),
    ("ranks", TWO),
    ("seeds", TWO),
    ("grid", (*TWO, "--target", "A")),
    ("amplification", BASE),
    ("gain", (*BASE, "--k", "2", "--columns", "2")),
    ("overlap", (*BASE, "--side", "out")),
    ("atlas", TWO),
    *(("map", (*BASE, "--metric", metric)) for metric in METRICS),
]


@pytest.mark.parametrize(("kind", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_every_figure_is_drawn(
    files: Path, kind: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    out = tmp_path / "drawn.svg"
    assert run(monkeypatch, kind, *arguments, "--out", out) == 0
    assert out.read_text("utf-8").count("<path") > 10


def test_a_name_is_given_where_none_is_asked_for(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "spectra", files / "a") == 0
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("map", "a"), 2, "--base: expected the base model"),
        (("ranks", "a"), 2, "expected two adapters, got 1"),
        (("spectra", "a", "b"), 2, "expected one adapter, got 2"),
        (("grid", "a", "b", "--module", "layers.9.q"), 1, "no module 'layers.9.q' (first: 'layers.0.self_attn."),
        (("spectra", "a", "--out", "figure.txt"), 2, "expected a name ending in .pdf, .png, .svg"),
        (("ablation", "a"), 1, "plan.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_told(
    files: Path,
    arguments: tuple[str, ...],
    code: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    assert run(monkeypatch, *arguments) == code
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert why in told


def test_json_says_where_it_is(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                               tmp_path: Path) -> None:  # fmt: skip
    assert run(monkeypatch, "spectra", files / "a", "--out", tmp_path / "s.pdf", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"figure": str(tmp_path / "s.pdf")}


def test_the_middle_layer_is_drawn() -> None:
    assert middle_modules(NAMES) == ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert middle_modules(["x.0.up", "x.0.down", "x.0.gate"]) == ["x.0.up", "x.0.down"]
    assert middle_modules([]) == []
