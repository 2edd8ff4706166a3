"""Writing kohya's format: ``<stem>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written, refuse_embeddings, refuse_magnitudes

_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def write(parts: list[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write one ``.safetensors`` file."""
    refuse_magnitudes(adapter.source, parts, "kohya")
    refuse_embeddings(adapter.source, parts, "kohya")
    components = {part.name.split(".")[0] for part in parts}
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    losses = []
    for part in parts:
        stem = _stem(adapter.source, part.name, options.component, components)
        if stem in names.values():
            raise UnsupportedAdapterError(
                f"{adapter.source}: {part.name!r}: another module gives the kohya name {stem!r} as well."
            )
        names[part.name] = stem
        alpha = torch.tensor(part.scale * part.r, dtype=torch.float32)
        if part.scale == 0 or float(alpha) == 0:
            # kohya takes an alpha of 0 as "none given", and then 1 as the scale.
            raise UnsupportedAdapterError(f"{adapter.source}: {part.name!r}: a scale of 0, which kohya cannot say.")
        if float(alpha) / part.r != part.scale:
            losses.append(part.name)
        up, down = part.kernels()
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
    ranks = {part.r for part in parts}
    alphas = {f"{part.scale * part.r:.9g}" for part in parts}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }
    put_in_place(path.parent, {path.name: safetensors_writer(tensors, metadata)})
    rounded = f"alpha is a float32: the scale of {len(losses)} modules is rounded by up to 6e-8 of itself."
    return Written(names, (rounded,) if losses else ())


def _stem(source: str, module: str, component: str | None, components: set[str]) -> str:
    first, _, rest = module.partition(".")
    if first not in _PREFIXES or not rest:
        if component is None:
            raise UnsupportedAdapterError(
                f"{source}: {module!r}: expected a name that begins with its component ({', '.join(_PREFIXES)}), which "
                "kohya's names need. Pass component=."
            )
        first, rest = component, module
    # With one text encoder alone, kohya's trainers leave the number out.
    lone = first == "text_encoder" and not components & {"text_encoder_2", "text_encoder_3"}
    return f"{'lora_te' if lone else _PREFIXES[first]}_{rest.replace('.', '_')}"
