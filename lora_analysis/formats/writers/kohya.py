"""Writing kohya's format: ``<stem>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

Conventions
-----------
A stem is a prefix for the component and the module's path with underscores for dots. Text encoders are ``lora_te``
where the model has one, as Stable Diffusion 1 and 2, else ``lora_te1``, ``lora_te2``; T5 is ``lora_te3``, also where
diffusers calls it ``text_encoder_2``, as in Flux. Facts from sd-scripts' ``networks/lora.py``, ``lora_flux.py`` and
``lora_sd3.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.components import in_component, require_distinct
from lora_analysis.formats.writers.folding import float32_alpha, zeroed
from lora_analysis.formats.writers.losses import count
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written
from lora_analysis.formats.writers.refusals import is_stem, refuse_embeddings, refuse_magnitudes, require_base_names

_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_SEVERAL_ENCODERS = re.compile(r"transformer\.|text_encoder_[23]\.|unet\..*\.transformer_blocks\.[1-9]")
"""What models with more than one text encoder have: SDXL's U-Net has blocks of several transformer layers."""
_T5 = re.compile(r"text_encoder_2\.encoder\.block\.")


def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write one ``.safetensors`` file."""
    source = adapter.source
    refuse_magnitudes(source, parts, "kohya")
    refuse_embeddings(source, parts, "kohya")
    require_base_names(adapter, [part for part in parts if not is_stem(part.name)], "kohya")
    stems = _stems(source, parts, options.component)
    losses = zeroed(parts)
    # kohya takes an alpha of 0 for "none given", and then 1 as the scale.
    parts = [replace(part, up=torch.zeros_like(part.up), scale=1.0) if part.scale == 0 else part for part in parts]
    tensors: dict[str, Tensor] = {}
    rounded = 0
    for part in parts:
        stem, alpha = stems[part.name], float32_alpha(source, repr(part.name), part.scale * part.r)
        rounded += alpha / part.r != part.scale
        up, down = part.kernels()
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha, dtype=torch.float32),
        }
    if rounded:
        losses.append(
            f"alpha is a float32: the scale of {count(rounded, 'module')} is rounded by up to 6e-8 of itself."
        )
    ranks = {part.r for part in parts}
    alphas = {f"{part.scale * part.r:.9g}" for part in parts}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }
    put_in_place(path.parent, {path.name: safetensors_writer(tensors, metadata)})
    return Written(parts, stems, tuple(losses))


def _stems(source: str, parts: Sequence[Part], component: str | None) -> dict[str, str]:
    """Part to kohya's name of it, each of which is another."""
    names = {
        part.name: part.name if is_stem(part.name) else in_component(source, part.name, component, "kohya")
        for part in parts
    }
    several = any(map(_SEVERAL_ENCODERS.match, names.values()))
    stems = {part: name if is_stem(part) else _stem(name, several) for part, name in names.items()}
    require_distinct(source, stems, "kohya")
    return stems


def _stem(name: str, several: bool) -> str:
    first, _, rest = name.partition(".")
    prefix = _PREFIXES[first]
    if first == "text_encoder" and not several:
        prefix = "lora_te"
    elif _T5.match(name):
        prefix = "lora_te3"
    return f"{prefix}_{rest.replace('.', '_')}"
