"""The blocks below the first one that trains, computed once for each row of the data.

With adapters on the upper layers only, the lower ones give the same activations for the same text in every epoch.
They are kept by row: what a batch's rows are is told by the arguments that the model is called with, so that shuffled
batches are found again as long as a row comes in the same padded length. Calls that cannot be told apart by rows of
tensors and plain values, or that fill a cache of keys and values, are computed in full.

Values
------
``FrozenPrefix``, ``frozen_prefix``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.training.recompute import block_lists, replaced_forwards

MAX_BYTES = 4 * 2**30
"""Activations kept at most; rows beyond are computed every time."""

_SAME = 1e-4
"""Relative difference of kept and computed activations: float32 of another batch differs by 1e-6, dropout by 1."""

_SAME_16 = 0.03
"""The same where products are of 16 bits."""


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

    def __init__(self, blocks: list[nn.Module], max_bytes: int) -> None:
        self.blocks = len(blocks)
        self.hits = self.misses = self.nbytes = 0
        self._max_bytes = max_bytes
        self._kept: dict[bytes, Tensor] = {}
        self._batches: set[bytes] = set()
        """Batches whose rows came together."""
        self._checked: set[tuple[str, bool]] = set()
        """States of the model in which known batches were compared, and whether their rows were in new company."""
        self._frozen = blocks
        self._is_tensor = True
        self._reset()

    def _reset(self) -> None:
        self._running = self._past = False
        self._keys: list[bytes] | None = None
        self._found: Tensor | None = None
        self._output: Tensor | None = None
        self._batch, self._state, self._trusted = b"", "", False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model is called: which rows come, and whether all are known."""
        self._reset()
        self._running = True
        self._state = self._state_of(model)
        self._keys = _row_keys([*enumerate(args), *sorted(kwargs.items())], self._state)
        if not self._keys:
            return
        self._batch = hashlib.blake2b(b"".join(self._keys), digest_size=16).digest()
        if all(key in self._kept for key in self._keys):
            self._found = torch.stack([self._kept[key] for key in self._keys])
            # Rows that change with their company (batch not first, statistics of the batch) differ in a new one only.
            together = self._batch in self._batches and (self._state, False) in self._checked
            self._trusted = together or (self._state, True) in self._checked

    def end(self, *_: Any) -> None:
        """After the model was called: blocks called apart from it, or again by the backward pass, are computed."""
        self._reset()

    def pass_through(self, block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's forward."""
        if not self._running:
            return forward(*args, **kwargs)
        if self._past:
            raise ValueError(
                "cache_frozen: expected the model to run its blocks once when it is called, got a frozen one after the "
                "first adapted one. Call the model once for each input, or leave cache_frozen= out."
            )
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            self._keys = self._found = None  # a skipped block would leave its part of the cache empty
        if self._found is None or not self._trusted:
            output = forward(*args, **kwargs)
            self._require_plain(output)
            self._output = output if self._is_tensor else output[0]
            return output
        # Whoever looks at what blocks below the last give is not to take it for the real thing.
        hidden = self._found if block is self._frozen[-1] else self._found.new_full((), math.nan).expand_as(self._found)
        return hidden if self._is_tensor else (hidden,)

    def keep(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block that trains is called: its input is what all this is about."""
        if not self._running or self._past:
            return
        self._past = True
        hidden = _hidden(args, kwargs)
        if hidden.requires_grad:
            raise ValueError(
                "cache_frozen: expected nothing that trains below the first adapted block, got a gradient."
            )
        if self._found is not None and self._trusted:
            self.hits += 1
            return
        self.misses += 1
        if self._output is not hidden and (self._output is None or not torch.equal(self._output, hidden)):
            raise ValueError(
                "cache_frozen: expected blocks whose output is the next one's input as it is, got something in "
                "between, such as a residual or a norm. Leave cache_frozen= out."
            )
        if self._keys is None or len(hidden) != len(self._keys):
            return
        if self._found is not None:
            self._compare(hidden, self._found)
        self._batches.add(self._batch)
        for key, row in zip(self._keys, hidden.detach(), strict=True):
            if key not in self._kept and self.nbytes + row.nbytes <= self._max_bytes:
                self._kept[key] = row.clone()
                self.nbytes += row.nbytes

    def _compare(self, hidden: Tensor, found: Tensor) -> None:
        """Trust batches such as this one from now on, if what is kept of it is what was computed."""
        low = hidden.dtype.itemsize < 4 or torch.is_autocast_enabled(hidden.device.type)
        difference, norm = float((hidden - found).norm()), float(hidden.norm())
        if not difference <= (_SAME_16 if low else _SAME) * norm:
            raise ValueError(
                f"cache_frozen: expected the frozen blocks to give the same twice, got a relative difference of "
                f"{difference / norm if norm else math.inf:.1g}. Is there dropout in them or below, or do the rows of "
                "a batch depend on each other? Set it to 0, or leave cache_frozen= out."
            )
        self._checked.add((self._state, self._batch not in self._batches))

    def _state_of(self, model: nn.Module) -> str:
        """What else than its arguments the activations depend on."""
        device = next(model.parameters()).device.type
        lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return f"{[block.training for block in self._frozen]} {model.training} {lowered}"

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

    The first batch that is met again is computed and compared, so that dropout or other state is noticed; so is the
    first of known rows that came apart before. What skipped blocks below the last give is NaN, should a loss look at
    it. A model whose first block trains, or that has no ``ModuleList`` of blocks, is left alone.

    Parameters
    ----------
    model : Module
        Adapted; called as a whole by whatever computes the loss. Parts of it that are called by themselves compute.
    max_bytes : int

    Raises
    ------
    ValueError
        While it runs: if what is kept cannot be right, because something below trains or is random, the model does
        something between its blocks, or runs them twice in one call.
    """
    blocks, first = _frozen_blocks(model)
    prefix = FrozenPrefix(blocks, max_bytes)
    if first is None or not blocks:
        yield prefix
        return
    handles = [
        model.register_forward_pre_hook(prefix.begin, with_kwargs=True),
        model.register_forward_hook(prefix.end, always_call=True),
        first.register_forward_pre_hook(prefix.keep, with_kwargs=True),
    ]
    try:
        with replaced_forwards(blocks, lambda block, forward: partial(prefix.pass_through, block, forward)):
            yield prefix
    finally:
        for handle in handles:
            handle.remove()


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


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _row_keys(named: list[tuple[Any, Any]], state: str) -> list[bytes] | None:
    """A digest of each row of all tensors together, and of everything else; None where that is not to be told."""
    tensors = [value for _, value in named if isinstance(value, Tensor) and value.dim() > 0]
    counts = {len(tensor) for tensor in tensors}
    others: list[Any] = [state]
    for name, value in named:
        if isinstance(value, Tensor):
            others.append(
                (name, value.shape[1:], value.dtype) if value.dim() > 0 else (name, value.dtype, value.item())
            )
        elif isinstance(value, _PLAIN):
            others.append((name, value))
        else:
            return None
    if len(counts) != 1:
        return None
    keys = [hashlib.blake2b(repr(others).encode(), digest_size=16) for _ in range(counts.pop())]
    for tensor in tensors:
        rows = tensor.detach().cpu().contiguous().flatten(1) if tensor.dim() > 1 else tensor.detach().cpu()[:, None]
        for key, row in zip(keys, rows.contiguous().view(torch.uint8).numpy(), strict=True):
            key.update(row.tobytes())
    return [key.digest() for key in keys]
