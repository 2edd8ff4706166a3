"""What the optimizer is given: the parameters that train, with their learning rates.

Values
------
``parameter_groups``.

References
----------
LoRA+: Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4 (B learns faster than A, by a ratio of about 16).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lora_analysis.training.kinds import EMBEDDING
from lora_analysis.training.layers import LoraLayer, sites


def parameter_groups(model: nn.Module, *, lr: float, lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters of a model, as any ``torch.optim`` optimizer takes them.

    Parameters
    ----------
    model : Module
    lr : float
        Learning rate of A, and of all that is no factor.
    lr_ratio : float
        The learning rate of B is so many times ``lr`` (LoRA+); 1 for plain LoRA. Both factors of an embedding keep
        ``lr``: there A is the one that begins at zero.

    Returns
    -------
    list of dict
        One group, or two: ``{"params": [...], "lr": lr}`` and B's.

    Raises
    ------
    ValueError
        If nothing trains, or a number is not positive.

    Examples
    --------
    >>> from lora_analysis.training import inject
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> _ = inject(model, ["0"], r=1)
    >>> [(group["lr"], len(group["params"])) for group in parameter_groups(model, lr=1, lr_ratio=16)]
    [(1, 1), (16, 1)]
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a positive number, got {value}.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(model).__name__}: expected trainable parameters, got none. Call inject or attach first."
        )
    if lr_ratio == 1:
        return [{"params": trained, "lr": lr}]
    fast = {
        id(factors.lora_B)
        for site in sites(model).values()
        if not (isinstance(site, LoraLayer) and site.kind is EMBEDDING)
        for factors in site.adapters.named().values()
    }
    groups = [
        {"params": [p for p in trained if id(p) not in fast], "lr": lr},
        {"params": [p for p in trained if id(p) in fast], "lr": lr * lr_ratio},
    ]
    return [group for group in groups if group["params"]]
