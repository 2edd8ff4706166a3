"""diffusers (huggingface/diffusers) and its kin: LoRA of diffusion models, several components in one file.

Conventions
-----------
Names are ``<component>.<path>``, with ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2`` (diffusers,
ai-toolkit) or ``diffusion_model`` (ComfyUI) as the component, or none where one model was saved alone. The factors,
down (r, in[, k, k]) and up (out, r[, 1, 1]), by age of the file:

- ``….attn1.processor.to_q_lora.down.weight``: ``….attn1.to_q``; ``to_out_lora`` is ``to_out.0``, and in a text
  encoder ``to_q_lora`` is ``q_proj``, ``to_out_lora`` ``out_proj``;
- ``….to_q.lora.down.weight``, in text encoders ``….q_proj.lora_linear_layer.down.weight``;
- ``….to_q.lora_A.weight`` as PEFT has it, with an adapter's name or without; ComfyUI's ``….lora_down.weight``.

Scales are alpha / r, alpha / sqrt(r) where the header says ``use_rslora``. Alpha is the module's own tensor
``<module>.alpha``; else what the safetensors header holds under ``lora_adapter_metadata``, the fields of PEFT's
``LoraConfig`` with the component before them (``unet.lora_alpha``, patterns by PEFT's rule, PEFT's default of 8 where
the field is absent); else r, a scale of 1, which is the format's default.

DoRA is ``lora_magnitude_vector`` with one number per output row (PEFT), or ``dora_scale`` as LyCORIS writes it,
(out, 1, …) or (1, in, …). diffusers drops ``dora_scale`` with a warning; here it is read, as what it was trained to be.

XLabs' Flux files name attention processors, ``double_blocks.N.processor.qkv_lora1.down.weight``, over Flux's own
layers: ``qkv_lora1`` and ``proj_lora1`` are ``img_attn.qkv`` and ``img_attn.proj``, those with 2 ``txt_attn``'s. In
single blocks ``qkv_lora`` adds to the first 3·dim rows of ``linear1`` (module ``linear1.qkv``), ``proj_lora`` is
``linear2``. Their network_alpha is in no file; diffusers reads them with a scale of 1, and so does this reader.

A fused qkv stays one module, as it was trained. Files of kohya's that diffusers converts have alpha / r folded into
their factors as powers of two; nothing in them says so, and nothing need.

Facts from diffusers' ``loaders/lora_base.py``, ``loaders/lora_conversion_utils.py``, ``utils/peft_utils.py``,
``utils/state_dict_utils.py``, and ``src/flux/modules/layers.py`` of XLabs-AI/x-flux.
"""

from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.formats.diffusers.lora import read
from lora_analysis.formats.diffusers.names import is_diffusers
from lora_analysis.formats.diffusers.scaling import HEADER

__all__ = ["NAME", "matches", "read"]

NAME = "diffusers"
TAKES = ("name",)


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the header is diffusers', or some factor is called as in its files; never with PEFT's configuration."""
    if "peft_type" in config:
        return False
    return HEADER in checkpoint.metadata or any(is_diffusers(name) for name in checkpoint)
