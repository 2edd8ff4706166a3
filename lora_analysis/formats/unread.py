"""Formats and kinds of update that are recognised, so that they can be refused by name.

A reader takes the place of a line here when it is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint

_BY_KEY = (
    ("LyCORIS LoHa", r"\.hada_w[12]"),
    ("LyCORIS LoKr", r"\.lokr_w[12]"),
    ("OFT or BOFT, a multiplicative update", r"\.oft_|\.boft_"),
    ("LyCORIS LoCon with a Tucker core", r"\.lora_mid\.weight$"),
    ("AdaLoRA", r"\.lora_E(\.|$)"),
    ("VeRA", r"\.vera_lambda_|(^|\.)vera_[AB](\.|$)"),
    ("IA3, which is no additive low-rank update", r"\.ia3_l(\.|$)"),
    ("UniLoRA, which shares one vector among all modules", r"unilora"),
    ("LoRA on embeddings", r"\.lora_embedding_[AB](\.|$)"),
    ("diffusers LoRA", r"\.lora\.(down|up)\.weight$|_lora\.(down|up)\.weight$|\.lora_linear_layer\."),
    ("XLabs Flux LoRA", r"_lora\d?\.(down|up)\.weight$"),
    ("kohya or LyCORIS LoRA", r"\.lora_(down|up)\.weight$"),
    ("torchtune LoRA", r"\.lora_[ab]\.weight$"),
    ("MLX or GGUF LoRA", r"\.lora_[ab]$"),
    ("Sam_LoRA slices", r"^w_[ab]_\d+$"),
    ("cloneofsimo LoRA", r"^(unet|text_encoder):\d+:(up|down)$"),
)
_NOT_LOW_RANK = {
    "IA3": ", which is no additive low-rank update",
    "UNILORA": ", which shares one vector among all modules",
    "OFT": ", a multiplicative update",
    "BOFT": ", a multiplicative update",
    "PROMPT_TUNING": ", which changes no weight",
    "PREFIX_TUNING": ", which changes no weight",
    "P_TUNING": ", which changes no weight",
}
_DIFFUSERS_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.")


def recognised(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The name of a format or kind that is known and not read, or None."""
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type.upper() != "LORA":
        return f"PEFT {peft_type}{_NOT_LOW_RANK.get(peft_type.upper(), '')}"
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "MLX LoRA"
    names = list(checkpoint)
    for title, pattern in _BY_KEY:
        if any(re.search(pattern, name) for name in names):
            return title
    if not config and (
        "lora_adapter_metadata" in checkpoint.metadata
        or any(name.startswith(_DIFFUSERS_COMPONENTS) and ".lora_A." in name for name in names)
    ):
        return "diffusers LoRA"
    return None
