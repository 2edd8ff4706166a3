"""What a written file does not hold of the adapter, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lora_analysis.adapter import Adapter
from lora_analysis.formats.writers.parts import Part

_HEADER = (
    "GGUF.",
    "adapter.",
    "format",
    "general.architecture",
    "general.type",
    "lora_adapter_metadata",
    "ss_network_",
)
"""What fields of a header begin with that say nothing but kind, r and alpha, which every format has its own way for."""


def left_behind(adapter: Adapter, format: str) -> list[str]:
    """What no writer takes along, or not this one: tensors beside the updates, updates of zero, where it is from."""
    losses = []
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for item in adapter.unused:
        tensors[item.reason] += 1
        sizes[item.reason] += item.nbytes
    losses += [
        f"{count(tensors[reason], 'tensor')} not written ({sizes[reason] / 1e6:.2f} MB): {reason}."
        for reason in tensors
    ]
    if empty := [name for name, module in adapter.modules.items() if module.r == 0]:
        losses.append(f"{count(len(empty), 'module')} of r = 0 not written, an update of zero (first: {empty[0]!r}).")
    if doubtful := [name for name, module in adapter.modules.items() if "ambiguous-layout" in module.flags]:
        losses.append(
            f"{count(len(doubtful), 'module')} written by one of the readings that the source allows "
            f"(first: {doubtful[0]!r}; see the notes)."
        )
    if format != "peft":
        if adapter.config.get("alora_invocation_tokens"):
            losses.append("activated LoRA: the file does not say that updates act from the invocation tokens on only.")
        if base := adapter.config.get("base_model_name_or_path"):
            losses.append(f"the name of the base model, {str(base)[:100]!r}, is not written.")
    if fields := sorted(field for field in adapter.metadata if not field.startswith(_HEADER)):
        losses.append(f"{count(len(fields), 'field')} of the header not written (first: {fields[0][:100]!r}).")
    return losses


def cut(parts: Sequence[Part]) -> list[str]:
    """How much of the norm of modules, and of all together, was cut off."""
    shortened = [part for part in parts if part.truncation_error]
    if not shortened:
        return []
    norms = {part.name: math.hypot(part.truncation_error, part.update.norm()) for part in parts}
    worst = max(part.truncation_error / norms[part.name] for part in shortened)
    total = math.hypot(*(part.truncation_error for part in shortened)) / math.hypot(*norms.values())
    return [
        f"{count(len(shortened), 'module')} cut to a smaller rank: at most {worst:.2e} of a module's norm is lost, "
        f"{total:.2e} of that of all together."
    ]


def rounded(errors: Sequence[float]) -> list[str]:
    """How many modules were rounded, by these parts of their norm."""
    return [f"{count(len(errors), 'module')} rounded, by at most {max(errors):.1e} of their norm."] if errors else []


def count(number: int, what: str) -> str:
    """A number of things.

    Examples
    --------
    >>> count(1, "module"), count(2, "module")
    ('1 module', '2 modules')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
