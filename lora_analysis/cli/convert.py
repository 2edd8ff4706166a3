"""``lora-analysis convert``: an adapter in another format, compared after writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import plain_text, say
from lora_analysis.convert import convert as converted

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    adapter: options.OneAdapter,
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="A directory for peft and mlx, a file for the others.")
    ],
    to: Annotated[Literal["peft", "kohya", "diffusers", "mlx", "gguf"], typer.Option(help="The format to write.")],
    r: Annotated[
        int | None, typer.Option(help="Cut what is no product of r columns to its best rank-r part.", min=1)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the factors; as stored by default.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="unet, transformer, text_encoder…, where module names have none.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="GGUF's name of the base's, such as llama.")] = None,
    overwrite: options.Overwrite = False,
    base: options.Base = None,
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
    as_json: options.AsJson = False,
) -> None:
    """An adapter in another format: written, read back, and every ΔW compared.

    Example: lora-analysis convert runs/r8 r8.gguf --to gguf --architecture llama --heads 32,8
    """
    options.require_free(destination, overwrite=overwrite, sources=[adapter])
    done = converted(
        adapter,
        destination,
        to=to,
        base=options.open_base(base, device, base_revision),
        r=r,
        dtype=_DTYPES[dtype] if dtype else None,
        component=component,
        architecture=architecture,
        heads=options.head_counts(heads),
        format=format,
        alpha=alpha,
        split=split,
        name=name,
        initial=initial,
        pattern=pattern,
        device=device,
        revision=revision,
    )
    if as_json:
        summary = {
            "path": str(done.path),
            "format": done.format,
            "modules": done.modules,
            "losses": list(done.losses),
            "largest_error": done.largest_error,
            "errors": dict(done.errors),
            "notes": list(done.notes),
        }
        print(json.dumps(summary, indent=1, allow_nan=False))
        return
    for note in done.notes:
        say(f"note: {note}")
    print(f"{plain_text(str(done.path))}: {done.format}, {done.modules} modules, read back and compared:")
    print(f"largest difference of a ΔW {done.largest_error:.1e} of its norm.")
    print("Nothing lost." if not done.losses else "Lost:")
    for loss in done.losses:
        print(f"  {plain_text(loss)}")
