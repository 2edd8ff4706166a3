"""What a report's files say: the tables' numbers, names as text, nothing outside its folder, the same every time."""

import filecmp
import math
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from small_report import HOSTILE, MODULES, SHOWN, STUDY, adapter, data, make_adapters, make_base

import lora_analysis as la
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.report import write_report
from lora_analysis.report.data import rounded
from lora_analysis.tables.discoveries import findings

EXACT = {"rel": 1e-5, "abs": 1e-300}
"""Numbers are written with six digits."""


def columns(table):
    """A table of a page as mapping of column to values."""
    return {column["key"]: [row[i] for row in table["rows"]] for i, column in enumerate(table["columns"])}


def assert_same(shown, expected):
    """Every column shown has the values of the frame, missing where that has none."""
    for key, values in columns(shown).items():
        if key not in expected or not pd.api.types.is_numeric_dtype(expected[key]):
            continue
        for value, number in zip(values, expected[key], strict=True):
            missing = pd.isna(number) or math.isinf(number)
            assert (value is None) if missing else value == pytest.approx(float(number), **EXACT), key


def test_tables_of_a_page_equal_those_of_the_package(folder, adapters, base):
    tables = data(folder, "adapter-2")["tables"]
    one = adapters[1]
    assert_same(tables["rank"], la.used_rank_table(one, draws=99))
    assert_same(tables["strength"], la.strength_table(one, base))
    assert_same(tables["amplification"], la.amplification_table(one, base, draws=99))
    assert_same(tables["intruders"], la.intruder_table(one, base))
    assert len(columns(tables["amplification"])["gain"]) == 4 * len(MODULES)
    pair = data(folder, "pair-1-2")
    assert_same(pair["same"], la.sameness_table(adapters[0], one, draws=99))
    assert_same(pair["merge"], la.interference_table([adapters[0], one], signs=False, draws=99))


def test_map_shows_measures_with_their_chance(folder, adapters, base):
    metrics = {metric["key"]: metric for metric in data(folder, "adapter-1")["metrics"]}
    rank, gains = la.used_rank_table(adapters[0], draws=99), la.amplification_table(adapters[0], base, draws=99)
    assert metrics["effective_rank"]["values"] == rounded(rank["effective_rank"].tolist())
    assert metrics["effective_rank"]["high"] == rounded(rank["effective_rank_high"].tolist())
    last = gains[gains["k"] == 4]
    assert metrics["gain"]["values"] == rounded(last["gain"].tolist())
    assert metrics["gain"]["low"] == [1] * len(MODULES)
    assert metrics["gain"]["plain"] == (last["q"] > 0.05).tolist()
    assert set(metrics) == {
        *("relative_norm", "norm", "effective_rank", "used_share", "gain", "intruders_out", "intruders_in"),
    }


def test_grids_hold_phi_its_chance_and_p(folder, adapters):
    table = la.similarity_table(adapters[0], adapters[1], cells="all", draws=99)
    for number, module in enumerate(MODULES):
        grids = data(folder, f"phi-1-2-{number}")["sides"]
        for side in ("in", "out"):
            grid, rows = grids[side], table[(table["module_a"] == module) & (table["side"] == side)]
            assert (grid["m"], grid["n"]) == (4, 8)
            for i, j, phi, chance, p, q in rows[["i", "j", "phi", "null_mean", "p", "q"]].itertuples(index=False):
                at = (i - 1) * 8 + j - 1
                assert grid["phi"][at] == pytest.approx(phi, rel=1e-3)
                assert grid["chance"][max(i, j) - 1] == pytest.approx(chance, **EXACT)
                assert grid["p"][at] == pytest.approx(p, rel=0.06)
                assert grid["q"][at] == pytest.approx(q, rel=0.06)


def test_first_screen_answers_the_questions_and_says_what_is_chance(folder, adapters, base):
    text = text_of(folder / "adapters" / "1.html")
    for question in (
        *("Did I waste rank?", "Which layers learned?", "Are these the same?", "Will they merge?"),
        "What did it amplify?",
    ):
        assert question in text
    last = la.amplification_table(adapters[0], base, draws=99)
    assert findings(last[last["k"] == 4]["q"], "Gain at the largest k") in text
    assert "consistent with chance" in text
    assert "2 (from: caller)" in text


def test_atlas_holds_every_cosine(folder, adapters):
    found = la.atlas(adapters)
    upper = [found.cosine[a, b] for a, b in ((0, 1), (0, 2), (1, 2))]
    page = data(folder, "atlas")
    assert [value * page["unit"] for value in page["cosine"]] == pytest.approx(upper, abs=page["unit"])
    assert page["order"] == found.order()


def test_ablation_page_shows_runs_intervals_claims_and_tables(folder):
    page = data(folder, "ablation")
    claims = columns(page["claims"])
    stored = pd.read_csv(STUDY / "claims.csv")
    assert claims["id"] == stored["id"].tolist()
    assert claims["p"] == [None if pd.isna(p) else pytest.approx(p, **EXACT) for p in stored["p"]]
    runs = pd.read_parquet(STUDY / "tables" / "runs.parquet")
    (series,) = (one for one in page["metrics"][0]["series"] if one["targets"] == "q+v")
    mine = runs[(runs["task"] == "docstrings") & (runs["targets"] == "q+v") & runs["size"].isna()]
    assert len(series["points"]) == len(mine[mine["method"] == "lora"])
    assert all(bar["low"] < bar["mean"] < bar["high"] for bar in series["bars"])
    assert {table["name"] for table in page["tables"]} == {f"table_{n}" for n in (5, 6, 7, 15, 18)}


class _Page(HTMLParser):
    """The text of a page, and the tags that could run something."""

    def __init__(self):
        super().__init__()
        self.text, self.active = [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert not any(name.startswith("on") for name in named), named
        if tag in ("script", "img", "iframe", "object"):
            self.active.append((tag, named.get("src")))

    def handle_data(self, text):
        self.text.append(text)


def parsed(path):
    page = _Page()
    page.feed(path.read_text("utf-8"))
    return page


def text_of(path):
    return " ".join("".join(parsed(path).text).split())


def test_hostile_names_are_text(folder):
    for path in folder.rglob("*.html"):
        for tag, source in parsed(path).active:
            assert tag == "script"
            assert source.startswith(("assets/", "../assets/")), path
        assert not set(path.read_text("utf-8")) & {"\x1b", "\u202e"}
    text = text_of(folder / "adapters" / "3.html")
    assert text.count(SHOWN) >= 4  # heading, source, metadata's key and value
    for path in folder.glob("data/*.js"):
        content = path.read_bytes()
        assert b"<" not in content
        assert content.isascii()
    assert data(folder, "index")["rows"][2][0] == SHOWN


def test_pages_have_numbers_for_names_and_lie_in_the_folder(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"index.html", "compare.html", "atlas.html", "ablation.html", "adapters/3.html"} <= names
    assert {name for name in names if "plotly" in name} == {"assets/plotly.min.js"}
    assert all(name.isascii() and not set(name) & set("<>\"' ") for name in names)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_report_is_the_same_every_time(folder, tmp_path):
    again = write_report(make_adapters(), make_base(), out=tmp_path / "again", study=STUDY, draws=99, workers=1).parent
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    same, other, failed = filecmp.cmpfiles(folder, again, names, shallow=False)
    assert not other
    assert not failed
    assert len(same) == len(names)


def test_one_adapter_without_base_is_the_first_page(tmp_path):
    page = write_report(adapter("r2", 2), out=tmp_path / "one", draws=19)
    text = text_of(page)
    assert "Not asked: it needs the base model's weights" in text
    assert "Not asked: there is no other adapter" in text
    assert not (page.parent / "compare.html").exists()
    assert "amplification" not in data(page.parent, "adapter-1")["tables"]


def test_what_has_no_number_says_so(tmp_path):
    zero = la.Adapter({"q": la.LowRankUpdate(torch.zeros(8, 2), torch.ones(2, 8), scale=1.0)}, source="zero")
    unknown = la.Adapter({"q": la.LowRankUpdate(torch.ones(8, 2), torch.ones(2, 8), scale=math.nan)}, source="unknown")
    other = la.Adapter({"q": la.LowRankUpdate(torch.ones(9, 2), torch.ones(2, 9), scale=1.0)}, source="other")
    page = write_report([zero, unknown, other], out=tmp_path / "odd", draws=19)
    assert "zero-update" in text_of(page.parent / "adapters" / "1.html")
    assert "every ΔW is zero" in text_of(page.parent / "adapters" / "1.html")
    assert "unknown: sizes are left out; pass --alpha" in text_of(page.parent / "adapters" / "2.html")
    assert "Not compared: 'q': expected one shape" in text_of(page.parent / "compare.html")
    assert "No atlas: 'q': expected one shape" in text_of(page.parent / "atlas.html")


def test_a_report_is_replaced_and_nothing_else_is(tmp_path):
    out = tmp_path / "report"
    write_report([adapter("a", 2, modules=MODULES[:1]), adapter("b", 2, modules=MODULES[:1])], out=out, draws=19)
    assert (out / "adapters" / "2.html").exists()
    write_report(adapter("a", 2, modules=MODULES[:1]), out=out, draws=19)
    assert not (out / "adapters" / "2.html").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected an empty folder, a report or nothing there, got other files"):
        write_report(adapter("a", 2), out=tmp_path / "mine")
    with pytest.raises(ValueError, match="of different sources, got 'runs/a' twice"):
        write_report([adapter("a", 2), adapter("a", 2)], out=tmp_path / "twice")
    with pytest.raises(LoraAnalysisError, match="expected a study directory"):
        write_report(adapter("a", 2, modules=MODULES[:1]), out=tmp_path / "none", study=tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "report"]


def test_beyond_the_first_adapters_pairs_are_left_out_and_said(tmp_path):
    shelf = [adapter(f"{i:04d}", 1, modules=MODULES[:1], seed=i) for i in range(40)]
    page = write_report(shelf, out=tmp_path / "shelf", compared=2, draws=19)
    assert "Compared two by two are the first 2 of 40 adapters; the atlas has them all." in text_of(page)
    assert len(list((page.parent / "data").glob("pair-*.js"))) == 1


def test_index_of_a_thousand_adapters_is_small(tmp_path, monkeypatch):
    # The atlas, which takes longest, is read by its own page alone.
    monkeypatch.setattr("lora_analysis.report.atlas_page.atlas", _no_atlas)
    shelf = [adapter(f"{i:04d}", 1, modules=MODULES[:1], seed=i) for i in range(1000)]
    page = write_report(shelf, out=tmp_path / "shelf", compared=2, draws=99)
    loaded = [
        page,
        page.parent / "data" / "index.js",
        *(page.parent / "assets").glob("re*"),
        page.parent / "assets/table.js",
    ]
    assert sum(path.stat().st_size for path in loaded) < 5e6
    assert len(list((page.parent / "adapters").iterdir())) == 1000


def _no_atlas(*arguments, **options):
    raise LoraAnalysisError("not made in this test")


def test_command_writes_a_report_of_real_adapters(shared_adapters, tmp_path):
    sources = [shared_adapters / "sam_lora" / f"round_{round_}" / "lora_rank4.safetensors" for round_ in "ab"]
    command = [sys.executable, "-m", "lora_analysis", "report", *map(str, sources), "--out", str(tmp_path / "sam")]
    run = subprocess.run([*command, "--draws", "19"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{tmp_path / 'sam' / 'index.html'}\n"
    opened = [la.load_adapter(source) for source in sources]
    assert_same(data(tmp_path / "sam", "adapter-1")["tables"]["rank"], la.used_rank_table(opened[0], draws=19))
    assert "seed or task" in columns(data(tmp_path / "sam", "pairs"))["kind"]
    again = subprocess.run([*command[:-1], str(sources[0])], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "expected a folder or nothing there, got a file" in again.stderr


def test_hostile_is_hostile():
    assert "</script>" in HOSTILE
    assert rounded(HOSTILE) == SHOWN
