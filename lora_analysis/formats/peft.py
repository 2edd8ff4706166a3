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

from lora_analysis.adapter import Adapter, Contents, Module, ScaleSource, Target, Unused
from lora_analysis.checkpoint import Checkpoint, nbytes
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.update import LowRankUpdate, factors

NAME = "peft"

_FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_DEFAULT_ALPHA = 8
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract their product from the base, so that s·B·A is not the update."""
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
    (r"\.bias$", "bias: a full bias in place of the base's"),
)


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the configuration or the tensors' names are PEFT's."""
    return "peft_type" in config or any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT LoRA adapter."""
    where = options.where
    _refuse_other_mathematics(checkpoint, config, where)
    if options.split is not None:
        raise UnsupportedAdapterError(
            f"{where}: split= names the slots of a loralib MergedLinear; a PEFT LoRA on a fused weight stays "
            "one module as trained. Leave split= out."
        )
    scaling = _Scaling(config, options.alpha, where)
    transposed = _flag(config, "fan_in_fan_out", where)
    pairs = _paired(checkpoint, options)
    used = {key for pair in pairs.values() for key in pair}
    modules: dict[str, Module] = {}
    notes = list(scaling.notes)
    for module, (key_a, key_b) in pairs.items():
        shape_a, shape_b = checkpoint.shape(key_a), checkpoint.shape(key_b)
        _require_factors(where, module, shape_a, shape_b)
        r = shape_a[0]
        declared = scaling.declared_r(module)
        if declared is not None and declared != r:
            notes.append(f"{module}: the configuration says r={declared}, the tensors have r={r}; they win.")
        scale, source = scaling.scale(module, r)
        modules[module] = Module(
            shape=(shape_b[0], shape_a[1]),
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", transposed=transposed),
            tensors=(key_a, key_b),
            read=partial(_read_update, checkpoint, key_a, key_b, scale, options.device),
        )
    unused = tuple(Unused(key, _reason(key, config), nbytes(checkpoint, key)) for key in checkpoint if key not in used)
    return Contents(modules, unused, tuple(notes))


def pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    r"""The first key, in the mapping's order, that PEFT's rule finds for a module.

    A key is a regular expression that must match a dotted suffix of the name (dots unescaped):
    ``re.match(rf"(.*\.)?({key})$", module)``, as in PEFT's ``get_pattern_key``.

    Examples
    --------
    >>> pattern_key({"proj": 4, "q_proj": 8, r".*\.0\.k": 2}, "layers.0.q_proj")
    'q_proj'
    >>> pattern_key({"proj": 4}, "layers.0.q_proj") is None
    True
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


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
        self._ranks = {
            k: _integer(v, f"rank_pattern[{k!r}]", where) for k, v in _pattern(config, "rank_pattern", where)
        }
        self._alphas = {
            k: _number(v, f"alpha_pattern[{k!r}]", where) for k, v in _pattern(config, "alpha_pattern", where)
        }
        self.notes: list[str] = []
        if config and self._alpha is None and alpha is None:
            self.notes.append(f"the configuration holds no lora_alpha; PEFT's default, {_DEFAULT_ALPHA}, applies.")

    def declared_r(self, module: str) -> int | None:
        key = pattern_key(self._ranks, module)
        return self._r if key is None else self._ranks[key]

    def scale(self, module: str, r: int) -> tuple[float, ScaleSource]:
        alpha, source = self._alpha_of(module)
        if r == 0 or math.isnan(alpha):
            return alpha, source
        return alpha / (math.sqrt(r) if self._rslora else r), source

    def _alpha_of(self, module: str) -> tuple[float, ScaleSource]:
        if self._caller is not None:
            return self._caller, "caller"
        if not self._known:
            return math.nan, "unknown"
        key = pattern_key(self._alphas, module)
        if key is not None:
            return self._alphas[key], "config"
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
    if len(found) > 1 and options.name not in found:
        names = ", ".join(repr(name) for name in found)
        raise AdapterFormatError(f"{options.where}: holds several adapters ({names}). Pass name= with one.")
    chosen = found.get(options.name) or next(iter(found.values()), {})
    for module, sides in chosen.items():
        if len(sides) < 2:
            (side, key), other = next(iter(sides.items())), "B" if "A" in sides else "A"
            raise AdapterFormatError(
                f"{options.where}: {module!r}: expected lora_A and lora_B, got only lora_{side} ({key!r}); "
                f"lora_{other} is missing."
            )
    return {module: (sides["A"], sides["B"]) for module, sides in chosen.items()}


def _module_name(stem: str) -> str:
    """The base model's name of a module, without what PEFT, DDP, FSDP and compile put round it."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod."):
        stem = stem.replace(wrapper, "")
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


def _reason(key: str, config: Mapping[str, Any]) -> str:
    if _FACTOR.match(key):
        return "a factor of another adapter in the same file"
    for pattern, reason in _SIDE_TENSORS:
        if re.search(pattern, key):
            return reason
    parts = _module_name(key).split(".")
    saved = config.get("modules_to_save") or ()
    if any(part in saved for part in parts):
        return "modules_to_save: a full tensor in place of the base's"
    return "a full tensor, no part of any update"


def _pattern(config: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(f"{where}: {name}: expected an object, got {type(patterns).__name__}.")
    for key in patterns:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise AdapterFormatError(
                f"{where}: {name}: expected regular expressions, got {key!r} ({error})."
            ) from error
    return list(patterns.items())


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterFormatError(f"{where}: {name}: expected a finite number, got {value!r}.")
    return float(value)


def _integer(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise AdapterFormatError(f"{where}: {name}: expected a positive integer, got {value!r}.")
    return value


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
        if (module.target.rows, module.target.columns, module.target.expert) != (None, None, None):
            raise UnsupportedAdapterError(
                f"{adapter.source}: {name!r}: expected updates of whole matrices, got a slice of "
                f"{module.target.tensor!r}, for which PEFT's LoRA has no place."
            )
        up, down = factors(adapter[name])
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.detach().cpu().contiguous()
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
    alpha = module.scale * module.r
    return int(alpha) if alpha.is_integer() else alpha


def _exactly(module: str) -> str:
    """A pattern key that PEFT resolves to this module and to no other."""
    return "^" + re.escape(module)
