"""The account of a file's other tensors: each is listed with a reason, or the load fails."""

from __future__ import annotations

from collections.abc import Callable, Collection

from lora_analysis.adapter import Unused
from lora_analysis.checkpoint import Checkpoint, nbytes
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError


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
        If a tensor is the alpha of a module: it would change the scale.
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
                f"{where}: {key!r}: per-module alpha tensors, as diffusers and kohya write them, are not read yet."
            )
        found = reason(key)
        if found is None and any("lora_" in part and part not in containers for part in key.split(".")):
            raise AdapterFormatError(
                f"{where}: {key!r}: expected the tensors of LoRA to be factors of a module, and this one's name is "
                "none known here. Remove it from the file if it is no part of the update."
            )
        if found is None:
            found = "bias: a full bias in place of the base's" if key.endswith("bias") else otherwise
        listed.append(Unused(key, found, nbytes(checkpoint, key)))
    return tuple(listed)
