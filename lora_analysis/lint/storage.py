"""Findings about the file as a file: what is stored twice."""

from __future__ import annotations

from collections.abc import Iterator

from lora_analysis.adapter import Adapter
from lora_analysis.lint.finding import Finding


def storage_findings(adapter: Adapter) -> Iterator[Finding]:
    """Tensors that an update shares with others, or that are stored under several names."""
    for item in adapter.unused:
        if "the base's own tensor" in item.reason:
            yield Finding(
                "duplicate-tensor",
                "warning",
                "",
                f"{item.tensor!r} ({item.nbytes / 1e6:.2f} MB) is {item.reason}. Leave it out.",
            )
