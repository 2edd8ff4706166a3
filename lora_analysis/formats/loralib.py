"""loralib (microsoft/LoRA): ``lora.lora_state_dict`` of Linear, MergedLinear, Embedding and Conv2d layers.

Conventions
-----------
``<module>.lora_A`` (r, d_in) and ``<module>.lora_B`` (d_out, r), no ``.weight``; ΔW = B·A·lora_alpha / r.
A ``MergedLinear`` over n equal slots, g of them enabled, holds A (g·r, d_in) and B (g·d_out/n, r): block k
is B's k-th block of rows times A's k-th block, in the k-th *enabled* slot. It comes apart into one module
per block, ``<module>.q``, ``<module>.v``.

lora_alpha is never in the file: without ``alpha=`` the scale is unknown. Which slots are enabled is not
there either, but for old files with ``lora_ind``: ``split=`` says. An ``Embedding``, A (r, vocab) and B (dim, r),
is a Linear in all but name: the map (dim, vocab), whose weight is stored transposed, as a base of that shape shows.

A ``Conv2d`` holds A (r·k, in·k) and B (out/groups·k, r·k), and its ΔW is B·A *viewed* as (out, in/groups, k, k):
in the unfolding (out, in/groups·k·k) that is no product of two factors of r columns, and a full matrix here. In its
file it looks like a Linear; only ``base=`` with a kernel tells, so give one where there may be convolutions. loralib's
``Conv1d`` and ``Conv3d`` have too many or too few numbers for any k but 1 and fail when run (microsoft/LoRA#115).

Facts from ``loralib/layers.py`` and ``loralib/utils.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target, Unused
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, AmbiguousAdapterError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import ReadOptions, Slots, parse_split
from lora_analysis.update import DenseUpdate, LowRankUpdate

NAME = "loralib"
TAKES = ("split",)

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\Z", re.DOTALL)


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether some tensors end in a bare ``lora_A`` or ``lora_B``."""
    return any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a loralib state dict."""
    where = options.where
    prefix = "module." if all(name.startswith("module.") for name in checkpoint) else ""
    keys = sorted(name for name in checkpoint if _FACTOR.match(name))
    modules: dict[str, Module] = {}
    used: set[str] = set()
    stems = dict.fromkeys(key.rsplit(".", 1)[0] for key in keys)
    for stem in stems:
        key_a, key_b = f"{stem}.lora_A", f"{stem}.lora_B"
        for key in (key_a, key_b):
            if key not in checkpoint:
                raise AdapterFormatError(f"{where}: {stem!r}: expected lora_A and lora_B, {key!r} is missing.")
        modules |= _blocks(checkpoint, stem, stem.removeprefix(prefix), options)
        used |= {key_a, key_b} | ({f"{stem}.lora_ind"} & set(checkpoint))
    if modules and options.split is not None and all(module.target.rows is None for module in modules.values()):
        raise AdapterFormatError(
            f"{where}: split= names slots, but no module of the file is a MergedLinear. Leave split= out."
        )
    full = "a full tensor trained beside LoRA, no part of any update"
    unused = unused_tensors(checkpoint, used, stems, _reason, otherwise=full, where=where)
    _require_known(unused, stems, where)
    notes = (
        ()
        if options.alpha is not None
        else (
            "loralib files do not hold lora_alpha: the scale is unknown. Pass alpha= (the training script's "
            "--lora_alpha; loralib's own default is 1).",
        )
    )
    return Contents(modules, unused, notes)


def _require_known(unused: Iterable[Unused], stems: Container[str], where: str) -> None:
    """Refuse what layers of loralib do not have, and others with factors of its names do: the magnitudes of a DoRA."""
    for item in unused:
        stem, _, last = item.tensor.rpartition(".")
        if stem in stems and last not in ("weight", "bias"):
            raise AdapterFormatError(
                f"{where}: {item.tensor!r}: expected lora_A, lora_B, weight and bias of an adapted layer, and this is "
                "none known here. Remove it from the file if it is no part of the update."
            )


def _blocks(checkpoint: Checkpoint, stem: str, module: str, options: ReadOptions) -> dict[str, Module]:
    """The update of a Linear, an Embedding or a convolution, or of each enabled slot of a MergedLinear."""
    where = options.where
    shape_a, shape_b = checkpoint.shape(f"{stem}.lora_A"), checkpoint.shape(f"{stem}.lora_B")
    tensor, in_base = (f"{module}.weight", None) if options.base is None else _base_tensor(options.base, module)
    if in_base is not None and len(in_base) > 2:
        return {module: _convolution(checkpoint, stem, module, Target(tensor, kernel=in_base[2:]), in_base, options)}
    _require_orientation(checkpoint, stem, module, options)
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in (shape_a[0], shape_b[1]) or shape_a[0] % shape_b[1]:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected lora_A (r, d_in) and lora_B (d_out, r), or a MergedLinear's "
            f"(g·r, d_in) and (g·d_out/n, r), got {shape_a} and {shape_b}. The file was read as 'loralib'; "
            "read other layouts with pattern=."
        )
    r = shape_b[1]
    groups = shape_a[0] // r
    scale, source = _scale(options.alpha, r)
    slots = _slots(checkpoint, stem, module, groups, options)
    keys = (f"{stem}.lora_A", f"{stem}.lora_B")
    if slots is None:
        whole = partial(_read_block, checkpoint, keys, (0, r), (0, shape_b[0]), scale, options.device)
        turned = in_base is not None and in_base[0] != in_base[1] and in_base == (shape_a[1], shape_b[0])
        target = Target(tensor, transposed=turned)
        return {module: Module((shape_b[0], shape_a[1]), r, scale, source, target, keys, whole)}
    if shape_b[0] % groups:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected the {shape_b[0]} rows of lora_B in {groups} equal blocks."
        )
    height = shape_b[0] // groups
    return {
        f"{module}.{name}": Module(
            shape=(height, shape_a[1]),
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(tensor, rows=(slot * height, (slot + 1) * height)),
            tensors=keys,
            read=partial(
                _read_block,
                checkpoint,
                keys,
                (block * r, (block + 1) * r),
                (block * height, (block + 1) * height),
                scale,
                options.device,
            ),
        )
        for block, (name, slot) in enumerate(zip(slots.names, slots.indices, strict=True))
    }


def _base_tensor(base: BaseWeights, module: str) -> tuple[str, tuple[int, ...]]:
    """The base's tensor of a module and its shape; loralib's own convolutions hold theirs one level down."""
    plain, inner = f"{module}.weight", f"{module}.conv.weight"
    if inner in base and plain not in base:  # asked for by its own name first: a base may end in any "conv.weight"
        return inner, base.shape(inner)
    return plain, base.shape(plain)


def _convolution(
    checkpoint: Checkpoint, stem: str, module: str, target: Target, weight: tuple[int, ...], options: ReadOptions
) -> Module:
    """The update of a loralib Conv2d, whose B·A is viewed as the kernel."""
    keys = (f"{stem}.lora_A", f"{stem}.lora_B")
    shape_a, shape_b = (checkpoint.shape(key) for key in keys)
    k = weight[2]
    fits = len(shape_a) == len(shape_b) == 2 and 0 not in (*shape_a, *shape_b, k) and shape_a[0] == shape_b[1]
    if not fits or any(length % k for length in shape_a + shape_b):
        raise AdapterFormatError(
            f"{options.where}: {module!r}: expected lora_A (r·k, in·k) and lora_B (out/groups·k, r·k) on a kernel of "
            f"{weight}, got {shape_a} and {shape_b}."
        )
    if set(weight[2:]) != {k} or shape_b[0] * shape_a[1] != math.prod(weight):
        raise UnsupportedAdapterError(
            f"{options.where}: {module!r}: lora_B·lora_A, {shape_b[0]}x{shape_a[1]}, cannot be viewed as its base "
            f"tensor of shape {weight}: a convolution that loralib itself cannot run (only its Conv2d works), or none."
        )
    r = shape_a[0] // k
    scale, source = _scale(options.alpha, r)
    shape = (weight[0], math.prod(weight[1:]))
    if shape == (shape_b[0], shape_a[1]):  # kernels of 1 without groups, where nothing is regrouped
        product = partial(_read_block, checkpoint, keys, (0, r), (0, shape[0]), scale, options.device)
        return Module(shape, r, scale, source, target, keys, product)
    viewed = partial(_read_viewed, checkpoint, keys, shape, r, scale, options.device)
    return Module(shape, r, scale, source, target, keys, viewed)


def _require_orientation(checkpoint: Checkpoint, stem: str, module: str, options: ReadOptions) -> None:
    """Refuse the factors of ``x @ A @ B``, A (d_in, r) and B (r, d_out), which can pass for loralib's with r = d_out.

    Shapes alone tell where r would be more than the sides of ΔW; a base that fits loralib's reading outweighs them.
    """
    shape_a, shape_b = checkpoint.shape(f"{stem}.lora_A"), checkpoint.shape(f"{stem}.lora_B")
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in shape_a + shape_b or shape_a[1] != shape_b[0]:
        return
    possible = shape_a[0] % shape_b[1] == 0 and shape_b[0] % (shape_a[0] // shape_b[1]) == 0
    if possible and (shape_b[1] <= shape_a[1] or f"{stem}.lora_ind" in checkpoint):
        return
    if possible and options.base is not None and shape_a[1] in options.base.shape(f"{module}.weight"):
        return
    otherwise = " If r is meant to be that large, pass base=." if possible else ""
    raise AdapterFormatError(
        f"{options.where}: {module!r}: looks transposed: expected lora_A (r, d_in) and lora_B (d_out, r), got "
        f"{shape_a} and {shape_b}, as of x @ A @ B. Read it with "
        f"pattern='down={{module}}.lora_A.T up={{module}}.lora_B.T'.{otherwise}"
    )


def _slots(checkpoint: Checkpoint, stem: str, module: str, groups: int, options: ReadOptions) -> Slots | None:
    """The enabled slots of a MergedLinear; None for a Linear.

    One enabled slot looks like a Linear whose B has fewer rows than the base, so only the base or the
    caller can tell.
    """
    where, split = options.where, options.split
    rows = checkpoint.shape(f"{stem}.lora_B")[0]
    height = rows // groups
    if f"{stem}.lora_ind" in checkpoint:
        return _slots_of_mask(checkpoint[f"{stem}.lora_ind"], height, groups, where, module)
    d_out = None
    if options.base is not None:
        d_out = _base_rows(options.base, module, checkpoint.shape(f"{stem}.lora_A")[1], where)
    fits = split is not None and len(split.names) == groups
    if groups == 1 and (d_out == rows or (d_out is None and not fits)):
        return None
    if split is not None and fits:
        if d_out is not None and d_out != split.total * height:
            raise AdapterFormatError(
                f"{where}: {module!r}: expected a base with {split.total} blocks of {height} rows, got {d_out} rows. "
                "Is split= right?"
            )
        return split
    if split is None and d_out == rows:
        return parse_split([True] * groups)
    wrong = AmbiguousAdapterError if split is None else AdapterFormatError
    raise wrong(
        f"{where}: {module!r}: a MergedLinear with {groups} enabled slot(s) of a fused weight, and the file does "
        f"not say which. Pass split= with {groups} of q,k,v (the training script's enable_lora), as 'q,v'."
    )


def _base_rows(base: BaseWeights, module: str, d_in: int, where: str) -> int:
    """Output rows of the base matrix, whichever way it is stored."""
    shape = base.shape(f"{module}.weight")
    if len(shape) != 2 or d_in not in shape:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected a base matrix with {d_in} input columns, got {shape}. "
            "Is this the model the adapter was trained on?"
        )
    return shape[0] if shape[1] == d_in else shape[1]


def _slots_of_mask(mask: torch.Tensor, height: int, groups: int, where: str, module: str) -> Slots:
    flags = mask.bool().flatten()
    enabled = flags.view(-1, height) if height and len(flags) % height == 0 else flags.view(1, -1)
    uniform = bool((enabled.all(1) == enabled.any(1)).all())
    slots = parse_split([bool(row.all()) for row in enabled]) if uniform and bool(flags.any()) else None
    if slots is None or len(slots.names) != groups:
        raise AdapterFormatError(f"{where}: {module!r}: lora_ind does not mark {groups} slots of {height} rows.")
    return slots


def _scale(alpha: float | None, r: int) -> tuple[float, ScaleSource]:
    return (math.nan, "unknown") if alpha is None else (alpha / r, "caller")


def _read_block(
    checkpoint: Checkpoint,
    keys: tuple[str, str],
    rows_a: tuple[int, int],
    rows_b: tuple[int, int],
    scale: float,
    device: torch.device,
) -> LowRankUpdate:
    down, up = (checkpoint[key].to(device) for key in keys)
    return LowRankUpdate(up[slice(*rows_b)], down[slice(*rows_a)], scale)


def _read_viewed(
    checkpoint: Checkpoint,
    keys: tuple[str, str],
    shape: tuple[int, int],
    r: int,
    scale: float,
    device: torch.device,
) -> DenseUpdate:
    """B·A as loralib views it, in float64; entries of one product, whose rounding errors are not independent."""
    down, up = (checkpoint[key].to(device).detach().double() for key in keys)
    return DenseUpdate((up @ down).view(shape), scale, declared_r=r, stored_eps=math.nan)


def _reason(key: str) -> str | None:
    return "the slot mask of a MergedLinear without factors" if key.endswith(".lora_ind") else None
