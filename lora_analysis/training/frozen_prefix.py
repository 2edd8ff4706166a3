"""The blocks below the first one that trains, computed once for each row of the data.

With adapters on the upper layers only, the lower ones give the same activations for the same text in every epoch.
They are kept by row: what a batch's rows are is told by the arguments that the model is called with, so that shuffled
batches are found again as long as a row comes in the same padded length.

Values
------
``FrozenPrefix``, ``frozen_prefix``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.training.recompute import block_lists

MAX_BYTES = 4 * 2**30
"""Activations kept at most; rows beyond are computed every time."""

_SAME = 1e-4
"""Relative difference of kept and computed activations: float32 of another batch differs by 1e-6, dropout by 1."""


class FrozenPrefix:
    """What is kept of the blocks below the first that trains.

    Attributes
    ----------
    blocks : int
        How many blocks are skipped where all rows of a batch are known; 0 if the first block trains.
    hits, misses : int
        Batches that were found, and that were computed.
    nbytes : int
        Activations kept.
    """

    def __init__(self, blocks: list[nn.Module], first: nn.Module | None, max_bytes: int) -> None:
        self.blocks = len(blocks)
        self.hits = self.misses = self.nbytes = 0
        self._max_bytes = max_bytes
        self._kept: dict[bytes, Tensor] = {}
        self._keys: list[bytes] | None = None
        self._found: Tensor | None = None
        self._checked = False
        self._is_tensor = True
        self._last = blocks[-1] if blocks else None
        self._first = first

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model is called: which rows come, and whether all are known."""
        self._keys = _row_keys([*args, *(kwargs[name] for name in sorted(kwargs))])
        known = self._keys is not None and all(key in self._kept for key in self._keys)
        self._found = torch.stack([self._kept[key] for key in self._keys]) if known and self._keys else None
        if self._found is not None and self._checked:
            self.hits += 1
        else:
            self.misses += 1

    def pass_through(self, block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's forward."""
        if self._found is None or not self._checked:
            output = forward(*args, **kwargs)
            self._require_plain(output)
            return output
        # What blocks below the last give is looked at by nobody.
        hidden = self._found if block is self._last else _hidden(args, kwargs)
        return hidden if self._is_tensor else (hidden,)

    def keep(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block that trains is called: its input is what all this is about."""
        hidden = _hidden(args, kwargs)
        if hidden.requires_grad:
            raise ValueError(
                "cache_frozen: expected nothing that trains below the first adapted block, got a gradient."
            )
        if self._keys is None or len(hidden) != len(self._keys):
            return
        if self._found is not None and not self._checked:
            error = float((hidden - self._found).norm() / hidden.norm())
            if not error <= _SAME:
                raise ValueError(
                    f"cache_frozen: expected the frozen blocks to give the same twice, got a relative difference of "
                    f"{error:.1g}. Is there dropout in them or below? Set it to 0, or leave cache_frozen= out."
                )
            self._checked = True
        for key, row in zip(self._keys, hidden.detach(), strict=True):
            if key not in self._kept and self.nbytes + row.nbytes <= self._max_bytes:
                self._kept[key] = row.clone()
                self.nbytes += row.nbytes

    def _require_plain(self, output: Any) -> None:
        self._is_tensor = isinstance(output, Tensor)
        if not self._is_tensor and not (isinstance(output, tuple) and len(output) == 1):
            raise ValueError(
                f"cache_frozen: expected blocks that give hidden states and nothing else, got {type(output).__name__}. "
                "Call the model without caches and attention outputs, or leave cache_frozen= out."
            )


@contextmanager
def frozen_prefix(model: nn.Module, *, max_bytes: int = MAX_BYTES) -> Iterator[FrozenPrefix]:
    """Keep and reuse the activations below the first block that trains, for as long as this runs.

    The first batch that is met again is computed and compared, so that dropout or other state is noticed. A model
    whose first block trains, or that has no ``ModuleList`` of blocks, is left alone.

    Parameters
    ----------
    model : Module
        Adapted; called as a whole by whatever computes the loss.
    max_bytes : int

    Raises
    ------
    ValueError
        While it runs: if what is kept cannot be right, because something below trains or is random.
    """
    blocks, first = _frozen_blocks(model)
    prefix = FrozenPrefix(blocks, first, max_bytes)
    if first is None or not blocks:
        yield prefix
        return
    handles = [
        model.register_forward_pre_hook(prefix.begin, with_kwargs=True),
        first.register_forward_pre_hook(prefix.keep, with_kwargs=True),
    ]
    for block in blocks:
        block.forward = partial(prefix.pass_through, block, block.forward)
    try:
        yield prefix
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            del block.forward


def _frozen_blocks(model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The blocks below the first one that trains, and that one."""
    for blocks in block_lists(model):
        trains = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        if any(trains):
            first = trains.index(True)
            return list(blocks)[:first], blocks[first]
    return [], None


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError("cache_frozen: expected blocks whose first argument is their hidden states.")
    return hidden


def _row_keys(values: list[Any]) -> list[bytes] | None:
    """A digest of each row of all tensors together, and of everything else; None where there are no rows."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
    counts = {len(tensor) for tensor in tensors}
    if len(counts) != 1:
        return None
    others = repr([(value.shape[1:], value.dtype) if isinstance(value, Tensor) else value for value in values])
    keys = [hashlib.blake2b(others.encode(), digest_size=16) for _ in range(counts.pop())]
    for tensor in tensors:
        rows = tensor.detach().cpu().contiguous().flatten(1) if tensor.dim() > 1 else tensor.detach().cpu()[:, None]
        for key, row in zip(keys, rows.contiguous().view(torch.uint8).numpy(), strict=True):
            key.update(row.tobytes())
    return [key.digest() for key in keys]
