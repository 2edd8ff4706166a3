"""``lora-analysis report``: every question about some adapters, as pages that open from disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import report_base, report_notes, say


def report(
    adapters: options.Adapters,
    out: Annotated[Path, typer.Option(help="A folder for the pages; an earlier report in it is replaced.")],
    study: Annotated[
        Path | None, typer.Option(help="A directory of ablate or demo, for a page on it.", exists=True, file_okay=False)
    ] = None,
    compared: Annotated[
        int, typer.Option(min=0, help="Adapters compared two by two, the first so many; the atlas has all.")
    ] = 12,
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
    as_json: options.AsJson = False,
) -> None:
    """All five questions as HTML: a page for each adapter, for every two, for a shelf, for a study. Opens from disk.

    Example: lora-analysis report runs/r8 runs/r64 --base model.safetensors --out report
    """
    weights = options.open_base(base, device, base_revision)
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
        skip=True,
    )
    from lora_analysis.report import write_report

    page = write_report(
        opened,
        weights,
        out=out,
        study=study,
        compared=compared,
        draws=draws,
        seed=seed,
        workers=workers,
        progress=sys.stderr.isatty(),
        say=say,
    )
    report_notes(opened)
    if weights is not None:
        report_base(weights)
    print(json.dumps({"index": str(page)}) if as_json else page)
