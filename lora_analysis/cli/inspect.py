"""``lora-analysis inspect``: what an adapter is, before any number is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pandas as pd

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
    revision: options.Revision = None,
    base_revision: options.BaseRevision = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """What an adapter is: format, modules, r, scale and where it came from, and every other tensor.

    Example: lora-analysis inspect runs/r8
    """
    opened_base = options.open_base(base, device, base_revision)
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
        revision=revision,
    )
    table = inspect_table(opened).drop(columns="adapter")
    if as_json:
        targets = [{"target": asdict(target)} for target in opened.targets.values()]
        modules = [row | target for row, target in zip(records(table), targets, strict=True)]
        print(json.dumps(_summary(opened) | {"modules": modules}, indent=1, allow_nan=False))
        return
    print(f"{plain_text(opened.source)}: {opened.format}, {len(opened)} modules")
    base_name = opened.config.get("base_model_name_or_path")
    if isinstance(base_name, str) and base_name:
        print(f"base model: {plain_text(base_name)}")
    whole = number(6)
    table["kernel"] = ["x".join(map(str, target.kernel)) for target in opened.targets.values()]
    print_table(
        _experts_together(table, opened),
        [
            ("module", "module", str),
            ("d_out", "d_out", whole),
            ("d_in", "d_in", whole),
            *([("kernel", "kernel", str)] if any(table["kernel"]) else []),
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


def _experts_together(table: pd.DataFrame, adapter: Adapter) -> pd.DataFrame:
    """The table with one row for all experts of a stack that are alike, ``….gate_up_proj.0-127``."""
    runs: dict[tuple[str, ...], list[int]] = {}
    for position, (row, target) in enumerate(zip(table.to_dict("records"), adapter.targets.values(), strict=True)):
        module = str(row.pop("module"))
        stem, _, last = module.rpartition(".")
        alike = target.expert is not None and last == str(target.expert)
        runs.setdefault((stem if alike else module, str(alike), *map(str, row.values())), []).append(position)
    rows = table.iloc[[positions[0] for positions in runs.values()]].copy()
    ends = [str(table.iloc[positions[-1]]["module"]).rpartition(".")[2] for positions in runs.values()]
    rows["module"] = [
        f"{module}-{end}" if len(positions) > 1 else module
        for module, end, positions in zip(rows["module"], ends, runs.values(), strict=True)
    ]
    return rows


def _summary(adapter: Adapter) -> dict[str, object]:
    return {
        "source": adapter.source,
        "format": adapter.format,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "unused": [{"tensor": u.tensor, "reason": u.reason, "nbytes": u.nbytes} for u in adapter.unused],
        "notes": list(adapter.notes),
        "metadata": dict(adapter.metadata),
    }
