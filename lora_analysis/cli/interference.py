"""``lora-analysis interference``: whether adapters will merge."""

from __future__ import annotations

import sys

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, findings, number, print_table, probability, report_notes, share
from lora_analysis.tables import interference_table


def interference(
    adapters: options.Adapters,
    draws: options.Draws = 999,
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
    """Will they merge? How updates of two or more adapters lie to each other, beside chance.

    Example: lora-analysis interference runs/mnli runs/agnews
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
    table = interference_table(opened, draws=draws, seed=seed, workers=workers, progress=sys.stderr.isatty())
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    shown = table.assign(z=table["cosine"] / table["cosine_null_sd"], chance=table["sti_null"] / table["sigma_sum"])
    print_table(
        shown,
        [
            ("module", "module", str),
            ("cosine", "cos", number(2)),
            ("z", "in sd", number(2)),
            ("sti_relative", "STI", number(2)),
            ("chance", "chance", number(2)),
            ("sti_p", "p", probability),
            ("alignment_ratio", "SAR", number(2)),
            ("sign_conflict", "signs", share),
            ("union_rank", "union", number()),
            ("rank_sum", "of", number()),
            ("averaging_error", "avg. error", share),
            ("flags", "flags", str),
        ],
    )
    explain(findings(table["sti_q"], "STI"))
    explain(
        "cos: of the updates, in standard deviations of chance (five make a finding). STI: interference of singular "
        "vectors over Σσ, and what random ones give. SAR: share of an update in the leading directions of the sum. "
        "signs: entries on which updates disagree, half by chance for two. avg. error: what averaging factors gets "
        "wrong of averaging updates. None of them decides: compare merges by them, and evaluate."
    )
