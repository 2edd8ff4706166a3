"""``lora-analysis magnitude``: how updates change lengths and directions of the base's rows."""

from __future__ import annotations

import sys

from lora_analysis.base import load_base
from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, number, print_source, print_table, report_base, report_notes
from lora_analysis.tables import magnitude_table


def magnitude(
    adapters: options.Adapters,
    base: options.RequiredBase,
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
    """How far each update changes the lengths and the directions of the base matrix's rows.

    Example: lora-analysis magnitude runs/dora --base model.safetensors
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
    table = magnitude_table(opened, weights, workers=workers, progress=sys.stderr.isatty())
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
                ("axis", "axis", number()),
                ("magnitude_change", "|Δm|", number()),
                ("magnitude_change_relative", "|Δm|/m", number()),
                ("direction_change", "1-cos", number()),
                ("flags", "flags", str),
            ],
        )
    explain(
        "|Δm| is the mean change of length of W's rows (axis 1, one per output) or columns (axis 0), 1-cos that of "
        "their directions, as DoRA takes a matrix apart."
    )
