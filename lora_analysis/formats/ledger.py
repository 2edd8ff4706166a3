"""The account of a file's other tensors: each is listed with a reason, or the load fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from lora_analysis.adapter import Unused
from lora_analysis.checkpoint import Checkpoint, nbytes
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.unread import kind_of

_FACTORS = (
    ("diffusers' LoRA of old", r"[._]lora[12]?\.(?:up|down)\.weight\Z"),
    ("LyCORIS", r"\.(?:hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|oft_blocks|oft_diag)(?:\.[^.]+)?\Z"),
    ("LyCORIS, a full difference", r"\.diff\Z"),
    ("DoRA", r"\.dora_scale\Z"),
    ("VeRA", r"\.vera_lambda_[bd](?:\.[^.]+)?\Z"),
    ("Sam_LoRA", r"(?:\A|\.)w_[ab]_[0-9]{3,4}\Z"),
    ("cloneofsimo's LoRA", r"[^:]:[0-9]+:(?:up|down)\Z"),
)
"""What tensors of updates are called in the formats that are read, where it is not ``lora_``."""
_OURS = ("lora_", "lycoris_")


def unused_tensors(
    checkpoint: Checkpoint,
    used: Collection[str],
    stems: Collection[str],
    reason: Callable[[str], str | None],
    *,
    otherwise: str,
    where: str,
) -> tuple[Unused, ...]:
    """The tensors that are no factor, each with its reason.

    Parameters
    ----------
    checkpoint : Checkpoint
    used : collection of str
        The tensors that updates are made of.
    stems : collection of str
        What the file calls its adapted modules.
    reason : callable
        Why the format has a tensor of this name; None where it does not say.
    otherwise : str
        The reason of any other full tensor.
    where : str
        The file, for messages.

    Raises
    ------
    UnsupportedAdapterError
        If a tensor is the alpha of a module, which would change the scale, or of an update of another kind.
    AdapterFormatError
        If a name speaks of LoRA and nothing says what it is: it might be half of an update.
    """
    # Components that modules of the file share, such as "lora_layers", say nothing about a tensor below them.
    containers = {component for stem in stems for component in stem.split(".")}
    listed = []
    for key in checkpoint:
        if key in used:
            continue
        stem, _, last = key.rpartition(".")
        if last in ("alpha", "lora_alpha") and stem in stems:
            raise UnsupportedAdapterError(
                f"{where}: {key!r}: per-module alpha tensors, as diffusers and kohya write them, are none of the "
                "format that the file is read as. Pass format='diffusers' if they are theirs, or remove them."
            )
        found = reason(key)
        if found is None and (kind := _kind_of(checkpoint, key)):
            raise UnsupportedAdapterError(
                f"{where}: {key!r}: expected updates of one kind, got a part of another ({kind}), which would be left "
                "out. Split the file by kinds, or remove it if it is no part of the update."
            )
        if found is None and any(_speaks_of_lora(part) and part not in containers for part in key.split(".")):
            raise AdapterFormatError(
                f"{where}: {key!r}: expected the tensors of LoRA to be factors of a module, and this one's name is "
                "none known here, to the format that the file is read as. Pass format= to read it as another, or "
                "remove the tensor if it is no part of the update."
            )
        if found is None:
            found = "bias: a full bias in place of the base's" if key.endswith("bias") else otherwise
        listed.append(Unused(key, found, nbytes(checkpoint, key)))
    return tuple(listed)


def _speaks_of_lora(component: str) -> bool:
    return any(name in component for name in _OURS)


def _kind_of(checkpoint: Checkpoint, key: str) -> str | None:
    """The kind of update that a tensor is a part of, by its name.

    None where that says nothing, and for the difference of a vector, a gain or bias.
    """
    if key.endswith(".diff") and len(checkpoint.shape(key)) < 2:
        return None
    return next((title for title, pattern in _FACTORS if re.search(pattern, key)), None) or kind_of(key)
