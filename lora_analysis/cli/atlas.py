"""``lora-analysis atlas``: a shelf of adapters of one base."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, number, print_table, report_notes
from lora_analysis.tables import Atlas
from lora_analysis.tables import atlas as charted


def atlas(
    adapters: options.Adapters,
    sampled: Annotated[
        int, typer.Option(min=1, help="Modules by which starts and growth are told; cosines are of all.")
    ] = 8,
    seed: options.Seed = 0,
    format: options.Format = None,
    alpha: options.Alpha = None,
    base: options.Base = None,
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
    """Many adapters of one base: which are alike, what they share, who stands apart. The table written is of pairs.

    Example: lora-analysis atlas runs/* --out pairs.parquet
    """
    opened = options.open_adapters(
        adapters,
        format=format,
        alpha=alpha,
        base=options.open_base(base, device, base_revision),
        split=split,
        name=name,
        initial=initial,
        heads=heads,
        pattern=pattern,
        device=device,
        revision=revision,
        skip=True,
    )
    found = charted(opened, sampled=sampled, seed=seed, workers=workers, progress=sys.stderr.isatty())
    report_notes(opened)
    if deliver(found.pairs(), out=out, as_json=as_json):
        return
    table = found.adapters().iloc[found.order()]
    table = table.assign(flags=["outlier" if apart else "" for apart in table["outlier"]])
    print_table(
        table,
        [
            ("adapter", "adapter", str),
            ("norm", "‖ΔW‖", number()),
            ("mean_cosine", "mean cos", number(2)),
            ("nearest_cosine", "largest cos", number(2)),
            ("start", "start", number()),
            ("flags", "flags", str),
        ],
    )
    explain(
        "Likest side by side. cos: of the whole updates, 0 by chance. start: adapters of one number began with the "
        "same A, and what these share on the input side is no sign of learning. outlier: by norm or mean cosine."
    )
    explain(_growth(found))


def _growth(found: Atlas) -> str:
    """What all adapters together need, beside chance."""
    everything = found.growth[found.growth["adapters"] == "all"]
    last = everything[everything["count"] == everything["count"].max()].set_index("side")
    needed = last[["k90", "k90_chance"]].to_dict("index")
    sides = [
        f"{row['k90']:.3g} directions on side {side} (turned at random {row['k90_chance']:.3g})"
        for side, row in needed.items()
    ]
    count = len(found.sources)
    return (
        f"90 % of the energy of all {count} lies in {' and '.join(sides)}, mean over modules. The mean update holds "
        f"{found.mean_share:.2g} of it, {1 / count:.2g} by chance."
    )
