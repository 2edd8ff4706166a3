"""Gradient checkpointing: activations of blocks are computed again in the backward pass instead of being kept.

Values
------
``recomputed``, ``block_lists``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_analysis.training.kinds import loaded


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost ``ModuleList`` of every part of a model, its stacks of layers; those of one layer are left out."""
    found: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and id(module) not in inside:
            found.append(module)
            inside |= {id(inner) for inner in module.modules()}
    return found


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Compute the activations of a model's blocks twice and keep none, for as long as this runs.

    A transformers model does it itself (``gradient_checkpointing_enable``). In any other the elements of its outermost
    ``ModuleList``s are put through ``torch.utils.checkpoint``.

    Raises
    ------
    ValueError
        If the model has no such blocks.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is not None and isinstance(model, pretrained):
        # transformers 5 has renamed it.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        try:
            yield
        finally:
            getattr(model, f"{kind}_checkpointing_disable")()
        return
    blocks = [block for blocks in block_lists(model) for block in blocks]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__}: expected a torch.nn.ModuleList of blocks to recompute, got none. "
            "Use torch.utils.checkpoint in the model's own forward."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
