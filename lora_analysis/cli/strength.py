"""``lora-analysis strength``: which layers learned."""

from __future__ import annotations

import sys

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
from lora_analysis.tables import strength_table


def strength(
    adapters: options.Adapters,
    base: options.RequiredBase,
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
    """Which layers learned? Each update beside its weight, and what a bfloat16 merge keeps of it.

    Example: lora-analysis strength runs/r8 --base model.safetensors
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
    table = strength_table(opened, weights, seed=seed, workers=workers, progress=sys.stderr.isatty())
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
                ("r", "r", number()),
                ("norm_update", "‖ΔW‖", number()),
                ("relative_norm", "/ ‖W‖", share),
                ("sigma_ratio", "σ₁ ratio", share),
                ("merge_signal_to_noise", "merge S/N", number()),
                ("merge_kept", "kept", share),
                ("flags", "flags", str),
            ],
        )
    explain(
        "σ₁ ratio = σ₁(ΔW) / σ₁(W). merge S/N = ‖ΔW‖ over the rounding noise of a weight merged in bfloat16; kept: the "
        "share of the update that such a merge leaves."
    )
