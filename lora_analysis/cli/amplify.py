"""``lora-analysis amplify``: Table 7 of the paper for every module."""

from __future__ import annotations

import sys

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
from lora_analysis.tables import amplification_table


def amplify(
    adapters: options.Adapters,
    base: options.RequiredBase,
    ks: options.Ks = None,
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
    """How the base matrix lies in the update's directions: amplification, and gain over random ones.

    Example: lora-analysis amplify runs/r8 --base model.safetensors --ks 1,8
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
    table = amplification_table(
        opened,
        weights,
        options.integers(ks),
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
                ("k", "k", number()),
                ("projected", "‖UᵀWV‖", number()),
                ("projected_null_rms", "random", number()),
                ("projected_top", "top", number()),
                ("gain", "gain", number()),
                ("p", "p", probability),
                ("ceiling_fraction", "ceiling", share),
                ("amplification", "factor", number()),
                ("flags", "flags", str),
            ],
        )
    last = table.groupby(["adapter", "module"], sort=False).tail(1)
    explain(
        f"{findings(last['q'], 'Gain at the largest k')} {findings(last['sign_q'], 'Its signs (sign_p with --out)')}"
    )
    explain(
        "gain = ‖UᵀWV‖ / random is the number to read. factor = ‖ΔW‖ / ‖UᵀWV‖ falls with k for random "
        "directions too, and is below theirs where gain > 1. ceiling = ‖UᵀWV‖ / top."
    )
