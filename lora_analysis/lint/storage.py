"""Findings about the file as a file: numbers stored twice, wider than they are, or too small for their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_analysis.adapter import Adapter, Target, Unused
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import BaseWeightsError
from lora_analysis.formats.peft.names import module_name
from lora_analysis.lint.finding import Finding
from lora_analysis.lint.numbers import is_finite
from lora_analysis.update import DenseUpdate, LowRankUpdate, rounding_error

_BESIDE = ("modules_to_save", "original_module", "base_layer", "default")
"""What PEFT puts into the names of full tensors."""

_NARROWER = {torch.float64: (torch.float32,), torch.float32: (torch.bfloat16, torch.float16)}

_FEWEST_VALUES = 16
"""Different numbers below which a tensor is a constant or an example, and says nothing of its dtype or origin."""

_NAMED = 3
"""Tensors that one finding names."""

_SAMPLED = 256
"""Numbers of a tensor that are looked at before all of them are."""


class _Stored(NamedTuple):
    """A tensor as it is stored: what holds it, and what it is called there."""

    module: str
    label: str
    tensor: Tensor


def storage_findings(adapter: Adapter, base: BaseWeights | None) -> Iterator[Finding]:
    """What is so of the tensors of the file, each read once; of an adapter in memory, of its factors."""
    if adapter.checkpoint is None:
        wide = _Wide()
        for stored in _in_memory(adapter):
            yield from _denormals(stored)
            wide.note(stored)
        yield from wide.findings()
        return
    unused = {item.tensor: item for item in adapter.unused}
    yield from _said_to_be_the_bases(adapter.unused)
    copies: dict[tuple[object, ...], list[str]] = {}
    owners = _owners(adapter)
    wide = _Wide()
    for key in adapter.checkpoint:
        if not adapter.checkpoint.dtype(key).is_floating_point or math.prod(adapter.checkpoint.shape(key)) < 2:
            continue
        tensor = adapter.checkpoint[key]
        module, label = owners.get(key, ("", repr(key)))
        stored = _Stored(module, label, tensor)
        yield from _denormals(stored)
        wide.note(stored)
        sample = _sample(tensor)
        varied = _is_varied(sample)
        if varied:
            copies.setdefault((tensor.dtype, tuple(tensor.shape), *sample.tolist()), []).append(key)
        if key in unused and not is_finite(tensor):
            yield Finding("nonfinite", "error", "", f"{key!r} holds NaN or infinities. Take an earlier checkpoint.")
        elif key in unused and base is not None and varied and "base's own" not in unused[key].reason:
            yield from _of_the_base(key, tensor, base)
    yield from wide.findings()
    for keys in copies.values():
        yield from _copies(keys, adapter.checkpoint, owners)


def _said_to_be_the_bases(unused: Sequence[Unused]) -> Iterator[Finding]:
    """Tensors that are the base's by their names, one finding for each reason."""
    by_reason: dict[str, list[Unused]] = {}
    for item in unused:
        if "the base's own tensor" in item.reason:
            by_reason.setdefault(item.reason, []).append(item)
    for reason, items in by_reason.items():
        size = _size(sum(item.nbytes for item in items))
        message = f"{_enumerated([repr(item.tensor) for item in items])} ({size}): {reason}. Leave that out."
        yield Finding("base-copy", "warning", "", message)


def _in_memory(adapter: Adapter) -> Iterator[_Stored]:
    for name, update in adapter.items():
        if isinstance(update, LowRankUpdate):
            yield _Stored(name, "B", update.up.detach())
            yield _Stored(name, "A", update.down.detach())
        elif isinstance(update, DenseUpdate):
            yield _Stored(name, "the matrix", update.matrix.detach())


def _owners(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """For each tensor of updates the first module that it is of, and what is left of its name there."""
    found: dict[str, tuple[str, str]] = {}
    for name, module in adapter.modules.items():
        parts = [tensor.split(".") for tensor in module.tensors]
        shared = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), -1)
        for tensor, components in zip(module.tensors, parts, strict=True):
            found.setdefault(tensor, (name, ".".join(components[shared:])))
    return found


class _Wide:
    """Tensors that are stored wider than they are, gathered so that one finding names those of a module."""

    def __init__(self) -> None:
        self._labels: dict[tuple[str, torch.dtype, torch.dtype], list[str]] = {}

    def note(self, stored: _Stored) -> None:
        """Remember a tensor if it is one of them."""
        if narrower := _narrower(stored.tensor):
            self._labels.setdefault((stored.module, stored.tensor.dtype, narrower), []).append(stored.label)

    def findings(self) -> Iterator[Finding]:
        """One for each module and dtype."""
        for (module, dtype, narrower), labels in self._labels.items():
            yield Finding(
                "size-waste",
                "info",
                module,
                f"{_enumerated(labels)} {'are' if len(labels) > 1 else 'is'} stored as {_named(dtype)}, and every "
                f"number is a {_named(narrower)}: half of the bytes hold nothing. Store as {_named(narrower)}.",
            )


def _denormals(stored: _Stored) -> Iterator[Finding]:
    dtype = _named(stored.tensor.dtype)
    if _has_denormals(stored.tensor):
        yield Finding(
            "denormals",
            "warning",
            stored.module,
            f"numbers of {stored.label} are denormal in {dtype} and have lost digits. Store it as "
            f"{'float32 or bfloat16' if stored.tensor.dtype.itemsize <= 2 else 'it was before it shrank'}, or scale it "
            "up and the other factor down.",
        )


def _has_denormals(tensor: Tensor) -> bool:
    """Whether a tensor holds denormals that matter.

    In dtypes with float32's exponents any does: trained numbers are nowhere near. float16 is denormal below 6e-5, where
    small ones among many are harmless: it matters where the digits that they lost outweigh the rounding of the others.
    """
    info = torch.finfo(tensor.dtype)
    size = tensor.float().abs() if tensor.dtype.itemsize < 4 else tensor.abs()
    denormal = (size > 0) & (size < info.tiny)
    count = int(denormal.count_nonzero())
    if not count or info.tiny < 1e-30:
        return count > 0
    lost = info.tiny * info.eps * math.sqrt(count / 12)
    return lost > rounding_error(tensor.dtype) * float(size.norm())


def _narrower(tensor: Tensor) -> torch.dtype | None:
    """A dtype of half the bytes that holds every number of a tensor, if there is one."""
    sample = _sample(tensor)
    if not _is_varied(sample):
        return None
    for dtype in _NARROWER.get(tensor.dtype, ()):
        if all(bool((part.to(dtype).to(tensor.dtype) == part).all()) for part in (sample, tensor)):
            return dtype
    return None


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    flat = flat[:: max(1, flat.numel() // _SAMPLED)]
    return flat.float() if flat.dtype.itemsize < 4 else flat


def _is_varied(sample: Tensor) -> bool:
    return len(set(sample.tolist())) >= _FEWEST_VALUES


def _of_the_base(key: str, tensor: Tensor, base: BaseWeights) -> Iterator[Finding]:
    """Whether a full tensor is the base's own, to the coarser of both dtypes."""
    name = ".".join(part for part in module_name(key).split(".") if part not in _BESIDE)
    if tensor.ndim < 2:
        return
    try:
        weight = base.matrix(Target(base.find(name)))
    except BaseWeightsError:
        return
    own = tensor.detach().flatten(1).to(weight.device)
    coarser = max(own.dtype, weight.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    for turned in (weight, weight.mT):
        if turned.shape == own.shape and torch.equal(own.to(coarser), turned.to(coarser)):
            size = _size(tensor.numel() * tensor.element_size())
            yield Finding("base-copy", "warning", "", f"{key!r} ({size}) equals the base's {name!r}. Leave it out.")
            return


def _copies(keys: list[str], checkpoint: Checkpoint, owners: dict[str, tuple[str, str]]) -> Iterator[Finding]:
    """Tensors of like samples that are equal altogether."""
    while len(keys) > 1:
        first, *others = keys
        tensor = checkpoint[first]
        equal = [key for key in others if torch.equal(checkpoint[key], tensor)]
        keys = [key for key in others if key not in equal]
        if not equal:
            continue
        more = f" and {len(equal) - 1} more" if len(equal) > 1 else ""
        size = _size(tensor.numel() * tensor.element_size() * len(equal))
        if first in owners and all(key in owners for key in equal):
            module, label = owners[first]
            yield Finding(
                "duplicate-tensor",
                "info",
                module,
                f"{label} is also that of {owners[equal[0]][0]!r}{more} ({size} more): the overlap of their subspaces "
                "was put there and not learned. If their weight was fused in training, adapt it fused.",
            )
        else:
            yield Finding(
                "duplicate-tensor",
                "warning",
                "",
                f"{first!r} and {equal[0]!r}{more} hold the same numbers, {size} of them needlessly. Leave one out.",
            )


def _enumerated(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    rest = len(names) - _NAMED
    return f"{', '.join(names[:_NAMED])} and {rest} more" if rest > 0 else " and ".join(names)


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
