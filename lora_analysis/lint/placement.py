"""Findings about an adapter on a base: whether every update has a matrix to act on."""

from __future__ import annotations

from collections.abc import Iterator

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError
from lora_analysis.lint.finding import Finding


def placement_findings(adapter: Adapter, base: BaseWeights) -> Iterator[Finding]:
    """What the base has no place for."""
    targets = {name: module.target.tensor for name, module in adapter.modules.items()}
    try:
        base.find_all(targets.values())
    except BaseWeightsError as error:
        absent = [name for name, tensor in targets.items() if tensor not in base]
        if len(absent) in (0, len(targets)):  # no name fits as it is written: one reason for all
            yield Finding("base-mismatch", "error", "", str(error))
            return
        for name in absent:
            yield Finding(
                "base-mismatch",
                "error",
                name,
                f"the base has no {targets[name]!r}: the update acts on nothing. Take the base it was trained on.",
            )
        present = [name for name in targets if name not in absent]
    else:
        present = list(targets)
    for name in present:
        module = adapter.modules[name]
        try:
            base.require_fit(module.target, module.shape)
        except BaseWeightsError as error:
            yield Finding("base-mismatch", "error", name, str(error))
