"""The scales of kohya's and LyCORIS' modules, and what the header says about them.

Conventions
-----------
``scale = alpha / r`` with the module's own ``alpha``, a scalar tensor; without one, or with 0, alpha = r, as every
loader of these formats has it. The header's ``ss_network_dim`` and ``ss_network_alpha``, and ``conv_dim`` and
``conv_alpha`` among its ``ss_network_args``, are what training was asked for: they decide nothing, a disagreement is
noted. Tools that give each module its own r write ``Dynamic``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_analysis.adapter import Module, ScaleSource
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.kohya.algorithms import Product
from lora_analysis.formats.options import MAX_ALPHA, ReadOptions


def scale_of(checkpoint: Checkpoint, stem: str, product: Product, options: ReadOptions) -> tuple[float, ScaleSource]:
    """A module's scale, and where it is from."""
    key = f"{stem}.alpha"
    alpha = scalar(checkpoint, key, options.where) if key in checkpoint else 0.0
    if not product.scaled:
        return 1.0, "format default"
    if options.alpha is not None:
        return options.alpha / product.r, "caller"
    return (alpha / product.r, "tensor") if alpha else (1.0, "format default")


def scalar(checkpoint: Checkpoint, key: str, where: str) -> float:
    """The number in a tensor of one, which is read.

    Raises
    ------
    AdapterFormatError
        If it holds none, several, or nothing finite.
    """
    shape = checkpoint.shape(key)
    if math.prod(shape) != 1:
        raise AdapterFormatError(f"{where}: {key!r}: expected one number, got shape {shape}.")
    value = float(checkpoint[key].reshape(()).double())
    if not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: {key!r}: expected a plausible finite number, got {value}. Pass alpha=.")
    return value


def require_folded_scalar(checkpoint: Checkpoint, stem: str, where: str) -> None:
    """Refuse a LyCORIS ``scalar`` that was not multiplied into its factors when the file was saved.

    LyCORIS folds it in on saving and sets it to 1 on loading; a file that holds another has two readings.
    """
    key = f"{stem}.scalar"
    if key in checkpoint and (value := scalar(checkpoint, key, where)) != 1:
        raise AdapterFormatError(
            f"{where}: {key!r}: expected LyCORIS' scalar to be folded into the factors, got {value:g} beside them; "
            "training multiplied by it, and every loader ignores it. Multiply lora_up, hada_w1_a or lokr_w1 by it, "
            "and remove it."
        )


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a header says training was asked for."""

    r: float | None
    alpha: float | None


def header_notes(
    metadata: Mapping[str, str], modules: Mapping[str, Module], products: Mapping[str, Product]
) -> list[str]:
    """Where the header and the tensors disagree."""
    arguments = _arguments(metadata)
    linear = _Stated(_number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha")))
    conv = _Stated(
        _number(arguments.get("conv_dim")) or linear.r,
        _number(arguments.get("conv_alpha")) or linear.alpha,
    )
    root = str(arguments.get("rs_lora", "")).lower() == "true"
    notes = []
    for kind, stated in (("linear layers", linear), ("convolutions", conv)):
        chosen = [
            module
            for name, module in modules.items()
            if products[name].scaled and (math.prod(module.target.kernel) > 1) == (stated is conv)
        ]
        if stated.r is not None and (others := [m.r for m in chosen if m.r != stated.r]):
            notes.append(
                f"the header says r={stated.r:g}, {len(others)} of {len(chosen)} {kind} have another (first: "
                f"{others[0]}); the tensors win."
            )
        if stated.alpha is None:
            continue
        differing = [
            module
            for module in chosen
            if module.scale_source == "tensor"
            and module.target.rows is None  # blocks of split_qkv have a note of their own
            and not math.isclose(
                module.scale * module.r, stated.alpha * (math.sqrt(module.r) if root else 1), rel_tol=1e-2
            )
        ]
        if differing:
            first = differing[0].scale * differing[0].r
            notes.append(
                f"the header says alpha={stated.alpha:g}, {len(differing)} of {len(chosen)} {kind} have another "
                f"(first: {first:g}); the tensors win."
            )
        missing = sum(m.scale_source == "format default" and m.r != stated.alpha for m in chosen)
        if missing:
            notes.append(
                f"the header says alpha={stated.alpha:g}, {missing} of {len(chosen)} {kind} have no alpha tensor: they "
                f"are read with alpha = r, as every loader does. Pass alpha={stated.alpha:g} if training used it."
            )
    return notes


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, object]:
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _number(stated: object) -> float | None:
    """A positive number that a header states; None for ``Dynamic`` and whatever else is none."""
    try:
        value = float(stated) if isinstance(stated, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return value if 0 < value <= MAX_ALPHA else None
