"""``lora-analysis demo``: the main job on its embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Three adapters of 25 steps, in under two minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Where adapters, tables and figures go.")] = Path("lora-demo"),
) -> None:
    """Fine-tune a real model by LoRA at several ranks, and analyse what was learned.

    Example: lora-analysis demo --quick --out /tmp/demo
    """
    from lora_analysis.study.demo import run_demo

    run_demo(out, quick=quick)
