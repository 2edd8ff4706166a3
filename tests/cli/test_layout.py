"""Lines of tables: every cell is there in full, whatever the names, flags and width."""

import math
import re

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_analysis as la
from lora_analysis.cli.amplify import amplify
from lora_analysis.cli.compare import compare, layers
from lora_analysis.cli.inspect import inspect
from lora_analysis.cli.layout import laid_out
from lora_analysis.cli.output import wrapped
from lora_analysis.cli.spectrum import spectrum

NAMES = {
    "long, nothing shared": ["lm_head", "model.language_model.layers.0.self_attn.q_proj"],
    "unet": [
        f"{block}.attentions.{i}.transformer_blocks.0.attn{k}.{kind}"
        for block in ("down_blocks.0", "up_blocks.1", "mid_block")
        for i in (0, 1)
        for k in (1, 2)
        for kind in ("to_q", "to_out.0")
    ],
    "300 characters": ["a" * 300, "b" * 300, "c"],
    "300 characters, alike": ["x" * 150 + "." + middle + "." + "x" * 148 for middle in "ab"],
    "one": ["model.language_model.layers.0.self_attn.q_proj"],
    "short": ["q", "k"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Adapters with small numbers, which take most columns, and their bases."""
    folder = tmp_path_factory.mktemp("written")
    generator = torch.Generator().manual_seed(0)
    for case, names in NAMES.items():
        factors, base = {}, {}
        for name in names:
            factors[f"{name}.lora_A"] = 1e-4 * torch.randn(4, 16, generator=generator)
            factors[f"{name}.lora_B"] = 1e-4 * torch.randn(16, 4, generator=generator)
            base[f"{name}.weight"] = 1e-4 * torch.randn(16, 16, generator=generator)
        save_file(factors, folder / f"{case}.safetensors")
        save_file(base, folder / f"{case}.base.safetensors")
    return folder


def parsed(text, headings, names):
    """Rows of the first table of a text, as dictionaries, with full names; flags are a list of words."""
    lines = text.split("\n\n")[0].splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "module")
    legend = dict(line.split(" is ") for line in lines[:start] if " is " in line)
    table = lines[start:]
    assert max(map(len, table)) <= 80
    assert table[0].split() in (headings, [*headings, "flags"])
    rows = []
    for line in table[1:]:
        if line.startswith(" "):
            rows[-1][-1].extend(line.split())
        else:
            cells = line.split()
            rows.append([*cells[: len(headings)], cells[len(headings) :]])
    for row in rows:
        for c in (0, 1) if headings[1] == "module" else (0,):
            row[c] = legend.get(row[c]) or full_name(row[c], names)
    return rows


def full_name(label, names):
    """The one name that an elided label can be of."""
    pattern = ".*".join(["", *map(re.escape, label.split("…")), ""])
    found = [name for name in names if name == label] or [name for name in names if re.fullmatch(pattern, name)]
    assert len(found) == 1, (label, found)
    return found[0]


def assert_same(cell, value, digits=3):
    if isinstance(value, str):
        assert cell == value
    elif value is None or value is pd.NA or math.isnan(value):
        assert cell == "-"
    elif cell.endswith("%"):
        assert float(cell[:-1]) / 100 == pytest.approx(value, abs=5.1e-4)  # one decimal of a per cent
    else:
        assert float(cell) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))  # that many significant digits


@pytest.mark.parametrize("case", NAMES)
def test_every_figure_of_spectrum_is_printed_in_full(written, case, capsys):
    path = written / f"{case}.safetensors"
    spectrum([str(path)], alpha=4.0)
    found = parsed(
        capsys.readouterr().out,
        ["module", "r", "‖ΔW‖", "σ₁", "stable", "eff.", "k90", "rank", "resolved"],
        NAMES[case],
    )
    table = la.spectrum_table(la.load_adapter(path, alpha=4.0))
    columns = [
        "module",
        "r",
        "norm",
        "sigma_max",
        "stable_rank",
        "effective_rank",
        "k90",
        "numerical_rank",
        "resolved_rank",
    ]
    assert len(found) == len(table)
    for cells, row in zip(found, table.to_dict("records"), strict=True):
        for cell, column in zip(cells, columns, strict=False):
            assert_same(cell, row[column])
        assert cells[-1] == row["flags"].split()


@pytest.mark.parametrize("case", NAMES)
def test_every_figure_of_inspect_is_printed_in_full(written, case, capsys):
    path = written / f"{case}.safetensors"
    inspect(str(path))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    assert max(map(len, lines[start:])) <= 80
    assert lines[start].split()[:7] == ["module", "d_out", "d_in", "r", "scale", "scale", "from"]
    rows = [line for line in lines[start + 1 :] if not line.startswith(" ")]
    assert [row.split()[1:6] for row in rows] == [["16", "16", "4", "-", "unknown"]] * len(NAMES[case])
    assert "\n".join(lines[start:]).count("unknown-scale") == len(rows)


@pytest.mark.parametrize("case", NAMES)
def test_every_figure_of_amplify_is_printed_in_full(written, case, capsys):
    path, base = written / f"{case}.safetensors", written / f"{case}.base.safetensors"
    amplify([str(path)], str(base), draws=20)  # without alpha: all rows are flagged
    found = parsed(
        capsys.readouterr().out,
        ["module", "k", "‖UᵀWV‖", "random", "top", "gain", "p", "ceiling", "factor"],
        NAMES[case],
    )
    table = la.amplification_table(la.load_adapter(path), la.load_base(base), draws=20)
    columns = [
        "module",
        "k",
        "projected",
        "projected_null_rms",
        "projected_top",
        "gain",
        "p",
        "ceiling_fraction",
        "amplification",
    ]
    assert len(found) == len(table)
    for cells, row in zip(found, table.to_dict("records"), strict=True):
        for cell, column in zip(cells, columns, strict=False):
            if column == "p":
                assert float(cell) == pytest.approx(row[column], abs=5.1e-4)  # three decimals
            else:
                assert_same(cell, row[column])
        assert cells[-1] == row["flags"].split() == ["unknown-scale"]


@pytest.mark.parametrize("case", [case for case, names in NAMES.items() if len(names) > 1])
@pytest.mark.parametrize("command", ["compare", "layers"])
def test_every_figure_of_pairs_is_printed_in_full(written, case, command, capsys):
    path = written / f"{case}.safetensors"
    adapter = la.load_adapter(path)
    if command == "layers":
        layers(str(path), draws=20)
        table = la.similarity_table(adapter, draws=20)
    else:
        compare(str(path), str(path), pairs=["all"], draws=20)
        table = la.similarity_table(adapter, adapter, pairs="all", draws=20)
    headings = ["module", "module", "side", "φ(1,1)", "p", "i,j", "φ(i,j)", "chance", "p"]
    found = parsed(capsys.readouterr().out, headings, NAMES[case])
    keys = ["module_a", "module_b", "side"]
    assert len(found) == min(60, len(table.drop_duplicates(keys)))
    for a, b, side, first, _, cell, last, chance, p, flags in found:
        rows = table[(table[keys] == [a, b, side]).all(axis=1)]
        i, j = map(int, cell.split(","))
        corner = rows[(rows["i"] == i) & (rows["j"] == j)].iloc[0]
        assert_same(first, float(rows.iloc[0]["phi"]))
        assert_same(last, float(corner["phi"]))
        assert_same(chance, float(corner["null_mean"]))
        assert float(p) == pytest.approx(corner["p"], abs=5.1e-4)
        assert flags == corner["flags"].split() == ["unknown-scale"]


names = st.text("ab.01層é", min_size=1, max_size=120)
flags = st.lists(st.sampled_from(["zero", "unknown-scale", "order-undetermined", "r>d", "nonfinite"]), max_size=4)


@given(
    rows=st.lists(st.tuples(names, names, st.integers(0, 10**8), flags), min_size=1, max_size=8),
    width=st.integers(52, 120),
)
def test_cells_survive_any_names_flags_and_width(rows, width):
    cells = [[a, b, str(value), "1.23e-05", " ".join(words)] for a, b, value, words in rows]
    headings = ["module", "module", "value", "number", "flags"]
    page = laid_out(headings, cells, ["name", "name", "number", "number", "flags"], width)
    assert all(len(line) <= width for line in [page.heading, *page.lines])
    found = []
    for line in page.lines:
        if line.startswith(" "):
            found[-1].extend(line.split())
        else:
            found.append(line.split())
    assert len(found) == len(rows)
    labels = {}
    for line, (a, b, value, words) in zip(found, rows, strict=True):
        assert line[2:] == [str(value), "1.23e-05", *words]
        for label, name in zip(line, (a, b), strict=False):
            assert labels.setdefault(name, label) == label
    assert len(set(labels.values())) == len(labels)
    if any(label.startswith("#") for label in labels.values()):
        assert sorted(page.legend) == sorted(f"{label} is {name}" for name, label in labels.items())


def test_numbers_in_names_are_kept_where_levels_share_them():
    rows = [[f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.to_q"] for i in (0, 1) for j in (0, 1)]
    page = laid_out(["module"], rows, ["name"], 80)
    assert page.lines == ["0…0…0", "0…1…0", "1…0…0", "1…1…0"]
    assert page.legend == ["0…0…0 is up_blocks.0.attentions.0.transformer_blocks.0.to_q"]


def test_paths_lose_the_folders_that_all_of_them_share():
    names = [f"/data/shelf/adapters/{name}/lora.v1.safetensors" for name in ("red", "blue")]
    page = laid_out(["adapter"], [[name] for name in names], ["name"], 80)
    assert page.lines == ["red", "blue"]
    assert page.legend == [f"red is {names[0]}"]


def test_flags_empty_in_all_rows_have_no_column():
    page = laid_out(["module", "r", "flags"], [["q", "8", ""]], ["name", "number", "flags"], 80)
    assert page.heading.split() == ["module", "r"]


def test_running_text_is_no_wider_than_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the scale rests on a default " * 8
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, wrapped(text).splitlines())) > 50  # a pipe is no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert max(map(len, wrapped(text, hanging=39).splitlines())) <= 50
    monkeypatch.setenv("COLUMNS", "200")
    assert 70 < max(map(len, wrapped(text).splitlines())) <= 80
