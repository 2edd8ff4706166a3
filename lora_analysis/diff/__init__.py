"""The difference of two full checkpoints as an adapter: a full fine-tune minus its base.

Conventions
-----------
``ΔW = W_tuned - W_base``, computed in float64 and oriented (d_out, d_in), one matrix at a time. Modules and
targets are named as in the base. Numbers stored in 16 bits carry their rounding into the difference: 1.7e-3
(bfloat16) or 2.1e-4 (float16) of each *weight*, often more than the fine-tuning itself, so the tail of such a
spectrum is no sign of a high rank. That noise is relative to W, not to ΔW, and no floor is claimed for it.

Values
------
``diff``; ``holds_embedding``.
"""

from lora_analysis.diff.difference import diff
from lora_analysis.diff.pairs import holds_embedding

__all__ = ["diff", "holds_embedding"]
