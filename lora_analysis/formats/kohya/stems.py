"""Names of tensors in kohya's and LyCORIS' files: ``<stem>.<what it is of the module>``."""

from __future__ import annotations

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import UnsupportedAdapterError

FACTORS = (".lora_up.weight", ".lora_down.weight")
PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_")
CONTROL_LORA = "lora_controlnet"
"""The tensor that marks a Control-LoRA."""

LOCON = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")
FULL = ("diff",)
SCALES = ("alpha", "dora_scale", "scalar")

LYCORIS_ANYWHERE = (
    *(f".{name}" for name in (*LOHA, *LOKR, "lora_mid.weight", "oft_blocks", "oft_diag")),
    ".lambda_layer",
)
LYCORIS_PREFIXED = (".dora_scale", ".diff", ".a1.weight", ".on_input", ".w_norm")

_REFUSED = {
    "oft_blocks": "OFT or BOFT, a multiplicative update",
    "oft_diag": "OFT, a multiplicative update",
    "on_input": "IA3, a multiplicative update",
    "a1.weight": "GLoRA, whose update is partly a product with the base",
    "a2.weight": "GLoRA, whose update is partly a product with the base",
    "lambda_layer": "T-LoRA, whose update depends on the timestep and on its initial factors",
    "bias_indices": "a sparse residual beside the factors",
    "bias_values": "a sparse residual beside the factors",
}
_KNOWN = (*LOCON, *LOHA, *LOKR, *FULL, *SCALES, *_REFUSED)
_LISTED = {
    "diff_b": "the difference of a bias, no part of ΔW",
    "w_norm": "the difference of a norm's gain, a vector",
    "b_norm": "the difference of a norm's bias",
}


def parts_by_stem(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """What the file holds of each module: its stem, and the last names of its tensors.

    Only modules with some tensor of an update; in a Control-LoRA also those with a bare ``up`` or ``down``.
    """
    known = (*_KNOWN, "up", "down") if CONTROL_LORA in checkpoint else _KNOWN
    endings = {f".{name}": name for name in known}
    found: dict[str, list[str]] = {}
    for key in checkpoint:
        # At most two components: what follows the last dot, or the last but one before ".weight".
        last = key.rfind(".")
        dot = key.rfind(".", 0, last) if key.endswith(".weight") else last
        name = endings.get(key[dot:]) if dot > 0 else None
        if name is not None:
            found.setdefault(key[:dot], []).append(name)
    return {stem: names for stem, names in found.items() if not set(names) <= {"alpha", "scalar"}}


def refuse_other_mathematics(parts: dict[str, list[str]], where: str) -> None:
    """Refuse a file whose updates are not all additive, naming the module."""
    for stem, names in parts.items():
        if title := next((_REFUSED[name] for name in names if name in _REFUSED), None):
            raise UnsupportedAdapterError(
                f"{where}: {stem!r} is {title}, which is not read; {len(parts) - 1} other modules are in the file. "
                "Take it out, or merge the adapter with its own tool and load the difference to the base."
            )


def listed_reason(key: str) -> str | None:
    """Why kohya or LyCORIS have a tensor of this name beside the updates, if they have."""
    if key == CONTROL_LORA:
        return "the mark of a Control-LoRA"
    return _LISTED.get(key.rpartition(".")[2])
