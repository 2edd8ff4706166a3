"""``lora-analysis compare`` and ``layers``: subspace similarity, with its null."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import typer

from lora_analysis.adapter import Adapter
from lora_analysis.cli import options
from lora_analysis.cli.output import deliver, explain, findings, number, print_table, probability, report_notes, say
from lora_analysis.tables import similarity_table

Which = Annotated[
    Literal["update", "A", "B"],
    typer.Option(help="Subspaces of ΔW (both sides), of A (as in the paper), or of B."),
]
Cells = Annotated[
    Literal["landmarks", "all"], typer.Option(help="(1,1), (1,r'), (r,1), (r,r') and the diagonal; or all i, j.")
]
_SHOWN = 60


def compare(
    adapter_a: Annotated[str, typer.Argument(metavar="A", help="An adapter.")],
    adapter_b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    target: Which = "update",
    pairs: options.Pairs = None,
    cells: Cells = "landmarks",
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
    """Similarity phi(i, j) of two adapters' subspaces, module by module, beside what chance gives.

    Example: lora-analysis compare runs/r8 runs/r64 --target A --cells all --out phi.parquet
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
    _compare(opened, pairs, out, as_json, target=target, cells=cells, draws=draws, seed=seed, workers=workers)


def layers(
    adapter: options.OneAdapter,
    target: Which = "update",
    pairs: options.Pairs = None,
    cells: Cells = "landmarks",
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
    """Similarity of the modules of one adapter to each other.

    Example: lora-analysis layers runs/r8 --pairs all --out layers.parquet
    """
    if options.module_pairs(pairs) == "same":
        raise typer.BadParameter(
            "expected 'all' or MODULE_A=MODULE_B, got 'same': a module is always like itself.", param_hint="--pairs"
        )
    opened = options.open_adapters(
        [adapter],
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
    _compare(opened, pairs, out, as_json, target=target, cells=cells, draws=draws, seed=seed, workers=workers)


def _compare(adapters: list[Adapter], pairs: list[str] | None, out: Path | None, as_json: bool, **choices: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = similarity_table(*adapters, pairs=options.module_pairs(pairs), progress=sys.stderr.isatty(), **choices)
    for warning in caught:
        say(f"note: {warning.message}")
    report_notes(adapters)
    if deliver(table, out=out, as_json=as_json):
        return
    _print(table)


def _print(table: pd.DataFrame) -> None:
    """One line per pair and side: the top directions, and the whole subspaces."""
    keys = ["module_a", "module_b", "side"]
    corner = table.groupby(keys, sort=False)
    first = table.loc[corner.head(1).index].set_index(keys)
    last = table.loc[corner.tail(1).index].set_index(keys)
    lines = pd.DataFrame(
        {
            "first": first["phi"],
            "first_null": first["null_mean"],
            "first_p": first["p"],
            "first_q": first["q"],
            "cell": last["i"].astype(str) + "," + last["j"].astype(str),
            "last": last["phi"],
            "last_null": last["null_mean"],
            "last_p": last["p"],
            "last_q": last["q"],
            "flags": last["flags"],
        }
    ).reset_index()
    same = bool((lines["module_a"] == lines["module_b"]).all())
    if not same:
        lines = lines.sort_values(["last_p", "last"], ascending=[True, False], kind="stable")
    print_table(
        lines,
        [
            ("module_a", "module", str),
            *([] if same else [("module_b", "module", str)]),
            ("side", "side", str),
            ("first", "φ(1,1)", number()),
            ("first_p", "p", probability),
            ("cell", "i,j", str),
            ("last", "φ(i,j)", number()),
            ("last_null", "chance", number()),
            ("last_p", "p", probability),
            ("flags", "flags", str),
        ],
        limit=None if same else _SHOWN,
    )
    ends = (("first", "φ(1,1)"), ("last", "φ(r,r')"))
    explain(" ".join(findings(lines[f"{end}_q"], what) for end, what in ends))
    chance = lines["first_null"].dropna()
    if len(chance):
        explain(
            f"Chance gives φ(1,1) = {chance.min():.2g}"
            + (f" to {chance.max():.2g}" if chance.max() > chance.min() else "")
            + ". p: upper tail, one test per line, not corrected for their number; for i, j > 1 by Monte Carlo, at "
            "least 1/(draws + 1). A low p means 'not independent random': a shared initialisation is enough."
        )
