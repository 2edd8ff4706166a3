"""cloneofsimo/lora, the first LoRA of diffusion models: factors by their order in the model, without names.

Conventions
-----------
A ``.safetensors`` file holds ``<component>:<i>:up`` (out, r[, 1, 1]) and ``<component>:<i>:down`` (r, in[, k, k])
with ``<component>`` such as ``unet`` or ``text_encoder``; its header holds ``<component>:<i>:rank``, the classes
whose layers were adapted under ``<component>``, and ``<embed>`` under each learned token, whose embedding lies in
the same file. A ``.pt`` file is a bare list of tensors, up, down, up, down, …; which component it is for, only its
name says (``….text_encoder.pt``).

ΔW = up·down: the layers multiply by a scale of 1 that no file stores (``LoraInjectedLinear.scale``), so alpha is
r here. ``alpha=`` is the lora_alpha of the paper, ΔW = alpha / r · up·down.

Module ``unet.7`` is ``unet:7`` of the file, ``lora.7`` the eighth pair of a list. The order is the one in which
``named_modules`` of the model meets the layers to be adapted, inside every module of the classes in the header;
without the model's code it leads to no name, so the targets resolve against no base. A layer whose ``up`` was never
trained (in the project's own early example every fourth, the output of each attention) is an ordinary update of
zero. Facts from ``lora_diffusion/lora.py`` (``save_safeloras_with_embeds``,
``save_lora_weight``, ``parse_safeloras``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import low_rank
from lora_analysis.update import LowRankUpdate

NAME = "cloneofsimo"
TAKES = ()

_FACTOR = re.compile(r"(?P<component>[^:]+):(?P<index>0|[1-9][0-9]{0,5}):(?P<side>up|down)\Z", re.DOTALL)
_EMBED = "<embed>"
_LIST = "lora"
"""The component of a bare list, which does not say whether it is the UNet's."""


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the tensors are a bare list, or some are called ``<component>:<i>:up``."""
    if "peft_type" in config:
        return False
    return _is_list(checkpoint) or any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a file of cloneofsimo's."""
    where = options.where
    pairs = _of_list(checkpoint, where) if _is_list(checkpoint) else _of_names(checkpoint, where)
    modules: dict[str, Module] = {}
    doubts: list[tuple[str, str]] = []
    for (component, index), keys in pairs.items():
        name = f"{component}.{index}"
        modules[name] = _module(checkpoint, name, keys, options)
        declared = checkpoint.metadata.get(f"{component}:{index}:rank")
        if declared is not None and declared != str(modules[name].r):
            shown = declared if declared.isprintable() and len(declared) < 20 else repr(declared[:20])
            text = f"{name!r}: the header says rank {shown}, the tensors have r={modules[name].r}; they win."
            doubts.append(("rank", text))
    used = {key for keys in pairs.values() for key in keys}
    unused = unused_tensors(
        checkpoint,
        used,
        (),
        partial(_reason, metadata=checkpoint.metadata),
        otherwise="a tensor beside the factors, no part of any update",
        where=where,
    )
    notes = first_of_each(doubts)
    if options.base is not None:
        notes.append("the file does not name its layers, so that base= says nothing of where they are.")
    return Contents(modules, unused, tuple(notes))


def _is_list(checkpoint: Checkpoint) -> bool:
    return checkpoint.metadata.get("container") == "list" and "0" in checkpoint


def _of_list(checkpoint: Checkpoint, where: str) -> dict[tuple[str, int], tuple[str, str]]:
    """The pairs of a bare list, by their positions."""
    if len(checkpoint) % 2:
        raise AdapterFormatError(
            f"{where}: expected a list of up, down, up, down, …, got an odd number of tensors ({len(checkpoint)})."
        )
    return {(_LIST, i): (str(2 * i), str(2 * i + 1)) for i in range(len(checkpoint) // 2)}


def _of_names(checkpoint: Checkpoint, where: str) -> dict[tuple[str, int], tuple[str, str]]:
    """The pairs of a safetensors file, by component and index."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for key in checkpoint:
        if match := _FACTOR.match(key):
            found.setdefault((match["component"], int(match["index"])), {})[match["side"]] = key
    for (component, index), sides in found.items():
        if len(sides) < 2:
            (side, key), other = next(iter(sides.items())), "down" if "up" in sides else "up"
            raise AdapterFormatError(
                f"{where}: {f'{component}.{index}'!r}: expected up and down, got only {side} ({key!r}); "
                f"{other} is missing."
            )
    return {place: (sides["up"], sides["down"]) for place, sides in sorted(found.items())}


def _module(checkpoint: Checkpoint, name: str, keys: tuple[str, str], options: ReadOptions) -> Module:
    up, down = (checkpoint.shape(key) for key in keys)
    fits = len(up) >= 2 and len(down) >= 2 and up[1] == down[0] and set(up[2:]) <= {1} and 0 not in up + down
    if not fits:
        raise AdapterFormatError(
            f"{options.where}: {name!r}: expected up (out, r) and down (r, in), or of a convolution (out, r, 1, 1) "
            f"and (r, in, k, k), got {up} and {down} in {keys[0]!r} and {keys[1]!r}."
        )
    r = down[0]
    scale, source = _scale(options.alpha, r)
    return Module(
        shape=(up[0], math.prod(down[1:])),
        r=r,
        scale=scale,
        scale_source=source,
        target=Target(f"{name}.weight", kernel=down[2:]),
        tensors=keys,
        read=partial(_read_update, checkpoint, keys, scale, options.device),
    )


def _scale(alpha: float | None, r: int) -> tuple[float, ScaleSource]:
    return (1.0, "format default") if alpha is None else (alpha / r, "caller")


def _read_update(checkpoint: Checkpoint, keys: tuple[str, str], scale: float, device: torch.device) -> LowRankUpdate:
    up, down = (checkpoint[key].to(device) for key in keys)
    return low_rank(up, down, scale)


def _reason(key: str, metadata: Mapping[str, str]) -> str | None:
    if metadata.get(key) == _EMBED:
        return "a learned token embedding (textual inversion), no part of any update"
    return None
