"""``lora-analysis used-rank``: how much of its r each update uses, beside chance."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, findings, number, print_source, print_table, report_notes
from lora_analysis.tables import used_rank_table

_STARTS = {
    "start-unknown": "A is like no known start, by most of its spectrum, so that what it learned is not counted.",
    "start-rescaled": "A is a little off the variance of a known start, so that directions are counted without it.",
}
_SHOWN = ("stable_rank", "effective_rank", "k90")


def used_rank(
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
    """Did I waste rank? Measures of rank beside what chance gives, and what stands above noise.

    Example: lora-analysis used-rank runs/r64 --out used.csv
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
    table = used_rank_table(opened, draws=draws, seed=seed, workers=workers, progress=sys.stderr.isatty())
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    shown = table.assign(**{name + "_chance": table.apply(_chance, axis=1, args=(name,)) for name in _SHOWN})
    for source, rows in shown.groupby("adapter", sort=False):
        if len(opened) > 1:
            print_source(source)
        print_table(
            rows,
            [
                ("module", "module", str),
                ("r", "r", number()),
                ("stable_rank", "stable", number()),
                ("stable_rank_chance", "chance", str),
                ("effective_rank", "eff.", number()),
                ("effective_rank_chance", "chance", str),
                ("k90", "k90", number()),
                ("k90_chance", "chance", str),
                ("resolved_rank", "resolved", number()),
                ("learned_directions", "learned", number()),
                ("flags", "flags", str),
            ],
        )
    explain(f"{_verdict(table)} {findings(table['learned_q'], 'A has learned')}")
    for flag, told in _STARTS.items():
        if count := int(table["flags"].str.split().apply(lambda words, flag=flag: flag in words).sum()):
            explain(f"{flag} ({count} of {len(table)}): {told}")
    explain(
        "chance: 1 % to 99 % of random factors of the same shape; inside it a measure is consistent with chance. "
        "resolved: directions above storage noise. learned: directions of A that its random start does not explain. "
        "None of them is quality: cut with resize, and evaluate."
    )


def _chance(row: pd.Series[Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "-" if pd.isna(low) else f"{low:.3g}-{high:.3g}"


def _verdict(table: pd.DataFrame) -> str:
    known = table[table["effective_rank_low"].notna() & table["effective_rank"].notna()]
    if known.empty:
        return "No update is a product of two factors: there is no chance to compare with."
    below = int((known["effective_rank"] < known["effective_rank_low"]).sum())
    above = int((known["effective_rank"] > known["effective_rank_high"]).sum())
    within = len(known) - below - above
    parts = [f"{count} {word} chance" for count, word in ((below, "below"), (above, "above")) if count]
    parts += [f"{within} consistent with chance"] if within else []
    applicable = int(table["above_noise"].notna().sum())
    plateau = (
        f"{applicable} end in a plateau of noise (columns above_noise, above_threshold)"
        if applicable
        else "no spectrum ends in a plateau of noise, so thresholds of random matrix theory are not applicable"
    )
    return f"Effective rank of {len(known)} modules: {', '.join(parts)}; {plateau}."
