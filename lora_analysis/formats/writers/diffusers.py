"""Writing diffusers' PEFT-style format: ``<component>.<path>.lora_A.weight``, scales in the header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.components import in_component, require_distinct
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written
from lora_analysis.formats.writers.peft import scale_fields
from lora_analysis.formats.writers.refusals import refuse_embeddings, refuse_magnitudes, require_base_names


def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write one ``.safetensors`` file whose header holds r and alpha of every component."""
    refuse_magnitudes(adapter.source, parts, "diffusers")
    refuse_embeddings(adapter.source, parts, "diffusers")
    require_base_names(adapter, parts, "diffusers")
    names = {part.name: in_component(adapter.source, part.name, options.component, "diffusers") for part in parts}
    require_distinct(adapter.source, names, "diffusers")
    tensors: dict[str, Tensor] = {}
    members: dict[str, dict[str, Part]] = {}
    for part in parts:
        name = names[part.name]
        component, _, rest = name.partition(".")
        members.setdefault(component, {})[rest] = part
        up, down = part.kernels()
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    configuration: dict[str, Any] = {}
    for component, modules in members.items():
        fields = scale_fields(modules) | {"use_dora": False}
        configuration |= {f"{component}.{key}": value for key, value in fields.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configuration, sort_keys=True)}
    put_in_place(path.parent, {path.name: safetensors_writer(tensors, metadata)})
    if all(part.scale == 1 for part in parts):
        return Written(parts, names)
    older = "the scale is in the header, which diffusers before 0.34 does not read: it takes alpha = r there."
    return Written(parts, names, (older,))
