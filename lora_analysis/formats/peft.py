"""PEFT (huggingface/peft): LoRA of linear layers, as ``save_pretrained`` writes it and as raw dumps hold it.

Conventions
-----------
``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``.lora_B.weight`` (d_out, r); ΔW = s·B·A with
s = lora_alpha / r, or lora_alpha / sqrt(r) under ``use_rslora``. Raw dumps keep the adapter's name:
``.lora_A.default.weight``. Facts from PEFT's own source: ``tuners/lora/layer.py`` (scaling, orientation),
``utils/other.py`` (``get_pattern_key``), ``utils/save_and_load.py`` (names).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_analysis.adapter import Adapter, Contents, Module, ScaleSource, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import MAX_ALPHA, ReadOptions
from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.update import LowRankUpdate, factors

NAME = "peft"

_FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight\Z", re.DOTALL)
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod"}
_DEFAULT_ALPHA = 8
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract their product from the base, so that s·B·A is not the update."""
_LEAVES_BASE = ("gaussian", "orthogonal", "eva")
"""Named initialisations that start from a product of zero, or from random factors that stay in the file."""
_REFUSED_OPTIONS = {
    "use_dora": "DoRA, whose update needs the magnitudes and the base",
    "use_qalora": "QALoRA, which pools the inputs of A",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which acts from its invocation tokens on",
    "target_parameters": "LoRA on parameters (mixtures of experts)",
    "layer_replication": "layer replication",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
}
_REFUSED_TENSORS = (
    (r"\.lora_magnitude_vector", "DoRA, whose update needs the magnitudes and the base"),
    (r"\.lora_embedding_[AB]", "LoRA on embeddings"),
)
_SIDE_TENSORS = (
    (r"\.lora_B(\.[^.]+)?\.bias$", "lora_bias: adds scale times it to the output, no part of ΔW"),
    (r"\.original_module\.", "the base's own tensor, kept beside modules_to_save"),
    (r"\.modules_to_save\.", "modules_to_save: a full tensor in place of the base's"),
    (r"\.token_adapter\.|trainable_tokens", "trainable tokens: rows in place of the embedding's"),
    (r"\.base_layer\.weight$", "the base's own tensor"),
)


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the configuration or the tensors' names are PEFT's."""
    return "peft_type" in config or any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT LoRA adapter."""
    where = options.where
    _require_types(config, where)
    _refuse_other_mathematics(checkpoint, config, where)
    if options.split is not None:
        raise UnsupportedAdapterError(
            f"{where}: split= names the slots of a loralib MergedLinear; a PEFT LoRA on a fused weight stays "
            "one module as trained. Leave split= out."
        )
    scaling = _Scaling(config, options.alpha, where)
    transposed = _flag(config, "fan_in_fan_out", where)
    pairs = _paired(checkpoint, options)
    if not pairs:
        return Contents({})
    used = {key for pair in pairs.values() for key in pair}
    modules: dict[str, Module] = {}
    notes = list(scaling.notes)
    for module, (key_a, key_b) in pairs.items():
        shape_a, shape_b = checkpoint.shape(key_a), checkpoint.shape(key_b)
        _require_factors(where, module, shape_a, shape_b)
        r = shape_a[0]
        declared = scaling.declared_r(module)
        if declared is not None and declared != r:
            notes.append(f"{_shown(module)}: the configuration says r={declared}, the tensors have r={r}; they win.")
        if r == 0:
            notes.append(f"{_shown(module)}: r=0, an update of zero whatever its scale; alpha / r is given as 0.")
        scale, source = scaling.scale(module, r)
        notes.extend(scaling.doubts(module))
        modules[module] = Module(
            shape=(shape_b[0], shape_a[1]),
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", transposed=transposed),
            tensors=(key_a, key_b),
            read=partial(_read_update, checkpoint, key_a, key_b, scale, options.device),
        )
    unused = unused_tensors(
        checkpoint,
        used,
        {match["stem"] for match in map(_FACTOR.match, checkpoint) if match},
        partial(_reason, config=config),
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    return Contents(modules, unused, tuple(notes))


class _Scaling:
    """The scale of each module, by PEFT's rules and the caller's alpha."""

    def __init__(self, config: Mapping[str, Any], alpha: float | None, where: str) -> None:
        self._caller = alpha
        self._known = bool(config)
        self._rslora = _flag(config, "use_rslora", where)
        self._r = None if config.get("r") is None else _integer(config["r"], "r", where)
        self._alpha = config.get("lora_alpha")
        if self._alpha is not None:
            self._alpha = _number(self._alpha, "lora_alpha", where)
        # Compiled once: a thousand keys against a thousand modules would outgrow the cache of re.
        self._ranks = [
            (regex, _integer(value, f"rank_pattern[{key!r}]", where))
            for key, regex, value in _pattern(config, "rank_pattern", where)
        ]
        self._alphas = [
            (regex, key, _number(value, f"alpha_pattern[{key!r}]", where))
            for key, regex, value in _pattern(config, "alpha_pattern", where)
        ]
        self.notes: list[str] = []
        if config and self._alpha is None and alpha is None:
            self.notes.append(f"the configuration holds no lora_alpha; PEFT's default, {_DEFAULT_ALPHA}, applies.")

    def declared_r(self, module: str) -> int | None:
        return next((r for regex, r in self._ranks if regex.match(module)), self._r)

    def scale(self, module: str, r: int) -> tuple[float, ScaleSource]:
        alpha, source = self._alpha_of(module)
        if math.isnan(alpha):
            return alpha, source
        if r == 0:
            return 0.0, source
        return alpha / (math.sqrt(r) if self._rslora else r), source

    def doubts(self, module: str) -> list[str]:
        """What the file leaves open: PEFT sorts patterns when it saves, so the order of training is lost."""
        matching = [(key, alpha) for regex, key, alpha in self._alphas if regex.match(module)]
        others = [key for key, alpha in matching if alpha != matching[0][1]]
        if self._caller is not None or not others:
            return []
        return [
            f"{_shown(module)}: {len(matching)} keys of alpha_pattern match; the first, {matching[0][0]!r}, applies. "
            f"PEFT sorts them when it saves, so training may have used {others[0]!r}."
        ]

    def _alpha_of(self, module: str) -> tuple[float, ScaleSource]:
        if self._caller is not None:
            return self._caller, "caller"
        if not self._known:
            return math.nan, "unknown"
        found = next((alpha for regex, _, alpha in self._alphas if regex.match(module)), None)
        if found is not None:
            return found, "config"
        if self._alpha is None:
            return float(_DEFAULT_ALPHA), "format default"
        return self._alpha, "config"


def _paired(checkpoint: Checkpoint, options: ReadOptions) -> dict[str, tuple[str, str]]:
    """Module name -> (key of A, key of B), for the one adapter asked for."""
    found: dict[str | None, dict[str, dict[str, str]]] = {}
    for key in checkpoint:
        if match := _FACTOR.match(key):
            sides = found.setdefault(match["adapter"], {}).setdefault(_module_name(match["stem"]), {})
            if match["side"] in sides:
                raise AdapterFormatError(
                    f"{options.where}: expected one lora_{match['side']} for {_module_name(match['stem'])!r}, "
                    f"got {sides[match['side']]!r} and {key!r}."
                )
            sides[match["side"]] = key
    chosen = _chosen(found, options)
    for module, sides in chosen.items():
        if len(sides) < 2:
            (side, key), other = next(iter(sides.items())), "B" if "A" in sides else "A"
            raise AdapterFormatError(
                f"{options.where}: {module!r}: expected lora_A and lora_B, got only lora_{side} ({key!r}); "
                f"lora_{other} is missing."
            )
    return {module: (sides["A"], sides["B"]) for module, sides in chosen.items()}


def _chosen(found: Mapping[str | None, dict[str, dict[str, str]]], options: ReadOptions) -> dict[str, dict[str, str]]:
    """The adapter asked for, of those in the file."""
    name = options.name
    if name in found:
        return found[name]
    if len(found) > 1:
        names = ", ".join(repr(name) for name in found)
        raise AdapterFormatError(f"{options.where}: holds several adapters ({names}). Pass name= with one.")
    only = next(iter(found), None)
    # PEFT's save_pretrained leaves the name out, and puts the default adapter into the folder itself.
    if name is None or (name == "default" and only is None):
        return found.get(only, {})
    held = "one without a name" if only is None else repr(only)
    raise AdapterFormatError(f"{options.where}: expected an adapter named {name!r}, found {held}. Leave name= out.")


def _module_name(stem: str) -> str:
    """The base model's name of a module, without what PEFT, DDP, FSDP and compile put round it."""
    stem = ".".join(component for component in stem.split(".") if component not in _WRAPPERS) or stem
    return stem.removeprefix("module.base_model.model.").removeprefix("base_model.model.")


def _require_factors(where: str, module: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    if len(shape_a) > 2 or len(shape_b) > 2:
        raise UnsupportedAdapterError(
            f"{where}: {module!r}: holds LoRA on a convolution (A {shape_a}, B {shape_b}), which is not read yet."
        )
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected lora_A (r, d_in) and lora_B (d_out, r) to share r, "
            f"got {shape_a} and {shape_b}. The file was read as 'peft'; pass format= to read it as another."
        )


def _read_update(checkpoint: Checkpoint, key_a: str, key_b: str, scale: float, device: torch.device) -> LowRankUpdate:
    return LowRankUpdate(checkpoint[key_b].to(device), checkpoint[key_a].to(device), scale)


def _refuse_other_mathematics(checkpoint: Checkpoint, config: Mapping[str, Any], where: str) -> None:
    """Refuse what would make s·B·A a wrong or partial answer."""
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_MOVES_BASE):
        raise UnsupportedAdapterError(
            f"{where}: initialised by {initial!r}, which moved the base: the update is s·(B·A - B0·A0), and the "
            "file does not hold B0 and A0. Save it converted to LoRA (PEFT: path_initial_model_for_weight_conversion)."
        )
    if isinstance(initial, str) and initial.lower() not in _LEAVES_BASE:
        raise UnsupportedAdapterError(
            f"{where}: initialised by {initial!r}, which is not known here: it may have moved the base, and then s·B·A "
            "is not the update. Give its factors as Adapter({module: LowRankUpdate(up, down, scale)}) if it has not."
        )
    for option, title in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise UnsupportedAdapterError(f"{where}: {option} is set: {title}, which is not read yet.")
    for option, value in config.items():
        if option.startswith("use_") and option != "use_rslora" and value:
            raise UnsupportedAdapterError(
                f"{where}: {option} is set, an option that may change the update and is not known here."
            )
    for pattern, title in _REFUSED_TENSORS:
        if key := next((key for key in checkpoint if re.search(pattern, key)), None):
            raise UnsupportedAdapterError(f"{where}: {key!r} belongs to {title}, which is not read yet.")


def _reason(key: str, config: Mapping[str, Any]) -> str | None:
    if _FACTOR.match(key):
        return "a factor of another adapter in the same file"
    for pattern, reason in _SIDE_TENSORS:
        if re.search(pattern, key):
            return reason
    saved = config.get("modules_to_save") or ()
    if not key.endswith("bias") and any(part in saved for part in _module_name(key).split(".")):
        return "modules_to_save: a full tensor in place of the base's"
    return None


def _pattern(config: Mapping[str, Any], name: str, where: str) -> list[tuple[str, re.Pattern[str], Any]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(f"{where}: {name}: expected an object, got {type(patterns).__name__}.")
    compiled: list[tuple[str, re.Pattern[str], Any]] = []
    for key, value in patterns.items():
        try:
            compiled.append((key, pattern_regex(key), value))
        except ValueError as error:
            raise AdapterFormatError(
                f"{where}: {name}: expected keys that are matched quickly, got {_short(key)} ({error}). "
                "Write it without."
            ) from error
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFormatError(
                f"{where}: {name}: expected regular expressions, got {_short(key)} ({error})."
            ) from error
    return compiled


def _number(value: Any, name: str, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise AdapterFormatError(f"{where}: {name}: expected a finite number, got {_short(value)}.")
    if abs(value) > MAX_ALPHA:
        raise AdapterFormatError(f"{where}: {name}: expected a plausible number, got {_short(value)}.")
    return float(value)


def _integer(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise AdapterFormatError(f"{where}: {name}: expected a positive integer, got {_short(value)}.")
    return value


def _require_types(config: Mapping[str, Any], where: str) -> None:
    peft_type, saved = config.get("peft_type"), config.get("modules_to_save")
    if peft_type is not None and not isinstance(peft_type, str):
        raise AdapterFormatError(f"{where}: peft_type: expected a name such as 'LORA', got {_short(peft_type)}.")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise AdapterFormatError(f"{where}: modules_to_save: expected a list of names, got {_short(saved)}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterFormatError(f"{where}: {name}: expected true or false, got {value!r}.")
    return bool(value)


def write(adapter: Adapter, directory: Path) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
    if not len(adapter):
        raise ValueError(f"{adapter.source}: expected an adapter with modules to save, got none.")
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        if math.isnan(module.scale):
            raise UndefinedUpdateError(
                f"{adapter.source}: {name!r}: expected a known scale to save, it is unknown. Pass alpha= when loading."
            )
        if module.target not in (Target(f"{name}.weight"), Target(f"{name}.weight", transposed=True)):
            raise UnsupportedAdapterError(
                f"{adapter.source}: {name!r}: expected an update of the whole of '{name}.weight', got one of "
                f"{_place(module.target)}, for which PEFT's LoRA has no place."
            )
        if module.r == 0:
            raise UnsupportedAdapterError(f"{adapter.source}: {name!r}: expected factors to save, got r=0.")
        up, down = factors(adapter[name])
        for side, factor in (("A", down), ("B", up)):
            # Copies, because safetensors refuses tensors that share memory.
            copied = factor.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = copied
    if adapter.unused:
        warnings.warn(
            f"{adapter.source}: {len(adapter.unused)} tensors that are no part of an update are not written "
            f"(first: {adapter.unused[0].tensor!r}).",
            stacklevel=3,
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        save_file(tensors, Path(scratch) / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_configuration(adapter), indent=2, sort_keys=True) + "\n"
        (Path(scratch) / "adapter_config.json").write_text(text, encoding="utf-8")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(scratch) / name, directory / name)  # noqa: PTH105 (atomic)
    return directory


def _configuration(adapter: Adapter) -> dict[str, Any]:
    ranks = {name: module.r for name, module in adapter.modules.items()}
    alphas = {name: _alpha(module) for name, module in adapter.modules.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(adapter.modules),
        "fan_in_fan_out": any(module.target.transposed for module in adapter.modules.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha(module: Module) -> float | int:
    """The alpha that gives the scale back, whole where one does: 49 / 11 * 11 is not 49."""
    product = module.scale * module.r
    whole = round(product)
    if whole / module.r == module.scale:
        return whole
    neighbours = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return min(neighbours, key=lambda alpha: abs(alpha / module.r - module.scale))


def _place(target: Target) -> str:
    whole = (target.rows, target.columns, target.expert) == (None, None, None)
    return f"{target.tensor!r}" if whole else f"a slice of {target.tensor!r}"


def _exactly(module: str) -> str:
    """A pattern key that PEFT resolves to this module and to no other."""
    return "^" + re.escape(module)
