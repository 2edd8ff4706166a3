"""The shape of the package: what may import what, what importing costs, and that the checks are clean."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_analysis as la

PACKAGE = Path(la.__file__).parent
LEVELS = [
    {"errors", "notebook"},
    {"update", "checkpoint"},
    {"adapter", "measures"},
    {"base"},
    {"formats", "training", "diff"},
    {"activations", "convert", "lint", "merge", "resize", "tables"},
    {"plots"},
    {"study"},
    {"report"},
    {"cli"},
]


def level(name):
    return next((number for number, names in enumerate(LEVELS) if name in names), None)


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lora_analysis" and len(parts) > 1 and level(parts[1]) is not None:
                yield parts[1]


def test_imports_flow_one_way():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        assert level(part) is not None, f"{path} is in no level"
        for other in imported_parts(path):
            checked += 1
            assert level(other) <= level(part), f"{path} imports {other}"
            if part == "formats":
                assert other != "training"
    assert checked > 50


def test_public_names_are_sorted_complete_and_there():
    assert la.__all__ == sorted(la.__all__)
    for name in la.__all__:
        assert getattr(la, name).__doc__, name


def test_importing_the_package_pulls_in_no_heavy_library():
    code = "import sys, lora_analysis; print([m for m in ('matplotlib', 'transformers', 'plotly', 'dask', 'peft', "
    code += "'jinja2', 'rich', 'typer', 'fsspec', 'huggingface_hub', 'aiohttp', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy", "--strict"],
        ["codespell_lib", "lora_analysis", "tests", "README.md", "CHANGELOG.md"],
    ],
    ids=lambda command: command[0] + "-" + command[-1].strip("-"),
)
def test_checks_are_clean(command):
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
