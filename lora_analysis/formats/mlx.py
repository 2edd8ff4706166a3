"""MLX (mlx-lm): ``adapters.safetensors`` or ``adapters.npz``, with ``adapter_config.json``.

Conventions
-----------
``<module>.lora_a`` (d_in, r) and ``<module>.lora_b`` (r, d_out), no ``.weight``: ΔW = scale · lora_bᵀ·lora_aᵀ. An
embedding's are (vocab, r) and (r, dim): the same formula gives the map (dim, vocab), whose weight is stored
transposed. The experts of a switch layer lie the other way round, ``lora_a`` (E, r, d_in), or (E·r, d_in) in files
of mlx-lm 0.28 and older, and ``lora_b`` (E, d_out, r): one module each, ``….switch_mlp.gate_proj.3``. DoRA has
``<module>.m``, a magnitude per output (per token of an embedding).

``lora_parameters.scale`` is the whole multiplier, not divided by r; 20 where a configuration lacks it. ``alpha`` is
not read by mlx-lm since 0.15, but stayed in its default configuration until 0.22 (rank 8, alpha 16, scale 10); 0.14 and
older multiplied by alpha / rank. A configuration of those times does not say which, and gets a note. A file
without configuration has no scale: ``alpha=`` then means what it means elsewhere, ΔW = alpha / r · …, so that a
multiplier s is ``alpha = s·r``.

Facts from mlx-lm ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py`` (versions 0.10 to 0.32).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Contents, Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.checkpoint.protocol import rows
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.mlx_configuration import Settings, disagreements, is_ours, read_settings
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import low_rank, true_update
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update

NAME = "mlx"
TAKES = ("config",)

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])\Z", re.DOTALL)
_EMBEDDINGS = frozenset(
    {"embed_tokens", "embedding", "embeddings", "tok_embeddings", "word_embeddings", "embed_in", "wte", "wpe"}
)
"""Last components of the names of embeddings, which store as (vocab, dim) what linear layers store as (dim, vocab)."""


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the configuration is MLX's, or some tensors end in a bare ``lora_a`` or ``lora_b``."""
    if "peft_type" in config:
        return False
    return is_ours(config) or any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of an MLX adapter."""
    where = options.where
    settings = read_settings(config, where)
    stems = dict.fromkeys(match["module"] for match in map(_FACTOR.match, checkpoint) if match)
    modules: dict[str, Module] = {}
    for stem in stems:
        modules |= _modules(checkpoint, stem, settings, options)
    used = {tensor for module in modules.values() for tensor in module.tensors}
    _require_known(checkpoint, used, stems, where)
    unused = unused_tensors(
        checkpoint,
        used,
        stems,
        lambda key: None,
        otherwise="a full tensor trained beside LoRA, no part of any update",
        where=where,
    )
    notes = [] if options.alpha is not None else list(settings.notes)
    notes += disagreements(settings, modules, where)
    if any(module.magnitude for module in modules.values()) and options.base is None:
        notes.append("DoRA: the updates are their low-rank part. Pass base= for what DoRA adds to the base.")
    return Contents(modules, unused, tuple(notes))


def _modules(checkpoint: Checkpoint, stem: str, settings: Settings, options: ReadOptions) -> dict[str, Module]:
    """The update of a linear layer or an embedding, or of each expert of a switch layer."""
    where, keys = options.where, (f"{stem}.lora_a", f"{stem}.lora_b")
    for key in keys:
        if key not in checkpoint:
            raise AdapterFormatError(f"{where}: {stem!r}: expected lora_a and lora_b, {key!r} is missing.")
    shape_a, shape_b = (checkpoint.shape(key) for key in keys)
    if len(shape_b) == 3:
        return _experts(checkpoint, stem, keys, settings, options)
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in shape_a + shape_b or shape_a[1] != shape_b[0]:
        _refuse_shapes(where, stem, shape_a, shape_b)
    (d_in, r), d_out = shape_a, shape_b[1]
    scale, source = settings.scale_of(options.alpha, r)
    target = Target(f"{stem}.weight", transposed=_is_embedding(stem, (d_in, d_out), options.base))
    plain = partial(_read_update, checkpoint, keys, None, scale, options.device)
    magnitude = _magnitude(checkpoint, stem, d_in if target.transposed else d_out, options)
    tensors = keys if magnitude is None else (*keys, f"{stem}.m")
    axis = 0 if target.transposed else 1
    read: Callable[[], Update] = plain
    flags: tuple[str, ...] = ()
    if magnitude is not None and options.base is not None:
        read = partial(_read_true_update, plain, magnitude, options.base, target, axis)
    elif magnitude is not None:
        flags = ("dora-low-rank-part",)
    # Without a configuration the tensors may be A (r, in) and B (out, r); for r below both sides that would be an
    # r above them.
    if not settings.known and shape_a[0] == shape_b[1] and r >= d_in:
        flags += ("ambiguous-layout",)
    described = Module(
        (d_out, d_in),
        r,
        scale,
        source,
        target,
        tensors,
        read,
        flags,
        magnitude,
        magnitude_axis=axis,
        embedding=target.transposed,
    )
    return {stem: described}


def _experts(
    checkpoint: Checkpoint, stem: str, keys: tuple[str, str], settings: Settings, options: ReadOptions
) -> dict[str, Module]:
    where = options.where
    shape_a, (experts, d_out, r) = (checkpoint.shape(key) for key in keys)
    d_in = shape_a[-1] if shape_a else 0
    if shape_a not in ((experts, r, d_in), (experts * r, d_in)) or 0 in (experts, d_out, r, d_in):
        raise AdapterFormatError(
            f"{where}: {stem!r}: expected lora_a (E, r, d_in) or (E·r, d_in) and lora_b (E, d_out, r) of E experts, "
            f"got {shape_a} and {checkpoint.shape(keys[1])}."
        )
    if f"{stem}.m" in checkpoint:
        raise UnsupportedAdapterError(f"{where}: {stem!r}: DoRA on experts, which MLX does not have, is not read.")
    scale, source = settings.scale_of(options.alpha, r)
    targets = _expert_targets(stem, experts, options.base)
    return {
        f"{stem}.{expert}": Module(
            shape=(d_out, d_in),
            r=r,
            scale=scale,
            scale_source=source,
            target=targets[expert],
            tensors=keys,
            read=partial(_read_update, checkpoint, keys, expert, scale, options.device),
        )
        for expert in range(experts)
    }


def _expert_targets(stem: str, experts: int, base: BaseWeights | None) -> list[Target]:
    """Slices of MLX's stack of experts, or the experts' own tensors in a base that keeps them apart."""
    apart = [f"{stem.replace('.switch_mlp.', f'.experts.{expert}.')}.weight" for expert in range(experts)]
    if base is not None and not base.has_all([f"{stem}.weight"]) and base.has_all(apart):
        return [Target(name) for name in apart]
    return [Target(f"{stem}.weight", expert=expert) for expert in range(experts)]


def _is_embedding(stem: str, shape: tuple[int, int], base: BaseWeights | None) -> bool:
    """Whether a weight is stored as (d_in, d_out): its shape in the base says, or its name."""
    stored = base.shape(f"{stem}.weight") if base is not None and f"{stem}.weight" in base else None
    if stored is not None and shape[0] != shape[1] and stored in (shape, shape[::-1]):
        return stored == shape
    return stem.rpartition(".")[2] in _EMBEDDINGS


def _magnitude(checkpoint: Checkpoint, stem: str, length: int, options: ReadOptions) -> partial[Tensor] | None:
    key = f"{stem}.m"
    if key not in checkpoint:
        return None
    if checkpoint.shape(key) != (length,):
        raise AdapterFormatError(
            f"{options.where}: {key!r}: expected a magnitude for each of {length} rows of the stored weight, got shape "
            f"{checkpoint.shape(key)}."
        )
    return partial(_read_tensor, checkpoint, key, options.device)


def _refuse_shapes(where: str, stem: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    message = f"{where}: {stem!r}: expected lora_a (d_in, r) and lora_b (r, d_out), got {shape_a} and {shape_b}."
    if len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] and 0 not in shape_a + shape_b:
        message += (
            " They look transposed, A (r, d_in) and B (d_out, r): build it with "
            "Adapter({module: LowRankUpdate(up=lora_b, down=lora_a, scale)})."
        )
    raise AdapterFormatError(message)


def _require_known(checkpoint: Checkpoint, used: set[str], stems: Mapping[str, None], where: str) -> None:
    """Refuse a tensor of an adapted module that is none of its own: it might change the update."""
    for key in checkpoint:
        stem, _, last = key.rpartition(".")
        if key not in used and stem in stems and last not in ("weight", "bias", "alpha"):
            raise AdapterFormatError(
                f"{where}: {key!r}: expected lora_a, lora_b and m of an adapted module, and this is none known here."
            )


def _read_update(
    checkpoint: Checkpoint, keys: tuple[str, str], expert: int | None, scale: float, device: torch.device
) -> LowRankUpdate:
    if expert is None:
        a, b = (checkpoint[key].to(device) for key in keys)
        return low_rank(b.mT, a.mT, scale)
    up = rows(checkpoint, keys[1], expert, expert + 1)[0]
    # (E, r, d_in), or with the experts' r rows one after the other.
    per_expert = 1 if len(checkpoint.shape(keys[0])) == 3 else up.shape[1]
    down = rows(checkpoint, keys[0], expert * per_expert, (expert + 1) * per_expert).reshape(up.shape[1], -1)
    return low_rank(up.to(device), down.to(device), scale)


def _read_true_update(
    plain: partial[LowRankUpdate], magnitude: partial[Tensor], base: BaseWeights, target: Target, axis: int
) -> DenseUpdate:
    update = plain()
    weight = base.matrix(target, update.shape).to(update.up.device)
    return true_update(update, weight, magnitude(), axis=axis)


def _read_tensor(checkpoint: Checkpoint, key: str, device: torch.device) -> Tensor:
    return checkpoint[key].to(device)
