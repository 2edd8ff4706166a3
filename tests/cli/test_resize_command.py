"""``lora-analysis resize`` on files: what it writes, prints and refuses."""

import json
import sys
from unittest import mock

import pytest
import torch

import lora_analysis as la
from lora_analysis import cli


def called(capsys, *arguments):
    """The command in this process, which spares the time of starting one: exit code, stdout, stderr."""
    with mock.patch.object(sys, "argv", ["lora-analysis", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def with_spectrum(*values, scale=1.0):
    U, V = (torch.linalg.qr(torch.randn(d, len(values))).Q for d in (24, 16))
    return la.LowRankUpdate(U * torch.tensor(values), V.mT.contiguous(), scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A PEFT adapter of four modules of r = 4, 640 parameters, on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("adapter")
    spectra = {
        "encoder.layer.0.attention.self.query": (8.0, 6.0, 0.1, 0.01),
        "encoder.layer.0.attention.self.value": (4.0, 0.5, 0.1, 0.1),
        "encoder.layer.1.attention.self.query": (3.0, 3.0, 3.0, 3.0),
        "encoder.layer.1.attention.self.value": (0.01, 0.01, 0.01, 0.01),
    }
    la.save_adapter(la.Adapter({name: with_spectrum(*S, scale=2.0) for name, S in spectra.items()}), path)
    return path


def test_what_is_written_is_the_functions_adapter_with_every_error_printed(folder, tmp_path, capsys):
    out = tmp_path / "small"
    code, printed, _ = called(capsys, "resize", folder, out, "--energy", "0.9")
    assert code == 0
    lines = printed.splitlines()
    assert max(map(len, [line for line in lines if str(out) not in line])) <= 80
    assert "r before  r after  ‖lost‖/‖ΔW‖" in printed
    assert "In sum 440 of 640 parameters (68.8%), ‖lost‖/‖ΔW‖ 0.0" in printed
    assert "4 modules, read back and compared." in printed
    expected = la.resize(la.load_adapter(folder), energy=0.9)
    written = la.load_adapter(out)
    assert {name: module.r for name, module in written.modules.items()} == {
        name: module.r for name, module in expected.modules.items()
    }
    for name, update in expected.items():
        assert torch.equal(written[name].dense(), update.dense()), name
        assert written.modules[name].scale == 2.0
        layer, kind = name.split(".")[2], name.rpartition(".")[2]
        [row] = [line.split() for line in lines if line.startswith(layer) and f"{kind} " in line and " is " not in line]
        assert row[1:3] == ["4", str(update.r)]


def test_a_share_of_the_parameters_is_a_budget(folder, tmp_path, capsys):
    code, printed, _ = called(capsys, "resize", folder, tmp_path / "half", "--budget", "37.5%", "--json")
    assert code == 0
    summary = json.loads(printed)
    expected = la.resize(la.load_adapter(folder), budget=240)
    assert (summary["parameters_before"], summary["parameters"], summary["format"]) == (640, 240, "peft")
    assert [row["r"] for row in summary["modules"]] == [module.r for module in expected.modules.values()]
    assert [row["r_before"] for row in summary["modules"]] == [4, 4, 4, 4]
    assert [row["truncation_error"] for row in summary["modules"]] == pytest.approx(
        [module.truncation_error for module in expected.modules.values()]
    )
    assert summary["notes"] == list(expected.notes)
    assert "1 module of r = 0 not written" in summary["losses"][0]
    whole = sum(update.norm() ** 2 for update in la.load_adapter(folder).values()) ** 0.5
    assert summary["truncation_error_relative"] == pytest.approx(summary["truncation_error"] / whole)
    again = called(capsys, "resize", folder, tmp_path / "240", "--budget", "240", "--json")
    assert json.loads(again[1])["modules"] == summary["modules"]


def test_other_formats_dtypes_and_raised_ranks(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    options = ["--to", "kohya", "--component", "text_encoder", "--dtype", "bfloat16", "--seed", "3"]
    code, printed, noted = called(capsys, "resize", folder, out, "--r", "6", *options)
    assert code == 0
    assert "960 of 640 parameters (150.0%)" in printed
    assert "lost: 4 modules rounded" in printed
    assert "columns that change nothing until they are trained" in noted
    written = la.load_adapter(out)
    assert (written.format, {module.r for module in written.modules.values()}) == ("kohya", {6})
    drawn = la.resize(la.load_adapter(folder), r=6, seed=3)["encoder.layer.0.attention.self.query"].down[4:]
    name = "lora_te_encoder_layer_0_attention_self_query"
    assert torch.equal(written[name].down[4:], drawn.bfloat16())


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        ([], 2, "expected exactly one of --r, --energy, --threshold, --budget, got none"),
        (["--r", "2", "--budget", "50%"], 2, "got --r and --budget"),
        (["--r", "0"], 2, "--r"),
        (["--energy", "1.5"], 2, "energy: expected a share in (0, 1], got 1.5"),
        (["--threshold", "1"], 2, "threshold: expected a part of the largest singular value in (0, 1), got 1.0"),
        (["--budget", "half"], 2, "expected a number of parameters, such as 100000, or per cent, such as 50%"),
        (["--budget", "0%"], 2, "got '0%'"),
        (["--budget", "101%"], 2, "got '101%'"),
        (
            ["--budget", "39"],
            2,
            "budget: expected at least 40 parameters, one direction of the smallest module, got 39",
        ),
        (["--r", "2", "--to", "gguf"], 1, "architecture"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_named_and_leave_nothing(folder, tmp_path, capsys, options, code, match):
    found, printed, said = called(capsys, "resize", folder, tmp_path / "out", *options)
    assert (found, printed) == (code, "")
    assert match in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scale_is_one_line_with_its_cure(folder, tmp_path, capsys):
    source = tmp_path / "bare"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    code, printed, said = called(capsys, "resize", source, tmp_path / "out", "--budget", "50%")
    assert (code, printed) == (1, "")
    assert "Pass alpha=" in said
    assert not (tmp_path / "out").exists()
    code, printed, _ = called(capsys, "resize", source, tmp_path / "out", "--budget", "50%", "--alpha", "8")
    assert code == 0
    assert {module.scale for module in la.load_adapter(tmp_path / "out").modules.values()} == {2.0}
