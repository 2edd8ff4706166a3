"""The scale of PEFT's LoHa and LoKr: ``alpha / r``, with the patterns of LoRA and no rank-stabilised variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_analysis.formats.peft.configuration import Scaling, number

LYCORIS_FIELDS = (
    "alpha",
    "alpha_pattern",
    "module_dropout",
    "r",
    "rank_dropout",
    "rank_pattern",
    "use_effective_conv2d",
)
"""What configurations of both families hold beside what all of PEFT's do."""


def lycoris_scaling(config: Mapping[str, Any], alpha: float | None, where: str) -> Scaling:
    """``Scaling`` for a configuration that calls it ``alpha``; PEFT's default is the same, 8.

    Raises
    ------
    AdapterFormatError
        If a field is of the wrong type.

    Examples
    --------
    >>> lycoris_scaling({"alpha": 6, "r": 4, "alpha_pattern": {"k": 2}}, None, "x").scale("q", 4)
    (1.5, 'config')
    >>> lycoris_scaling({"r": 4}, None, "x").notes
    ["the configuration holds no alpha; PEFT's default, 8, applies."]
    """
    stated = config.get("alpha")
    if stated is not None:
        number(stated, "alpha", where)
    kept = {name: value for name, value in config.items() if name not in ("lora_alpha", "use_rslora")}
    scaling = Scaling(kept if stated is None else kept | {"lora_alpha": stated}, alpha, where)
    scaling.notes = [note.replace("no lora_alpha;", "no alpha;") for note in scaling.notes]
    return scaling
