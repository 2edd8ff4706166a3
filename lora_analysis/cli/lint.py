"""``lora-analysis lint``: what is wrong, wasted, undecidable or unportable about an adapter."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import plain_text
from lora_analysis.lint import CODES, Finding
from lora_analysis.lint import lint as findings_of

_SHOWN = 3
"""Modules named for one finding that many of them share."""


def _checked_codes(value: list[str] | None) -> list[str] | None:
    for code in value or []:
        if code not in CODES:
            raise typer.BadParameter(f"expected one of {', '.join(sorted(CODES))}, got {code!r}.")
    return value


def lint(
    adapter: options.OneAdapter,
    base: options.Base = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A code to leave out; may be repeated.", callback=_checked_codes)
    ] = None,
    format: options.Format = None,
    alpha: options.Alpha = None,
    split: options.Split = None,
    name: options.Name = None,
    initial: options.Initial = None,
    heads: options.Heads = None,
    pattern: options.Pattern = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """What is wrong, wasted, undecidable or unportable about an adapter, each with its cure.

    Exit code 0: nothing found; 3: findings; 4: only checks that could not be decided.

    Example: lora-analysis lint runs/r8 --base model.safetensors
    """
    found = [
        finding
        for finding in findings_of(
            adapter,
            options.open_base(base, device),
            format=format,
            alpha=alpha,
            split=split,
            name=name,
            initial=initial,
            heads=options.head_counts(heads),
            pattern=pattern,
            device=device,
        )
        if finding.code not in (ignore or [])
    ]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        _print(found)
    if found:
        raise typer.Exit(4 if all(finding.severity == "undecided" for finding in found) else 3)


def _print(found: list[Finding]) -> None:
    """One paragraph for each thing that is so, however many modules share it."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in found:
        groups.setdefault((finding.severity, finding.code, finding.message), []).append(finding.module)
    for (severity, code, message), modules in groups.items():
        named = [plain_text(module) for module in modules if module]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        where = f"{', '.join(named[:_SHOWN])}{more}: " if named else ""
        print(f"{severity}[{code}] {where}{plain_text(message)}")
    if not found:
        print("Nothing found.")
