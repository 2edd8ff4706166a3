"""torchtune: the state dict of its LoRA and DoRA layers (``adapter_model.pt``, ``adapter_0.pt``).

Conventions
-----------
``<module>.lora_a.weight`` (r, d_in), ``<module>.lora_b.weight`` (d_out, r) and, of DoRA, ``<module>.magnitude``
(d_out,): ΔW = alpha / r · lora_b·lora_a. alpha is in the recipe, and in the ``adapter_config.json`` that newer
versions write beside the file for PEFT (``lora_alpha``); without either the scale is unknown.

Modules are torchtune's, ``layers.3.attn.q_proj``, ``layers.3.mlp.w1`` (gate; w2 is down, w3 up), ``output``. They
get their Hugging Face names, ``model.layers.3.self_attn.q_proj``, ``model.layers.3.mlp.gate_proj``, ``lm_head``,
where ``base=`` has those, or with ``heads=``.

The rows of q and k are in the order of the model's rotary positions: interleaved in Llama, Mistral and Gemma, where
Hugging Face has them half-split; as there in Qwen2, Qwen3 and Phi-3. The file does not say which model it is of. A
Hugging Face ``base=`` does, by its ``config.json``, and GGUF by its header: their numbers of heads turn interleaved
rows. ``heads=(n_heads, n_kv_heads)`` turns them in any case. With neither, q and k are flagged ``ambiguous-layout``:
the output side of an overlap with adapters of Hugging Face models then means nothing. Singular values and the input
side do not depend on it.

Facts from torchtune 0.6 ``modules/peft/lora.py``, ``modules/peft/dora.py``, ``models/convert_weights.py`` and
``models/*/_convert_weights.py``. Its own conversion to PEFT permutes the rows of lora_b but not DoRA's magnitudes,
and those of Qwen2, which it should not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, AmbiguousAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import MAX_ALPHA, ReadOptions
from lora_analysis.formats.products import low_rank, true_update
from lora_analysis.formats.rotary import half_split, require_heads, said_by_the_base
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update

NAME = "torchtune"
TAKES = ("config", "heads")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])\.weight\Z", re.DOTALL)
_ROTARY = re.compile(r"(?:decoder\.)?layers\.[0-9]+\.(?:layer\.)?attn\.(?P<side>[qk])_proj\Z")
"""q and k of self-attention; those of cross-attention and of vision encoders have no rotary positions."""
_LAYER = re.compile(r"layers\.(?P<block>[0-9]+)\.(?P<part>.+)\Z")
_IN_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_INTERLEAVED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_AS_HUGGING_FACE = frozenset({"qwen2", "qwen3", "phi3"})
"""Models by the order in which torchtune has the rows of q and k."""
_OUTSIDE = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether some tensors end in ``lora_a.weight`` or ``lora_b.weight``."""
    return any(_FACTOR.match(name) for name in checkpoint)


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a torchtune adapter."""
    where = options.where
    stems = list(dict.fromkeys(match["module"] for match in map(_FACTOR.match, checkpoint) if match))
    names = _names(stems, options)
    order = _order(stems, names, options)
    alpha = _alpha(config, where)
    modules = {names[stem]: _module(checkpoint, stem, names[stem], alpha, order, options) for stem in stems}
    unused = unused_tensors(
        checkpoint,
        {tensor for module in modules.values() for tensor in module.tensors},
        stems,
        lambda key: None,
        otherwise="a full tensor trained beside LoRA, no part of any update",
        where=where,
    )
    return Contents(modules, unused, (*_notes(modules, config, alpha, options), *order.notes))


def _names(stems: list[str], options: ReadOptions) -> dict[str, str]:
    """Names of torchtune, or those of Hugging Face where the base has them or the caller wants their order."""
    theirs = {stem: _hugging_face_name(stem) or stem for stem in stems}
    fits_ours = options.base is not None and options.base.has_all([f"{stem}.weight" for stem in stems])
    if fits_ours and options.heads is not None:
        raise AdapterFormatError(
            f"{options.where}: heads= turns the rows of q and k to the order of Hugging Face models, and the base is "
            "torchtune's own, whose order they have. Leave heads= out, or give the Hugging Face base."
        )
    if options.heads is not None or (
        options.base is not None
        and not fits_ours
        and options.base.has_all([f"{name}.weight" for name in theirs.values()])
    ):
        return theirs
    return {stem: stem for stem in stems}


class _Order(NamedTuple):
    """In which order the rows of q and k lie, and which numbers of heads turn them to Hugging Face's."""

    heads: tuple[int, int] | None
    known: bool
    notes: tuple[str, ...] = ()


def _order(stems: list[str], names: Mapping[str, str], options: ReadOptions) -> _Order:
    if not any(map(_ROTARY.match, stems)):
        return _Order(None, True)
    theirs = options.base is not None and any(name != stem for stem, name in names.items())
    model, counts = options.base.architecture if options.base is not None and theirs else (None, None)
    if options.heads is not None:
        notes = said_by_the_base(options.heads, counts)
        if model in _AS_HUGGING_FACE:
            notes.append(
                f"heads= turns the rows of q and k, which torchtune has in the order of {model!r}, the base's."
            )
        return _Order(options.heads, True, tuple(notes))
    if model in _AS_HUGGING_FACE:
        return _Order(None, True)
    if model in _INTERLEAVED and counts is not None:
        return _Order(counts, True, tuple(said_by_the_base(None, counts)))
    note = (
        "the rows of q and k may be in interleaved rotary order (Llama, Mistral, Gemma; not Qwen2, Phi-3): their "
        "output side then compares with no Hugging Face adapter or base. Pass heads=(n_heads, n_kv_heads) to turn "
        "them."
    )
    return _Order(None, False, (note,))


def _hugging_face_name(stem: str) -> str | None:
    found = _LAYER.match(stem)
    if found is None:
        return _OUTSIDE.get(stem)
    part = _IN_LAYER.get(found["part"])
    return None if part is None else f"model.layers.{found['block']}.{part}"


def _module(
    checkpoint: Checkpoint, stem: str, name: str, alpha: float | None, order: _Order, options: ReadOptions
) -> Module:
    where, keys = options.where, (f"{stem}.lora_a.weight", f"{stem}.lora_b.weight")
    for key in keys:
        if key not in checkpoint:
            raise AdapterFormatError(f"{where}: {stem!r}: expected lora_a and lora_b, {key!r} is missing.")
    shape_a, shape_b = (checkpoint.shape(key) for key in keys)
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in shape_a + shape_b or shape_a[0] != shape_b[1]:
        raise AdapterFormatError(
            f"{where}: {stem!r}: expected lora_a (r, d_in) and lora_b (d_out, r) to share r, got {shape_a} and "
            f"{shape_b}. The file was read as 'torchtune'; pass format= to read it as another."
        )
    (r, d_in), d_out = shape_a, shape_b[0]
    scale, source = _scale(alpha, options.alpha, r)
    rotary = _ROTARY.match(stem)
    n_heads = None
    if rotary and order.heads is not None:
        n_heads = order.heads[0 if rotary["side"] == "q" else 1]
        require_heads(where, stem, d_out, n_heads)
    flags: tuple[str, ...] = ("ambiguous-layout",) if rotary and not order.known else ()
    plain = partial(_read_update, checkpoint, keys, n_heads, scale, options.device)
    magnitude = _magnitude(checkpoint, stem, d_out, n_heads, options)
    target = Target(f"{name}.weight")
    read: Callable[[], Update] = plain
    if magnitude is not None and options.base is not None:
        if rotary and not order.known and name != stem:
            raise AmbiguousAdapterError(
                f"{where}: {stem!r}: DoRA rescales the rows of the base, and whether these are in its order nothing "
                "says. Pass heads=(n_heads, n_kv_heads), or give the base with its config.json."
            )
        read = partial(_read_true_update, plain, magnitude, options.base, target)
    elif magnitude is not None:
        flags += ("dora-low-rank-part",)
    tensors = keys if magnitude is None else (*keys, f"{stem}.magnitude")
    return Module((d_out, d_in), r, scale, source, target, tensors, read, flags, magnitude)


def _magnitude(
    checkpoint: Checkpoint, stem: str, d_out: int, n_heads: int | None, options: ReadOptions
) -> partial[Tensor] | None:
    key = f"{stem}.magnitude"
    if key not in checkpoint:
        return None
    if checkpoint.shape(key) != (d_out,):
        raise AdapterFormatError(
            f"{options.where}: {key!r}: expected a magnitude for each of {d_out} rows, got shape "
            f"{checkpoint.shape(key)}."
        )
    return partial(_read_rows, checkpoint, key, n_heads, options.device)


def _alpha(config: Mapping[str, Any], where: str) -> float | None:
    """The lora_alpha of the configuration that torchtune writes for PEFT."""
    alpha = config.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: lora_alpha: expected a finite number, got {str(alpha)[:40]!r}.")
    return float(alpha)


def _scale(configured: float | None, given: float | None, r: int) -> tuple[float, ScaleSource]:
    if given is not None:
        return given / r, "caller"
    return (math.nan, "unknown") if configured is None else (configured / r, "config")


def _notes(
    modules: Mapping[str, Module], config: Mapping[str, Any], alpha: float | None, options: ReadOptions
) -> list[str]:
    notes = []
    if options.alpha is None and alpha is None:
        notes.append(
            "torchtune keeps alpha in the recipe (model.lora_alpha), not in this file: the scale is unknown. "
            "Pass alpha=."
        )
    declared = config.get("r")
    notes += [
        f"{name!r}: the configuration says r={declared}, the tensors have r={module.r}; they win."
        for name, module in modules.items()
        if isinstance(declared, int) and declared != module.r
    ]
    if options.base is None and any(module.magnitude for module in modules.values()):
        notes.append("DoRA: the updates are their low-rank part. Pass base= for what DoRA adds to the base.")
    return notes


def _read_update(
    checkpoint: Checkpoint, keys: tuple[str, str], n_heads: int | None, scale: float, device: torch.device
) -> LowRankUpdate:
    down, up = (checkpoint[key].to(device) for key in keys)
    return low_rank(half_split(up, n_heads), down, scale)


def _read_true_update(
    plain: partial[LowRankUpdate], magnitude: partial[Tensor], base: BaseWeights, target: Target
) -> DenseUpdate:
    update = plain()
    return true_update(update, base.matrix(target, update.shape).to(update.up.device), magnitude())


def _read_rows(checkpoint: Checkpoint, key: str, n_heads: int | None, device: torch.device) -> Tensor:
    return half_split(checkpoint[key].to(device), n_heads)
