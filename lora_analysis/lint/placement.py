"""Findings about an adapter on a base: whether every update has a matrix to act on."""

from __future__ import annotations

from collections import Counter
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
        present = _present(list(dict.fromkeys(targets.values())), base)
        if not present:  # no name fits: one reason for all
            yield Finding("base-mismatch", "error", "", str(error))
            return
        for name, tensor in targets.items():
            if tensor not in present:
                yield Finding(
                    "base-mismatch",
                    "error",
                    name,
                    "the base has no such tensor: the update acts on nothing. Take the base it was trained on, or "
                    "correct the name.",
                )
    else:
        present = set(targets.values())
    for name, module in adapter.modules.items():
        if targets[name] in present:
            try:
                base.require_fit(module.target, module.shape)
            except BaseWeightsError as error:
                yield Finding("base-mismatch", "error", name, str(error))


def _present(tensors: list[str], base: BaseWeights) -> set[str]:
    """The tensors that the base has under the change of prefix that finds most of them."""
    found = {}
    for tensor in tensors:
        try:
            found[tensor] = _change(tensor, base.find(tensor))
        except BaseWeightsError:
            continue
    if not found:
        return set()
    usual, _ = Counter(found.values()).most_common(1)[0]
    return {tensor for tensor, change in found.items() if change == usual}


def _change(tensor: str, name: str) -> tuple[str, str]:
    """The prefix that a name loses, and the one that it gets in its place."""
    kept = 0
    while kept < min(len(tensor), len(name)) and tensor[-1 - kept] == name[-1 - kept]:
        kept += 1
    return tensor[: len(tensor) - kept], name[: len(name) - kept]
