"""Names of tensors in PEFT's files: which layer, which factor, which adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.options import ReadOptions

_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
_ADAPTER = rf"(?:\.(?P<adapter>(?!weight\Z)[^.]+))?(?:\.(?:{'|'.join(_WRAPPERS)}))*"
FACTOR = re.compile(
    rf"(?P<stem>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB]){_ADAPTER}(?(embedding)(?:\.weight)?|\.weight)\Z",
    re.DOTALL,
)
"""A and B: parameters of layers, ``.weight`` and all, but for an embedding's, which are parameters themselves."""
MAGNITUDE = re.compile(rf"(?P<stem>.+)\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?\Z", re.DOTALL)
"""DoRA's magnitudes: bare where PEFT saved them, in a layer's ``.weight`` in raw dumps."""
_PREFIX = "base_model.model."


class Layer(NamedTuple):
    """The tensors of one adapted layer."""

    stem: str
    """Its name in the adapted model: ``base_layer`` is still in it where PEFT nests its layers."""
    down: str
    up: str
    embedding: bool
    magnitude: str | None


def plain(key: str) -> str:
    """A tensor's name without what FSDP, compile and activation checkpointing put into it."""
    return ".".join(component for component in key.split(".") if component not in _WRAPPERS) or key


def stem_of(key: str) -> str | None:
    """What the file calls the layer of a factor or magnitude; None for other tensors."""
    for pattern in (FACTOR, MAGNITUDE):
        if match := pattern.match(plain(key)):
            return match["stem"]
    return None


def module_name(stem: str) -> str:
    """The base model's name of a module, without what PEFT, DDP, FSDP and compile put round it."""
    stem = plain(stem)
    # Trainers put their own attribute before PEFT's prefix: "module.base_model.model.…", "model.base_model.model.…".
    _, prefix, rest = f".{stem}".partition(f".{_PREFIX}")
    return rest if prefix else stem


def layers(checkpoint: Checkpoint, options: ReadOptions) -> dict[str, Layer]:
    """Every layer of the one adapter asked for, by its name in the adapted model."""
    found: dict[str | None, dict[str, dict[str, str]]] = {}
    embeddings = set()
    for key in checkpoint:
        match = FACTOR.match(plain(key)) or MAGNITUDE.match(plain(key))
        if match is None:
            continue
        groups = match.groupdict()
        part = f"lora_{groups.get('embedding') or ''}{groups['side']}" if "side" in groups else "lora_magnitude_vector"
        stem = module_name(match["stem"])
        parts = found.setdefault(match["adapter"], {}).setdefault(stem, {})
        if part in parts:
            raise AdapterFormatError(
                f"{options.where}: expected one {part} for {stem!r}, got {parts[part]!r} and {key!r}."
            )
        parts[part] = key
        if groups.get("embedding"):
            embeddings.add((match["adapter"], stem))
    name, chosen = _chosen(found, options)
    return {stem: _layer(stem, parts, (name, stem) in embeddings, options.where) for stem, parts in chosen.items()}


def _layer(stem: str, parts: Mapping[str, str], embedding: bool, where: str) -> Layer:
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [part for part in (a, b) if part not in parts]:
        part, key = next(iter(parts.items()))
        raise AdapterFormatError(
            f"{where}: {stem!r}: expected {a} and {b}, got only {part} ({key!r}); {missing[0]} is missing."
        )
    if extra := sorted(parts.keys() - {a, b, "lora_magnitude_vector"}):
        raise AdapterFormatError(
            f"{where}: {stem!r}: expected the factors of a layer or of an embedding, got {extra[0]} beside {a}."
        )
    return Layer(stem, parts[a], parts[b], embedding, parts.get("lora_magnitude_vector"))


def _chosen(
    found: Mapping[str | None, dict[str, dict[str, str]]], options: ReadOptions
) -> tuple[str | None, dict[str, dict[str, str]]]:
    """The adapter asked for, of those in the file, and what the file calls it."""
    name = options.name
    if name in found:
        return name, found[name]
    if len(found) > 1:
        names = ", ".join(repr(name) for name in found)
        raise AdapterFormatError(f"{options.where}: holds several adapters ({names}). Pass name= with one.")
    only = next(iter(found), None)
    # PEFT's save_pretrained leaves the name out, and puts the default adapter into the folder itself.
    if name is None or (name == "default" and only is None):
        return only, found.get(only, {})
    held = "one without a name" if only is None else repr(only)
    raise AdapterFormatError(f"{options.where}: expected an adapter named {name!r}, found {held}. Leave name= out.")
