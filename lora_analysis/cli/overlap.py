"""``lora-analysis overlap``: where along the whole spectrum of W an update lies."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lora_analysis.base import load_base
from lora_analysis.cli import options
from lora_analysis.cli.output import (
    deliver,
    explain,
    findings,
    number,
    print_source,
    print_table,
    probability,
    report_base,
    report_notes,
    share,
)
from lora_analysis.tables import spectrum_overlap_table

_SHOWN = 66


def _checked_ks(value: str | None) -> str | None:
    options.integers(value)
    return value


Ks = Annotated[
    str | None,
    typer.Option(help="Top directions of ΔW, such as 1,4,8; 1 and r by default.", callback=_checked_ks),
]
Parts = Annotated[
    int, typer.Option(help="How many equal runs W's singular directions are cut into.", min=1, max=10_000)
]


def overlap(
    adapters: options.Adapters,
    base: options.RequiredBase,
    ks: Ks = None,
    parts: Parts = 10,
    draws: options.Draws = 999,
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
    """Share of each update in every tenth of its base matrix's singular directions, beside chance.

    Example: lora-analysis overlap runs/r8 --base model.safetensors --ks 1,8
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
    table = spectrum_overlap_table(
        opened,
        weights,
        ks=options.integers(ks),
        parts=parts,
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
            rows if len(rows) <= _SHOWN else rows[rows["part"].isin([1, parts])],
            [
                ("module", "module", str),
                ("side", "side", str),
                ("k", "k", number()),
                ("first", "from", number()),
                ("last", "to", number()),
                ("overlap", "share", share),
                ("null_mean", "chance", share),
                ("p", "p", probability),
                ("energy_share", "energy", share),
                ("energy_p", "p", probability),
                ("flags", "flags", str),
            ],
            limit=_SHOWN,
        )
    last = table[table["k"] == table.groupby(["adapter", "module"])["k"].transform("max")]
    for part, name in ((1, "The largest σ"), (parts, "The smallest")):
        sides = last[last["part"] == part].groupby("side", sort=False)["energy_q"]
        explain(" ".join(findings(q, f"{name}, {side}") for side, q in sides))
    if len(table) > _SHOWN:
        explain(f"Shown are the first and the last of {parts} parts; --out FILE writes all.")
    explain(
        "share = of ΔW's top k directions, how much lies among W's singular directions from … to …, the first having "
        "the largest singular values; energy = the same, each direction weighed by its σ². chance is for random "
        "directions; p = how often they have at least as much."
    )
