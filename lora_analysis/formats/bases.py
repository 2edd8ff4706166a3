"""Whether a base has the tensors that a reader thinks of, under the names it thinks of."""

from __future__ import annotations

from collections.abc import Iterable

from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError


def has_all(base: BaseWeights, tensors: Iterable[str]) -> bool:
    """Whether a base has every one of some tensors, with one change of prefix, in a stack or under GGUF's names.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.base import load_base
    >>> base = load_base({"model.layers.0.q.weight": torch.ones(2, 3)})
    >>> has_all(base, ["model.layers.0.q.weight"]), has_all(base, ["layers.0.q.weight", "layers.1.q.weight"])
    (True, False)
    """
    try:
        base.find_all(tensors)
    except BaseWeightsError:
        return False
    return True
