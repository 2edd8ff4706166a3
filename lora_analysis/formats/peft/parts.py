"""Which tensors make up a module, for PEFT's families beside LoRA, and what the others are.

Conventions
-----------
``save_pretrained`` writes ``base_model.model.<module>.<part>``; raw dumps keep the adapter's name behind the part,
``base_model.model.<module>.<part>.default``. Facts from PEFT's ``utils/save_and_load.py`` and
``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from lora_analysis.adapter import Unused
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.fields import refuse_unknown
from lora_analysis.formats.peft.lora import reason
from lora_analysis.formats.peft.names import module_name, plain

_COMMON_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)
"""Keys of ``adapter_config.json`` that every family has, and that say nothing about ΔW once it is trained."""

Parts = dict[str, str]
"""The keys of one module's tensors, by part: ``{"lora_A": "base_model.model.q.lora_A", …}``."""


def grouped(checkpoint: Checkpoint, names: Collection[str], options: ReadOptions) -> dict[str, Parts]:
    """The modules of the one adapter asked for, each with its tensors.

    Parameters
    ----------
    checkpoint : Checkpoint
    names : collection of str
        The parts of this family.
    options : ReadOptions
        ``name`` says which adapter, where a raw dump holds several.

    Raises
    ------
    AdapterFormatError
        If a module has a part twice, or the adapter asked for is not there.
    """
    pattern = _pattern(names)
    found: dict[str | None, dict[str, Parts]] = {}
    for key in checkpoint:
        if match := pattern.match(plain(key)):
            module = module_name(match["stem"])
            parts = found.setdefault(match["adapter"], {}).setdefault(module, {})
            if match["part"] in parts:
                raise AdapterFormatError(
                    f"{options.where}: expected one {match['part']} for {module!r}, "
                    f"got {parts[match['part']]!r} and {key!r}."
                )
            parts[match["part"]] = key
    return _of_one_adapter(found, options)


def _of_one_adapter(found: Mapping[str | None, dict[str, Parts]], options: ReadOptions) -> dict[str, Parts]:
    name, where = options.name, options.where
    if name in found:
        return found[name]
    if len(found) > 1:
        names = ", ".join(repr(name) for name in found)
        raise AdapterFormatError(f"{where}: holds several adapters ({names}). Pass name= with one.")
    only = next(iter(found), None)
    # PEFT's save_pretrained leaves the name out, and puts the default adapter into the folder itself.
    if name is None or (name == "default" and only is None):
        return found.get(only, {})
    held = "one without a name" if only is None else repr(only)
    raise AdapterFormatError(f"{where}: expected an adapter named {name!r}, found {held}. Leave name= out.")


def others(
    checkpoint: Checkpoint,
    used: Collection[str],
    names: Collection[str],
    config: Mapping[str, Any],
    where: str,
    known: Mapping[str, str] | None = None,
) -> tuple[Unused, ...]:
    """The tensors of the file that no update is made of, each with its reason.

    Parameters
    ----------
    checkpoint : Checkpoint
    used : collection of str
        The tensors that updates are made of.
    names : collection of str
        The parts of this family.
    config : mapping
    where : str
        The file, for messages.
    known : mapping of str to str, optional
        Reasons of some tensors.

    Raises
    ------
    AdapterFormatError
        If a tensor is called like a part of this family and is none known here.
    """
    prefixes = {name.partition("_")[0] + "_" for name in names if "_" in name}
    pattern = _pattern(names)

    def why(key: str) -> str | None:
        if known and key in known:
            return known[key]
        if pattern.match(plain(key)):
            return "a factor of another adapter in the same file"
        if found := reason(key, config=config):
            return found
        last = key.split(".")[-2:]
        if any(component.startswith(prefix) for component in last for prefix in prefixes):
            raise AdapterFormatError(
                f"{where}: {key!r}: expected the parts of a module to be {', '.join(names)}, and this one is none of "
                "them. Remove it from the file if it is no part of the update."
            )
        return None

    stems = {match["stem"] for match in map(pattern.match, map(plain, checkpoint)) if match}
    full = "a full tensor, no part of any update"
    return unused_tensors(checkpoint, used, stems, why, otherwise=full, where=where)


def require_parts(where: str, module: str, parts: Parts, *needed: str) -> None:
    """Refuse a module that lacks a part."""
    if missing := [name for name in needed if name not in parts]:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected {', '.join(needed)}, {missing[0]} is missing (found {', '.join(parts)})."
        )


def require_fields(config: Mapping[str, Any], fields: Collection[str], where: str) -> list[str]:
    """Refuse options that are set and that neither this family nor all of PEFT's have; a note of the unset ones."""
    return refuse_unknown(config, {*_COMMON_FIELDS, *fields}, where)


def refuse_options(options: ReadOptions, family: str) -> None:
    """Refuse what the caller said about other kinds of file."""
    for option in ("split", "initial", "heads"):
        if getattr(options, option) is not None:
            raise UnsupportedAdapterError(
                f"{options.where}: {option}= has no meaning for a PEFT {family}. Leave {option}= out."
            )


def base_shapes(base: BaseWeights | None, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the base tensors that modules act on, as stored; without those that the base has no tensor of."""
    return {} if base is None else {module: base.shape(name) for module, name in _base_names(base, modules).items()}


def base_dtypes(base: BaseWeights | None, modules: Iterable[str]) -> tuple[torch.dtype, ...]:
    """The dtypes of the base matrices that modules act on, each once; none without a base."""
    dtypes = () if base is None else (base.dtype(name) for name in _base_names(base, modules).values())
    return tuple(dtype for dtype in dict.fromkeys(dtypes) if dtype.is_floating_point)


def _base_names(base: BaseWeights, modules: Iterable[str]) -> dict[str, str]:
    """Module -> the base's own tensor. A base that fuses what the adapter splits has none."""
    tensors = {module: f"{module}.weight" for module in modules}
    found = base.find_all(tensors.values())
    return {module: found[tensor] for module, tensor in tensors.items() if found[tensor] in base}


def kernel(shape: tuple[int, int], stored: tuple[int, ...] | None, otherwise: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The kernel of the convolution that an update (out, in·k·k) acts on, as the base tells it.

    Without a base, or with one that the update does not fit, what the file tells.
    """
    if stored is None or (stored[:1], math.prod(stored[1:])) != (shape[:1], shape[1]):
        return otherwise
    return stored[2:]


def _pattern(names: Collection[str]) -> re.Pattern[str]:
    # An adapter named "weight" is a LoRA's part, not an adapter.
    return re.compile(rf"(?P<stem>.+)\.(?P<part>{'|'.join(names)})(?:\.(?P<adapter>(?!weight\Z)[^.]+))?\Z", re.DOTALL)
