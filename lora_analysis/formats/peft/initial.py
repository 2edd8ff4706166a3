"""Initialisations that take their first product off the base, so that s·B·A alone is not the update.

PiSSA, OLoRA, CorDA and LoRA-GA begin with factors B0·A0 cut out of the base, LoftQ with factors that mend a
quantised one: the model begins where it was, but the base under the adapter does not. Against the base that was
published the update is s·(B·A - B0·A0), which takes the factors that training began with. PEFT's own conversion
(``path_initial_model_for_weight_conversion``) writes that difference as one LoRA of twice the r.
Facts from PEFT's ``tuners/lora/layer.py`` (``pissa_init`` and its like) and ``model.py`` (``subtract_mutated_init``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_analysis.adapter import Adapter
from lora_analysis.errors import AdapterFormatError, MutatedBaseError, UnsupportedAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import Remark, about, short, shown
from lora_analysis.formats.peft.places import Place
from lora_analysis.update import LowRankUpdate

_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LEAVES_BASE = ("gaussian", "orthogonal", "eva", "true", "false")
"""Named ones that start from a product of zero, or from random factors that stay in the file."""


def initial_adapter(config: Mapping[str, Any], options: ReadOptions) -> tuple[Adapter | None, list[str]]:
    """The factors to take off, if any, and what to note about them.

    An empty ``initial`` takes nothing off: the factors of the file are themselves the initial ones.

    Raises
    ------
    MutatedBaseError
        If the base was moved, or may have been, and the factors that training began with are not given.
    """
    found = config.get("init_lora_weights")
    kind = found.lower() if isinstance(found, str) else None
    moves = kind is not None and kind.startswith(_MOVES_BASE)
    if kind == "mica":
        raise UnsupportedAdapterError(f"{options.where}: initialised by 'mica': MiCA, which is not read yet.")
    if kind is not None and not moves and kind not in _LEAVES_BASE and options.initial is None:
        raise MutatedBaseError(
            f"{options.where}: initialised by {short(found)}, which is not known here: it may have moved the base, and "
            "then s·B·A is not the update. Pass initial= with the adapter as it was before training."
        )
    if options.initial is None:
        if moves:
            raise MutatedBaseError(
                f"{options.where}: initialised by {found!r}, which moved the base: the update is s·(B·A - B0·A0), and "
                "the file does not hold B0 and A0. Pass initial= with the adapter as it was before training, or save "
                "it converted to LoRA (PEFT: path_initial_model_for_weight_conversion)."
            )
        return None, []
    if not len(options.initial):
        return None, []
    note = f"less the initial factors of {shown(options.initial.source)}: ΔW = s·B·A - s0·B0·A0, of rank r + r0."
    if not moves:
        note += f" The configuration's own initialisation, {found!r}, does not ask for it."
    if kind == "loftq":
        note += " LoftQ's base is quantised: quantised weights plus B0·A0 are only close to the published ones."
    return options.initial, [note]


def require_agreement(initial: Adapter, places: Mapping[str, Place], where: str) -> None:
    """Refuse initial factors of other modules or shapes than the adapter's.

    Raises
    ------
    AdapterFormatError
        If a module is missing on either side, or has another shape.
    """
    for name, place in places.items():
        if name not in initial.modules:
            raise AdapterFormatError(
                f"{where}: {name!r}: expected initial factors of this module, {initial.source} has none. Is it the "
                "adapter this training began with?"
            )
        if initial.modules[name].shape != place.shape:
            raise AdapterFormatError(
                f"{where}: {name!r}: expected initial factors of shape {place.shape}, got "
                f"{initial.modules[name].shape} in {initial.source}."
            )
    if stray := [name for name in initial.modules if name not in places]:
        raise AdapterFormatError(
            f"{where}: expected the modules of the initial factors, {stray[0]!r} of {initial.source} is not among the "
            f"{len(places)} here."
        )


def compared_scales(initial: float, scale: float, module: str, where: str) -> list[Remark]:
    """A remark where the initial factors have another scale than the trained ones: one training has one.

    Raises
    ------
    UnsupportedAdapterError
        If the trained ones have the scale 0 and the initial ones have not: no common factor is left.
    """
    if math.isnan(initial) or math.isnan(scale) or math.isclose(initial, scale, rel_tol=1e-12):
        return []
    if scale == 0:
        raise UnsupportedAdapterError(
            f"{where}: {module!r}: expected a scale other than 0 beside the initial factors' {initial:g}, got 0."
        )
    return [about(module, f"the scale is {scale:g}, that of the initial factors {initial:g}; each keeps its own.")]


def initial_update(initial: Adapter, module: str, where: str) -> partial[LowRankUpdate]:
    """What reads one module's initial product."""
    return partial(_read, initial, module, where)


def _read(initial: Adapter, module: str, where: str) -> LowRankUpdate:
    update = initial[module]
    if not isinstance(update, LowRankUpdate):
        raise UnsupportedAdapterError(
            f"{where}: {module!r}: expected initial factors, got {update!r} from {initial.source}."
        )
    return update
