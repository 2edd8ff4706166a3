"""``save_adapter``: an adapter in any format that is written."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.formats.files import WEIGHTS
from lora_analysis.formats.saving import require_destination
from lora_analysis.formats.writers.assembly import parts_of
from lora_analysis.formats.writers.formats import WRITERS
from lora_analysis.formats.writers.losses import cut, left_behind, rounded
from lora_analysis.formats.writers.parts import WriteOptions


def save_adapter(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    format: str = "peft",
    r: int | None = None,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
    component: str | None = None,
    architecture: str | None = None,
    heads: tuple[int, int] | None = None,
) -> Path:
    """Write an adapter; what the format cannot hold exactly is refused, or cut on request.

    Only updates are written: what is left behind, cut or rounded is warned of, one warning each.
    ``lora_analysis.convert`` reads the result back and measures.

    Parameters
    ----------
    adapter : Adapter
        Updates with known scales.
    directory : path
        Made if absent; a file for ``kohya``, ``diffusers`` and ``gguf``. Files are written under temporary names and
        moved into place.
    format : str
        ``"peft"``, ``"kohya"``, ``"diffusers"``, ``"mlx"`` or ``"gguf"``.
    r : int, optional
        Cut updates that are no product of at most r columns to their best rank-r part, with the error in a warning.
    dtype : torch.dtype, optional
        Of the factors. By default as stored, and float32 for factors that had to be computed.
    base : BaseWeights, optional
        Says how many rows a fused weight has whose blocks are to be put together.
    component : str, optional
        ``unet``, ``transformer``, ``text_encoder``…, for kohya and diffusers, where module names have none.
    architecture : str, optional
        GGUF's name of the base's architecture, for gguf.
    heads : (int, int), optional
        Query and key-value heads of the base, for gguf of architectures whose q and k rows are stored permuted.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    UnsupportedAdapterError
        If an update is no product of two factors and r is not given, or has no place in the format.
    UndefinedUpdateError
        If the scale of a module is unknown, or its numbers are not finite.
    ValueError
        If there is nothing to write, something else where it is to be written, or ``directory`` is called like a file
        of another format.
    """
    if format not in WRITERS:
        raise ValueError(f"format: expected one of {', '.join(WRITERS)}, got {format!r}.")
    path, writer = Path(directory), WRITERS[format]
    require_destination(path, writer.files, WEIGHTS, writer.suffix)
    parts = parts_of(adapter, r=r, dtype=dtype, base=base)
    written = writer.write(parts, adapter, path, WriteOptions(component, architecture, heads))
    # What was rounded to zero altogether is off by its whole norm.
    errors = [
        part.rounding_error / max(part.update.norm(), part.rounding_error)
        for part in written.parts
        if part.rounding_error
    ]
    for loss in [*left_behind(adapter, format), *written.losses, *cut(written.parts), *rounded(errors)]:
        warnings.warn(f"{adapter.source}: {loss}", stacklevel=2)
    return path
