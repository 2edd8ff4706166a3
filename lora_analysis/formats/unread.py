"""Kinds of update that are recognised, so that they can be refused by name: most are no additive low-rank updates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_analysis.checkpoint import Checkpoint

_BY_KEY = (
    ("OFT or BOFT, a multiplicative update", r"\.oft_(?!blocks|diag)|\.boft_"),
    ("IA3, which is no additive low-rank update", r"\.ia3_l(\.|$)"),
    ("UniLoRA, which shares one vector among all modules", r"unilora"),
)
_PARTS = {
    "adamss_A": "ADAMSS",
    "beft_bias": "BEFT",
    "bone_block": "BONE",
    "c3a_kernel": "C3A",
    "deft_P": "DEFT",
    "delora_A": "DELORA",
    "fourierft_spectrum": "FOURIERFT",
    "frod_lambda_l": "FROD",
    "glora_A": "GLORA",
    "gralora_A": "GRALORA",
    "hira_A": "HIRA",
    "hira_embedding_A": "HIRA",
    "hra_u": "HRA",
    "lily_A": "LILY",
    "miss_block": "MISS",
    "osf_svd_params": "OSF",
    "peanut_A": "PEANUT",
    "poly_lora_A": "POLY",
    "prompt_embeddings": "PROMPT_TUNING",
    "psoft_R": "PSOFT",
    "pvera_lambda_b": "PVERA",
    "randlora_lambda": "RANDLORA",
    "road_theta": "ROAD",
    "shira_weight": "SHIRA",
    "supertuning_values": "SUPERTUNING",
    "tinylora_v": "TINYLORA",
    "vblora_logits_A": "VBLORA",
    "waveft_spectrum": "WAVEFT",
}
"""One parameter of every module of PEFT's other kinds, which tells them where there is no configuration."""
PEFT_TYPES = {
    "ADAMSS": "whose updates lie in subspaces of the base's own SVD",
    "ADAPTION_PROMPT": "which changes no weight",
    "BEFT": "which trains biases only",
    "BOFT": "a multiplicative update",
    "BONE": "whose update repeats one small matrix along the weight",
    "C3A": "a block-circulant update, of full rank",
    "CARTRIDGE": "which changes no weight",
    "CPT": "which changes no weight",
    "DEFT": "which projects the base's own weight",
    "DELORA": "whose factors are normalised and scaled by norms of the base",
    "FOURIERFT": "a sparse update in the Fourier domain",
    "FROD": "which decomposes the weight anew in a basis that modules share",
    "GLORA": "which scales the base's own weight as well",
    "GRALORA": "with factors for every block of a weight",
    "HIRA": "which multiplies the base's own weight by its product, entry by entry",
    "HRA": "a multiplicative update",
    "IA3": "which is no additive low-rank update",
    "LILY": "which mixes shared factors token by token",
    "LN_TUNING": "which trains norms only",
    "MISS": "whose update repeats one small matrix along the weight",
    "MULTITASK_PROMPT_TUNING": "which changes no weight",
    "OFT": "a multiplicative update",
    "OSF": "which moves the base's own singular directions",
    "PEANUT": "a nonlinear function of the base's own weight",
    "POLY": "which mixes several LoRAs task by task",
    "PREFIX_TUNING": "which changes no weight",
    "PROMPT_TUNING": "which changes no weight",
    "PSOFT": "which rotates within the base's own principal subspace",
    "PVERA": "whose update is drawn anew for every input",
    "P_TUNING": "which changes no weight",
    "RANDLORA": "a sum of random products, of full rank",
    "ROAD": "which rotates activations, a multiplicative update",
    "SHADOW": "a network beside the base, whose weights do not change",
    "SHIRA": "a sparse update, of high rank",
    "SUPERTUNING": "a sparse update of single entries",
    "TINYLORA": "which moves the base's own singular directions",
    "TRAINABLE_TOKENS": "which replaces rows of the embedding",
    "UNILORA": "which shares one vector among all modules",
    "VBLORA": "whose factors are mixed from one bank of vectors",
    "WAVEFT": "a sparse update in the wavelet domain",
    "XLORA": "which mixes several LoRAs token by token",
}
"""Kinds of adapter that PEFT writes beside those that ``formats.peft`` reads, each with what it is instead."""
PEFT_READ = ("LORA", "ADALORA", "VERA", "LOHA", "LOKR")


def recognised(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The name of a format or kind that is known and not read, or None."""
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type.upper() not in PEFT_READ:
        return f"PEFT {peft_type}, {PEFT_TYPES.get(peft_type.upper(), 'a kind that is not known here')}"
    if isinstance(peft_type, str) and peft_type.upper() != "LORA":
        return None
    names = list(checkpoint)
    if found := next((title for title in map(kind_of, names) if title is not None), None):
        return found
    if names and all(re.fullmatch(r"<.+>", name) for name in names):
        return "learned token embeddings (textual inversion), which change no weight matrix"
    return None


def kind_of(name: str) -> str | None:
    """The kind of update that a tensor of this name is a part of, where it is known and not read.

    Examples
    --------
    >>> kind_of("base_model.model.q.hra_u.default")
    'PEFT HRA, a multiplicative update'
    >>> kind_of("base_model.model.q.weight") is None
    True
    """
    if found := next((title for title, pattern in _BY_KEY if re.search(pattern, name)), None):
        return found
    peft_type = next((_PARTS[part] for part in reversed(name.split(".")) if part in _PARTS), None)
    return None if peft_type is None else f"PEFT {peft_type}, {PEFT_TYPES[peft_type]}"
