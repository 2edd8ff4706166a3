"""The path of a module that PEFT matches the keys of its configuration with."""

from __future__ import annotations

from lora_analysis.adapter import Module
from lora_analysis.formats.peft.names import module_name, stem_of

_NESTED = ".base_layer"


def pattern_path(name: str, module: Module) -> str:
    """A module's path as PEFT knows it: not down to experts or slots, and an attention's for its projections.

    Parameters
    ----------
    name : str
        The module's name in the adapter.
    module : Module
        Of a PEFT adapter.

    Examples
    --------
    >>> from lora_analysis.adapter import Target
    >>> tensors = ("base_model.model.attn.lora_A.weight", "base_model.model.attn.lora_B.weight")
    >>> target = Target("attn.in_proj_weight")
    >>> pattern_path("attn.in_proj_weight", Module((9, 3), 2, 1.0, "config", target, tensors, dict))
    'attn'
    """
    target = module.target
    stem = stem_of(module.tensors[0]) if module.tensors else None
    if target.expert is not None or stem is None:
        return name if target.expert is None else target.tensor
    layer = module_name(stem)
    if layer.endswith(f"{_NESTED}.out_proj"):
        return layer.removesuffix(f"{_NESTED}.out_proj")
    of_layer = name == layer or target.rows is not None or name == f"{layer}.in_proj_weight"
    return layer if of_layer else target.tensor
