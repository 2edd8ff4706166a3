"""The one reader of kohya's and LyCORIS' files, whose modules each have their own algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.kohya.algorithms import Product, described, read_update
from lora_analysis.formats.kohya.scaling import header_notes, require_folded_scalar, scale_of
from lora_analysis.formats.kohya.split_qkv import Block, blocks_of, read_block
from lora_analysis.formats.kohya.stems import listed_reason, parts_by_stem, refuse_other_mathematics
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import true_update
from lora_analysis.formats.underscored import Resolved, resolved
from lora_analysis.update import LowRankUpdate, Update


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a kohya or LyCORIS file."""
    where = options.where
    parts = parts_by_stem(checkpoint)
    refuse_other_mathematics(parts, where)
    products: dict[str, Product] = {}
    vectors: set[str] = set()
    for stem, names in parts.items():
        if set(names) & {"diff"} and len(checkpoint.shape(f"{stem}.diff")) < 2:
            vectors.add(f"{stem}.diff")
            names.remove("diff")
            if set(names) <= {"alpha", "scalar"}:
                continue
        require_folded_scalar(checkpoint, stem, where)
        products[stem] = described(checkpoint, stem, names, where)
    found = {}
    if options.base is not None and products:
        found = resolved({stem: product.shape for stem, product in products.items()}, options.base, where)
    modules: dict[str, Module] = {}
    by_name: dict[str, Product] = {}
    split = 0
    for stem, product in products.items():
        tensors = tuple(dict.fromkeys(f"{stem}.{name}" for name in (*product.parts, *parts[stem])))
        module = _whole(checkpoint, stem, product, tensors, found.get(stem), options)
        name = found[stem].module if stem in found else stem
        # Magnitudes belong to rows of the whole weight.
        blocks = () if module.magnitude is not None else blocks_of(checkpoint, stem, product)
        split += bool(blocks)
        for block in blocks:
            _add(modules, f"{name}.{block.name}", _block(module, block), where)
            by_name[f"{name}.{block.name}"] = product
        if not blocks:
            _add(modules, name, module, where)
            by_name[name] = product
    used = {tensor for module in modules.values() for tensor in module.tensors}
    _require_known(checkpoint, used | vectors, parts, where)
    unused = unused_tensors(
        checkpoint,
        used,
        parts,
        partial(_reason, vectors=vectors),
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    notes = [
        *_unresolved_notes(products, found, options),
        *header_notes(checkpoint.metadata, modules, by_name),
        *_split_notes(modules, split),
        *_dora_notes(modules),
        *_alpha_notes(products, options),
    ]
    return Contents(modules, unused, tuple(notes))


def _whole(
    checkpoint: Checkpoint,
    stem: str,
    product: Product,
    tensors: tuple[str, ...],
    found: Resolved | None,
    options: ReadOptions,
) -> Module:
    """One module as its file has it, before a fused weight comes apart."""
    scale, source = scale_of(checkpoint, stem, product, options)
    kernel = product.kernel
    if found is not None and options.base is not None and not kernel:
        # Factors that are unfolded already do not tell the kernel, the base does.
        kernel = options.base.shape(found.tensor)[2:]
    target = Target(found.tensor if found else f"{stem}.weight", kernel=kernel)
    read: Callable[[], Update] = partial(read_update, checkpoint, stem, product, scale, options.device)
    key = f"{stem}.dora_scale"
    if key not in tensors:
        return Module(product.shape, product.r, scale, source, target, tensors, read)
    axis, taps = _norms(checkpoint.shape(key), product, options.where, stem)
    magnitude: Callable[[], Tensor] = partial(_read_magnitude, checkpoint, key, options.device)
    known = found is not None
    if options.base is not None and known:
        read = partial(_read_true, read, options.base, target, product.shape, magnitude, axis, taps)
    return Module(
        product.shape,
        product.r,
        scale,
        source,
        target,
        tensors,
        read,
        flags=() if known else ("dora-low-rank-part",),
        magnitude=magnitude,
        magnitude_axis=axis,
    )


def _norms(shape: tuple[int, ...], product: Product, where: str, stem: str) -> tuple[int, int]:
    """Which axis a magnitude's norms run over, and how many columns share one: the taps of a kernel.

    (out, 1, …), or (out,) as PEFT has it, is one per output row; (1, in, 1, …) one per input channel.
    """
    d_out, d_in = product.shape
    ones = math.prod(shape[2:]) == 1
    if shape == (d_out,) or (len(shape) > 1 and shape[:2] == (d_out, 1) and ones):
        return 1, 1
    if len(shape) > 1 and shape[0] == 1 and ones and shape[1] > 0 and d_in % shape[1] == 0:
        taps = d_in // shape[1]
        unfolded = not product.kernel and len(shape) > 2
        if taps == math.prod(product.kernel) or unfolded:
            return 0, taps
    raise AdapterFormatError(
        f"{where}: {stem!r}: expected dora_scale (out, 1, …) or (1, in, 1, …) for an update of {d_out}x{d_in}, "
        f"got {shape}."
    )


def _read_magnitude(checkpoint: Checkpoint, key: str, device: torch.device) -> Tensor:
    magnitude = checkpoint[key].to(device)
    return (magnitude.float() if magnitude.dtype.itemsize == 1 else magnitude).flatten()


def _read_true(
    read: Callable[[], Update],
    base: BaseWeights,
    target: Target,
    shape: tuple[int, int],
    magnitude: Callable[[], Tensor],
    axis: int,
    taps: int,
) -> Update:
    update, length = read(), magnitude()
    return true_update(update, base.matrix(target, shape).to(length.device), length, axis=axis, kernel=(taps,))


def _block(module: Module, block: Block) -> Module:
    """One block of a fused weight's module."""
    height = block.rows[1] - block.rows[0]
    return Module(
        (height, module.shape[1]),
        block.ranks[1] - block.ranks[0],
        module.scale,
        module.scale_source,
        Target(module.target.tensor, rows=block.rows),
        module.tensors,
        partial(_read_block, module.read, block),
    )


def _read_block(read: Callable[[], Update], block: Block) -> LowRankUpdate:
    whole = read()
    assert isinstance(whole, LowRankUpdate)  # blocks are found in products of two factors alone
    return read_block(whole, block)


def _add(modules: dict[str, Module], name: str, module: Module, where: str) -> None:
    if name in modules:
        raise AdapterFormatError(f"{where}: expected one module called {name!r}, got two.")
    modules[name] = module


def _require_known(checkpoint: Checkpoint, known: set[str], parts: Mapping[str, list[str]], where: str) -> None:
    """Refuse a tensor of an adapted module that may belong to its update and is none known."""
    for key in checkpoint:
        stem, _, last = key.rpartition(".")
        full = last in ("weight", "bias")  # as Control-LoRA keeps beside its factors
        if key not in known and stem in parts and not full and listed_reason(key) is None:
            raise AdapterFormatError(
                f"{where}: {key!r}: expected a tensor of LyCORIS or kohya, got one whose name is none known here. "
                "Remove it from the file if it is no part of the update."
            )


def _reason(key: str, vectors: set[str]) -> str | None:
    return "the difference of a vector (a gain), no matrix" if key in vectors else listed_reason(key)


def _unresolved_notes(
    products: Mapping[str, Product], found: Mapping[str, Resolved], options: ReadOptions
) -> list[str]:
    missing = [stem for stem in products if stem not in found]
    if options.base is None or not missing:
        return []
    return [
        f"{len(missing)} of {len(products)} modules are not in the base (first: {missing[0]!r}): they keep the file's "
        "names."
    ]


def _split_notes(modules: Mapping[str, Module], split: int) -> list[str]:
    if not split:
        return []
    first = next(module for module in modules.values() if module.target.rows is not None)
    count = sum(module.target == Target(first.target.tensor, rows=module.target.rows) for module in modules.values())
    return [
        f"{split} fused weights were trained in blocks (split_qkv), each of its own r, and saved as one with alpha "
        f"unchanged: the scale is alpha / (blocks·r), {first.scale:g} for the first, as every consumer computes it; "
        f"in training it was alpha / r, {count * first.scale:g}."
    ]


def _dora_notes(modules: Mapping[str, Module]) -> list[str]:
    count = sum("dora-low-rank-part" in module.flags for module in modules.values())
    if not count:
        return []
    return [
        f"{count} modules are DoRA: a magnitude rescales the merged weight, and the update here is the product of the "
        "factors alone. Pass base= for the whole."
    ]


def _alpha_notes(products: Mapping[str, Product], options: ReadOptions) -> list[str]:
    fixed = [stem for stem, product in products.items() if not product.scaled]
    if options.alpha is None or not fixed:
        return []
    return [f"alpha= does not bear on {len(fixed)} modules of whole matrices (first: {fixed[0]!r}): their scale is 1."]
