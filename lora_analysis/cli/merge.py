"""``lora-analysis merge``: several adapters of one base as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import explain, number, print_table, report_notes, share
from lora_analysis.convert import convert
from lora_analysis.measures.merging import Method
from lora_analysis.merge import merge as merged
from lora_analysis.tables import truncation_table
from lora_analysis.tables.frames import records

_TOLD = {
    "tsv": "TSV keeps the first {keep:.0%} of each adapter's directions (--keep) and makes them orthogonal.",
    "iso-c": "Iso-C gives all directions of the sum one singular value, their mean.",
    "knots": "KnOTS trims, elects signs and averages (--density), as TIES does.",
}


def _checked_weights(value: str | None) -> str | None:
    weights(value)
    return value


def weights(text: str | None) -> list[float] | None:
    """Numbers between commas."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers, such as 0.7,0.3, got {text!r}.") from None


def merge(
    adapters: options.Adapters,
    out: Annotated[Path, typer.Option(help="A directory for the merged adapter, in PEFT's format.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Method))}.")] = "sum",
    weight: Annotated[
        str | None,
        typer.Option(
            "--weights", help="Of each adapter, such as 0.5,0.5; 1 each by default.", callback=_checked_weights
        ),
    ] = None,
    density: Annotated[float, typer.Option(help="Of knots: share of entries that trimming leaves.")] = 0.2,
    keep: Annotated[
        float | None, typer.Option(help="Of tsv: share of each adapter's directions; 1/T by default.")
    ] = None,
    r: Annotated[int | None, typer.Option(min=1, help="Cut to this r; all directions by default.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or to the least r that holds this share of ‖ΔW‖².")] = None,
    overwrite: options.Overwrite = False,
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
    as_json: options.AsJson = False,
) -> None:
    """One adapter in the place of several, exactly; the error of a cut is stated. TIES and DARE are PEFT's.

    Example: lora-analysis merge runs/mnli runs/agnews --weights 0.5,0.5 --out runs/both
    """
    if method not in get_args(Method):
        raise typer.BadParameter(
            f"expected one of {', '.join(get_args(Method))}, got {method!r}.", param_hint="--method"
        )
    options.require_free(out, overwrite=overwrite, sources=adapters)
    opened_base = options.open_base(base, device, base_revision)
    opened = options.open_adapters(
        adapters,
        format=format,
        alpha=alpha,
        base=opened_base,
        split=split,
        name=name,
        initial=initial,
        heads=heads,
        pattern=pattern,
        device=device,
        revision=revision,
    )
    after = merged(
        opened,
        weights=weights(weight),
        method=method,  # type: ignore[arg-type]
        density=density,
        keep=keep,
        r=r,
        energy=energy,
    )
    done = convert(after, out, to="peft", base=opened_base)
    table = truncation_table(after)
    plain = after if method == "sum" else merged(opened, weights=weights(weight))
    table.insert(6, "norm_sum", [plain[module].norm() for module in table["module"]])
    if as_json:
        content = {"path": str(done.path), "modules": records(table), "losses": list(done.losses)}
        print(json.dumps(content, indent=1, allow_nan=False))
        return
    report_notes([*opened, after])
    print_table(
        table,
        [
            ("module", "module", str),
            ("r", "r", number()),
            ("norm", "‖ΔW‖", number()),
            ("norm_sum", "of the sum", number()),
            ("truncation_error_relative", "cut off", share),
            ("flags", "flags", str),
        ],
    )
    share_kept = 1 / len(opened) if keep is None else keep
    if told := _TOLD.get(method):
        explain(told.format(keep=share_kept) + " So ‖ΔW‖ is not that of the sum, which stands beside it.")
    explain(f"{len(table)} modules in {done.path}, read back and compared.")
