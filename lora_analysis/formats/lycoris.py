"""LyCORIS: LoCon, LoHa, LoKr, their Tucker and DoRA forms, and full differences, mixed as one file likes.

Conventions
-----------
Stems are kohya's, or ``lycoris_`` and the underscored path in any model. Each module has its own algorithm, told by its
tensors (``kohya.algorithms``), and an ``alpha``: the scale is alpha / r; rsLoRA's root is in the saved alpha already.
LoKr of two full matrices has scale 1 whatever its alpha. ``dora_scale`` rescales the merged weight, per output row,
shape (out, 1, …), or per input channel, (1, in, 1, …). Gains and biases (``w_norm``, ``b_norm``, ``diff_b``) are
listed. A file with a multiplicative module (OFT, BOFT, IA3), GLoRA or T-LoRA is refused, the module named.

Facts from ``lycoris/modules/*.py``: what a module adds in its ``forward``. For LoHa and LoKr LyCORIS'
``get_diff_weight``, and with it ``merge_to``, multiplies by the scale twice; kohya's own modules do not.
"""

from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.formats.kohya.reader import read
from lora_analysis.formats.kohya.stems import FACTORS, LYCORIS_ANYWHERE, LYCORIS_PREFIXED, PREFIXES

__all__ = ["NAME", "matches", "read"]

NAME = "lycoris"
TAKES = ()


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether some tensors are LyCORIS' by their last names, or by those and a prefix or the header."""
    if "peft_type" in config or any(key.startswith(("base_model.", "module.base_model.")) for key in checkpoint):
        return False
    written_by_it = checkpoint.metadata.get("ss_network_module", "").startswith("lycoris")
    return any(
        key.endswith(LYCORIS_ANYWHERE)
        or (key.startswith(PREFIXES) and key.endswith(LYCORIS_PREFIXED))
        or ((written_by_it or key.startswith("lycoris_")) and key.endswith(FACTORS))
        for key in checkpoint
    )
