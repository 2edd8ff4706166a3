"""``lora-analysis lint``: what is wrong, wasted, undecidable or unportable about an adapter."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, get_args

import typer

from lora_analysis.cli import options
from lora_analysis.cli.output import plain_text, report_base, wrapped
from lora_analysis.lint import CODES, SEVERITIES, Finding, Severity
from lora_analysis.lint import lint as findings_of

_SHOWN = 3
"""Modules named for one finding that many of them share."""

_SEVERITIES: tuple[str, ...] = get_args(Severity)

_NUMBER = re.compile(r"[0-9]+([.,][0-9]+)*(e[+-]?[0-9]+)?")


def _checked_codes(value: list[str] | None) -> list[str] | None:
    for code in value or []:
        if code not in CODES and code not in _SEVERITIES:
            close = get_close_matches(code, [*CODES, *_SEVERITIES], n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise typer.BadParameter(
                f"expected a code of --codes or one of {', '.join(_SEVERITIES)}, got {code!r}.{meant}"
            )
    return value


def _print_codes(wanted: bool) -> None:
    """Print every code with its severities and what it means, and end."""
    if not wanted:
        return
    for code, meaning in CODES.items():
        severities = ", ".join(SEVERITIES[code])
        print(wrapped(f"{code:<22} {severities:<14}  {meaning}", hanging=39))
    raise typer.Exit


def lint(
    adapter: options.OneAdapter,
    base: options.Base = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE",
            help="A code to leave out, or a severity, such as info; may be repeated.",
            callback=_checked_codes,
        ),
    ] = None,
    codes: Annotated[
        bool,
        typer.Option(
            "--codes", help="List every code with its severity, and stop.", callback=_print_codes, is_eager=True
        ),
    ] = False,
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
    """What is wrong, wasted, undecidable or unportable about an adapter, each with its cure.

    Exit code 0: nothing found; 3: findings, of any severity; 4: only checks that could not be decided; 1: the adapter
    cannot be read. What is ignored does not count: --ignore info lets pass what is right here and misread elsewhere.

    Example: lora-analysis lint runs/r8 --base model.safetensors --ignore info
    """
    weights = options.open_base(base, device, base_revision)
    found = [
        finding
        for finding in findings_of(
            adapter,
            weights,
            format=format,
            alpha=alpha,
            split=split,
            name=name,
            initial=initial,
            heads=options.head_counts(heads),
            pattern=pattern,
            device=device,
            revision=revision,
        )
        if not {finding.code, finding.severity} & set(ignore or ())
    ]
    if weights is not None:
        report_base(weights)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        _print(found)
    if found:
        raise typer.Exit(4 if all(finding.severity == "undecided" for finding in found) else 3)


def _print(found: list[Finding]) -> None:
    """One paragraph for each thing that is so, however many modules share it, if only its numbers differ."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found:
        masked = _NUMBER.sub("0", finding.message.replace(finding.module, "") if finding.module else finding.message)
        groups.setdefault((finding.severity, finding.code, masked), []).append(finding)
    for (severity, code, _), alike in groups.items():
        named = [plain_text(finding.module) for finding in alike if finding.module]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        message = plain_text(alike[0].message)
        if len({finding.message for finding in alike}) > 1:
            message += " (The first; the numbers of the others differ.)"
        print(wrapped(f"{severity}[{code}] {', '.join(named[:_SHOWN])}{more}"))
        print(wrapped(message, indent="    "))
    if not found:
        print("Nothing found.")
