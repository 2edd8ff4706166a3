"""``lora-analysis inspect``: what an adapter is, before any number is read."""

from __future__ import annotations

import json
from collections import Counter

from lora_analysis.adapter import Adapter
from lora_analysis.cli import options
from lora_analysis.cli.output import number, plain_text, print_table, report_notes
from lora_analysis.tables import inspect_table
from lora_analysis.tables.frames import records


def inspect(
    adapter: options.OneAdapter,
    format: options.Format = None,
    alpha: options.Alpha = None,
    base: options.Base = None,
    split: options.Split = None,
    name: options.Name = None,
    initial: options.Initial = None,
    heads: options.Heads = None,
    pattern: options.Pattern = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """What an adapter is: format, modules, r, scale and where it came from, and every other tensor.

    Example: lora-analysis inspect runs/r8
    """
    opened_base = options.open_base(base, device)
    (opened,) = options.open_adapters(
        [adapter],
        format=format,
        alpha=alpha,
        base=opened_base,
        split=split,
        name=name,
        initial=initial,
        heads=heads,
        pattern=pattern,
        device=device,
    )
    table = inspect_table(opened).drop(columns="adapter")
    if as_json:
        print(json.dumps(_summary(opened) | {"modules": records(table)}, indent=1, allow_nan=False))
        return
    print(f"{plain_text(opened.source)}: {opened.format}, {len(opened)} modules")
    base_name = opened.config.get("base_model_name_or_path")
    if isinstance(base_name, str) and base_name:
        print(f"base model: {plain_text(base_name)}")
    whole = number(6)
    print_table(
        table,
        [
            ("module", "module", str),
            ("d_out", "d_out", whole),
            ("d_in", "d_in", whole),
            ("r", "r", whole),
            ("scale", "scale", whole),
            ("scale_source", "scale from", str),
            ("flags", "flags", str),
        ],
    )
    if opened.unused:
        size = sum(item.nbytes for item in opened.unused)
        print(f"{len(opened.unused)} other tensors, {size / 1e6:.2f} MB:")
        for reason, count in Counter(item.reason for item in opened.unused).most_common():
            example = next(item.tensor for item in opened.unused if item.reason == reason)
            print(f"  {count} x {plain_text(reason)}\n      such as {plain_text(example)}")
    report_notes([opened])


def _summary(adapter: Adapter) -> dict[str, object]:
    return {
        "source": adapter.source,
        "format": adapter.format,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "unused": [{"tensor": u.tensor, "reason": u.reason, "nbytes": u.nbytes} for u in adapter.unused],
        "notes": list(adapter.notes),
        "metadata": dict(adapter.metadata),
    }
