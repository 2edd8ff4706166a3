"""``lora-analysis reproducible``: what trainings from different seeds have in common."""

from __future__ import annotations

import sys
import warnings

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, findings, number, print_table, probability, report_notes, say
from lora_analysis.tables import reproducible_table


def reproducible(
    adapters: options.Adapters,
    draws: options.Draws = 2000,
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
    """How many directions of each update two or more trainings of one task share beyond chance.

    Example: lora-analysis reproducible runs/r8-seed0 runs/r8-seed1
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
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = reproducible_table(opened, draws=draws, seed=seed, workers=workers, progress=sys.stderr.isatty())
    for warning in caught:
        say(f"note: {warning.message}")
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    # Of several pairs the least: what every two of them share.
    shown = table.sort_values("reproduced", kind="stable").groupby(["module", "side"], sort=False).head(1)
    print_table(
        shown.sort_index(),
        [
            ("module", "module", str),
            ("side", "side", str),
            ("m", "m", number()),
            ("n", "n", number()),
            ("reproduced", "shared", number()),
            ("largest_cosine", "cos", number()),
            ("chance_edge", "chance", number()),
            ("p", "p", probability),
            ("flags", "flags", str),
        ],
    )
    pairs = len(table[["adapter_a", "adapter_b"]].drop_duplicates())
    each = "" if pairs == 1 else f" Of {pairs} pairs that which shares least, in each line."
    explain(" ".join(findings(rows["q"], f"Side {side}") for side, rows in table.groupby("side")))
    explain(
        "shared: principal cosines above chance, the 99 % quantile of the largest of random subspaces; p is that of "
        f"the largest.{each} Seeds must differ in initialisation and in the order of the data, or what they share is "
        "that: same-start marks rows of A in common."
    )
