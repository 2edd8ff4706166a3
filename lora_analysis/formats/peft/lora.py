"""PEFT's LoRA: the product of two factors per module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import Scaling, flag, require_types, shown
from lora_analysis.formats.peft.names import FACTOR, module_name, paired
from lora_analysis.update import LowRankUpdate

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


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT LoRA adapter."""
    where = options.where
    require_types(config, where)
    refuse_other_mathematics(checkpoint, config, where)
    if options.split is not None:
        raise UnsupportedAdapterError(
            f"{where}: split= names the slots of a loralib MergedLinear; a PEFT LoRA on a fused weight stays "
            "one module as trained. Leave split= out."
        )
    scaling = Scaling(config, options.alpha, where)
    transposed = flag(config, "fan_in_fan_out", where)
    pairs = paired(checkpoint, options)
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
            notes.append(f"{shown(module)}: the configuration says r={declared}, the tensors have r={r}; they win.")
        if r == 0:
            notes.append(f"{shown(module)}: r=0, an update of zero whatever its scale; alpha / r is given as 0.")
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
        {match["stem"] for match in map(FACTOR.match, checkpoint) if match},
        partial(reason, config=config),
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    return Contents(modules, unused, tuple(notes))


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


def refuse_other_mathematics(checkpoint: Checkpoint, config: Mapping[str, Any], where: str) -> None:
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


def reason(key: str, config: Mapping[str, Any]) -> str | None:
    """Why PEFT has a tensor of this name, if it has."""
    if FACTOR.match(key):
        return "a factor of another adapter in the same file"
    for pattern, reason in _SIDE_TENSORS:
        if re.search(pattern, key):
            return reason
    saved = config.get("modules_to_save") or ()
    if not key.endswith("bias") and any(part in saved for part in module_name(key).split(".")):
        return "modules_to_save: a full tensor in place of the base's"
    return None
