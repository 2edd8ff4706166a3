"""Writing diffusers' PEFT-style format: ``<component>.<path>.lora_A.weight``, scales in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written, refuse_embeddings, refuse_magnitudes
from lora_analysis.formats.writers.peft import scale_fields

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def write(parts: list[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write one ``.safetensors`` file whose header holds r and alpha of every component."""
    refuse_magnitudes(adapter.source, parts, "diffusers")
    refuse_embeddings(adapter.source, parts, "diffusers")
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    members: dict[str, dict[str, Part]] = {}
    for part in parts:
        component, _, rest = part.name.partition(".")
        if component not in COMPONENTS or not rest:
            if options.component is None:
                raise UnsupportedAdapterError(
                    f"{adapter.source}: {part.name!r}: expected a name that begins with its component "
                    f"({', '.join(COMPONENTS)}), which diffusers' names need. Pass component=."
                )
            component, rest = options.component, part.name
        up, down = part.kernels()
        names[part.name] = f"{component}.{rest}"
        members.setdefault(component, {})[rest] = part
        tensors |= {f"{component}.{rest}.lora_A.weight": down, f"{component}.{rest}.lora_B.weight": up}
    configuration: dict[str, Any] = {}
    for component, modules in members.items():
        fields = scale_fields(modules) | {"use_dora": False}
        configuration |= {f"{component}.{key}": value for key, value in fields.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configuration, sort_keys=True)}
    put_in_place(path.parent, {path.name: safetensors_writer(tensors, metadata)})
    unscaled = all(part.scale == 1 for part in parts)
    return Written(
        names,
        ()
        if unscaled
        else ("the scale is in the header, which diffusers before 0.34 does not read: it takes alpha = r there.",),
    )
