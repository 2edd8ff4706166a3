"""The ``adapter_config.json`` of MLX adapters: the scale, the rank and whether it is DoRA, and what is unclear.

Conventions
-----------
``fine_tune_type`` (``lora``, ``dora``, ``full``; before mlx-lm 0.19 ``use_dora``) and ``lora_parameters``, an object
with ``rank``, ``scale`` and, in older files, ``alpha``. See ``formats.mlx`` for what the scale means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_analysis.adapter import Module, ScaleSource
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.options import MAX_ALPHA

_DEFAULT_SCALE = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says; ``known`` is False where there is none."""

    scale: float
    source: ScaleSource
    r: int | None
    dora: bool
    known: bool
    notes: tuple[str, ...]
    """What is unclear about the scale."""

    def scale_of(self, alpha: float | None, r: int) -> tuple[float, ScaleSource]:
        """The scale of a module and where it comes from; the caller's alpha wins."""
        return (self.scale, self.source) if alpha is None else (alpha / r, "caller")


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is MLX's."""
    return "fine_tune_type" in config or "lora_parameters" in config


def read_settings(config: Mapping[str, Any], where: str) -> Settings:
    """What the configuration says.

    Raises
    ------
    AdapterFormatError
        If a value is none that MLX can use.
    UnsupportedAdapterError
        If it is of a full fine-tune, or another kind.
    """
    if not is_ours(config):
        note = "no adapter_config.json of MLX beside the tensors: the scale is unknown. Pass alpha= (scale times r)."
        return Settings(math.nan, "unknown", None, False, False, (note,))
    kind = config.get("fine_tune_type") or "lora"
    if kind == "full":
        raise UnsupportedAdapterError(
            f"{where}: fine_tune_type is 'full': it holds the tuned weights themselves, no adapter. "
            "Compare them with the base's: diff(tuned, base)."
        )
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(f"{where}: fine_tune_type is {str(kind)[:40]!r}; read are 'lora' and 'dora'.")
    dora = kind == "dora" or config.get("use_dora") is True
    parameters = config.get("lora_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise AdapterFormatError(
            f"{where}: lora_parameters: expected an object with rank and scale, got {type(parameters).__name__}."
        )
    r = parameters.get("rank")
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        raise AdapterFormatError(f"{where}: lora_parameters.rank: expected a positive integer, got {str(r)[:40]!r}.")
    alpha, scale = (_number(parameters, key, where) for key in ("alpha", "scale"))
    if scale is None:
        beside = "" if alpha is None else f"; its alpha {alpha:g} is not read by MLX"
        note = f"the configuration has no scale: MLX's default of {_DEFAULT_SCALE:g} is taken{beside}."
        return Settings(_DEFAULT_SCALE, "format default", r, dora, True, (note,))
    return Settings(scale, "config", r, dora, True, _doubts(config, scale, alpha, r))


def disagreements(settings: Settings, modules: Mapping[str, Module], where: str) -> list[str]:
    """Where the tensors are other than the configuration says; they win.

    Raises
    ------
    AdapterFormatError
        If the configuration says DoRA and a magnitude is missing: that is half of the update.
    """
    without = [name for name, module in modules.items() if module.magnitude is None]
    if settings.dora and without:
        raise AdapterFormatError(
            f"{where}: {without[0]!r}: the configuration says DoRA: expected a magnitude, '{without[0]}.m' is missing."
        )
    notes = [
        f"{name!r}: the configuration says rank {settings.r}, the tensors have {module.r}; they win."
        for name, module in modules.items()
        if settings.r not in (None, module.r)
    ]
    if settings.known and not settings.dora and len(without) < len(modules):
        notes.append("the configuration does not say DoRA, and there are magnitudes m; read as DoRA.")
    return notes


def _doubts(config: Mapping[str, Any], scale: float, alpha: float | None, r: int | None) -> tuple[str, ...]:
    """What an alpha beside the scale may have meant."""
    if alpha is None or r is None or alpha == r:
        return ()
    # "lora_layers" became "num_layers" with 0.19, long after alpha was last read.
    if "lora_layers" in config:
        return (
            f"the configuration is of mlx-lm before 0.19: its scale {scale:g} is taken as the whole multiplier, as "
            f"from 0.15 on; 0.14 and older multiplied it by alpha / rank, to {scale * alpha / r:g}. If this file is of "
            f"those, pass alpha={scale * alpha:g}.",
        )
    return (f"the configuration's alpha {alpha:g} is not read by MLX: its scale {scale:g} is the whole multiplier.",)


def _number(parameters: Mapping[str, Any], key: str, where: str) -> float | None:
    value = parameters.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: lora_parameters.{key}: expected a finite number, got {str(value)[:40]!r}.")
    return float(value)
