"""``lora-analysis resize``: an adapter at other ranks, written with the error of every module."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import explain, number, plain_text, print_table, report_notes, wrapped
from lora_analysis.convert import Conversion, convert, loaded
from lora_analysis.resize import held_parameters
from lora_analysis.resize import resize as resized
from lora_analysis.tables import truncation_table
from lora_analysis.tables.frames import records

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _checked_budget(value: str | None) -> str | None:
    if value is not None:
        _parsed_budget(value)
    return value


def resize(
    adapter: options.OneAdapter,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A directory for peft and mlx, a file for the other formats.")
    ],
    r: Annotated[int | None, typer.Option(help="Every module at exactly this r, cut or raised.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep the least r that holds this share of ‖ΔW‖², such as 0.9.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Keep singular values of at least this part of the largest, such as 0.1.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="At most so many parameters, or per cent of those there are (50%), where they lose least.",
            metavar="N|P%",
            callback=_checked_budget,
        ),
    ] = None,
    to: Annotated[
        Literal["peft", "kohya", "diffusers", "mlx", "gguf"], typer.Option(help="The format to write.")
    ] = "peft",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the factors; as stored by default.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="unet, transformer, text_encoder…, where module names have none.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="GGUF's name of the base's, such as llama.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new rows of A where r is raised.", min=0)] = 0,
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
    """An adapter at other ranks: every module's best approximation of that r, its error stated.

    Example: lora-analysis resize runs/r64 runs/half --budget 50%
    """
    given = {"--r": r, "--energy": energy, "--threshold": threshold, "--budget": budget}
    if (count := sum(value is not None for value in given.values())) != 1:
        got = " and ".join(option for option, value in given.items() if value is not None) if count else "none"
        raise typer.BadParameter(f"expected exactly one of {', '.join(given)}, got {got}.")
    options.require_free(out, overwrite=overwrite, sources=[adapter])
    opened = options.open_base(base, device, base_revision)
    head_counts = options.head_counts(heads)
    before = loaded(
        adapter,
        head_counts,
        format=format,
        alpha=alpha,
        base=opened,
        split=split,
        name=name,
        initial=initial,
        pattern=pattern,
        device=device,
        revision=revision,
    )
    present = held_parameters(before)
    parameters = None if budget is None else _parameters(budget, present)
    after = resized(before, r=r, energy=energy, threshold=threshold, budget=parameters, seed=seed)
    done = convert(
        after,
        out,
        to=to,
        base=opened,
        dtype=_DTYPES[dtype] if dtype else None,
        component=component,
        architecture=architecture,
        heads=head_counts,
    )
    table = truncation_table(after)
    table.insert(4, "r_before", [before.modules[module].r for module in table["module"]])
    kept = held_parameters(after)
    if as_json:
        print(json.dumps(_summary(table, done, present, kept), indent=1, allow_nan=False))
        return
    report_notes([after])
    _print(table, done, present, kept)


def _parsed_budget(text: str) -> int | float:
    """A number of parameters, or a share of those there are."""
    if found := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text):
        if 0 < (share := float(found[1]) / 100) <= 1:
            return share
    elif re.fullmatch("[0-9]{1,18}", text) and (parameters := int(text)):
        return parameters
    raise typer.BadParameter(
        f"expected a number of parameters, such as 100000, or per cent, such as 50%, got {text!r}."
    )


def _parameters(budget: str, present: int) -> int:
    asked = _parsed_budget(budget)
    return asked if isinstance(asked, int) else max(1, math.floor(asked * present))


def _sum(table: pd.DataFrame) -> dict[str, float]:
    """Norms of all modules together."""
    norm, error = (math.hypot(*table[column]) for column in ("norm", "truncation_error"))
    return {
        "norm": norm,
        "truncation_error": error,
        "truncation_error_relative": _share(error, math.hypot(norm, error)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _summary(table: pd.DataFrame, done: Conversion, present: int, kept: int) -> dict[str, Any]:
    return {
        "path": str(done.path),
        "format": done.format,
        "parameters_before": present,
        "parameters": kept,
        **_sum(table),
        "modules": records(table),
        "losses": list(done.losses),
        "notes": list(done.notes),
    }


def _print(table: pd.DataFrame, done: Conversion, present: int, kept: int) -> None:
    print_table(
        table,
        [
            ("module", "module", str),
            ("r_before", "r before", number()),
            ("r", "r after", number()),
            ("truncation_error_relative", "‖lost‖/‖ΔW‖", number()),
            ("flags", "flags", str),
        ],
    )
    explain(
        f"In sum {kept:,} of {present:,} parameters ({_share(kept, present):.1%}), ‖lost‖/‖ΔW‖ "
        f"{_sum(table)['truncation_error_relative']:.3g}. Errors are measured on the factors held; the square of "
        "‖lost‖/‖ΔW‖ is the share of ‖ΔW‖² left out."
    )
    print(f"{plain_text(str(done.path))}: {done.format}, {done.modules} modules, read back and compared.")
    for loss in done.losses:
        print(wrapped(f"lost: {plain_text(loss)}", indent="  ", hanging=2))
