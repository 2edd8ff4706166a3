"""The command line as a user meets it, its output read as text."""

import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from unittest import mock

import pandas as pd
import pytest
import torch
from command_line import run
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis import cli


def run_alone(*arguments, **environment):
    """In a process of its own."""
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
        "target": {
            "tensor": "encoder.layer.0.attention.self.query.weight",
            "transposed": False,
            "rows": None,
            "columns": None,
            "expert": None,
            "kernel": [],
        },
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


def test_hostile_and_foreign_files_are_one_named_line_and_execute_nothing(tmp_path, monkeypatch, capsys):
    count = 0
    for path in hostile_files(tmp_path):
        monkeypatch.setattr(sys, "argv", ["lora-analysis", "inspect", str(path)])
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.startswith(f"lora-analysis: {path}")
        assert found.err.count("\n") == 1
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
        ["compare", "{r4}", "{r8}", "--pairs", "a=b=c"],
        ["layers", "{r4}", "--pairs", "same"],
        ["amplify", "{r4}", "--base", "{base}", "--ks", "0"],
        ["amplify", "{r4}", "--base", "{base}", "--ks", "1,99999999999999999999"],
        ["inspect", "{r4}", "--split", "x"],
        ["inspect", "{r4}", "--alpha", "nan"],
        ["inspect", "{r4}", "--device", "nonsense"],
        ["inspect", "{r4}", "--device", "meta"],
        ["inspect", "{r4}", "--device", "cuda:99"],
        ["compare", "{r4}", "{r8}", "--draws", "100000000000"],
        ["compare", "{r4}", "{r8}", "--draws", "0"],
        ["compare", "{r4}", "{r8}", "--seed", "-1"],
        ["compare", "{r4}", "{r8}", "--seed", "99999999999999999999"],
        ["spectrum", "{r4}", "--workers", "0"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(files, arguments, capsys):
    paths = {"r4": files / "r4", "r8": files / "r8", "base": files / "base.safetensors"}
    with pytest.raises(SystemExit, match="2"):
        cli.app([argument.format(**paths) for argument in arguments])
    found = capsys.readouterr()
    assert found.out == ""
    assert "No such command 'nonsense'" in found.err or re.search(f"Invalid value for '?{arguments[-2]}'?: ", found.err)


def test_names_with_terminal_escapes_are_shown_as_text(tmp_path):
    name = "layer\x1b[31m\u202e.[bold]q"
    save_file({f"{name}.lora_A": torch.ones(1, 2), f"{name}.lora_B": torch.ones(2, 1)}, tmp_path / "a.safetensors")
    found = run("spectrum", tmp_path / "a.safetensors", "--alpha", "1")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout
    assert "\u202e" not in found.stdout
    assert "\\x1b[31m\\u202e.[bold]q" in found.stdout.replace("\n", "")


def test_directories_with_terminal_escapes_are_shown_as_text(files, tmp_path):
    hostile = shutil.copytree(files / "r4", tmp_path / "a\x1b[31m")
    found = run("spectrum", hostile, files / "r8")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout
    assert f"{tmp_path}/a\\x1b[31m\n" in found.stdout


@pytest.mark.parametrize("options", [["--json"], []], ids=["long", "short enough for a buffer"])
def test_output_whose_reader_has_gone_is_no_error(files, options):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        found = subprocess.run(
            [sys.executable, "-m", "lora_analysis", "spectrum", files / "r4", *options],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (found.returncode, found.stderr) == (0, "")


def test_output_is_cut_short_by_head(files):
    pair = [sys.executable, "-m", "lora_analysis", "compare", files / "r4", files / "r8", "--cells", "all", "--json"]
    with subprocess.Popen(pair, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        head = subprocess.run(["head", "-n", "1"], stdin=writer.stdout, capture_output=True, text=True, check=True)
        writer.stdout.close()
        assert head.stdout == "[\n"
        assert writer.stderr.read() == b""
    assert writer.returncode == 0


def test_an_error_keeps_its_exit_code_when_the_reader_has_gone(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        command = [sys.executable, "-m", "lora_analysis", "inspect", tmp_path / "absent"]
        found = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, check=False)
    assert found.returncode == 1


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_cannot_hold_symbols_has_question_marks(files, encoding):
    command = [sys.executable, "-m", "lora_analysis", "spectrum", files / "r4"]
    found = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert found.returncode == 0, found.stderr
    lines = found.stdout.decode(encoding).splitlines()
    assert next(line for line in lines if line.startswith("module")).split()[:3] == ["module", "r", "??W?"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("inspect", ["{0}"]),
        ("spectrum", ["{0}"]),
        ("compare", ["{0}", "{0}"]),
        ("layers", ["{0}"]),
        ("amplify", ["{0}", "--base", "{0}/base.safetensors"]),
    ],
)
def test_one_of_several_adapters_is_chosen_by_name(files, command, arguments, capsys):
    arguments = [command, *(argument.format(files) for argument in arguments)]
    with pytest.raises(la.AdapterFormatError, match="a folder of 2"):
        cli.app(arguments)
    cli.app([*arguments, "--name", "r4", "--json"], standalone_mode=False)
    named = capsys.readouterr().out
    direct = [str(files / "r4") if argument == str(files) else argument for argument in arguments]
    cli.app([*direct, "--json"], standalone_mode=False)
    expected = capsys.readouterr().out.replace(str(files / "r4"), str(files))
    assert json.loads(named) == json.loads(expected)


def test_the_demo_does_not_start_where_a_file_is(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        found = run("demo", "--out", out)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr == f"lora-analysis: {out}: expected a directory, got a file. Pass another --out.\n"
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_demo_does_not_start_without_its_packages(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers')")
    found = run_alone("demo", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert (found.returncode, found.stdout) == (1, "")
    told, error = found.stderr.splitlines()
    assert told.startswith("Importing")
    assert error.startswith("lora-analysis: all-MiniLM-L6-v2: expected transformers")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (la.AdapterFormatError("bad"), 1),
        (FileNotFoundError("bad"), 1),
        (MemoryError("bad"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: bad"), 1),
        (torch.OutOfMemoryError("bad"), 1),
        (ValueError("bad"), 2),
    ],
)
def test_errors_that_are_no_bugs_are_one_line(error, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit, match=str(code)):
        cli.main()
    assert capsys.readouterr().err.startswith("lora-analysis: ")


@pytest.mark.parametrize("error", [TypeError("bug"), RuntimeError("bug"), KeyError("bug")])
def test_bugs_are_not_dressed_up(error, monkeypatch):
    monkeypatch.setattr(cli, "app", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match="bug"):
        cli.main()


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
