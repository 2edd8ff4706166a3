"""Writing mlx-lm's format: ``adapters.safetensors`` with transposed factors, one scale for all."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.saving import put_in_place, safetensors_writer
from lora_analysis.formats.writers.folding import with_one_scale
from lora_analysis.formats.writers.losses import count
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written, in_dtype
from lora_analysis.formats.writers.refusals import (
    refuse_convolutions,
    require_base_names,
    require_magnitudes_of_outputs,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What MLX has on every device."""
_BLOCK = re.compile(r"(?:.+\.)?layers\.\d+\.(?P<key>.+)")


def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write ``adapters.safetensors`` and ``adapter_config.json`` into a directory."""
    refuse_convolutions(adapter.source, parts, "mlx")
    require_base_names(adapter, parts, "mlx")
    magnitudes = [part.magnitude is not None for part in parts]
    if any(magnitudes) and not all(magnitudes):
        raise UnsupportedAdapterError(
            f"{adapter.source}: expected DoRA on all modules or on none, as mlx's fine_tune_type has it, got both."
        )
    require_magnitudes_of_outputs(adapter.source, parts, "mlx")
    scale, folded, losses = with_one_scale(adapter.source, parts, "scale", lambda part: 1)
    folded = [
        part if {part.up.dtype, part.down.dtype} <= {*_DTYPES} else in_dtype(adapter.source, part, torch.float32)
        for part in folded
    ]
    r = max(part.r for part in folded)
    if padded := sum(part.r < r for part in folded):
        losses.append(f"{count(padded, 'module')} of a smaller r than {r}, mlx's one for all: padded with zeros.")
    tensors: dict[str, Tensor] = {}
    keys = set()
    for part in folded:
        inner = _BLOCK.fullmatch(part.name)
        if inner is None:
            raise UnsupportedAdapterError(
                f"{adapter.source}: {part.name!r}: expected a module inside a numbered layer ('layers.0.…'), where mlx "
                "puts LoRA."
            )
        keys.add(inner["key"])
        # (in, r) and (r, out), the transposes of PEFT's.
        tensors[f"{part.name}.lora_a"] = pad(part.down, (0, 0, 0, r - part.r)).mT
        tensors[f"{part.name}.lora_b"] = pad(part.up, (0, r - part.r)).mT
        if part.magnitude is not None:
            tensors[f"{part.name}.m"] = part.magnitude.flatten()
    configuration = {
        "fine_tune_type": "dora" if any(magnitudes) else "lora",
        "num_layers": -1,  # LoRA on all layers; those without tensors here start from a zero update
        "lora_parameters": {"rank": r, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    text = json.dumps(configuration, indent=2, sort_keys=True) + "\n"
    put_in_place(
        path,
        {
            "adapters.safetensors": safetensors_writer(tensors, {"format": "mlx"}),
            "adapter_config.json": lambda file: file.write_text(text, encoding="utf-8"),
        },
    )
    return Written(folded, {part.name: part.name for part in parts}, tuple(losses))
