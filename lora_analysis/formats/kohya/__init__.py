"""kohya-ss/sd-scripts: ``lora_down``, ``lora_up`` and ``alpha`` per module, under underscored names.

Conventions
-----------
``<stem>.lora_down.weight`` (r, d_in) or (r, in, k, k), ``<stem>.lora_up.weight`` (d_out, r) or (out, r, 1, 1), and a
scalar ``<stem>.alpha``; ΔW = up·down·alpha / r, where no alpha, or one of 0, means alpha = r. The stem is a
prefix (``lora_unet``, ``lora_te``, ``lora_te1``, ``lora_te2``, ``lora_te3``) and the module's path with underscores
for dots; ``base=`` resolves it (``formats.underscored``), else it stays verbatim. Dotted stems are read, too. DyLoRA
saves the same tensors. A fused weight trained with ``split_qkv`` comes apart into its blocks (``kohya.split_qkv``).
A Control-LoRA, marked ``lora_controlnet``, holds bare ``up`` and ``down`` of scale 1 beside full tensors.

A module may hold LyCORIS' tensors instead, which the same reader reads (``kohya.algorithms``). Facts from sd-scripts'
``networks/lora.py``, ``lora_flux.py``, ``dylora.py``, ``loha.py`` and ``lokr.py``.
"""

from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.formats.kohya.reader import read
from lora_analysis.formats.kohya.stems import CONTROL_LORA, FACTORS

__all__ = ["NAME", "matches", "read"]

NAME = "kohya"
TAKES = ()


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether some tensors are called ``lora_up.weight`` or ``lora_down.weight``, or the file is a Control-LoRA."""
    return "peft_type" not in config and (
        CONTROL_LORA in checkpoint or any(key.endswith(FACTORS) for key in checkpoint)
    )
