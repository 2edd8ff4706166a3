"""The keys of a LoRA's ``adapter_config.json``: which ones say something about ΔW, and which of those are not read.

Every field of PEFT's ``LoraConfig`` is in one of three lists. A key in none of them may have been written by a later
version with other mathematics: it is refused where it is set, and named in a note where it is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_analysis.errors import UnsupportedAdapterError

READ = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_dora",
    "use_rslora",
)
"""What the reader asks."""

WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "trainable_token_indices",
)
"""What changes training, or tensors that are listed, but no ΔW: how factors began ``init_lora_weights`` says."""

REFUSED = {
    "arrow_config": "Arrow routing, which mixes several adapters",
    "kasa_config": "KaSA, which truncates the base and puts singular values between the factors",
    "layer_replication": "layer replication, where several layers grow out of one of the base",
    "monteclora_config": "MonteCLoRA, whose factors are sampled",
    "use_bdlora": "block-diagonal LoRA, whose factors are stored as blocks",
    "use_qalora": "QALoRA, which pools the inputs of A",
    "velora_config": "VeLoRA",
}
"""What changes the update or its place, and is not read."""

EARLIER_REFUSED = {
    "enable_lora": "MergedLinear, as PEFT had it before 0.3",
    "use_mora": "MoRA, whose factor is a square matrix",
}
EARLIER_WITHOUT_EFFECT = (
    # PEFT before 0.3, and 0.20's developments.
    "merge_weights",
    # ms-swift's.
    "lora_dtype",
    "lorap_emb_lr",
    "lorap_lr_ratio",
)
"""Keys of earlier versions and of other trainers that build on PEFT."""

_MOST_NAMED = 10


def require_known(config: Mapping[str, Any], where: str) -> list[str]:
    """Refuse options that change the update and are not read; a note of the unknown ones that are not set.

    Raises
    ------
    UnsupportedAdapterError
        If such an option is set, or one that is not known here.
    """
    for option, title in (REFUSED | EARLIER_REFUSED).items():
        if config.get(option):
            raise UnsupportedAdapterError(f"{where}: {option} is set: {title}, which is not read yet.")
    return refuse_unknown(config, {*READ, *WITHOUT_EFFECT, *REFUSED, *EARLIER_REFUSED, *EARLIER_WITHOUT_EFFECT}, where)


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> list[str]:
    """Refuse options that are set and not known here; a note of those that are not set, a few of them by name.

    Raises
    ------
    UnsupportedAdapterError
        If such an option is set: a later version of PEFT may have other mathematics under it.
    """
    unknown = sorted(option for option in config if option not in known)
    if option := next((option for option in unknown if config[option]), None):
        raise UnsupportedAdapterError(
            f"{where}: {option if option.isidentifier() else repr(option)} is set, an option that may change the "
            "update and is not known here. Take it out of adapter_config.json if it does not."
        )
    if not unknown:
        return []
    more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
    named = ", ".join(map(repr, unknown[:_MOST_NAMED]))
    return [f"configuration keys not known here, none of them set: {named}{more}."]
