"""The list of formats that are written."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_analysis.adapter import Adapter
from lora_analysis.formats.writers import diffusers, gguf, kohya, mlx, peft
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written

WRITERS: Mapping[str, Callable[[list[Part], Adapter, Path, WriteOptions], Written]] = {
    "peft": peft.write,
    "kohya": kohya.write,
    "diffusers": diffusers.write,
    "mlx": mlx.write,
    "gguf": gguf.write,
}
"""Format to what writes it."""
