"""Stable Diffusion's U-Net under its two sets of names: the original checkpoint's and diffusers'.

Conventions
-----------
Names are underscored paths, ``input_blocks_4_1_proj_in``. SD 1, SD 2 and SDXL have two residual blocks on each level,
so ``input_blocks.i`` and ``output_blocks.i`` are counted in threes. Facts from diffusers'
``scripts/convert_diffusers_to_original_sdxl.py``.
"""

from __future__ import annotations

import re

_LAYERS = 3
"""Blocks on each level of the original: two residual blocks and a change of resolution, or three on the way up."""

_TOP = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<number>[0-9]{1,3})_(?P<part>[012])_(?P<rest>.+)\Z", re.DOTALL)
_MIDDLE = re.compile(r"middle_block_(?P<part>[012])_(?P<rest>.+)\Z", re.DOTALL)


def diffusers_form(name: str) -> str:
    """The diffusers name of an original block's; any other name as it is.

    Examples
    --------
    >>> diffusers_form("input_blocks_4_1_transformer_blocks_0_attn1_to_q")
    'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    >>> diffusers_form("output_blocks_2_1_conv"), diffusers_form("middle_block_2_in_layers_2")
    ('up_blocks_0_upsamplers_0_conv', 'mid_block_resnets_1_conv1')
    >>> diffusers_form("mid_block_resnets_1_conv1")
    'mid_block_resnets_1_conv1'
    """
    if name in _TOP:
        return _TOP[name]
    if middle := _MIDDLE.match(name):
        part, rest = middle["part"], middle["rest"]
        if part == "1":
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{int(part) // 2}_{_RESNET[rest]}" if rest in _RESNET else name
    if not (block := _BLOCK.match(name)):
        return name
    down = block["side"] == "input"
    level, layer = divmod(int(block["number"]) - down, _LAYERS)
    side, part, rest = "down" if down else "up", block["part"], block["rest"]
    if down and part == "0" and rest == "op" and layer == _LAYERS - 1:
        return f"down_blocks_{level}_downsamplers_0_conv"
    if not down and part in "12" and rest == "conv" and layer == _LAYERS - 1:
        return f"up_blocks_{level}_upsamplers_0_conv"
    if part == "0":
        return f"{side}_blocks_{level}_resnets_{layer}_{_RESNET[rest]}" if rest in _RESNET else name
    return f"{side}_blocks_{level}_attentions_{layer}_{rest}" if part == "1" else name
