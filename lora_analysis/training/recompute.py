"""Gradient checkpointing: activations of blocks are computed again in the backward pass instead of being kept.

Values
------
``recomputed``, ``block_lists``, ``replaced_forwards``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):  # left as it is
            yield
            return
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
    with replaced_forwards(blocks, lambda block, forward: partial(checkpoint, forward, use_reentrant=False)):
        yield


@contextmanager
def replaced_forwards(
    blocks: Iterable[nn.Module], wrapped: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each block's forward replaced by ``wrapped(block, forward)``; what was there is there again at the end."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for block in dict.fromkeys(blocks):  # one block may stand in a list twice
            before.append((block, vars(block).get("forward")))
            block.forward = wrapped(block, block.forward)
        yield
    finally:
        for block, own in before:
            if own is None:
                del block.forward
            else:  # accelerate sets one on the module itself, and so do others
                block.forward = own
