"""PEFT (huggingface/peft): its additive families, as ``save_pretrained`` writes them and as raw dumps hold them.

Conventions
-----------
``peft_type`` of ``adapter_config.json`` says which family a file is of; without it, the names of its tensors do. Names
are ``base_model.model.<module>.<part>``, and raw dumps keep the adapter's name: ``.lora_A.default.weight``. Each family
has a file: ``lora``, ``adalora``, ``vera``, ``hadamard`` (LoHa), ``kronecker`` (LoKr). PEFT's other kinds are no
additive updates of weights, or not read; ``formats.unread`` names them. Facts from PEFT's own source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_analysis.adapter import Contents
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft import adalora, hadamard, kronecker, lora, vera
from lora_analysis.formats.peft.names import FACTOR
from lora_analysis.formats.peft.parts import refuse_options
from lora_analysis.formats.unread import PEFT_TYPES

__all__ = ["NAME", "matches", "read"]

NAME = "peft"
TAKES = ("config", "name", "split", "initial", "heads")

_READERS = {
    "LORA": lora.read,
    "ADALORA": adalora.read,
    "VERA": vera.read,
    "LOHA": hadamard.read,
    "LOKR": kronecker.read,
}
_BY_NAME = (
    ("ADALORA", re.compile(r".+\.lora_E(\.[^.]+)?\Z", re.DOTALL)),
    ("VERA", re.compile(r".+\.vera_lambda_[bd](\.[^.]+)?\Z", re.DOTALL)),
    ("LOHA", re.compile(r".+\.hada_w[12]_[ab](\.[^.]+)?\Z", re.DOTALL)),
    ("LOKR", re.compile(r".+\.lokr_w[12](_[ab])?(\.[^.]+)?\Z", re.DOTALL)),
)
_SHARED_NAMES = ("LOHA", "LOKR")
"""Families whose tensors LyCORIS calls the same, so that only PEFT's prefix tells."""
_PREFIX = re.compile(r"(module\.)?base_model\.model\.")


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the configuration or the tensors' names are PEFT's."""
    if "peft_type" in config or any(FACTOR.match(name) for name in checkpoint):
        return True
    family = _family_by_names(checkpoint)
    return family is not None and (family not in _SHARED_NAMES or any(map(_PREFIX.match, checkpoint)))


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT adapter of any family.

    Raises
    ------
    AdapterFormatError
        If the file breaks the rules of its family.
    UnsupportedAdapterError
        If it is of a kind that is not read, or an option of its configuration is not.
    """
    stated = config.get("peft_type")
    # What is no string, LoRA's reader refuses.
    family = stated.upper() if isinstance(stated, str) else _family_by_names(checkpoint) or "LORA"
    if family not in _READERS:
        why = PEFT_TYPES.get(family, "a kind that is not known here")
        raise UnsupportedAdapterError(f"{options.where}: holds PEFT {stated}, {why}; it is not read.")
    if family != "LORA":
        refuse_options(options, family)
    return _READERS[family](checkpoint, config, options)


def _family_by_names(checkpoint: Checkpoint) -> str | None:
    return next((family for family, names in _BY_NAME if any(map(names.match, checkpoint))), None)
