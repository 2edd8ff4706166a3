"""PEFT's VeRA: two random matrices that all modules share, and two vectors for each.

Conventions
-----------
``<module>.vera_lambda_b`` (d_out) and ``.vera_lambda_d`` (r); ``base_model.vera_A`` (r, the largest d_in) and
``base_model.vera_B`` (the largest d_out, r), used by every module. ``ΔW = diag(λ_b) B[:d_out] diag(λ_d) A[:, :d_in]``,
without alpha. ``d_initial`` is only where λ_d begins.

Nothing in the file tells the d_in of a module, so that ``base=`` is needed. Projections that were not saved
(``save_projection=False``) are drawn again from ``projection_prng_key`` as PEFT draws them: on the CPU, A before B,
each Kaiming-uniform at the largest sizes among the modules, rounded to the base's dtype. Raw dumps hold a copy of the
projections in each module.

The row space of every ΔW is A's, by construction, and the column space B's up to a diagonal. Facts from PEFT's
``tuners/vera/model.py`` (``_find_dim``, ``_init_vera_A_vera_B``, ``_kaiming_init``) and ``layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, AmbiguousAdapterError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft.configuration import Remark, about, flag, require_types, short
from lora_analysis.formats.peft.parts import (
    Parts,
    base_dtypes,
    base_shapes,
    grouped,
    others,
    require_fields,
    require_parts,
)
from lora_analysis.update import LowRankUpdate

_LAMBDAS = ("vera_lambda_b", "vera_lambda_d")
_PROJECTIONS = ("vera_A", "vera_B")
_PARTS = (*_LAMBDAS, *_PROJECTIONS)
_FIELDS = ("d_initial", "fan_in_fan_out", "projection_prng_key", "r", "save_projection", "vera_dropout")
_SHARED = ("base_model", "module.base_model")
"""What the shared projections lie under."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Projections that are drawn again from a seed, at their full sizes."""

    seed: int
    d_out: int
    d_in: int
    dtypes: tuple[torch.dtype, ...]
    """Of the base's matrices: PEFT moves the projections to each of them, and back to float32."""

    def __call__(self, r: int) -> tuple[Tensor, Tensor]:
        """(A, B), in the order and by the arithmetic of PEFT, whose generator is the CPU's."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        A, B = _kaiming_uniform(r, self.d_in, generator), _kaiming_uniform(self.d_out, r, generator)
        for dtype in self.dtypes:
            A, B = A.to(dtype), B.to(dtype)
        return A, B


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a PEFT VeRA adapter."""
    where = options.where
    require_types(config, where)
    if options.alpha is not None:
        raise UnsupportedAdapterError(f"{where}: alpha= has no meaning for VeRA, which has none. Leave alpha= out.")
    unknown = require_fields(config, _FIELDS, where)
    holders = grouped(checkpoint, _PARTS, options)
    shared = next((holders.pop(name) for name in _SHARED if name in holders), {})
    # In raw dumps the modules of other adapters hold copies of this one's projections, and no vectors of it.
    found = {module: parts for module, parts in holders.items() if any(name in parts for name in _LAMBDAS)}
    sizes = {module: _sizes(checkpoint, module, parts, where) for module, parts in found.items()}
    if not sizes:
        return Contents({})
    if options.base is None:
        raise AmbiguousAdapterError(
            f"{where}: a VeRA file does not say how many inputs its modules have: A is shared, saved or not, and as "
            "wide as the widest of them. Pass base=, the model it was trained on."
        )
    stored = base_shapes(options.base, found)
    shapes = {
        module: (d_out, _d_in(module, d_out, stored.get(module, ()), where)) for module, (d_out, _) in sizes.items()
    }
    # In a dump of the model inside of PEFT's, only the modules hold them.
    saved = any("vera_A" in parts or "vera_B" in parts for parts in (shared, *found.values()))
    drawn = None if saved else _drawn(config, shapes, base_dtypes(options.base, found), where)
    transposed = flag(config, "fan_in_fan_out", where)
    modules: dict[str, Module] = {}
    for module, parts in found.items():
        shape, r = shapes[module], sizes[module][1]
        lambdas = _keys(parts, _LAMBDAS)
        projections: tuple[str, ...] = ()
        if saved:
            holder = shared or parts
            require_parts(where, module, holder, *_PROJECTIONS)
            projections = _keys(holder, _PROJECTIONS)
            _require_projections(checkpoint, module, projections, shape, r, where)
        square = shape[0] == shape[1]
        modules[module] = Module(
            shape=shape,
            r=r,
            scale=1.0,
            scale_source="format default",
            target=Target(f"{module}.weight", transposed=transposed if square else stored[module] != shape),
            tensors=(*lambdas, *projections),
            read=partial(_read_update, checkpoint, lambdas, drawn or projections, shape, options.device),
        )
    used = {key for module in modules.values() for key in module.tensors}
    copies = {parts[name] for parts in holders.values() for name in _PROJECTIONS if name in parts}
    known = dict.fromkeys(copies - used, "the shared projection once more, a copy for one module")
    unused = others(checkpoint, used, _PARTS, config, where, known)
    return Contents(modules, unused, (*unknown, *_notes(config, sizes, drawn)))


def _keys(parts: Parts, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(parts[name] for name in names)


def _sizes(checkpoint: Checkpoint, module: str, parts: Parts, where: str) -> tuple[int, int]:
    """(d_out, r)."""
    require_parts(where, module, parts, *_LAMBDAS)
    shapes = [checkpoint.shape(parts[name]) for name in _LAMBDAS]
    if not all(len(shape) == 1 and shape[0] for shape in shapes):
        raise AdapterFormatError(
            f"{where}: {module!r}: expected vera_lambda_b (d_out) and vera_lambda_d (r), "
            f"got {shapes[0]} and {shapes[1]}."
        )
    for name in _LAMBDAS:
        if not checkpoint.dtype(parts[name]).is_floating_point:
            raise AdapterFormatError(
                f"{where}: {parts[name]!r}: expected floating-point numbers, got {checkpoint.dtype(parts[name])}."
            )
    return shapes[0][0], shapes[1][0]


def _d_in(module: str, d_out: int, stored: tuple[int, ...], where: str) -> int:
    """The inputs of a module with this many outputs, whichever way its base stores the weight."""
    if len(stored) != 2 or d_out not in stored or 0 in stored:
        raise BaseWeightsError(
            f"{where}: {module!r}: expected a base matrix with {d_out} outputs, got shape {stored}. "
            "Is this the model the adapter was trained on?"
        )
    return stored[1] if stored[0] == d_out else stored[0]


def _require_projections(
    checkpoint: Checkpoint, module: str, keys: tuple[str, ...], shape: tuple[int, int], r: int, where: str
) -> None:
    a, b = (checkpoint.shape(key) for key in keys)
    if len(a) != 2 or len(b) != 2 or a[0] != r or b[1] != r or a[1] < shape[1] or b[0] < shape[0]:
        raise AdapterFormatError(
            f"{where}: {module!r}: expected vera_A ({r}, {shape[1]} or more) and vera_B ({shape[0]} or more, {r}), "
            f"got {a} and {b}."
        )


def _drawn(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], dtypes: tuple[torch.dtype, ...], where: str
) -> _Drawn:
    """The projections that the configuration only gives the seed of."""
    seed = config.get("projection_prng_key", 0)
    if not config or flag({"save_projection": True} | dict(config), "save_projection", where):
        raise AdapterFormatError(
            f"{where}: expected base_model.vera_A and base_model.vera_B in the file, found none"
            f"{'' if config else ', nor adapter_config.json with projection_prng_key'}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise AdapterFormatError(f"{where}: projection_prng_key: expected an integer of 64 bits, got {short(seed)}.")
    d_outs, d_ins = zip(*shapes.values(), strict=True)
    return _Drawn(seed, max(d_outs), max(d_ins), dtypes)


def _kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """PEFT's, for which the fan is the columns, in float32."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _notes(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], drawn: _Drawn | None) -> list[str]:
    notes = [
        "VeRA: all modules share their row space by construction, so that right-side similarities between modules of "
        "one width are 1 and mean nothing; the left side differs by a diagonal only."
    ]
    if drawn is not None:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in drawn.dtypes)
        notes.append(
            "the projections are not in the file; they are drawn again from projection_prng_key and, as in PEFT, "
            f"rounded to the base's dtype ({dtypes}). They were others if it was loaded in another dtype."
        )
    elif config.get("save_projection") is False:
        notes.append("save_projection is false, yet the file holds projections; they win, PEFT would draw its own.")
    declared = config.get("r")
    remarks: list[Remark] = [
        about(module, f"the configuration says r={short(declared)}, the tensors have r={r}; they win.")
        for module, (_, r) in sizes.items()
        if declared is not None and declared != r
    ]
    return notes + first_of_each(remarks)


def _read_update(
    checkpoint: Checkpoint,
    lambdas: tuple[str, ...],
    projections: tuple[str, ...] | _Drawn,
    shape: tuple[int, int],
    device: torch.device,
) -> LowRankUpdate:
    lambda_b, lambda_d = (checkpoint[key].to(device).double() for key in lambdas)
    whole = projections(len(lambda_d)) if isinstance(projections, _Drawn) else map(checkpoint.__getitem__, projections)
    A, B = (matrix.to(device) for matrix in whole)
    d_out, d_in = shape
    # One rounding of λ moves a whole row: no independent errors to make a noise floor of.
    return LowRankUpdate(
        lambda_b[:, None] * B[:d_out].double(), lambda_d[:, None] * A[:, :d_in].double(), 1.0, stored_eps=math.nan
    )
