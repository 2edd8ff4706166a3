"""Which model a base is and how many attention heads it has, as its configuration or header says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_analysis.checkpoint.gguf_header import Field
from lora_analysis.checkpoint.gguf_names import head_counts

_TEXT = "text_config"
"""Where the configuration of a model of several kinds of input has that of its language model."""


class Architecture(NamedTuple):
    """What is known of a model besides its weights."""

    name: str | None = None
    """``llama``, ``qwen2``, …: transformers' ``model_type``, or GGUF's ``general.architecture``."""
    heads: tuple[int, int] | None = None
    """Numbers of query and of key-value heads, where all layers have the same."""


def of_config(config: Mapping[str, Any]) -> Architecture:
    """What a ``config.json`` of transformers says.

    Examples
    --------
    >>> of_config({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8})
    Architecture(name='llama', heads=(32, 8))
    >>> of_config({"num_attention_heads": 12}).heads, of_config({"num_attention_heads": "12"}).heads
    ((12, 12), None)
    """
    text = config.get(_TEXT)
    if isinstance(text, Mapping):
        config = text
    name = config.get("model_type")
    queries = _count(config.get("num_attention_heads"))
    keys = queries if config.get("num_key_value_heads") is None else _count(config["num_key_value_heads"])
    heads = None if queries is None or keys is None else (queries, keys)
    return Architecture(name if isinstance(name, str) else None, heads)


def of_gguf(fields: Mapping[str, Field]) -> Architecture:
    """What the header of a GGUF file says.

    Examples
    --------
    >>> fields = {"general.architecture": "llama", "llama.attention.head_count": 32, "llama.block_count": 2}
    >>> of_gguf(fields)
    Architecture(name='llama', heads=(32, 32))
    >>> of_gguf(fields | {"llama.attention.head_count_kv": (8, 4)}).heads is None
    True
    """
    name = fields.get("general.architecture")
    blocks = _count(fields.get(f"{name}.block_count")) or 1
    # Where a field is no array every block has the same.
    several = any(isinstance(fields.get(f"{name}.attention.head_count{side}"), tuple) for side in ("", "_kv"))
    found = {head_counts(fields, block) for block in range(min(blocks, _MOST_BLOCKS) if several else 1)}
    heads = found.pop() if len(found) == 1 else None
    return Architecture(name if isinstance(name, str) else None, heads)


_MOST_BLOCKS = 2**12


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None
