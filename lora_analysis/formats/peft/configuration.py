"""What ``adapter_config.json`` says, checked: types, numbers, patterns, and the scale of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lora_analysis.adapter import ScaleSource
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.options import MAX_ALPHA
from lora_analysis.formats.patterns import PatternKeys

DEFAULT_ALPHA = 8

Remark = tuple[str, str]
"""Kind and text of a note, for ``formats.notes.first_of_each``."""


class Scaling:
    """The scale of each module, by PEFT's rules and the caller's alpha."""

    def __init__(self, config: Mapping[str, Any], alpha: float | None, where: str) -> None:
        self._caller = alpha
        self._known = bool(config)
        self._rslora = flag(config, "use_rslora", where)
        self._r = None if config.get("r") is None else integer(config["r"], "r", where)
        self._alpha = config.get("lora_alpha")
        if self._alpha is not None:
            self._alpha = number(self._alpha, "lora_alpha", where)
        ranks, alphas = (_pattern(config, name, where) for name in ("rank_pattern", "alpha_pattern"))
        self._ranks = [integer(value, f"rank_pattern[{key!r}]", where) for key, value in ranks.items()]
        self._alphas = [(key, number(value, f"alpha_pattern[{key!r}]", where)) for key, value in alphas.items()]
        self._rank_keys = _keys(ranks, "rank_pattern", where)
        self._alpha_keys = _keys(alphas, "alpha_pattern", where)
        self.notes: list[str] = []
        if config and self._alpha is None and alpha is None:
            self.notes.append(f"the configuration holds no lora_alpha; PEFT's default, {DEFAULT_ALPHA}, applies.")

    def declared_r(self, module: str) -> int | None:
        """The r that the configuration gives a module."""
        matching = self._rank_keys.matching(module)
        return self._ranks[matching[0]] if matching else self._r

    def scale(self, module: str, r: int) -> tuple[float, ScaleSource]:
        """The scale of a module whose tensors have this r, and its source."""
        alpha, source = self._alpha_of(module)
        if math.isnan(alpha):
            return alpha, source
        if r == 0:
            return 0.0, source
        return alpha / (math.sqrt(r) if self._rslora else r), source

    def doubts(self, module: str) -> list[str]:
        """What the file leaves open: PEFT sorts patterns when it saves, so the order of training is lost."""
        matching = [self._alphas[index] for index in self._alpha_keys.matching(module)]
        others = [key for key, alpha in matching if alpha != matching[0][1]]
        if self._caller is not None or not others:
            return []
        return [
            f"{shown(module)}: {len(matching)} keys of alpha_pattern match; the first, {matching[0][0]!r}, applies. "
            f"PEFT sorts them when it saves, so training may have used {others[0]!r}."
        ]

    def _alpha_of(self, module: str) -> tuple[float, ScaleSource]:
        if self._caller is not None:
            return self._caller, "caller"
        if not self._known:
            return math.nan, "unknown"
        matching = self._alpha_keys.matching(module)
        if matching:
            return self._alphas[matching[0]][1], "config"
        if self._alpha is None:
            return float(DEFAULT_ALPHA), "format default"
        return self._alpha, "config"


def _pattern(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{where}: {name}: expected an object, got {type(found).__name__}.")
    return found


def _keys(pattern: Mapping[str, Any], name: str, where: str) -> PatternKeys:
    keys = PatternKeys()
    for key in pattern:
        try:
            keys.append(key)
        except ValueError as error:
            raise AdapterFormatError(
                f"{where}: {name}: expected keys that are matched quickly, got {short(key)} ({error}). "
                "Write it without."
            ) from error
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFormatError(
                f"{where}: {name}: expected regular expressions, got {short(key)} ({error})."
            ) from error
    return keys


def number(value: Any, name: str, where: str) -> float:
    """A finite number."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or (isinstance(value, float) and not math.isfinite(value)):
        raise AdapterFormatError(f"{where}: {name}: expected a finite number, got {short(value)}.")
    if abs(value) > MAX_ALPHA:
        raise AdapterFormatError(f"{where}: {name}: expected a plausible number, got {short(value)}.")
    return float(value)


def integer(value: Any, name: str, where: str) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise AdapterFormatError(f"{where}: {name}: expected a positive integer, got {short(value)}.")
    return value


def require_types(config: Mapping[str, Any], where: str) -> None:
    """Refuse fields of the wrong type that every kind of adapter has."""
    peft_type, saved = config.get("peft_type"), config.get("modules_to_save")
    if peft_type is not None and not isinstance(peft_type, str):
        raise AdapterFormatError(f"{where}: peft_type: expected a name such as 'LORA', got {short(peft_type)}.")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise AdapterFormatError(f"{where}: modules_to_save: expected a list of names, got {short(saved)}.")


def short(value: object) -> str:
    """A value as it may appear in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def shown(name: str) -> str:
    """A name as it may appear in a note."""
    return name if name.isprintable() else repr(name)


def about(name: str, text: str) -> Remark:
    """A remark on one module, of a kind with those that say the same of others."""
    return text, f"{shown(name)}: {text}"


def disagreement_on_r(module: str, declared: int | None, r: int) -> list[Remark]:
    """A remark where the configuration gives a module another r than its tensors have."""
    if declared in (None, r):
        return []
    return [about(module, f"the configuration says r={declared}, the tensors have r={r}; they win.")]


def flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    """A boolean field, false where it is absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterFormatError(f"{where}: {name}: expected true or false, got {value!r}.")
    return bool(value)
