"""``lora-analysis intruders`` and ``overlap`` on files."""

import json

import pandas as pd
import pytest
import torch
from command_line import run
from safetensors.torch import save_file

import lora_analysis as la


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two PEFT adapters and their base, on disk."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    modules = [f"encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
    for r in (4, 8):
        updates = {
            name: la.LowRankUpdate(
                torch.randn(24, r, generator=generator), torch.randn(r, 16, generator=generator), 0.3
            )
            for name in modules
        }
        la.save_adapter(la.Adapter(updates), folder / f"r{r}")
    save_file({f"{n}.weight": torch.randn(24, 16, generator=generator) for n in modules}, folder / "base.safetensors")
    return folder


def test_tables_written_by_the_commands_equal_those_of_the_functions(files, tmp_path):
    adapters, base = [la.load_adapter(files / f"r{r}") for r in (4, 8)], la.load_base(files / "base.safetensors")
    options = ["--base", files / "base.safetensors"]
    cases = {
        "intruders": (
            ["--k", "4,10", "--threshold", "0.4,0.6", "--draws", "3"],
            la.intruder_table(adapters, base, ks=[4, 10], thresholds=[0.4, 0.6], draws=3),
        ),
        "overlap": (
            ["--ks", "1,3", "--parts", "4", "--draws", "99"],
            la.spectrum_overlap_table(adapters, base, ks=[1, 3], parts=4, draws=99),
        ),
    }
    for name, (arguments, expected) in cases.items():
        out = tmp_path / f"{name}.parquet"
        found = run(name, files / "r4", files / "r8", *options, *arguments, "--out", out)
        assert found.returncode == 0, found.stderr
        assert found.stdout == ""
        la.write_table(expected, tmp_path / "expected.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(tmp_path / "expected.parquet"))


@pytest.mark.parametrize(("command", "heading"), [("intruders", "newest"), ("overlap", "chance")])
def test_readable_tables_fit_80_columns_and_json_is_json(files, command, heading):
    readable = run(command, files / "r4", "--base", files / "base.safetensors")
    assert readable.returncode == 0, readable.stderr
    assert max(map(len, readable.stdout.splitlines())) <= 80
    assert heading in readable.stdout
    rows = json.loads(run(command, files / "r4", "--base", files / "base.safetensors", "--json").stdout)
    assert {row["side"] for row in rows} == {"out", "in"}
    assert set(rows[0]) >= {"adapter", "module", "k", "energy_share", "flags"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["intruders", "--threshold", "1.5"], "expected cosines above 0 and up to 1"),
        (["intruders", "--k", "0"], "expected integers from 1"),
        (["overlap", "--ks", "x"], "expected integers from 1"),
    ],
)
def test_wrong_options_are_wrong_usage(files, arguments, message):
    found = run(*arguments, files / "r4", "--base", files / "base.safetensors")
    assert found.returncode == 2
    assert message in " ".join(found.stderr.split())
