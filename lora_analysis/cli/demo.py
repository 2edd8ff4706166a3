"""``lora-analysis demo``: the main job on its embedded default."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_analysis.cli import options
from lora_analysis.errors import LoraAnalysisError


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Four adapters of 20 steps, for the impatient.")] = False,
    out: Annotated[Path, typer.Option(help="Where adapters, tables and figures go.")] = Path("lora-demo"),
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a real model by LoRA at several ranks, and analyse what was learned.

    Example: lora-analysis demo --quick --out /tmp/demo
    """
    # What can fail for reasons outside fails here, before ten seconds of reading docstrings.
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{out}: expected a directory, got a file. Pass another --out.") from None
    print("Importing what the demo needs; the first time this takes a while.", file=sys.stderr, flush=True)
    from lora_analysis.study.demo import run_demo
    from lora_analysis.study.minilm import load_minilm

    try:
        load_minilm()
    except ImportError as error:
        raise LoraAnalysisError(str(error)) from error

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        findings = run_demo(out, quick=quick)
    runs, weights = out / "runs", json.loads((out / "base.json").read_text("utf-8"))["path"]
    if as_json:
        print(json.dumps({"findings": findings, "runs": str(runs), "base": weights}, indent=1))
        return
    print(f"\nThe pretrained weights, for --base: {weights}")
    print(f"Look at them: lora-analysis report {runs}/*-r* --base {weights} --study {out} --out {out}-report")
