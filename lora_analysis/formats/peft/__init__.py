"""PEFT (huggingface/peft): LoRA of linear layers, as ``save_pretrained`` writes it and as raw dumps hold it.

Conventions
-----------
``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``.lora_B.weight`` (d_out, r); ΔW = s·B·A with
s = lora_alpha / r, or lora_alpha / sqrt(r) under ``use_rslora``. Raw dumps keep the adapter's name:
``.lora_A.default.weight``. Facts from PEFT's own source: ``tuners/lora/layer.py`` (scaling, orientation),
``utils/other.py`` (``get_pattern_key``), ``utils/save_and_load.py`` (names).
"""

from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.formats.peft.lora import read
from lora_analysis.formats.peft.names import FACTOR
from lora_analysis.formats.peft.write import write

__all__ = ["NAME", "matches", "read", "write"]

NAME = "peft"


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the configuration or the tensors' names are PEFT's."""
    return "peft_type" in config or any(FACTOR.match(name) for name in checkpoint)
