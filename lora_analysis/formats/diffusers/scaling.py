"""Where the scale of a module comes from in a file of diffusers': its own alpha, the header, or the default."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from lora_analysis.adapter import ScaleSource
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, MutatedBaseError, UnsupportedAdapterError
from lora_analysis.formats.options import MAX_ALPHA
from lora_analysis.formats.peft.configuration import Scaling, flag, shown

HEADER = "lora_adapter_metadata"
_FIELDS = ("lora_alpha", "r")
_LEAVES_BASE = ("gaussian", "orthogonal", "eva")
"""Named initialisations that start from a product of zero, or from random factors that stay in the file."""
_READ_OPTIONS = ("use_rslora", "use_dora")
_REFUSED_OPTIONS = (
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "kasa_config",
)


class Header:
    """The ``LoraConfig`` fields that diffusers keeps in the safetensors header, by component."""

    def __init__(self, checkpoint: Checkpoint, alpha: float | None, where: str) -> None:
        self._where = where
        self._fields = _by_component(_parsed(checkpoint.metadata.get(HEADER), where))
        self._scalings: dict[str, Scaling] = {}
        for component, fields in self._fields.items():
            _refuse_other_mathematics(fields, component, where)
            self._scalings[component] = Scaling(fields, alpha, where)

    def notes(self, modules: Collection[str]) -> list[str]:
        """What the header leaves open, and what it says of components that no module is in."""
        notes = [
            f"{HEADER}{f' of {shown(component)}' if component else ''}: {note}"
            for component, scaling in self._scalings.items()
            for note in scaling.notes
        ]
        found = {module.partition(".")[0] for module in modules}
        without = [module for module in modules if self.of(module)[0] is None]
        if without and (stray := [name for name in self._scalings if name not in found]):
            notes.append(
                f"{HEADER} speaks of {', '.join(map(repr, stray))}, which no module is in, and not of {len(without)} "
                f"modules here (first: {without[0]!r}): where they have no alpha of their own, alpha is r, the "
                "default of the format. Pass alpha= if it was another."
            )
        return notes

    def of(self, module: str) -> tuple[Scaling | None, str]:
        """What the header says of the component that a module is in, and the module's name within it."""
        component, _, path = module.partition(".")
        if component in self._scalings:
            return self._scalings[component], path
        return self._scalings.get(""), module

    def says(self, option: str, module: str) -> bool:
        """Whether a flag of the configuration is set for the component that a module is in."""
        component = module.partition(".")[0]
        fields = self._fields.get(component, self._fields.get("", {}))
        return flag(fields, option, self._where)


def scale_of(
    module: str, r: int, alpha_key: str | None, checkpoint: Checkpoint, header: Header, alpha: float | None, where: str
) -> tuple[tuple[float, ScaleSource], list[tuple[str, str]]]:
    """The scale of a module and where it comes from; where the file disagrees with itself about it, by kind."""
    scaling, path = header.of(module)
    notes: list[tuple[str, str]] = []
    stored: tuple[float, ScaleSource] | None = None
    if scaling is not None:
        scale, source = scaling.scale(path, r)
        stored = scale, "header" if source == "config" else source
        declared = scaling.declared_r(path)
        if declared is not None and declared != r:
            notes.append(("r", f"{shown(module)}: the header says r={declared}, the tensors have r={r}; they win."))
        notes += [("pattern", f"{HEADER}: {doubt}") for doubt in scaling.doubts(path)]
    if alpha is not None:
        return stored or (alpha / r, "caller"), notes
    if alpha_key is not None:
        own = stored_alpha(checkpoint, alpha_key, where) / (math.sqrt(r) if header.says("use_rslora", module) else r)
        if stored is not None and not math.isclose(own, stored[0], rel_tol=1e-3):
            text = f"{shown(module)}: its alpha tensor gives scale {own:g}, the header {stored[0]:g}; the tensor wins."
            notes.append(("alpha", text))
        return (own, "tensor"), notes
    return stored or (1.0, "format default"), notes


def stored_alpha(checkpoint: Checkpoint, key: str, where: str) -> float:
    """The number in a tensor of alpha."""
    shape = checkpoint.shape(key)
    if math.prod(shape) != 1:
        raise AdapterFormatError(f"{where}: {key!r}: expected one number, got shape {shape}.")
    value = float(checkpoint[key].double().item())
    if not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: {key!r}: expected a finite alpha, got {value}. Pass alpha= to replace it.")
    return value


def _parsed(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"{where}: {HEADER} in its header: expected a JSON object, got {text[:40]!r}. Remove it, or pass alpha=."
        ) from error
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{where}: {HEADER} in its header: expected an object, got {type(found).__name__}.")
    return found


def _by_component(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of each component; under "" those of a model that was saved alone, which have no prefix.

    Examples
    --------
    >>> _by_component({"unet.r": 4, "unet.lora_alpha": 8})
    {'unet': {'r': 4, 'lora_alpha': 8}}
    """
    if any(name in found for name in _FIELDS):  # one model's own save_lora_adapter
        return {"": dict(found)}
    components: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        component, _, field = name.partition(".")
        if field:
            components.setdefault(component, {})[field] = value
        elif isinstance(value, dict) and value:  # some writers nest
            components.setdefault(component, {}).update(value)
    return components


def _refuse_other_mathematics(fields: Mapping[str, Any], component: str, where: str) -> None:
    """Refuse what would make s·B·A a wrong or partial answer, by the fields of a ``LoraConfig``."""
    of = f" of {component!r}" if component else ""
    initial = fields.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower() not in _LEAVES_BASE:
        raise MutatedBaseError(
            f"{where}: {HEADER}{of}: initialised by {initial!r}, which may have moved the base: the update is then "
            "s·(B·A - B0·A0), and the file does not hold B0 and A0. Save it converted to LoRA."
        )
    for option, value in fields.items():
        if value and (option in _REFUSED_OPTIONS or (option.startswith("use_") and option not in _READ_OPTIONS)):
            raise UnsupportedAdapterError(
                f"{where}: {HEADER}{of}: {shown(option)} is set, an option that changes the update and is not read."
            )
