"""Every command on adapters at the edge: an answer, or one line that says what was expected, and never a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import lora_analysis as la

NAMES = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(2) for kind in "qv"]
KINDS = ("r>d", "zero", "bfloat16", "nan", "no alpha", "disjoint")
BASE = ("--base", "base.safetensors")
DRAWS = ("--draws", "20")
OF_ONE = {
    "inspect": (),
    "lint": (),
    "spectrum": (),
    "layers": DRAWS,
    "used-rank": DRAWS,
    "strength": BASE,
    "amplify": (*BASE, *DRAWS),
    "overlap": (*BASE, *DRAWS),
    "intruders": BASE,
    "magnitude": BASE,
}
OF_TWO = {
    "compare": DRAWS,
    "same": DRAWS,
    "reproducible": DRAWS,
    "interference": DRAWS,
    "atlas": (),
    "merge": ("--out", "merged", "--overwrite"),
    "figure ranks": ("--out", "ranks.svg"),
    "figure atlas": ("--out", "atlas.svg"),
    "report": (*DRAWS, "--out", "pages"),
}
REFUSED = {
    ("atlas", "nan"): "expected finite numbers",
    ("merge", "nan"): "nan: 'model.layers.0.self_attn.q_proj'",
    ("figure atlas", "nan"): "expected finite numbers",
    ("atlas", "no alpha"): "Pass alpha=",
    ("merge", "no alpha"): "Pass alpha=",
    ("figure atlas", "no alpha"): "Pass alpha=",
    ("compare", "disjoint"): "expected modules of like name, found none",
    ("same", "disjoint"): "expected modules of like name, found none",
    ("reproducible", "disjoint"): "expected modules that all adapters have, got none",
    ("interference", "disjoint"): "expected modules that two adapters have, got none",
    ("figure ranks", "disjoint"): "expected modules of like name, found none",
}
"""What has no answer, and what is said instead; everything else is answered."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def save(kind: str, r: int, dtype: torch.dtype = torch.float32, strength: float = 1.0) -> None:
        names = ["other.q_proj"] if kind == "disjoint" else NAMES
        updates = {
            name: la.LowRankUpdate((strength * random(12, r)).to(dtype), random(r, 10).to(dtype), 0.5) for name in names
        }
        la.save_adapter(la.Adapter(updates), folder / kind)

    for kind in ("ok", "nan", "disjoint"):
        save(kind, 4)
    save("r>d", 30)
    save("zero", 4, strength=0.0)
    save("bfloat16", 4, torch.bfloat16)
    file = folder / "nan" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if "layers.0" in key and "q_proj.lora_B" in key)].fill_(math.nan)
    save_file(tensors, file)
    bare = {f"{name}.lora_A": random(4, 10) for name in NAMES} | {f"{name}.lora_B": random(12, 4) for name in NAMES}
    save_file(bare, folder / "no alpha")
    (folder / "no alpha").rename(folder / "no alpha.safetensors")
    save_file({f"{name}.weight": random(12, 10) for name in NAMES}, folder / "base.safetensors")
    return folder


def path_of(kind: str) -> str:
    return "no alpha.safetensors" if kind == "no alpha" else kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "disjoint"])
def test_commands_of_one_adapter_answer(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for command, options in OF_ONE.items():
        readable = run(command, path_of(kind), *options)
        assert readable.returncode in ((0, 3, 4) if command == "lint" else (0,)), (command, readable.stderr)
        assert readable.stdout
        json.loads(run(command, path_of(kind), *options, "--json").stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_of_two_adapters_answer_or_say_why_not(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for command, options in OF_TWO.items():
        found = run(*command.split(), "ok", path_of(kind), *options)
        said = found.stderr.strip().splitlines()
        if (command, kind) not in REFUSED:
            assert found.returncode == 0, (command, found.stderr)
            continue
        assert found.returncode == 1, command
        assert said[-1].startswith("lora-analysis: ")
        assert REFUSED[command, kind] in said[-1], command
