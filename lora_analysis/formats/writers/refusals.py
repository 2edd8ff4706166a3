"""What formats have no place for, each refused by name."""

from __future__ import annotations

from collections.abc import Iterable

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.kohya.stems import PREFIXES
from lora_analysis.formats.writers.parts import Part


def is_stem(name: str) -> bool:
    """Whether a module has kohya's name, which says the base's only together with a base."""
    return name.startswith(PREFIXES) and "." not in name


def refuse_magnitudes(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse DoRA for a format that cannot hold it."""
    if part := next((part for part in parts if part.magnitude is not None), None):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: DoRA, whose magnitudes {format} cannot hold. Read it with base= and cut the "
            "true update to r=, or convert to peft or mlx."
        )


def require_magnitudes_of_outputs(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse magnitudes that are not one for each output, as DoRA's of peft and mlx are."""
    for part in parts:
        if part.magnitude is None:
            continue
        if part.magnitude_axis != 1:
            raise UnsupportedAdapterError(
                f"{source}: {part.name!r}: expected one magnitude for each output, as {format}'s, got one for each "
                "input. Read it with base= and cut the true update to r=."
            )
        if part.magnitude.numel() != len(part.up):
            raise UnsupportedAdapterError(
                f"{source}: {part.name!r}: expected {len(part.up)} magnitudes, one for each output, got "
                f"{part.magnitude.numel()}."
            )


def refuse_embeddings(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse embeddings for a format that has another layout for them."""
    if part := next((part for part in parts if part.embedding), None):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: an embedding, which is written as peft only, not as {format}."
        )


def refuse_convolutions(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse convolutions for a format of language models."""
    if part := next((part for part in parts if part.target.kernel), None):
        raise UnsupportedAdapterError(f"{source}: {part.name!r}: a convolution, for which {format} has no place.")


def require_base_names(adapter: Adapter, parts: Iterable[Part], format: str) -> None:
    """Refuse the names that another format has for modules, for one that has the base's."""
    for part in parts:
        if is_stem(part.name):
            named, help = "kohya's", "Pass base=, which resolves them."
        elif adapter.format == "gguf" and part.name.startswith("blk."):
            named, help = "GGUF's", "Pass base=, which resolves them."
        elif adapter.format == "cloneofsimo":
            named, help = "its number in the file", "The file does not say more."
        elif adapter.format == "torchtune" and part.name.startswith(("layers.", "decoder.layers.")):
            named, help = "torchtune's", "Pass heads= or base=, with which they are translated."
        else:
            continue
        raise UnsupportedAdapterError(
            f"{adapter.source}: {part.name!r}: expected the base's own name of this module, which {format} needs, got "
            f"{named}. {help}"
        )
