"""``lora-analysis spectrum``: singular values and rank measures of every module."""

from __future__ import annotations

import sys

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, number, print_source, print_table, report_notes
from lora_analysis.tables import spectrum_table


def spectrum(
    adapters: options.Adapters,
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
    """Singular values of each update and how many directions it uses.

    Example: lora-analysis spectrum runs/r8 runs/r64 --out spectrum.parquet
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
    table = spectrum_table(opened, workers=workers, progress=sys.stderr.isatty())
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    for source, rows in table.groupby("adapter", sort=False):
        if len(opened) > 1:
            print_source(source)
        print_table(
            rows,
            [
                ("module", "module", str),
                ("r", "r", number()),
                ("norm", "‖ΔW‖", number()),
                ("sigma_max", "σ₁", number()),
                ("stable_rank", "stable", number()),
                ("effective_rank", "eff.", number()),
                ("k90", "k90", number()),
                ("numerical_rank", "rank", number()),
                ("resolved_rank", "resolved", number()),
                ("flags", "flags", str),
            ],
        )
    explain(
        "stable and eff. rank are below r by chance too: used-rank sets them beside what random factors of the same "
        "shape have. --out FILE writes all measures and singular values."
    )
