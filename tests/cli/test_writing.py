"""What commands write over, what they leave out of a pattern, and other stumbles of a first walk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis.checkpoint import gguf_names
from lora_analysis.errors import UnsupportedAdapterError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        up, down = torch.randn(24, 4, generator=generator), torch.randn(4, 20, generator=generator)
        la.save_adapter(la.Adapter({"layers.0.q_proj": la.LowRankUpdate(up, down, 0.5)}), tmp_path / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").write_text("loss 1.0")
    save_file({"layers.0.q_proj.weight": torch.randn(24, 20, generator=generator)}, tmp_path / "base.safetensors")
    return tmp_path


COMMANDS = {
    "resize": ["a", "b", "--r", "2"],
    "convert": ["a", "b", "--to", "peft"],
    "merge": ["a", "a", "--out", "b"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_is_not_written_over_unless_asked(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = (folder / "b" / "adapter_model.safetensors").read_bytes()
    refused = run(command, *COMMANDS[command])
    assert refused.returncode == 2
    assert "b: expected nothing there, got a folder" in " ".join(refused.stderr.replace("│", " ").split())
    assert (folder / "b" / "adapter_model.safetensors").read_bytes() == before
    done = run(command, *COMMANDS[command], "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (folder / "b" / "adapter_model.safetensors").read_bytes() != before


def test_what_is_read_is_never_written_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = (folder / "a" / "adapter_model.safetensors").read_bytes()
    for arguments in (["resize", "a", "./a", "--r", "2"], ["merge", "b", "a", "--out", "a"]):
        found = run(*arguments, "--overwrite")
        assert found.returncode == 2
        assert "expected another place than the adapter that is read" in " ".join(found.stderr.split())
    assert (folder / "a" / "adapter_model.safetensors").read_bytes() == before


def test_a_pattern_may_catch_what_is_no_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = run("atlas", "a", "b", "logs", "--json")
    assert found.returncode == 0
    assert "left out: logs" in found.stderr
    assert len(json.loads(found.stdout)) == 1
    assert run("atlas", "logs").returncode == 1
    assert run("atlas", "logs", "logs").returncode == 1
    # Where every adapter that is named counts, none is left out.
    assert run("interference", "a", "b", "logs").returncode == 1


def test_an_adapter_is_itself(folder: Path) -> None:
    printed = " ".join(run("same", folder / "a", folder / "a").stdout.split())
    assert "The updates are the same." in printed
    assert "Of the rows of A 100% are shared" in printed
    twice = la.load_adapter(folder / "a")["layers.0.q_proj"]
    assert isinstance(twice, la.LowRankUpdate)
    la.save_adapter(la.Adapter({"layers.0.q_proj": la.LowRankUpdate(twice.up, twice.down, 1.0)}), folder / "twice")
    printed = " ".join(run("same", folder / "a", folder / "twice").stdout.split())
    assert "The updates are the same up to their scale." in printed


def test_what_a_method_does_to_an_update_is_said(folder: Path) -> None:
    printed = " ".join(
        run("merge", folder / "a", folder / "b", "--method", "tsv", "--out", folder / "c").stdout.split()
    )
    assert "TSV keeps the first 50% of each adapter's directions" in printed
    assert "of the sum" in printed


def test_the_library_of_gguf_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_names._templates.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedAdapterError, match=r'pip install "lora-analysis\[gguf\]"'):
        gguf_names._templates("llama")
    gguf_names._templates.cache_clear()


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.startswith("lora-analysis 0.")
