"""The documentation site builds without a warning, names what the package has, and its examples run."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
import yaml

import lora_analysis as la
from lora_analysis.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LOADED = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src")}
"""What a browser fetches by itself."""


class Page(HTMLParser):
    """Anchors of a page, its text, and what it makes a browser fetch."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.fetched, self.text = set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.add(values.get("id"))
        if values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched += [values[name] for kind, name in LOADED if kind == tag and values.get(name)]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and what its build printed."""
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs" / "mkdocs.yml"), "-d", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # The theme announces its successor on every build; the variable is its own way to say that it was read.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out, run.stdout + run.stderr


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site[0]).as_posix(): Page(path) for path in site[0].rglob("*.html")}


def test_site_builds_without_a_warning(site):
    lines = [line for line in site[1].splitlines() if line.strip()]
    assert [line for line in lines if not line.startswith("INFO")] == []


def test_every_public_name_is_in_the_index_and_documented_in_full(pages):
    documented = {anchor for name, page in pages.items() if name != "api/index.html" for anchor in page.ids if anchor}
    for name in la.__all__:
        assert f"lora_analysis.{name}" in pages["api/index.html"].ids, name
        value = getattr(la, name)
        part = ".".join(value.__module__.split(".")[:2])
        assert {f"{value.__module__}.{name}", f"{part}.{name}"} & documented, name


@pytest.mark.parametrize("part", ["tables", "plots", "training", "study", "formats", "update", "base"])
def test_every_name_of_a_public_module_is_documented(part, pages):
    module = __import__(f"lora_analysis.{part}", fromlist=["__all__"])
    documented = {anchor for page in pages.values() for anchor in page.ids if anchor}
    for name in module.__all__:
        own = getattr(getattr(module, name), "__module__", "")
        assert {f"lora_analysis.{part}.{name}", f"{own}.{name}"} & documented, name


def test_every_measure_module_is_documented(pages):
    documented = {anchor for page in pages.values() for anchor in page.ids if anchor}
    for path in (ROOT / "lora_analysis" / "measures").glob("[!_]*.py"):
        assert f"lora_analysis.measures.{path.stem}" in documented


def test_docstrings_leave_no_markup_behind(pages):
    for name, page in pages.items():
        assert "``" not in page.text, name
        assert not re.search(r"\w::\s", page.text), name


def test_docstrings_become_markdown():
    path = ROOT / "docs" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    turned = docstrings.as_markdown(
        "What it is, see arXiv:2106.09685.\n\n>>> 1 + 1\n2\n\nA law::\n\n    a = b\n      + c\n\nAfter.\n\n"
        "Conventions\n-----------\n``zero``\n    Nothing.\n``r>d``\n    Too much.\n\nParameters\n----------\n"
        "x : Tensor, shape of ``y``\n    Any.\n"
    )
    assert "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)" in turned
    assert "```pycon\n>>> 1 + 1\n2\n```" in turned
    assert "A law:\n\n```text\na = b\n  + c\n```\n\nAfter." in turned
    assert "``zero``\n:   Nothing.\n\n``r>d``\n:   Too much." in turned
    assert "x : Tensor, shape of y\n    Any." in turned


def test_the_site_fetches_nothing_from_elsewhere(pages):
    fetched = [address for page in pages.values() for address in page.fetched]
    assert len(fetched) > len(pages)
    assert [address for address in fetched if re.match(r"(https?:)?//", address)] == []


# What questions point to


def rows():
    """The table rows of the page, as cells."""
    lines = (PAGES / "questions.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "question"]


def test_every_command_has_a_question_and_every_question_a_command():
    text = (PAGES / "questions.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`lora-analysis ([\w-]+)", text)) == set(typer.main.get_command(app).commands)


def test_every_public_function_answers_a_question():
    text = (PAGES / "questions.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`la\.(\w+)", text))
    assert named <= set(la.__all__)
    assert {name for name in la.__all__ if not isinstance(getattr(la, name), type)} <= named


def test_columns_of_questions_are_those_of_their_tables():
    checked = 0
    for row in rows():
        tables = re.findall(r"`la\.(\w+_table)`", row[2]) if len(row) == 4 else []
        if tables:
            known = {column for name in tables for column in sys.modules[getattr(la, name).__module__].COLUMNS}
            columns = re.findall(r"`(\w+)`", row[3])
            assert columns, row
            assert [column for column in columns if column not in known] == [], row[0]
            checked += len(columns)
    assert checked > 40


# Examples


def test_examples_of_the_reading_guide_run():
    blocks = re.findall(r"```pycon\n(.*?)```", (PAGES / "reading.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "reading.md", "reading.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0


# How to cite


def test_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"] == la.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The lora_analysis contributors"}]
    assert {"message", "title", "abstract", "keywords", "type"} <= set(citation)
    (paper,) = citation["references"]
    assert paper["doi"] == "10.48550/arXiv.2106.09685"
    assert paper["authors"][0]["family-names"] == "Hu"
