"""Names of tensors in the files of diffusers and its kin: which module of the base, and which part of its update."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.options import ReadOptions

_PART = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|\.lora_embedding_(?P<embedding>[AB])(?:\.(?P<adapter_e>[^.]+))?"
    r"|(?P<old>_lora[12]?|\.lora|\.lora_linear_layer)\.(?P<old_side>down|up)\.weight"
    r"|\.lora_(?P<kohya_side>down|up)\.weight"
    r"|\.lora_magnitude_vector(?:\.(?P<adapter_m>(?!weight\Z)[^.]+))?(?:\.weight)?"
    r"|\.(?P<other>alpha|dora_scale)"
    r")\Z",
    re.DOTALL,
)
_DECISIVE = re.compile(r"(?:_lora[12]?|\.lora|\.lora_linear_layer)\.(?:down|up)\.weight\Z")
"""Endings that no other format has."""
_DIFFUSION = re.compile(
    r"(?!base_model\.)(?:"
    r"(?:unet|diffusion_model|text_encoder(?:_[0-9])?)\."
    r"|(?:.*[._])?transformer_blocks\."
    r"|(?:.*[._])?(?:double|single)(?:_stream)?_blocks\."
    r"|transformer(?:_[0-9])?\..*\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."
    r")",
    re.DOTALL,
)
"""Names that language models, which have ``transformer.h`` and ``transformer.blocks`` too, do not use."""

_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What the oldest files call the projections of a text encoder, and what it calls them itself."""
_XLABS = {
    "double_blocks": {
        "qkv_lora1": "img_attn.qkv",
        "proj_lora1": "img_attn.proj",
        "qkv_lora2": "txt_attn.qkv",
        "proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {"qkv_lora": "linear1.qkv", "proj_lora": "linear2"},
}
_XLABS_STEM = re.compile(
    r"(?P<block>(?:.+\.)?(?P<kind>double_blocks|single_blocks)\.[0-9]+)\.processor\.(?P<layer>\w+)\Z", re.DOTALL
)


@dataclass(slots=True)
class Parts:
    """The tensors of one module, by what they are to it: ``down``, ``up``, ``alpha``, ``magnitude``, …."""

    keys: dict[str, str] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)
    """What the file calls the module."""
    embedding: bool = False


def is_diffusers(name: str) -> bool:
    """Whether a name is that of a factor in a file of diffusers' or its kin's, whatever else the file holds."""
    part = _PART.match(name)
    if part is None or part["other"] is not None:
        return False
    return _DECISIVE.search(name) is not None or _DIFFUSION.match(name) is not None


def parts_by_module(checkpoint: Checkpoint, options: ReadOptions) -> tuple[dict[str, Parts], set[str]]:
    """Module name to its tensors, of the one adapter asked for; and the tensors of the others."""
    parsed = list(_parsed(checkpoint))
    adapter = _chosen(parsed, options)
    nameless = any(named is None and part in ("down", "up") for _, part, _, named in parsed)
    found: dict[str, Parts] = {}
    of_others: set[str] = set()
    for key, part, stem, named in parsed:
        # What has no name belongs to the one that has, unless there is one without; alphas belong to all.
        shared = named is None and (part in ("alpha", "dora_scale") or not nameless)
        if named != adapter and not shared:
            of_others.add(key)
            continue
        module = module_name(stem)
        parts = found.setdefault(module, Parts())
        if part in parts.keys:
            raise AdapterFormatError(
                f"{options.where}: {module!r}: expected one {part}, got {parts.keys[part]!r} and {key!r}."
            )
        parts.keys[part] = key
        parts.stems.add(stem)
        parts.embedding |= ".lora_embedding_" in key[len(stem) :]
    whole = {module: parts for module, parts in found.items() if not parts.keys.keys().isdisjoint(("down", "up"))}
    return whole, of_others


def _parsed(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str, str | None]]:
    """Key, part, stem and adapter's name of every tensor whose name says what it is."""
    for key in checkpoint:
        match = _PART.match(key)
        if match is None:
            continue
        stem, adapter = match["stem"], match["adapter"] or match["adapter_e"] or match["adapter_m"]
        if side := match["peft"] or match["embedding"]:
            part = "down" if side == "A" else "up"
        elif side := match["old_side"] or match["kohya_side"]:
            part = side
        else:
            part = match["other"] or "magnitude"
        if part == "alpha" and (factor := _PART.match(stem)):  # of …to_q_lora.down.weight, as network_alphas has it
            stem, adapter = factor["stem"], adapter or factor["adapter"]
            stem += factor["old"] if (factor["old"] or "").startswith("_") else ""
        elif (match["old"] or "").startswith("_"):
            stem += match["old"]
        elif part == "magnitude" and stem.rpartition(".")[2] in _PROJECTIONS:  # of …to_out_lora, which loses its end
            stem += "_lora"
        yield key, part, stem, adapter


def _chosen(parsed: Iterable[tuple[str, str, str, str | None]], options: ReadOptions) -> str | None:
    """The name of the adapter asked for, of those in the file."""
    names = dict.fromkeys(named for _, part, _, named in parsed if part in ("down", "up"))
    if options.name in names:
        return options.name
    held = ", ".join("one without a name" if name is None else repr(name) for name in names)
    if len(names) > 1:
        raise AdapterFormatError(f"{options.where}: holds several adapters ({held}). Pass name= with one.")
    if options.name is not None and names:
        raise AdapterFormatError(
            f"{options.where}: expected an adapter named {options.name!r}, found {held}. Leave name= out."
        )
    return next(iter(names), None)


def module_name(stem: str) -> str:
    """The base model's name of a module, its component before it.

    Examples
    --------
    >>> module_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    >>> module_name("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora")
    'text_encoder.text_model.encoder.layers.0.self_attn.q_proj'
    >>> module_name("double_blocks.7.processor.qkv_lora2")
    'double_blocks.7.txt_attn.qkv'
    """
    if (xlabs := _XLABS_STEM.match(stem)) and (layer := _XLABS[xlabs["kind"]].get(xlabs["layer"])):
        return f"{xlabs['block']}.{layer}"
    stem = stem.removesuffix(".lora").removesuffix(".lora_linear_layer")  # of their alphas
    components = [component for component in stem.split(".") if component != "processor"] or [stem]
    if components[-1].endswith("_lora"):
        last = components[-1].removesuffix("_lora")
        if components[0].startswith("text_encoder") or "self_attn" in components:
            last = _PROJECTIONS.get(last, last)
        components[-1] = "to_out.0" if last == "to_out" else last
    return ".".join(components)
