"""PEFT's LoKr: the Kronecker product of two small matrices.

Conventions
-----------
``ΔW = kron(w1, w2) · alpha / r``, no ``.weight`` in names: ``<module>.lokr_w1`` (m_1, n_1), or under
``decompose_both`` its factors ``lokr_w1_a`` (m_1, r) and ``lokr_w1_b`` (r, n_1); ``lokr_w2`` (m_2, n_2[, k, k]), or
``lokr_w2_a`` (m_2, r) and ``lokr_w2_b`` (r, n_2·k·k), or under ``use_effective_conv2d`` with a Tucker core
``lokr_t2`` (r, r, k, k), and then ``lokr_w2_a`` is (r, m_2), ``lokr_w2_b`` (r, n_2). Where both are full, r is in the
configuration only, and unlike LyCORIS PEFT divides by it all the same.

``lokr_w2`` of a ``Conv1d``, (m_2, n_2, k), is the exception: ``torch.kron`` lines the matrix w1 up with its *last*
two axes, and PEFT reshapes what comes out, so that ``ΔW[(p, i), (q, j, x)] = w1[i, j] w2[p, q, x]``: the two sides
changed places, and no Kronecker product of the unfolded weight. It is what PEFT adds to the base, in training too.
Facts from PEFT's ``tuners/lokr/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import Remark, Scaling, about, disagreement_on_r, require_types
from lora_analysis.formats.peft.lycoris_scaling import LYCORIS_FIELDS, lycoris_scaling
from lora_analysis.formats.peft.parts import Parts, base_shapes, grouped, kernel, others, require_fields
from lora_analysis.formats.products import kronecker
from lora_analysis.update import DenseUpdate, Update

DEFAULT_R = 8
_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_FIELDS = (*LYCORIS_FIELDS, "decompose_both", "decompose_factor", "rank_dropout_scale")
_LAYOUTS = tuple(
    (first, second)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
)
"""Which tensors make up w1 and w2."""


@dataclass(frozen=True, slots=True)
class _Sides:
    """What the shapes of one module say."""

    left: tuple[int, int]
    right: tuple[int, int]
    r: int | None
    """None where both sides are full."""
    kernel: tuple[int, ...]
    keys: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left[0] * self.right[0], self.left[1] * self.right[1]


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT LoKr adapter."""
    where = options.where
    require_types(config, where)
    unknown = require_fields(config, _FIELDS, where)
    scaling = lycoris_scaling(config, options.alpha, where)
    found = grouped(checkpoint, _NAMES, options)
    stored = base_shapes(options.base, found)
    modules: dict[str, Module] = {}
    remarks: list[Remark] = []
    for module, parts in found.items():
        sides = _sides(checkpoint, module, parts, where)
        r, scale, source, doubts = _scale(scaling, module, sides, bool(config))
        remarks += [*doubts, *(("alpha_pattern", doubt) for doubt in scaling.doubts(module))]
        swapped = len(sides.kernel) == 1
        if swapped:
            text = (
                "a full lokr_w2 on a Conv1d, which PEFT multiplies the other way round; the update is what PEFT "
                "computes, and no Kronecker product."
            )
            remarks.append(about(module, text))
        modules[module] = Module(
            shape=sides.shape,
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", kernel=kernel(sides.shape, stored.get(module), sides.kernel)),
            tensors=(*sides.keys[0], *sides.keys[1]),
            read=partial(_read_swapped if swapped else _read_update, checkpoint, sides.keys, scale, r, options.device),
        )
    used = {key for module in modules.values() for key in module.tensors}
    notes = (*unknown, *scaling.notes, *first_of_each(remarks))
    return Contents(modules, others(checkpoint, used, _NAMES, config, where), notes)


def _sides(checkpoint: Checkpoint, module: str, parts: Parts, where: str) -> _Sides:
    layout = next((names for names in _LAYOUTS if set(names[0] + names[1]) == set(parts)), None)
    if layout is None:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected lokr_w1 or lokr_w1_a and lokr_w1_b, and lokr_w2 or lokr_w2_a and lokr_w2_b "
            f"(with lokr_t2 or without), got {', '.join(parts)}."
        )
    shapes = {name: checkpoint.shape(key) for name, key in parts.items()}
    left = _side(shapes.get("lokr_w1"), shapes.get("lokr_w1_a"), shapes.get("lokr_w1_b"), None)
    right = _side(shapes.get("lokr_w2"), shapes.get("lokr_w2_a"), shapes.get("lokr_w2_b"), shapes.get("lokr_t2"))
    keys = (tuple(parts[name] for name in layout[0]), tuple(parts[name] for name in layout[1]))
    if left is None or right is None or left[2] or (left[1] and right[1] and left[1] != right[1]):
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise AdapterFormatError(
            f"{where}: {module!r}: expected matrices w1 and w2, the latter with up to two axes more, or their factors "
            f"(m, r) and (r, n) (beside a core (r, r, k, k): (r, m) and (r, n)), all with one r, got {described}."
        )
    return _Sides(left[0], right[0], left[1] or right[1], right[2], keys)


def _side(
    full: tuple[int, ...] | None, a: tuple[int, ...] | None, b: tuple[int, ...] | None, core: tuple[int, ...] | None
) -> tuple[tuple[int, int], int | None, tuple[int, ...]] | None:
    """((m, n·k·k), r or None, kernel) of w1 or w2; None where the shapes do not fit."""
    if full is not None:
        fits = 2 <= len(full) <= 4 and 0 not in full
        return ((full[0], math.prod(full[1:])), None, full[2:]) if fits else None
    if a is None or b is None or len(a) != 2 or len(b) != 2 or 0 in a + b:
        return None
    if core is None:
        return ((a[0], b[1]), b[0], ()) if a[1] == b[0] else None
    if len(core) != 4 or 0 in core or core[:2] != (a[0], b[0]) or a[0] != b[0]:
        return None
    return (a[1], b[1] * core[2] * core[3]), b[0], core[2:]


def _scale(
    scaling: Scaling, module: str, sides: _Sides, configured: bool
) -> tuple[int, float, ScaleSource, list[Remark]]:
    """(r, scale, its source, remarks)."""
    declared = scaling.declared_r(module)
    if sides.r is not None:
        return sides.r, *scaling.scale(module, sides.r), disagreement_on_r(module, declared, sides.r)
    if declared is not None:
        return declared, *scaling.scale(module, declared), []
    if configured:
        scale, source = scaling.scale(module, DEFAULT_R)
        text = f"w1 and w2 are full and the configuration holds no r; PEFT's default, {DEFAULT_R}, applies."
        return DEFAULT_R, scale, source if source == "caller" else "format default", [about(module, text)]
    text = (
        "w1 and w2 are full, so that the r that alpha is divided by is in adapter_config.json only: the scale is "
        "unknown. Put it beside the file."
    )
    return min(sides.left) * min(sides.right), math.nan, "unknown", [about(module, text)]


def _read_update(
    checkpoint: Checkpoint,
    keys: tuple[tuple[str, ...], tuple[str, ...]],
    scale: float,
    r: int,
    device: torch.device,
) -> Update:
    w1, w2 = ([checkpoint[key].to(device) for key in side] for side in keys)
    return kronecker(
        (w1[0], w1[1]) if len(w1) == 2 else w1[0],
        (w2[0], w2[1]) if len(w2) > 1 else w2[0],
        scale,
        core=w2[2] if len(w2) == 3 else None,
        declared_r=r,
    )


def _read_swapped(
    checkpoint: Checkpoint,
    keys: tuple[tuple[str, ...], tuple[str, ...]],
    scale: float,
    r: int,
    device: torch.device,
) -> Update:
    """A full w2 (m_2, n_2, k) of a ``Conv1d``: ``ΔW[(p, i), (q, j, x)] = w1[i, j] w2[p, q, x]``."""
    w1 = [checkpoint[key].to(device).double() for key in keys[0]]
    left = w1[0] @ w1[1] if len(w1) == 2 else w1[0]
    right = checkpoint[keys[1][0]].to(device).double()
    matrix = torch.einsum("ij,pqx->piqjx", left, right).flatten(2).flatten(0, 1)
    return DenseUpdate(matrix, scale, declared_r=r, stored_eps=math.nan)
