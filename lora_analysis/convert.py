"""Converting adapters between formats, with everything that is lost named and every ΔW compared afterwards.

Conventions
-----------
An adapter is read, written beside its destination, read back from disk and compared module by module, and only then
moved into place: whatever fails, nothing is left and nothing that was there is gone. What a format cannot say about
ΔW itself is refused; what it does not hold beside it (biases, full tensors, the name of the base) is a loss, and
listed.

Values
------
``convert``, ``Conversion``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import LoraAnalysisError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.files import WEIGHTS
from lora_analysis.formats.saving import draft, require_destination
from lora_analysis.formats.writers import WRITERS, Part, WriteOptions, Written, parts_of
from lora_analysis.formats.writers.losses import cut, left_behind, rounded
from lora_analysis.update import LowRankUpdate, distance, factors

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
        How many matrices it holds: blocks of one fused weight are one, and modules of r = 0 none.
    losses : tuple of str
        What the new file does not hold, or holds rounded. Empty for a conversion without loss.
    errors : mapping of str to float
        For every module that is written ``‖ΔW_read_back − ΔW‖_F / ‖ΔW‖_F``, dimensionless; 0 where ΔW is 0 and stays
        so.
    notes : tuple of str
        Those of the adapter that was read.
    """

    path: Path
    format: str
    modules: int
    losses: tuple[str, ...]
    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()

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
        Query and key-value heads of the base, where either format stores rows of q and k in interleaved order
        (torchtune, GGUF of llama architectures), or ``split`` cuts a fused weight by them.
    **options
        Of ``load_adapter``, for a path.

    Returns
    -------
    Conversion

    Raises
    ------
    UnsupportedAdapterError
        If the format cannot say ΔW.
    UndefinedUpdateError
        If a scale is unknown, or an update holds NaN or infinities.
    ValueError
        If there is nothing to write, something else where it is to be written, or ``destination`` is called like a file
        of another format.
    LoraAnalysisError
        If a ΔW read back is another than that written: a bug of ours.
    """
    if to not in WRITERS:
        raise ValueError(f"to: expected one of {', '.join(WRITERS)}, got {to!r}.")
    if isinstance(adapter, Adapter) and options:
        raise TypeError(f"{', '.join(options)}: options of load_adapter, and this adapter is loaded already.")
    path, writer = Path(destination), WRITERS[to]
    require_destination(path, writer.files, WEIGHTS, writer.suffix)
    if base is not None and not isinstance(base, BaseWeights):
        base = load_base(base)
    if not isinstance(adapter, Adapter):
        adapter = loaded(adapter, heads, base=base, **options)
    parts = parts_of(adapter, r=r, dtype=dtype, base=base)
    with draft(path, writer.files) as first:
        written = writer.write(parts, adapter, first, WriteOptions(component, architecture, heads))
        errors = _errors(adapter, written, first, path, format=to, heads=heads if to == "gguf" else None)
    uncut = [part for part in written.parts if not part.truncation_error]
    changed = [error for part in uncut if (error := max(errors[name] for name in part.modules)) > _NOISE]
    losses = (*left_behind(adapter, to), *written.losses, *cut(written.parts), *rounded(changed))
    return Conversion(path, to, len(written.parts), losses, errors, adapter.notes)


def loaded(source: str | os.PathLike[str], heads: tuple[int, int] | None, **options: Any) -> Adapter:
    """What is to be written elsewhere, read with the numbers of heads where they mean something to its format."""
    if heads is not None:
        with contextlib.suppress(UnsupportedAdapterError):
            return load_adapter(source, heads=heads, **options)
    return load_adapter(source, **options)


def _errors(adapter: Adapter, written: Written, first: Path, path: Path, **options: Any) -> dict[str, float]:
    """Relative difference of each module's ΔW, read back from a first version of the file.

    Raises
    ------
    LoraAnalysisError
        If there are other modules in it, or one differs by more than was cut off and rounded.
    """
    try:
        back = load_adapter(first, **options)
        found: dict[str, list[str]] = {name: [] for name in written.names.values()}
        for name, module in back.modules.items():
            # Some readers take a fused weight apart again.
            whole = name if name in found else module.target.tensor.removesuffix(".weight")
            if whole not in found:
                raise LoraAnalysisError(f"it has a module {name!r}, which was not written.")
            found[whole].append(name)
        errors: dict[str, float] = {}
        for part in written.parts:
            errors |= _errors_of_part(adapter, part, [back.modules[name] for name in found[written.names[part.name]]])
    except LoraAnalysisError as error:
        raise LoraAnalysisError(
            f"{path}: what was written is not the adapter when read back: {error} Nothing is kept of it; please report "
            "this."
        ) from error
    return errors


def _errors_of_part(adapter: Adapter, part: Part, back: Sequence[Module]) -> dict[str, float]:
    """Relative difference of each module that a part is made of."""
    d_out, d_in = part.update.shape
    ups, downs = [], []
    for module in back:
        first, last = module.target.rows or (0, d_out)
        up, down = factors(update := module.read())
        if up.shape[0] != last - first or last > d_out or down.shape[1] != d_in:
            raise LoraAnalysisError(f"{part.name!r} is of shape {module.shape}, not {(d_out, d_in)}.")
        ups.append(pad(update.scale * up.double(), (0, 0, first, d_out - last)))
        downs.append(down.double())
        _require_magnitude(part, module)
    if not back:
        raise LoraAnalysisError(f"{part.name!r} is missing.")
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    errors = {}
    rest = torch.ones(d_out, dtype=torch.bool)
    for name in part.modules:
        rows = slice(*(adapter.targets[name].rows or (0, d_out)))
        rest[rows] = False
        update = adapter[name]
        difference, size = distance(update, LowRankUpdate(up[rows], down, 1.0)), update.norm()
        allowed = _EXACT * (size + part.truncation_error) + part.truncation_error + part.rounding_error
        if not difference <= allowed:
            raise LoraAnalysisError(
                f"ΔW of {name!r} differs by a norm of {difference:.1e} where at most {allowed:.1e} was to be expected, "
                f"of {size:.1e}."
            )
        errors[name] = difference / size if size else 0.0
    if bool(up[rest].any()) and LowRankUpdate(up[rest], down, 1.0).norm() > 0:
        raise LoraAnalysisError(f"{part.name!r} changes rows that no module changes.")
    return errors


def _require_magnitude(part: Part, module: Module) -> None:
    read = module.magnitude
    if (part.magnitude is None) != (read is None):
        raise LoraAnalysisError(f"{part.name!r} has {'no' if read is None else 'a'} magnitude of DoRA.")
    if part.magnitude is None or read is None:
        return
    same = torch.equal(read().flatten(), part.magnitude.flatten())
    if not same or module.magnitude_axis != part.magnitude_axis:
        raise LoraAnalysisError(f"{part.name!r} has another magnitude of DoRA.")
