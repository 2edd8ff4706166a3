"""Converting adapters between formats, with everything that is lost named and every ΔW compared afterwards.

Conventions
-----------
A conversion is read, written, read back from disk and compared, module by module, before it is reported. What a
format cannot say about ΔW itself is refused; what it does not hold beside it (biases, full tensors, the name of the
base) is a loss, and listed.

Values
------
``convert``, ``Conversion``.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.writers import WRITERS, Part, WriteOptions, parts_of
from lora_analysis.update import LowRankUpdate, Update, rounding_error

_EXACT = 1e-6
"""Largest relative difference of a ΔW that was not rounded on purpose: a scale or factor rounded once to float32."""

_NOISE = 1e-12
"""Relative differences below this are of the comparison, in float64, and not of the file."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Parameters
    ----------
    path : Path
        What was written.
    format : str
    modules : int
    losses : tuple of str
        What the new file does not hold, or holds rounded. Empty for a conversion without loss.
    errors : mapping of str to float
        For every module ``‖ΔW_read_back − ΔW‖_F / ‖ΔW‖_F``, dimensionless; 0 where ΔW is 0 and stays so.
    """

    path: Path
    format: str
    modules: int
    losses: tuple[str, ...]
    errors: Mapping[str, float]

    @property
    def largest_error(self) -> float:
        """The largest relative error of a module."""
        return max(self.errors.values(), default=0.0)


def convert(
    adapter: Adapter | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str,
    base: BaseWeights | str | os.PathLike[str] | None = None,
    r: int | None = None,
    dtype: torch.dtype | None = None,
    component: str | None = None,
    architecture: str | None = None,
    heads: tuple[int, int] | None = None,
    **options: Any,
) -> Conversion:
    """Write an adapter in another format, read it back, and compare every ΔW.

    Parameters
    ----------
    adapter : Adapter or path
        What ``load_adapter`` takes.
    destination : path
        A directory for ``peft`` and ``mlx``, a file for the others.
    to : str
        ``"peft"``, ``"kohya"``, ``"diffusers"``, ``"mlx"`` or ``"gguf"``.
    base : BaseWeights or path, optional
        Resolves names (kohya's stems), puts blocks of fused weights together, and makes DoRA's true update.
    r : int, optional
        Cut updates that are no product of at most r columns to their best rank-r part; the errors then state what was
        cut off.
    dtype : torch.dtype, optional
        Of the factors; as stored by default.
    component : str, optional
        ``unet``, ``transformer``, ``text_encoder``…, for kohya and diffusers, where module names have none.
    architecture : str, optional
        GGUF's name of the base's architecture, for gguf.
    heads : (int, int), optional
        Query and key-value heads of the base, for gguf of architectures whose q and k rows are stored permuted.
    **options
        Of ``load_adapter``, for a path.

    Returns
    -------
    Conversion

    Raises
    ------
    UnsupportedAdapterError
        If the format cannot say ΔW.
    LoraAnalysisError
        If a ΔW read back is another than that written: a bug of ours; the written file is not to be used.
    """
    if to not in WRITERS:
        raise ValueError(f"to: expected one of {', '.join(WRITERS)}, got {to!r}.")
    if base is not None and not isinstance(base, BaseWeights):
        base = load_base(base)
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter, base=base, **options)
    path = Path(destination)
    parts = parts_of(adapter, r=r, dtype=dtype, base=base)
    writing = WriteOptions(component=component, architecture=architecture, heads=heads)
    written = WRITERS[to](parts, adapter, path, writing)
    back = load_adapter(path, format=to, heads=heads if to == "gguf" else None)
    errors = {part.name: _relative_error(adapter, part, back[written.names[part.name]]) for part in parts}
    _require_magnitudes(parts, back, written.names, path)
    _require_equal(errors, parts, adapter, path, dtype)
    losses = (*_left_behind(adapter), *written.losses, *_rounding(errors, parts, adapter))
    return Conversion(path, to, len(parts), losses, errors)


def _relative_error(adapter: Adapter, part: Part, back: Update) -> float:
    """‖ΔW_back − ΔW‖ / ‖ΔW‖ without either, where both are products."""
    update = _original(adapter, part)
    if isinstance(update, LowRankUpdate) and isinstance(back, LowRankUpdate):
        up = torch.cat([update.scale * update.up.double(), -back.scale * back.up.double()], 1)
        difference = LowRankUpdate(up, torch.cat([update.down.double(), back.down.double()]), 1.0).norm()
    else:
        difference = float((update.dense() - back.dense()).norm())
    size = update.norm()
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def _require_magnitudes(parts: list[Part], back: Adapter, names: Mapping[str, str], path: Path) -> None:
    for part in parts:
        read = back.modules[names[part.name]].magnitude
        if part.magnitude is not None and (read is None or not torch.equal(read().flatten(), part.magnitude.flatten())):
            raise LoraAnalysisError(f"{path}: {part.name!r}: read back, DoRA's magnitude differs. Do not use the file.")


def _original(adapter: Adapter, part: Part) -> Update:
    """What a part has to equal: the module itself, or the fused weight its blocks make up."""
    if part.name in adapter:
        return adapter[part.name]
    return LowRankUpdate(part.up, part.down, part.scale)


def _require_equal(
    errors: Mapping[str, float], parts: list[Part], adapter: Adapter, path: Path, dtype: torch.dtype | None
) -> None:
    for part in parts:
        allowed = _EXACT + (0 if dtype is None else 4 * rounding_error(dtype))
        if part.truncation_error:
            allowed += (1 + _EXACT) * part.truncation_error / _original(adapter, part).norm()
        if not errors[part.name] <= allowed:
            raise LoraAnalysisError(
                f"{path}: {part.name!r}: read back, ΔW differs by {errors[part.name]:.1e} of its norm where at most "
                f"{allowed:.1e} was to be expected. Do not use the file, and report this."
            )


def _left_behind(adapter: Adapter) -> list[str]:
    """What no writer takes along: tensors beside the updates."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for item in adapter.unused:
        sizes[item.reason] += item.nbytes
        counts[item.reason] += 1
    return [f"{counts[reason]} tensors not written ({sizes[reason] / 1e6:.2f} MB): {reason}." for reason in counts]


def _rounding(errors: Mapping[str, float], parts: list[Part], adapter: Adapter) -> list[str]:
    cut = [part.name for part in parts if part.truncation_error]
    rounded = [error for name, error in errors.items() if error > _NOISE and name not in cut]
    losses = []
    if cut:
        worst = max(errors[name] for name in cut)
        total = math.sqrt(sum(part.truncation_error**2 for part in parts))
        whole = math.sqrt(sum(update.norm() ** 2 for update in adapter.values()))
        losses.append(
            f"{len(cut)} modules cut to a smaller rank: at most {worst:.2e} of a module's norm is lost, "
            f"{total / whole:.2e} of that of all together."
        )
    if rounded:
        losses.append(f"{len(rounded)} modules rounded, by at most {max(rounded):.1e} of their norm.")
    return losses
