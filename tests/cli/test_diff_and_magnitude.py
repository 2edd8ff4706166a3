"""``lora-analysis diff`` and ``magnitude`` on files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import lora_analysis as la


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model before and after, and an adapter of it, on disk."""
    folder = tmp_path_factory.mktemp("files")
    shapes = {
        f"encoder.layer.{i}.attention.self.{name}.weight": (24, 16) for i in range(2) for name in ("key", "query")
    }
    shapes |= {"embed_tokens.weight": (30, 16), "norm.weight": (16,), "gate": (3, 16)}
    for name, seed in (("base", 0), ("tuned", 50)):
        tensors = {tensor: normal(*shape, seed=seed + i) for i, (tensor, shape) in enumerate(shapes.items())}
        save_file(tensors, folder / f"{name}.safetensors")
    updates = {
        name.removesuffix(".weight"): la.LowRankUpdate(normal(24, 2), normal(2, 16, seed=1), 0.1)
        for name in shapes
        if name.startswith("encoder")
    }
    la.save_adapter(la.Adapter(updates), folder / "adapter")
    return folder


def test_a_truncated_difference_is_an_adapter_with_its_errors_stated(files, tmp_path):
    out = tmp_path / "extracted"
    found = run("diff", files / "tuned.safetensors", files / "base.safetensors", "--r", "2", "--out", out)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "In sum ‖kept‖" in found.stdout
    assert "5 modules in" in found.stderr
    assert "1 modules have no place in a PEFT adapter" in found.stderr
    assert "'gate'" in found.stderr
    assert "Warning" not in found.stderr
    whole = la.diff(files / "tuned.safetensors", files / "base.safetensors")
    written = la.load_adapter(out)
    assert set(written) == set(whole) - {"gate"}
    for name in written:
        svd = whole[name].svd(2)
        expected = svd.U * svd.S @ svd.Vh
        assert torch.allclose(written[name].dense(), expected, atol=1e-5), name
    names = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.embed_tokens.lora_embedding_A" in names
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(files / "base.safetensors")
    assert config["fan_in_fan_out"] is False


def test_errors_in_json_are_those_of_the_table(files):
    found = run("diff", files / "tuned.safetensors", files / "base.safetensors", "--energy", "0.5", "--json")
    rows = json.loads(found.stdout)
    expected = la.truncation_table(la.diff(files / "tuned.safetensors", files / "base.safetensors", energy=0.5))
    assert [row["module"] for row in rows] == expected["module"].tolist()
    assert [row["truncation_error"] for row in rows] == pytest.approx(expected["truncation_error"].tolist())
    assert [row["r"] for row in rows] == expected["r"].tolist()


def test_without_truncation_the_spectra_say_what_it_would_take(files):
    found = run("diff", files / "tuned.safetensors", files / "base.safetensors")
    assert found.returncode == 0, found.stderr
    assert "k90" in found.stdout
    rows = json.loads(run("diff", files / "tuned.safetensors", files / "base.safetensors", "--json").stdout)
    assert [row["module"] for row in rows] == list(la.diff(files / "tuned.safetensors", files / "base.safetensors"))
    assert len(rows[0]["singular_values"]) == 16


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (["--r", "2", "--energy", "0.5"], 2, "expected one of --r and --energy, got both"),
        (["--out", "x"], 2, "expected --r or --energy beside it"),
        (["--energy", "0"], 2, "expected a share in (0, 1], got 0.0"),
        (["--energy", "2"], 2, "--energy"),
        (["--r", "0"], 2, "--r"),
    ],
    ids=["both", "out alone", "no energy", "too much energy", "no r"],
)
def test_wrong_options_are_named(files, tmp_path, options, code, match):
    options = [tmp_path / option if option == "x" else option for option in options]
    found = run("diff", files / "tuned.safetensors", files / "base.safetensors", *options)
    assert (found.returncode, found.stdout) == (code, "")
    assert match in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_do_not_differ_or_are_not_there_are_one_line(files, tmp_path):
    base = files / "base.safetensors"
    same = run("diff", base, base, "--r", "2", "--out", tmp_path / "x")
    assert same.returncode == 1
    assert "expected a matrix that changed" in same.stderr
    missing = run("diff", tmp_path / "missing", base)
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_magnitudes_written_and_printed_are_those_of_the_function(files, tmp_path):
    out = tmp_path / "magnitudes.parquet"
    found = run("magnitude", files / "adapter", "--base", files / "base.safetensors", "--out", out)
    assert found.returncode == 0, found.stderr
    expected = la.magnitude_table(la.load_adapter(files / "adapter"), la.load_base(files / "base.safetensors"))
    la.write_table(expected, tmp_path / "expected.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(tmp_path / "expected.parquet"))
    readable = run("magnitude", files / "adapter", files / "adapter", "--base", files / "base.safetensors")
    assert readable.returncode == 0, readable.stderr
    assert max(map(len, readable.stdout.splitlines())) <= 80
    assert "1-cos" in readable.stdout
    rows = json.loads(run("magnitude", files / "adapter", "--base", files / "base.safetensors", "--json").stdout)
    assert [row["module"] for row in rows] == expected["module"].tolist()
