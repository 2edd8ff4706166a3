"""PEFT's LoHa: the elementwise product of two low-rank matrices.

Conventions
-----------
``<module>.hada_w1_a`` (d_out, r), ``.hada_w1_b`` (r, d_in), and ``hada_w2_*`` likewise, no ``.weight``;
``ΔW = (w1_a w1_b) ∘ (w2_a w2_b) · alpha / r`` with ``alpha`` and ``r`` from the configuration, ``rank_pattern`` and
``alpha_pattern`` by LoRA's rule. A convolution has d_in = in·k·k; under ``use_effective_conv2d`` it has Tucker cores
``hada_t1``, ``hada_t2`` (r, r, k, k), or (r, r, k, 1) for a ``Conv1d``, and then ``w_a`` is (r, out), ``w_b`` (r, in).
A grouped convolution's update has the base's own shape. Facts from PEFT's ``tuners/loha/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import Remark, disagreement_on_r, require_types
from lora_analysis.formats.peft.lycoris_scaling import LYCORIS_FIELDS, lycoris_scaling
from lora_analysis.formats.peft.parts import Parts, base_shapes, grouped, kernel, others, require_fields, require_parts
from lora_analysis.formats.products import hadamard
from lora_analysis.update import Update

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT LoHa adapter."""
    where = options.where
    require_types(config, where)
    unknown = require_fields(config, LYCORIS_FIELDS, where)
    scaling = lycoris_scaling(config, options.alpha, where)
    found = grouped(checkpoint, (*_FACTORS, *_CORES), options)
    stored = base_shapes(options.base, found)
    modules: dict[str, Module] = {}
    remarks: list[Remark] = []
    for module, parts in found.items():
        shape, r, taps = _layout(checkpoint, module, parts, where)
        remarks += disagreement_on_r(module, scaling.declared_r(module), r)
        remarks += [("alpha_pattern", doubt) for doubt in scaling.doubts(module)]
        scale, source = scaling.scale(module, r)
        keys = tuple(parts[name] for name in (*_FACTORS, *(_CORES if taps else ())))
        modules[module] = Module(
            shape=shape,
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", kernel=kernel(shape, stored.get(module), taps)),
            tensors=keys,
            read=partial(_read_update, checkpoint, keys, scale, r, options.device),
        )
    used = {key for module in modules.values() for key in module.tensors}
    notes = (*unknown, *scaling.notes, *first_of_each(remarks))
    return Contents(modules, others(checkpoint, used, (*_FACTORS, *_CORES), config, where), notes)


def _layout(
    checkpoint: Checkpoint, module: str, parts: Parts, where: str
) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """(shape, r, kernel); the kernel is () without cores."""
    with_cores = any(name in parts for name in _CORES)
    require_parts(where, module, parts, *_FACTORS, *(_CORES if with_cores else ()))
    w1_a, w1_b, w2_a, w2_b = (checkpoint.shape(parts[name]) for name in _FACTORS)
    r = w1_b[0] if w1_b else 0
    fits = len(w1_a) == len(w1_b) == 2 and (w1_a, w1_b) == (w2_a, w2_b) and 0 not in w1_a + w1_b
    if not with_cores:
        if fits and w1_a[1] == r:
            return (w1_a[0], w1_b[1]), r, ()
        raise AdapterFormatError(
            f"{where}: {module!r}: expected hada_w1_a (d_out, r) and hada_w1_b (r, d_in), and hada_w2 likewise, "
            f"got {w1_a}, {w1_b}, {w2_a} and {w2_b}."
        )
    cores = [checkpoint.shape(parts[name]) for name in _CORES]
    taps = cores[0][2:]
    if fits and w1_a[0] == r and len(taps) == 2 and 0 not in taps and cores == [(r, r, *taps)] * 2:
        return (w1_a[1], w1_b[1] * taps[0] * taps[1]), r, taps
    raise AdapterFormatError(
        f"{where}: {module!r}: expected hada_w1_a (r, out), hada_w1_b (r, in) and hada_t1 (r, r, k, k), and the "
        f"second ones likewise, got {w1_a}, {w1_b}, {cores[0]}; {w2_a}, {w2_b}, {cores[1]}."
    )


def _read_update(checkpoint: Checkpoint, keys: tuple[str, ...], scale: float, r: int, device: torch.device) -> Update:
    w1_a, w1_b, w2_a, w2_b, *cores = (checkpoint[key].to(device) for key in keys)
    pair = (cores[0], cores[1]) if cores else None
    return hadamard((w1_a, w1_b), (w2_a, w2_b), scale, cores=pair, declared_r=r)
