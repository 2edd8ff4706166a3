"""``lora-analysis intruders``: which top directions of the adapted model are new to it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lora_analysis.base import load_base
from lora_analysis.cli import options
from lora_analysis.cli.output import (
    deliver,
    explain,
    number,
    print_source,
    print_table,
    report_base,
    report_notes,
    share,
)
from lora_analysis.tables import intruder_table


def _cosines(text: str) -> list[float]:
    """Cosines between commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value <= 1 for value in found):
        raise typer.BadParameter(f"expected cosines above 0 and up to 1, such as 0.3,0.5, got {text!r}.")
    return found


def _checked_thresholds(value: str) -> str:
    _cosines(value)
    return value


def _checked_ks(value: str) -> str:
    options.integers(value)
    return value


Top = Annotated[
    str,
    typer.Option("--k", help="How many top directions of W + ΔW to look at, such as 10,32.", callback=_checked_ks),
]
Thresholds = Annotated[
    str,
    typer.Option(
        "--threshold",
        help="An intruder's cosine with every old direction is below this; several by commas.",
        callback=_checked_thresholds,
    ),
]
Complete = Annotated[
    bool | None,
    typer.Option(
        "--complete/--top",
        help="All singular vectors of W, or only the top ones; by default all up to a smaller side of 2048.",
    ),
]
ControlDraws = Annotated[int, typer.Option("--draws", help="Random updates of the control.", min=0, max=100_000)]


def intruders(
    adapters: options.Adapters,
    base: options.RequiredBase,
    ks: Top = "10",
    thresholds: Thresholds = "0.5",
    complete: Complete = None,
    draws: ControlDraws = 10,
    seed: options.Seed = 0,
    format: options.Format = None,
    alpha: options.Alpha = None,
    split: options.Split = None,
    name: options.Name = None,
    initial: options.Initial = None,
    heads: options.Heads = None,
    pattern: options.Pattern = None,
    revision: options.Revision = None,
    base_revision: options.BaseRevision = None,
    device: options.Device = "cpu",
    workers: options.Workers = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Intruder dimensions: top directions of W + ΔW that are close to none of W, beside random updates.

    Example: lora-analysis intruders runs/r8 --base model.safetensors --k 10 --threshold 0.5
    """
    weights = load_base(base, device=device, revision=base_revision)
    opened = options.open_adapters(
        adapters,
        format=format,
        alpha=alpha,
        base=weights,
        split=split,
        name=name,
        initial=initial,
        heads=heads,
        pattern=pattern,
        device=device,
        revision=revision,
    )
    table = intruder_table(
        opened,
        weights,
        ks=options.integers(ks) or (),
        thresholds=_cosines(thresholds),
        complete=complete,
        draws=draws,
        seed=seed,
        workers=workers,
        progress=sys.stderr.isatty(),
    )
    report_notes(opened)
    report_base(weights)
    if deliver(table, out=out, as_json=as_json):
        return
    for source, rows in table.groupby("adapter", sort=False):
        if len(opened) > 1:
            print_source(source)
        print_table(
            rows,
            [
                ("module", "module", str),
                ("side", "side", str),
                ("k", "k", number()),
                ("threshold", "below", number()),
                ("intruders", "new", number()),
                ("undecided", "open", number()),
                ("energy_share", "energy", share),
                ("control_share", "random", share),
                ("max_cosine_min", "newest", number()),
                ("flags", "flags", str),
            ],
        )
    explain(
        "new = directions among the top k of W + ΔW whose cosine with every singular vector of W is below the "
        "threshold; open = those not decided. energy = their share of the top k's σ², random = that of random updates "
        "with the same singular values: new directions below it are fewer than strength alone makes. "
        "newest = the smallest of the largest cosines."
    )
