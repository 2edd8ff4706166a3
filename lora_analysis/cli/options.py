"""Options that several commands share, and how they open what they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.formats import FORMATS, load_adapter
from lora_analysis.tables.frames import SUFFIXES

Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Directories or files of adapters.")]
OneAdapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory or file of an adapter.")]
Format = Annotated[
    str | None, typer.Option(help=f"Read as this format instead of detecting it: {', '.join(f.NAME for f in FORMATS)}.")
]
Alpha = Annotated[float | None, typer.Option(help="lora_alpha of training, where the file does not hold it.")]
Base = Annotated[str | None, typer.Option(help="Base model: a file, a sharded directory, or an index of shards.")]
Split = Annotated[str | None, typer.Option(help="Adapted slots of a fused q,k,v weight (loralib), such as q,v.")]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
Out = Annotated[
    Path | None, typer.Option(help=f"Write the whole table to FILE ({', '.join(SUFFIXES)}) instead of printing it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
Workers = Annotated[int | None, typer.Option(help="Threads; the cores of the machine by default.", min=1)]
Draws = Annotated[int, typer.Option(help="Monte Carlo draws of a p that has no closed form.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]


def open_base(base: str | None, device: str) -> BaseWeights | None:
    """The base that an option names, if it names one."""
    return None if base is None else load_base(base, device=device)


def open_adapters(
    sources: Sequence[str],
    *,
    format: str | None,
    alpha: float | None,
    base: BaseWeights | None,
    split: str | None,
    device: str,
) -> list[Adapter]:
    """The adapters that arguments name, all with the same options."""
    return [
        load_adapter(source, format=format, alpha=alpha, base=base, split=split, device=device) for source in sources
    ]


def check_out(out: Path | None) -> None:
    """Refuse a file name that cannot be written, before the work and not after it."""
    if out is not None and out.suffix not in SUFFIXES:
        raise ValueError(f"--out: expected a name ending in {', '.join(SUFFIXES)}, got {str(out)!r}.")
