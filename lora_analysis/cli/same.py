"""``lora-analysis same``: whether two adapters are the same thing."""

from __future__ import annotations

import sys
from typing import Annotated

import pandas as pd
import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, number, print_table, probability, report_notes
from lora_analysis.tables import sameness_table


def same(
    adapter_a: Annotated[str, typer.Argument(metavar="A", help="An adapter.")],
    adapter_b: Annotated[str, typer.Argument(metavar="B", help="Another of the same base.")],
    draws: options.Draws = 1999,
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
    """Are these the same? Start, updates and subspaces of two adapters, module by module.

    Example: lora-analysis same runs/seed0 runs/seed1
    """
    opened = options.open_adapters(
        [adapter_a, adapter_b],
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
    table = sameness_table(*opened, draws=draws, seed=seed, workers=workers, progress=sys.stderr.isatty())
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    print_table(
        table,
        [
            ("module", "module", str),
            ("cosine", "cos", number(2)),
            ("cosine_p", "p", probability),
            ("phi_corrected_in", "φ* in", number(2)),
            ("phi_p_in", "p", probability),
            ("phi_corrected_out", "φ* out", number(2)),
            ("phi_p_out", "p", probability),
            ("flags", "flags", str),
        ],
    )
    explain(_start(table))
    explain(
        "cos: of the updates as vectors. φ*: overlap of all their directions, 0 by chance and 1 where one holds the "
        "other. p: against random directions, one test per line, not corrected for their number."
    )


def _start(table: pd.DataFrame) -> str:
    known = table["rows_shared"].dropna()
    if known.empty:
        return "Whether both began with the same A cannot be told: one row each, or no factors."
    share = float(known.mean())
    if share < 0.01:
        return "They did not begin with the same A, as far as the trained ones tell."
    return (
        f"Of the rows of A {share:.0%} are shared: the two began alike, and likeness on the side 'in' is no sign of "
        "learning."
    )
