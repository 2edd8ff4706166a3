"""``lora-analysis tokens``: what the first directions of updates say in tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

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
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.tables import token_table


def tokens(
    adapters: options.Adapters,
    base: options.RequiredBase,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; by default the one beside the base's weights.")
    ] = None,
    directions: Annotated[int, typer.Option(min=1, help="First singular directions of each update.")] = 1,
    top: Annotated[int, typer.Option(min=1, help="Tokens of each direction.")] = 5,
    draws: options.Draws = 199,
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
    """Tokens that the first directions of each update are closest to, beside random directions.

    Example: lora-analysis tokens runs/r8 --base models/llama --directions 3
    """
    decode = _decoder(tokenizer, Path(base))
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
    table = token_table(
        opened,
        weights,
        decode,
        directions=directions,
        top=top,
        draws=draws,
        seed=seed,
        workers=workers,
        progress=sys.stderr.isatty(),
    )
    report_notes(opened)
    report_base(weights)
    if deliver(table, out=out, as_json=as_json):
        return
    shown = table.assign(
        text=[" ".join(json.dumps(token, ensure_ascii=False) for token in row or []) for row in table["tokens"]],
        cosine=[abs(row[0]) if row else float("nan") for row in table["cosines"]],
    )
    for source, rows in shown.groupby("adapter", sort=False):
        if len(opened) > 1:
            print_source(source)
        print_table(
            rows,
            [
                ("module", "module", str),
                ("side", "side", str),
                ("k", "k", number()),
                ("share", "energy", share),
                ("cosine", "|cos|", number(2)),
                ("p", "p", probability),
                ("text", "tokens", str),
                ("flags", "flags", str),
            ],
        )
    explain(findings(table["q"], "Tokens"))
    explain(
        "|cos|: of the nearest token; p: random directions come as close to one of all tokens. Modules that read the "
        "residual stream (q, k, v) speak on side in, those that write to it (o) on side out; of square ones "
        "both are shown."
    )


def _decoder(tokenizer: Path | None, base: Path) -> Callable[[int], str]:
    """A token's text by its id, from a tokenizer.json."""
    folder = base if base.is_dir() else base.parent
    path = tokenizer or folder / "tokenizer.json"
    if not path.is_file():
        raise LoraAnalysisError(
            f"{path}: expected a tokenizer, got no such file. Name its tokenizer.json: --tokenizer."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LoraAnalysisError(f'{error}. Install it with pip install "lora-analysis[train]".') from error
    try:
        opened = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise LoraAnalysisError(f"{path}: expected a tokenizer.json, got {error}.") from error
    return lambda token: str(opened.decode([token], skip_special_tokens=False))
