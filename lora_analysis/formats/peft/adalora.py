"""PEFT's AdaLoRA: two factors with a diagonal between them, pruned in training.

Conventions
-----------
``<module>.lora_A`` (r, d_in), ``.lora_E`` (r, 1), ``.lora_B`` (d_out, r), no ``.weight``;
``ΔW = B (A ∘ E) · alpha / (ranknum + 1e-5)`` with ``ranknum`` the r that training *began* with (``init_r``), also in
modules that were pruned since; alpha is ``lora_alpha``, or the r of the tensors where that is not positive.
``alpha_pattern`` and ``use_rslora`` are without effect. ``rank_pattern`` maps names to lists of booleans, the rows
that were kept; the file holds only these. A convolution's A is (r, in·k·k).

A raw dump holds ``ranknum`` itself. Without it and without the configuration the scale is unknown, also to a
caller who knows alpha. Facts from PEFT's ``tuners/adalora/layer.py`` (``update_layer``, ``get_delta_weight``) and
``model.py`` (``resize_modules_by_rank_pattern``, ``resize_state_dict_by_rank_pattern``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import (
    DEFAULT_ALPHA,
    Remark,
    about,
    flag,
    integer,
    number,
    require_types,
    short,
)
from lora_analysis.formats.peft.fields import READ, REFUSED, WITHOUT_EFFECT
from lora_analysis.formats.peft.names import module_name
from lora_analysis.formats.peft.parts import Parts, base_shapes, grouped, kernel, others, require_fields, require_parts
from lora_analysis.update import LowRankUpdate

DEFAULT_INIT_R = 12
OFFSET = 1e-5
"""What PEFT adds to the rank it divides by."""

_PARTS = ("lora_A", "lora_B", "lora_E", "ranknum")
_FIELDS = (
    *(*READ, *WITHOUT_EFFECT),
    *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
)
_REFUSED_OPTIONS = REFUSED | {
    "target_parameters": "AdaLoRA on parameters (mixtures of experts)",
    "use_dora": "DoRA, which PEFT's AdaLoRA does not have",
}
_INEFFECTIVE_OPTIONS = ("alpha_pattern", "use_rslora")


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT AdaLoRA adapter."""
    where = options.where
    require_types(config, where)
    for option, title in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise UnsupportedAdapterError(f"{where}: {option} is set: {title}, which is not read yet.")
    unknown = require_fields(config, {*_FIELDS, *_REFUSED_OPTIONS}, where)
    transposed = flag(config, "fan_in_fan_out", where)
    found = grouped(checkpoint, _PARTS, options)
    kept = _kept_rows(config, where)
    init_r = _init_r(config, kept, where)
    stored = base_shapes(options.base, found)
    modules: dict[str, Module] = {}
    notes = [*unknown, *_notes(config, kept, found)]
    remarks: list[Remark] = []
    unscaled = False
    for module, parts in found.items():
        require_parts(where, module, parts, "lora_A", "lora_E", "lora_B")
        d_out, r, d_in = _sizes(checkpoint, module, parts, where)
        ranknum = _ranknum(checkpoint, parts, where)
        if ranknum is not None and init_r is not None and ranknum != init_r and r > 0:
            remarks.append(about(module, f"init_r is {init_r}, the tensor ranknum says {ranknum:g}; it wins."))
        if module in kept and sum(kept[module]) != r != len(kept[module]):
            rows = f"{sum(kept[module])} of {len(kept[module])} rows"
            remarks.append(about(module, f"rank_pattern keeps {rows}, the tensors have r={r}; they win."))
        if r == 0:
            remarks.append(about(module, "r=0, pruned to an update of zero; its scale is given as 0."))
        alpha, source = _alpha(config, options.alpha, where)
        divisor = init_r if ranknum is None else ranknum
        scale, source = _scale(alpha, source, r, divisor)
        unscaled |= options.alpha is not None and math.isnan(scale)
        if alpha <= 0 and divisor is not None and r < divisor:
            text = f"{r} here and when PEFT loads it, {divisor:g} in training."
            remarks.append(about(module, f"lora_alpha is not positive, so r takes its place: {text}"))
        keys = tuple(parts[name] for name in ("lora_A", "lora_E", "lora_B"))
        modules[module] = Module(
            shape=(d_out, d_in),
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", transposed=transposed, kernel=kernel((d_out, d_in), stored.get(module))),
            tensors=(*keys, *([parts["ranknum"]] if "ranknum" in parts else [])),
            read=partial(_read_update, checkpoint, keys, scale, options.device),
        )
    if unscaled:
        notes.append(
            "alpha= alone does not give AdaLoRA's scale, which divides by the r that training began with: the scale is "
            "unknown. Put adapter_config.json beside the file."
        )
    used = {key for module in modules.values() for key in module.tensors}
    notes += first_of_each(remarks)
    return Contents(modules, others(checkpoint, used, _PARTS, config, where), tuple(notes))


def _sizes(checkpoint: Checkpoint, module: str, parts: Parts, where: str) -> tuple[int, int, int]:
    """(d_out, r, d_in)."""
    a, b, e = (checkpoint.shape(parts[name]) for name in ("lora_A", "lora_B", "lora_E"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or e != (a[0], 1) or 0 in (b[0], a[1]):
        raise AdapterFormatError(
            f"{where}: {module!r}: expected lora_A (r, d_in), lora_E (r, 1) and lora_B (d_out, r) to share r, "
            f"got {a}, {e} and {b}."
        )
    return b[0], a[0], a[1]


def _kept_rows(config: Mapping[str, Any], where: str) -> dict[str, list[bool]]:
    """Module -> which rows of the initial r were kept."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise AdapterFormatError(f"{where}: rank_pattern: expected an object, got {type(pattern).__name__}.")
    kept = {}
    for name, rows in pattern.items():
        if not isinstance(rows, list) or not all(isinstance(row, bool) for row in rows):
            raise AdapterFormatError(
                f"{where}: rank_pattern[{short(name)}]: expected a list of booleans, AdaLoRA's, got {short(rows)}."
            )
        kept[module_name(name.rpartition(".lora_E")[0] or name)] = rows
    return kept


def _init_r(config: Mapping[str, Any], kept: Mapping[str, list[bool]], where: str) -> int | None:
    """The r that training began with, where the configuration is there."""
    if not config:
        return None
    value = config.get("init_r")
    init_r = DEFAULT_INIT_R if value is None else integer(value, "init_r", where)
    if odd := next((name for name, rows in kept.items() if len(rows) != init_r), None):
        raise AdapterFormatError(
            f"{where}: rank_pattern[{short(odd)}]: expected a list of init_r = {init_r} booleans, got {len(kept[odd])}."
        )
    return init_r


def _ranknum(checkpoint: Checkpoint, parts: Parts, where: str) -> float | None:
    if "ranknum" not in parts:
        return None
    key = parts["ranknum"]
    shape = checkpoint.shape(key)
    value = float(checkpoint[key].double()) if math.prod(shape) == 1 else math.nan
    if not 0 <= value < math.inf:
        raise AdapterFormatError(f"{where}: {key!r}: expected one rank, got shape {shape}, value {value:g}.")
    return value


def _alpha(config: Mapping[str, Any], caller: float | None, where: str) -> tuple[float, ScaleSource]:
    value = config.get("lora_alpha")
    stated = None if value is None else number(value, "lora_alpha", where)
    if caller is not None:
        return caller, "caller"
    if not config:
        return math.nan, "unknown"
    if stated is None or config.get("init_r") is None:
        return float(DEFAULT_ALPHA) if stated is None else stated, "format default"
    return stated, "config"


def _scale(alpha: float, source: ScaleSource, r: int, divisor: float | None) -> tuple[float, ScaleSource]:
    if math.isnan(alpha) or divisor is None:
        return math.nan, "unknown"
    if r == 0:
        return 0.0, source
    return (alpha if alpha > 0 else float(r)) / (divisor + OFFSET), source


def _notes(config: Mapping[str, Any], kept: Mapping[str, list[bool]], found: Mapping[str, Parts]) -> list[str]:
    notes = []
    if config and config.get("lora_alpha") is None:
        notes.append(f"the configuration holds no lora_alpha; PEFT's default, {DEFAULT_ALPHA}, applies.")
    if config and config.get("init_r") is None:
        notes.append(f"the configuration holds no init_r; PEFT's default, {DEFAULT_INIT_R}, applies.")
    notes.extend(f"{name} is set; PEFT's AdaLoRA does not use it." for name in _INEFFECTIVE_OPTIONS if config.get(name))
    if absent := [name for name in kept if name not in found]:
        notes.append(f"rank_pattern names {len(absent)} modules that are not in the file (first: {short(absent[0])}).")
    return notes


def _read_update(checkpoint: Checkpoint, keys: tuple[str, ...], scale: float, device: torch.device) -> LowRankUpdate:
    down, diagonal, up = (checkpoint[key].to(device) for key in keys)
    # One rounding of E moves a whole row: no independent errors to make a noise floor of.
    return LowRankUpdate(up, down.double() * diagonal.double(), scale, stored_eps=math.nan)
