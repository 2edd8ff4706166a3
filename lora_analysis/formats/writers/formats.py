"""The list of formats that are written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_analysis.adapter import Adapter
from lora_analysis.formats.writers import diffusers, gguf, kohya, mlx, peft
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written


class Writer(NamedTuple):
    """What writes a format.

    Parameters
    ----------
    write : callable
        Parts, the adapter, where to, and options.
    files : tuple of str
        What it puts into the directory that it is given; () if it is given a file's path.
    suffix : str
        How that file's name ends.
    """

    write: Callable[[Sequence[Part], Adapter, Path, WriteOptions], Written]
    files: tuple[str, ...] = ()
    suffix: str = ""


WRITERS: Mapping[str, Writer] = {
    "peft": Writer(peft.write, ("adapter_model.safetensors", "adapter_config.json")),
    "kohya": Writer(kohya.write, suffix=".safetensors"),
    "diffusers": Writer(diffusers.write, suffix=".safetensors"),
    "mlx": Writer(mlx.write, ("adapters.safetensors", "adapter_config.json")),
    "gguf": Writer(gguf.write, suffix=".gguf"),
}
"""Format to what writes it."""
