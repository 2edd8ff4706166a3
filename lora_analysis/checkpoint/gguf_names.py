"""What GGUF calls the tensors of a model, and which of their rows it permutes.

A converter to GGUF renames tensors (``model.layers.3.self_attn.q_proj`` -> ``blk.3.attn_q``), stacks experts, and
for some architectures reorders the rows of q and k from half-split to interleaved rotary order (``rotary``). The
names come from the ``gguf`` library's own tables, ``TensorNameMap``; the permuted architectures are those whose
class in llama.cpp's ``conversion/`` permutes ``q_proj`` and ``k_proj`` (or the parts of a fused one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from lora_analysis.checkpoint.gguf_header import Field
from lora_analysis.errors import UnsupportedAdapterError

PERMUTED_ARCHITECTURES = frozenset(
    {
        "arcee",
        "arctic",
        "baichuan",
        "bailingmoe",
        "chameleon",
        "deci",
        "deepseek",
        "granite",
        "granitehybrid",
        "granitemoe",
        "internlm2",
        "llada",
        "llama",
        "llama-embed",
        "minicpm",
        "mistral3",
        "nemotron_h",
        "nemotron_h_moe",
        "olmo",
        "smollm3",
        "xverse",
    }
)
"""Architectures of which GGUF holds the rows of q and k in interleaved rotary order, Hugging Face half-split."""

_LINEAR_ATTENTION = r"attn_qkv|attn_gate|ssm_\w+"
_REORDERED = {
    "bloom": r"attn_qkv",
    "falcon": r"attn_qkv",
    "gptneox": r"attn_qkv",
    "plamo": r"attn_q|attn_output",
    "qwen35": _LINEAR_ATTENTION,
    "qwen35moe": _LINEAR_ATTENTION,
    "qwen3next": r"attn_qkv|attn_gate|ssm_in",
}
"""Tensors whose rows or columns the converter puts in yet another order, by heads or groups of them."""

_BLOCK = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_PERMUTED = re.compile(r"blk\.[0-9]+\.attn_(?P<side>[qk])\.(?:weight|bias)\Z")
_OF_BLOCK = re.compile(r"blk\.[0-9]+\.(?P<role>\w+)\.(?:weight|bias)\Z")
_SUFFIX = re.compile(r"\.(?:weight|bias)\Z")


class Place(NamedTuple):
    """Where GGUF keeps a tensor of a model: a tensor of its own, or one of a stack of experts."""

    tensor: str
    expert: int | None


def hugging_face_names(tensor: str, architecture: str) -> tuple[str, ...]:
    """Every name that models of an architecture may have for a tensor of GGUF.

    Parameters
    ----------
    tensor : str
        ``blk.3.attn_q.weight``.
    architecture : str
        The field ``general.architecture``.

    Returns
    -------
    tuple of str
        Without doubles; () for what the library does not know. Names differ by who wrote the model, so that the
        one that a base holds is the one.

    Examples
    --------
    >>> hugging_face_names("blk.3.attn_q.weight", "llama")[:2]
    ('model.layers.3.self_attn.q_proj.weight', 'layers.3.self_attn.q_proj.weight')
    """
    stem, ending = _split(tensor)
    block = _BLOCK.search(stem)
    template = _BLOCK.sub("{bid}", stem, count=1) if block else stem
    names = _templates(architecture).get(template, ())
    return tuple(dict.fromkeys(name.replace("{bid}", block[0] if block else "") + ending for name in names))


def gguf_place(tensor: str, architecture: str) -> Place | None:
    """Where GGUF keeps a tensor that a Hugging Face model calls so; None for what the library does not know.

    Examples
    --------
    >>> gguf_place("model.layers.3.self_attn.o_proj.weight", "llama")
    Place(tensor='blk.3.attn_output.weight', expert=None)
    >>> gguf_place("model.layers.3.mlp.experts.17.up_proj.weight", "qwen2moe")
    Place(tensor='blk.3.ffn_up_exps.weight', expert=17)
    """
    stem, ending = _split(tensor)
    inverse = {name: found for found, names in _templates(architecture).items() for name in names}
    expert = re.search(r"(?<=\.experts)\.([0-9]+)(?=\.)", stem)
    bare = stem if expert is None else stem[: expert.start()] + stem[expert.end() :]
    number = None if expert is None else int(expert[1])
    for block in (None, *_BLOCK.finditer(bare)):
        template = bare if block is None else f"{bare[: block.start()]}{{bid}}{bare[block.end() :]}"
        if found := inverse.get(template):
            return Place(found.replace("{bid}", block[0] if block else "") + ending, number)
    return None


def permuted_heads(tensor: str, architecture: str, heads: tuple[int, int]) -> int | None:
    """How many heads the rows of a tensor of GGUF were permuted in, None if they were not.

    Parameters
    ----------
    tensor : str
        ``blk.3.attn_k.weight``.
    architecture : str
        The field ``general.architecture``.
    heads : (int, int)
        Numbers of query and of key-value heads.

    Examples
    --------
    >>> permuted_heads("blk.3.attn_k.weight", "llama", (32, 8))
    8
    >>> permuted_heads("blk.3.attn_v.weight", "llama", (32, 8)) is None
    True
    >>> permuted_heads("blk.3.attn_q.weight", "qwen2", (32, 8)) is None
    True
    """
    found = _PERMUTED.match(tensor)
    if found is None or architecture not in PERMUTED_ARCHITECTURES:
        return None
    return heads[0] if found["side"] == "q" else heads[1]


def reordered(tensor: str, fields: Mapping[str, Field]) -> bool:
    """Whether a tensor of GGUF lies in an order that no rule here undoes.

    Examples
    --------
    >>> reordered("blk.0.attn_qkv.weight", {"general.architecture": "bloom"})
    True
    >>> reordered("blk.0.attn_qkv.weight", {"general.architecture": "phi3"})
    False
    """
    architecture = str(fields.get("general.architecture", ""))
    found = _OF_BLOCK.match(tensor)
    if found is None:
        return False
    # Of GLM-4's models for images alone, whose rotary positions have sections.
    if architecture == "glm4" and fields.get("glm4.rope.dimension_sections") is not None:
        return found["role"] in ("attn_q", "attn_k")
    roles = _REORDERED.get(architecture)
    return roles is not None and re.fullmatch(roles, found["role"]) is not None


def head_counts(fields: Mapping[str, Field], block: int) -> tuple[int, int] | None:
    """Numbers of query and of key-value heads of a block, as the header of a model says; None if it does not.

    Examples
    --------
    >>> fields = {"general.architecture": "llama", "llama.attention.head_count": 32}
    >>> head_counts(fields | {"llama.attention.head_count_kv": (8, 4)}, block=1)
    (32, 4)
    >>> head_counts(fields, block=0)  # no grouped queries
    (32, 32)
    """
    prefix = f"{fields.get('general.architecture')}.attention"
    queries = _of_block(fields.get(f"{prefix}.head_count"), block)
    keys = _of_block(fields.get(f"{prefix}.head_count_kv"), block) or queries
    return None if queries is None or keys is None else (queries, keys)


def _of_block(field: Field, block: int) -> int | None:
    value = (field[block] if block < len(field) else None) if isinstance(field, tuple) else field
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _split(tensor: str) -> tuple[str, str]:
    ending = _SUFFIX.search(tensor)
    return (tensor[: ending.start()], ending[0]) if ending else (tensor, "")


@lru_cache(maxsize=8)
def _templates(architecture: str) -> dict[str, tuple[str, ...]]:
    """Names of an architecture's tensors in GGUF to their names elsewhere, both with {bid} for the block."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedAdapterError(
            'GGUF\'s names of tensors are those of its own library: pip install "lora-analysis[gguf]".'
        ) from error
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        return {}
    known = set(gguf.MODEL_TENSORS[numbers[architecture]])
    names = gguf.get_tensor_name_map(numbers[architecture], 0)
    tables = (names.mappings_cfg, names.block_mappings_cfg)
    return {gguf.TENSOR_NAMES[kind]: tuple(keys) for table in tables for kind, keys in table.items() if kind in known}
