"""The command line as a user meets it: in a process of its own, its output read as text."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import lora_analysis as la


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lora_analysis", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"} | environment,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two PEFT adapters and their base, on disk."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    modules = [f"encoder.layer.{i}.attention.self.{name}" for i in range(3) for name in ("query", "value")]
    for r in (4, 8):
        updates = {
            name: la.LowRankUpdate(
                torch.randn(24, r, generator=generator), torch.randn(r, 16, generator=generator), 2.0
            )
            for name in modules
        }
        la.save_adapter(la.Adapter(updates), folder / f"r{r}")
    save_file({f"{n}.weight": torch.randn(24, 16, generator=generator) for n in modules}, folder / "base.safetensors")
    return folder


def test_inspect_names_everything(files):
    found = run("inspect", files / "r8")
    assert found.returncode == 0, found.stderr
    assert "peft, 6 modules" in found.stdout
    summary = json.loads(run("inspect", files / "r8", "--json").stdout)
    assert summary["format"] == "peft"
    assert summary["unused"] == []
    assert summary["modules"][0] == {
        "module": "encoder.layer.0.attention.self.query",
        "d_out": 24,
        "d_in": 16,
        "r": 8,
        "scale": 2.0,
        "scale_source": "config",
        "flags": "",
    }


def test_tables_written_by_commands_equal_those_of_the_functions(files, tmp_path):
    a, b = la.load_adapter(files / "r4"), la.load_adapter(files / "r8")
    base = la.load_base(files / "base.safetensors")
    cases = {
        "spectrum": (["spectrum", files / "r4", files / "r8"], la.spectrum_table([a, b])),
        "compare": (["compare", files / "r4", files / "r8", "--cells", "all"], la.similarity_table(a, b, cells="all")),
        "layers": (["layers", files / "r4", "--target", "A"], la.similarity_table(a, target="A")),
        "amplify": (
            ["amplify", files / "r4", "--base", files / "base.safetensors", "--ks", "1,3"],
            la.amplification_table(a, base, ks=[1, 3]),
        ),
    }
    for name, (arguments, expected) in cases.items():
        out = tmp_path / f"{name}.parquet"
        found = run(*arguments, "--out", out)
        assert found.returncode == 0, found.stderr
        assert found.stdout == ""
        written = pd.read_parquet(out)
        la.write_table(expected, tmp_path / "expected.parquet")
        pd.testing.assert_frame_equal(written, pd.read_parquet(tmp_path / "expected.parquet"))


@pytest.mark.parametrize("command", ["spectrum", "compare", "layers", "amplify"])
def test_readable_tables_fit_80_columns_and_json_is_json(files, command):
    arguments = {
        "spectrum": [files / "r4"],
        "compare": [files / "r4", files / "r8"],
        "layers": [files / "r4"],
        "amplify": [files / "r4", "--base", files / "base.safetensors"],
    }[command]
    readable = run(command, *arguments)
    assert readable.returncode == 0, readable.stderr
    lines = readable.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.rstrip().endswith("…") for line in lines)
    assert "0…query" in readable.stdout
    assert "\x1b" not in readable.stdout
    rows = json.loads(run(command, *arguments, "--json").stdout)
    assert rows
    assert {"flags"} <= rows[0].keys()


def test_listed_pairs_are_compared(files):
    first, second = "encoder.layer.0.attention.self.query", "encoder.layer.2.attention.self.value"
    rows = json.loads(run("compare", files / "r4", files / "r8", "--pairs", f"{first}={second}", "--json").stdout)
    assert {(row["module_a"], row["module_b"]) for row in rows} == {(first, second)}


def test_missing_values_are_null_in_json(files, tmp_path):
    save_file({"m.lora_A": torch.ones(2, 4), "m.lora_B": torch.zeros(4, 2)}, tmp_path / "zero.safetensors")
    row = json.loads(run("spectrum", tmp_path / "zero.safetensors", "--alpha", "2", "--json").stdout)[0]
    assert (row["flags"], row["stable_rank"], row["norm"]) == ("zero", None, 0.0)
    rows = json.loads(run("spectrum", tmp_path / "zero.safetensors", "--json").stdout)
    assert rows[0]["norm"] is None
    assert rows[0]["flags"] == "unknown-scale zero"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile_files(folder):
    whole = folder / "whole.safetensors"
    save_file({"m.lora_A": torch.ones(2, 4), "m.lora_B": torch.ones(4, 2)}, whole)
    data = whole.read_bytes()
    (folder / "truncated.safetensors").write_bytes(data[:-3])
    (folder / "header.safetensors").write_bytes(data[:40])
    header = json.dumps({"m.lora_A": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 16]}}).encode()
    (folder / "lying.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    (folder / "huge.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    (folder / "page.safetensors").write_text("<!doctype html><html>Not found</html>")
    (folder / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (folder / "empty.bin").write_bytes(b"")
    torch.save({"m": Evil(folder / "executed")}, folder / "code.pt")
    with (folder / "bare.bin").open("wb") as file:
        pickle.dump({"m": Evil(folder / "executed")}, file)
    save_file({"foo.finegates_rows": torch.ones(3)}, folder / "foreign.safetensors")
    save_file({"x.hada_w1_a": torch.ones(3, 2)}, folder / "loha.safetensors")
    yield from (p for p in sorted(folder.iterdir()) if p.name not in ("whole.safetensors", "executed"))
    yield folder / "absent"


def test_hostile_and_foreign_files_are_one_named_line_and_execute_nothing(tmp_path):
    count = 0
    for path in hostile_files(tmp_path):
        found = run("inspect", path)
        assert found.returncode == 1, path
        assert found.stdout == ""
        assert found.stderr.startswith(f"lora-analysis: {path}")
        assert found.stderr.count("\n") == 1
        assert "Traceback" not in found.stderr
        count += 1
    assert count == 12
    assert not (tmp_path / "executed").exists()


def test_the_base_must_hold_what_the_adapter_updates(files, tmp_path):
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    found = run("amplify", files / "r4", "--base", tmp_path / "other.safetensors")
    assert found.returncode == 1
    assert "expected the tensor 'encoder.layer.0.attention.self.query.weight'" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "{r4}", "{r8}", "--target", "C"],
        ["spectrum", "{r4}", "--out", "table.xlsx"],
        ["spectrum", "{r4}", "--format", "nothing"],
        ["amplify", "{r4}", "--base", "{base}", "--ks", "one"],
        ["compare", "{r4}", "{r8}", "--pairs", "x"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(files, arguments):
    paths = {"r4": files / "r4", "r8": files / "r8", "base": files / "base.safetensors"}
    found = run(*(argument.format(**paths) for argument in arguments))
    assert found.returncode == 2
    assert found.stdout == ""
    assert "Traceback" not in found.stderr


def test_names_with_terminal_escapes_are_shown_as_text(tmp_path):
    name = "layer\x1b[31m\u202e.[bold]q"
    save_file({f"{name}.lora_A": torch.ones(1, 2), f"{name}.lora_B": torch.ones(2, 1)}, tmp_path / "a.safetensors")
    found = run("spectrum", tmp_path / "a.safetensors", "--alpha", "1")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout
    assert "\u202e" not in found.stdout
    assert "\\x1b[31m\\u202e.[bold]q" in found.stdout.replace("\n", "")


def test_output_cut_short_by_its_reader_is_no_error(files):
    command = f"{sys.executable} -m lora_analysis spectrum {files / 'r4'} --json | head -n 1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert found.stdout == "[\n"
    assert found.stderr == ""


def test_real_adapters_equal_dense_oracles_through_the_command_line(shared_adapters, tmp_path):
    import numpy as np

    path = shared_adapters / "loralib" / "roberta_base_mnli_r8" / "roberta_base_lora_mnli.bin"
    found = run("spectrum", path, "--alpha", "16", "--out", tmp_path / "s.parquet")
    assert found.returncode == 0, found.stderr
    table = pd.read_parquet(tmp_path / "s.parquet").set_index("module")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    modules = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    assert sorted(modules) == sorted(table.index)
    for module in modules:
        delta_w = 2.0 * tensors[f"{module}.lora_B"].double().numpy() @ tensors[f"{module}.lora_A"].double().numpy()
        # The full spectrum by LAPACK of the dense matrix: slow, and shares nothing with ours.
        expected = np.linalg.svd(delta_w, compute_uv=False)[:8]
        np.testing.assert_allclose(table.loc[module, "singular_values"], expected, rtol=1e-6)
        assert math.isclose(table.loc[module, "norm"], np.linalg.norm(delta_w), rel_tol=1e-9)
