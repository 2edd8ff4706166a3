"""Names of tensors in PEFT's files: which module, which factor, which adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.options import ReadOptions

FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight\Z", re.DOTALL)
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod"}


def paired(checkpoint: Checkpoint, options: ReadOptions) -> dict[str, tuple[str, str]]:
    """Module name -> (key of A, key of B), for the one adapter asked for."""
    found: dict[str | None, dict[str, dict[str, str]]] = {}
    for key in checkpoint:
        if match := FACTOR.match(key):
            sides = found.setdefault(match["adapter"], {}).setdefault(module_name(match["stem"]), {})
            if match["side"] in sides:
                raise AdapterFormatError(
                    f"{options.where}: expected one lora_{match['side']} for {module_name(match['stem'])!r}, "
                    f"got {sides[match['side']]!r} and {key!r}."
                )
            sides[match["side"]] = key
    chosen = _chosen(found, options)
    for module, sides in chosen.items():
        if len(sides) < 2:
            (side, key), other = next(iter(sides.items())), "B" if "A" in sides else "A"
            raise AdapterFormatError(
                f"{options.where}: {module!r}: expected lora_A and lora_B, got only lora_{side} ({key!r}); "
                f"lora_{other} is missing."
            )
    return {module: (sides["A"], sides["B"]) for module, sides in chosen.items()}


def _chosen(found: Mapping[str | None, dict[str, dict[str, str]]], options: ReadOptions) -> dict[str, dict[str, str]]:
    """The adapter asked for, of those in the file."""
    name = options.name
    if name in found:
        return found[name]
    if len(found) > 1:
        names = ", ".join(repr(name) for name in found)
        raise AdapterFormatError(f"{options.where}: holds several adapters ({names}). Pass name= with one.")
    only = next(iter(found), None)
    # PEFT's save_pretrained leaves the name out, and puts the default adapter into the folder itself.
    if name is None or (name == "default" and only is None):
        return found.get(only, {})
    held = "one without a name" if only is None else repr(only)
    raise AdapterFormatError(f"{options.where}: expected an adapter named {name!r}, found {held}. Leave name= out.")


def module_name(stem: str) -> str:
    """The base model's name of a module, without what PEFT, DDP, FSDP and compile put round it."""
    stem = ".".join(component for component in stem.split(".") if component not in _WRAPPERS) or stem
    return stem.removeprefix("module.base_model.model.").removeprefix("base_model.model.")
