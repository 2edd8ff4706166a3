"""``lora-analysis diff``: a full fine-tune minus its base, whole or cut to an adapter."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from lora_analysis.adapter import Adapter, Contents, Module, Origin
from lora_analysis.base import load_base
from lora_analysis.cli import options
from lora_analysis.cli.output import explain, number, print_table, report_notes, report_read, say
from lora_analysis.diff import diff as difference
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats import save_adapter
from lora_analysis.tables import spectrum_table, truncation_table
from lora_analysis.tables.frames import records


def diff(
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="Fine-tuned weights: a file, a folder, a hub id or a URL.")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The weights before.")],
    r: Annotated[int | None, typer.Option(help="Keep the first r singular triples of each difference.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep as many as hold this share of ‖ΔW‖², such as 0.9.", max=1.0)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the truncated difference to DIR as a PEFT adapter.", metavar="DIR")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of TUNED on the Hugging Face hub.")
    ] = None,
    base_revision: options.BaseRevision = None,
    device: options.Device = "cpu",
    workers: options.Workers = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """What full fine-tuning changed: the spectrum of every difference, or its best low-rank part.

    Example: lora-analysis diff tuned.safetensors base.safetensors --r 16 --out runs/extracted
    """
    if r is not None and energy is not None:
        raise typer.BadParameter("expected one of --r and --energy, got both.")
    if energy is not None and not energy > 0:
        raise typer.BadParameter(f"--energy: expected a share in (0, 1], got {energy}.")
    if out is not None and r is None and energy is None:
        raise typer.BadParameter("--out: expected --r or --energy beside it: a PEFT adapter holds low-rank updates.")
    if out is not None:
        options.require_free(out, overwrite=overwrite, sources=[tuned, base])
    after = load_base(tuned, device=device, revision=revision)
    before = load_base(base, device=device, revision=base_revision)
    adapter = difference(after, before, r=r, energy=energy, device=device, progress=sys.stderr.isatty())
    report_notes([adapter])
    truncated = r is not None or energy is not None
    if out is not None:
        _save(adapter, out)
    table = (
        truncation_table(adapter)
        if truncated
        else spectrum_table(adapter, workers=workers, progress=sys.stderr.isatty())
    )
    for weights in (after, before):
        report_read(weights)
    if as_json:
        print(json.dumps(records(table), indent=1, allow_nan=False))
    elif truncated:
        _print_truncation(table)
    else:
        _print_spectrum(table)


def _save(adapter: Adapter, out: Path) -> None:
    """Write what PEFT has a place for, and say what it has none for."""
    placed = {name: module for name, module in adapter.modules.items() if _has_place(name, module)}
    if not placed:
        raise UnsupportedAdapterError(
            f"{adapter.source}: expected a matrix that changed and that PEFT can adapt, none."
        )
    if apart := [name for name in adapter if name not in placed]:
        say(
            f"note: {len(apart)} modules have no place in a PEFT adapter and are not written: experts of a stack, "
            f"parameters that are no layer's weight (first: {apart[0]!r})."
        )
    kept = Adapter.from_contents(
        Contents(placed),
        source=adapter.source,
        format=adapter.format,
        origin=Origin(_kept, (adapter, tuple(placed))),
        config=adapter.config,
    )
    save_adapter(kept, out)
    say(f"{len(kept)} modules in {out}")


def _has_place(name: str, module: Module) -> bool:
    return module.target.tensor == f"{name}.weight" and module.target.expert is None


def _kept(adapter: Adapter, names: tuple[str, ...]) -> Adapter:
    return Adapter({name: adapter[name] for name in names}, source=adapter.source)


def _print_truncation(table: pd.DataFrame) -> None:
    print_table(
        table,
        [
            ("module", "module", str),
            ("d_out", "d_out", number()),
            ("d_in", "d_in", number()),
            ("r", "r", number()),
            ("norm", "‖kept‖", number()),
            ("truncation_error", "‖lost‖", number()),
            ("truncation_error_relative", "lost/all", number()),
            ("flags", "flags", str),
        ],
    )
    norm, error = (math.hypot(*table[column]) for column in ("norm", "truncation_error"))
    whole = math.hypot(norm, error)
    explain(
        f"In sum ‖kept‖ {norm:.3g}, ‖lost‖ {error:.3g}, lost/all {error / whole if whole else 0:.3g}. Errors are "
        "measured on the factors as held. The square of lost/all is the share of ‖ΔW‖² left out."
    )


def _print_spectrum(table: pd.DataFrame) -> None:
    print_table(
        table,
        [
            ("module", "module", str),
            ("norm", "‖ΔW‖", number()),
            ("sigma_max", "σ₁", number()),
            ("stable_rank", "stable", number()),
            ("effective_rank", "eff.", number()),
            ("k90", "k90", number()),
            ("k95", "k95", number()),
            ("k99", "k99", number()),
            ("flags", "flags", str),
        ],
    )
    explain(
        "k90 is the least r that holds 90% of ‖ΔW‖²: --r or --energy keeps so many, --out DIR writes them. The "
        "rounding of 16-bit weights is part of the difference and has a full spectrum of its own."
    )
