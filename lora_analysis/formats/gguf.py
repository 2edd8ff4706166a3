"""GGUF adapters: llama.cpp's, as ``convert_lora_to_gguf.py`` writes them.

Conventions
-----------
Fields ``general.type`` = ``adapter``, ``adapter.type`` = ``lora``, ``general.architecture``, ``adapter.lora.alpha``.
``<base tensor>.lora_a`` (r, d_in) and ``<base tensor>.lora_b`` (d_out, r) in numpy's order, the base's tensor with
its ``.weight``: ``blk.3.attn_q.weight.lora_a``. ΔW = s · lora_b·lora_a with s = alpha / r, or 1 where alpha is 0 or
absent. Of ``token_embd``, ``lora_a`` is transposed, (vocab, r), beside ``lora_b`` (dim, r): the map (dim, vocab),
whose weight is stored transposed. Experts are stacked, (E, r, d_in) and (E, d_out, r): one module each,
``blk.3.ffn_up_exps.5``.

Modules keep GGUF's names, or get those of ``base=`` where the gguf library's table of names knows one that the base
has. For the architectures of ``checkpoint.gguf_names.PERMUTED_ARCHITECTURES`` the rows of q and k are in
interleaved rotary order, those of a base in half-split order, be it Hugging Face's or a GGUF file, whose rows
``load_base`` turns: the numbers of heads turn the adapter's, which a base's ``config.json`` or header says, or
``heads=(n_heads, n_kv_heads)``.

rsLoRA, alphas of single modules and DoRA have no place in the format: an rsLoRA adapter that was converted is
scaled by alpha / r, whatever it was trained with. Factors in Q8_0 are dequantised and claim no storage-noise floor.
Facts from llama.cpp ``convert_lora_to_gguf.py``, ``src/llama-adapter.{h,cpp}``, ``conversion/llama.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint, GGUFFile
from lora_analysis.checkpoint.gguf_names import PERMUTED_ARCHITECTURES, hugging_face_names, permuted_heads, reordered
from lora_analysis.checkpoint.protocol import rows
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.options import MAX_ALPHA, ReadOptions
from lora_analysis.formats.products import low_rank
from lora_analysis.formats.rotary import half_split, require_heads, said_by_the_base
from lora_analysis.update import LowRankUpdate

NAME = "gguf"
TAKES = ("heads",)

_FACTOR = re.compile(r"(?P<tensor>.+)\.lora_(?P<side>[ab])\Z", re.DOTALL)
_OURS = re.compile(r".+\.weight\.lora_[ab]\Z", re.DOTALL)


class _Factors(NamedTuple):
    """Where the factors of one update lie, and how to turn them."""

    keys: tuple[str, str]
    expert: int | None
    embedding: bool
    n_heads: int | None


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the header says that this is an adapter, or tensors end in ``.weight.lora_a`` or ``.weight.lora_b``."""
    return checkpoint.metadata.get("general.type") == "adapter" or any(map(_OURS.match, checkpoint))


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor of a GGUF adapter."""
    where = options.where
    architecture, alpha = _header(checkpoint, where)
    tensors = list(dict.fromkeys(match["tensor"] for match in map(_FACTOR.match, checkpoint) if match))
    modules: dict[str, Module] = {}
    for tensor in tensors:
        for name, module in _modules(checkpoint, tensor, architecture, alpha, options).items():
            if name in modules:
                raise AdapterFormatError(f"{where}: expected one update of {name!r}, got a second from {tensor!r}.")
            modules[name] = module
    unused = unused_tensors(
        checkpoint,
        {key for module in modules.values() for key in module.tensors},
        tensors,
        lambda key: "a full norm, which llama.cpp skips" if key.endswith("_norm.weight") else None,
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    return Contents(modules, unused, tuple(_notes(checkpoint, modules, tensors, architecture, options)))


def _header(checkpoint: Checkpoint, where: str) -> tuple[str, float]:
    """The architecture and alpha, of a header that llama.cpp would take."""
    metadata = checkpoint.metadata
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if metadata.get(key) != expected:
            raise AdapterFormatError(
                f"{where}: expected a GGUF header with {key} = {expected!r}, got {str(metadata.get(key))[:40]!r}. "
                "The file was read as 'gguf'; pass format= to read it as another."
            )
    if "adapter.alora.invocation_tokens" in _fields(checkpoint):
        raise UnsupportedAdapterError(
            f"{where}: activated LoRA, which acts from its invocation tokens on, is not read."
        )
    architecture = metadata.get("general.architecture")
    if not architecture:
        raise AdapterFormatError(f"{where}: expected general.architecture in the header, it is missing.")
    value = metadata.get("adapter.lora.alpha", "0")
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not abs(alpha) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: adapter.lora.alpha: expected a finite number, got {value[:40]!r}.")
    return architecture, alpha


def _fields(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.fields if isinstance(checkpoint, GGUFFile) else checkpoint.metadata


def _modules(
    checkpoint: Checkpoint, tensor: str, architecture: str, alpha: float, options: ReadOptions
) -> dict[str, Module]:
    """The update of a matrix, or of each of a stack of experts."""
    where, keys = options.where, (f"{tensor}.lora_a", f"{tensor}.lora_b")
    for key in keys:
        if key not in checkpoint:
            raise AdapterFormatError(f"{where}: {tensor!r}: expected lora_a and lora_b, {key!r} is missing.")
    shape_a, shape_b = (checkpoint.shape(key) for key in keys)
    embedding = tensor == "token_embd.weight"
    stacked = len(shape_a) == len(shape_b) == 3 and shape_a[0] == shape_b[0] and not embedding
    if (len(shape_a), len(shape_b)) != (2, 2) and not stacked:
        _refuse_shapes(where, tensor, shape_a, shape_b, embedding)
    d_out, r = shape_b[-2:]
    r_a, d_in = shape_a[-2:][::-1] if embedding else shape_a[-2:]
    if r_a != r or 0 in shape_a + shape_b:
        _refuse_shapes(where, tensor, shape_a, shape_b, embedding)
    scale, source = _scale(alpha, options.alpha, r)
    modules = {}
    for expert in range(shape_b[0]) if stacked else (None,):
        target, elsewhere = _target(tensor, expert, architecture, embedding, options.base)
        n_heads = _turned(tensor, architecture, elsewhere, options)
        if n_heads is not None:
            require_heads(where, tensor, d_out, n_heads)
        name = target.tensor.removesuffix(".weight") + (f".{expert}" if target.expert is not None else "")
        factors = _Factors(keys, expert, embedding, n_heads)
        read = partial(_read_update, checkpoint, factors, scale, options.device)
        modules[name] = Module((d_out, d_in), r, scale, source, target, keys, read, embedding=embedding)
    return modules


def _refuse_shapes(
    where: str, tensor: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...], embedding: bool
) -> None:
    expected = "(vocab, r) and lora_b (dim, r)" if embedding else "(r, d_in) and lora_b (d_out, r), or stacks of them"
    raise AdapterFormatError(f"{where}: {tensor!r}: expected lora_a {expected}, got {shape_a} and {shape_b}.")


def _target(
    tensor: str, expert: int | None, architecture: str, embedding: bool, base: BaseWeights | None
) -> tuple[Target, bool]:
    """GGUF's own tensor, or the base's under the name it has there; and whether the base knows it by such a name.

    If it does, the rows that it gives are those of a Hugging Face model: those of a GGUF file are turned when they
    are read. A mapping of GGUF's names gives them as they are.
    """
    verbatim = Target(tensor, transposed=embedding, expert=expert)
    if base is None:
        return verbatim, False
    places = [] if expert is None else _experts_apart(tensor, expert, architecture)
    places += [Target(name, transposed=embedding, expert=expert) for name in hugging_face_names(tensor, architecture)]
    exact = [place for place in places if place.tensor in base]
    # Names differ by who wrote the model; the first that the base knows is as good as the others it knows.
    known = next(iter(exact), None) or next((place for place in places if base.has_all([place.tensor])), None)
    return verbatim if known is None or tensor in base else known, known is not None


def _experts_apart(tensor: str, expert: int, architecture: str) -> list[Target]:
    """The tensors of one expert in models that do not stack them."""
    names = [name for name in hugging_face_names(tensor, architecture) if ".experts." in name]
    return [Target(name.replace(".experts.", f".experts.{expert}.")) for name in names]


def _turned(tensor: str, architecture: str, elsewhere: bool, options: ReadOptions) -> int | None:
    """The heads by which the rows of q and k are turned to the order that a base has elsewhere than in GGUF.

    Raises
    ------
    AdapterFormatError
        If the orders would differ.
    """
    where, base = f"{options.where}: {tensor!r}", options.base
    if elsewhere and reordered(tensor, {"general.architecture": architecture}):
        raise AdapterFormatError(
            f"{where}: GGUF has the heads of {architecture!r} in an order of its own, which the base has not. "
            "Read it without base=, or read the adapter that it was made from."
        )
    if permuted_heads(tensor, architecture, (1, 1)) is None:
        return None
    heads = options.heads
    if base is not None and elsewhere and heads is None:
        heads = base.heads
        if heads is None:
            raise AdapterFormatError(
                f"{where}: its rows are in another order than the base gives them. "
                "Pass heads=(n_heads, n_kv_heads) of the model."
            )
    if base is not None and tensor in base and not elsewhere and heads is not None:
        raise AdapterFormatError(
            f"{where}: heads= turns its rows to the order of Hugging Face models, and the base has GGUF's. Leave "
            "heads= out, or give the Hugging Face base."
        )
    return None if heads is None else permuted_heads(tensor, architecture, heads)


def _scale(alpha: float, given: float | None, r: int) -> tuple[float, ScaleSource]:
    if given is not None:
        return given / r, "caller"
    return (alpha / r, "header") if alpha else (1.0, "format default")


def _notes(
    checkpoint: Checkpoint,
    modules: Mapping[str, Module],
    tensors: list[str],
    architecture: str,
    options: ReadOptions,
) -> list[str]:
    notes = []
    rotary = any(permuted_heads(tensor, architecture, (1, 1)) for tensor in tensors)
    counts = options.base.heads if options.base is not None and rotary else None
    notes += said_by_the_base(options.heads, counts)
    if rotary and options.heads is None and counts is None:
        notes.append(
            f"GGUF has the rows of q and k of {architecture!r} in interleaved rotary order: their output side compares "
            "with no Hugging Face adapter or base. Pass heads=(n_heads, n_kv_heads) to turn them."
        )
    if options.heads is not None and architecture not in PERMUTED_ARCHITECTURES:
        notes.append(f"heads= has no effect: GGUF does not permute the rows of q and k of {architecture!r}.")
    quantised = sorted({_stored(checkpoint, key) for module in modules.values() for key in module.tensors} - {""})
    if quantised:
        notes.append(f"factors are stored quantised ({', '.join(quantised)}): their noise floor is unknown.")
    return notes


def _stored(checkpoint: Checkpoint, key: str) -> str:
    """The type a quantised tensor is stored in; empty for others."""
    quantised = isinstance(checkpoint, GGUFFile) and checkpoint.is_quantised(key)
    return checkpoint.stored_type(key) if isinstance(checkpoint, GGUFFile) and quantised else ""


def _read_update(checkpoint: Checkpoint, factors: _Factors, scale: float, device: torch.device) -> LowRankUpdate:
    if factors.expert is None:
        a, b = (checkpoint[key].to(device) for key in factors.keys)
    else:
        a, b = (rows(checkpoint, key, factors.expert, factors.expert + 1)[0].to(device) for key in factors.keys)
    update = low_rank(half_split(b, factors.n_heads), a.mT if factors.embedding else a, scale)
    quantised = any(_stored(checkpoint, key) for key in factors.keys)
    return replace(update, stored_eps=math.nan) if quantised else update
