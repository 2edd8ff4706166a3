"""``lora-analysis same``: whether two adapters are the same thing."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import pandas as pd
import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, findings, number, print_table, probability, report_notes, say
from lora_analysis.tables import sameness_table

_ROUNDING = 1e-6
_SHOWN = 60


def same(
    adapter_a: Annotated[str, typer.Argument(metavar="A", help="An adapter.")],
    adapter_b: Annotated[
        str | None, typer.Argument(metavar="B", help="Another of the same base; without it the layers of A.")
    ] = None,
    pairs: options.Pairs = None,
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
    """Are these the same? Start, updates and subspaces of two adapters, module by module, or of one's layers.

    Example: lora-analysis same runs/seed0 runs/seed1
    """
    listed = options.module_pairs(pairs)
    if adapter_b is None and listed == "same":
        raise typer.BadParameter(
            "expected 'all' or MODULE_A=MODULE_B, got 'same': a module is always like itself.", param_hint="--pairs"
        )
    opened = options.open_adapters(
        [adapter_a] if adapter_b is None else [adapter_a, adapter_b],
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
        table = sameness_table(
            *opened, pairs=listed, draws=draws, seed=seed, workers=workers, progress=sys.stderr.isatty()
        )
    for warning in caught:
        say(f"note: {warning.message}")
    report_notes(opened)
    if deliver(table, out=out, as_json=as_json):
        return
    same_names = bool((table["module_a"] == table["module_b"]).all())
    print_table(
        table if same_names else table.sort_values(["cosine_p", "cosine"], ascending=[True, False], kind="stable"),
        [
            ("module_a", "module", str),
            *([] if same_names else [("module_b", "module", str)]),
            ("cosine", "cos", number(2)),
            ("cosine_p", "p", probability),
            ("phi_corrected_in", "φ* in", number(2)),
            ("phi_p_in", "p", probability),
            ("phi_corrected_out", "φ* out", number(2)),
            ("phi_p_out", "p", probability),
            ("flags", "flags", str),
        ],
        limit=None if same_names else _SHOWN,
    )
    explain(f"{_identity(table)}{_start(table)}")
    tested = (("cosine_q", "cos"), ("phi_q_in", "φ* in"), ("phi_q_out", "φ* out"))
    explain(" ".join(findings(table[column], what) for column, what in tested))
    explain(
        "cos: of the updates as vectors. φ*: overlap of all their directions, 0 by chance and 1 where one holds the "
        "other. p: against random directions, one test per line, not corrected for their number."
    )


def _identity(table: pd.DataFrame) -> str:
    """That the updates are the same, where they are."""
    if table["cosine"].isna().any() or float(table["cosine"].min()) < 1 - _ROUNDING:
        return ""
    equal = bool((table["norm_ratio"] > 1 - _ROUNDING).all())
    return "The updates are the same. " if equal else "The updates are the same up to their scale. "


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
