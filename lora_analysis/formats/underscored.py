"""Which base tensor an underscored name means: ``lora_unet_mid_block_attentions_0_proj_in``.

Conventions
-----------
A stem is a prefix for the component and a module path whose dots were written as underscores, which cannot be undone
(``to_q_proj`` may be ``to.q.proj``). So the base decides: its own paths are underscored and looked up. It may hold one
component or several, each under a prefix of its own (``text_encoder.``, ``conditioner.embedders.0.transformer.``) or
bare; one prefix serves all modules of a component. A base tensor counts only if the update fits its shape. What
could be either of two tensors is refused.

A resolved module is called ``component.path`` as in diffusers' pipelines (``unet.mid_block.…``, ``text_encoder_2.…``),
after the base's own path. Original blocks of Stable Diffusion's U-Net (``input_blocks``) are found under diffusers'
names and the other way round (``formats.unet_names``); OpenCLIP's names of a text encoder (``resblocks``) are not.
Facts from kohya's ``networks/lora.py`` and ``lora_flux.py`` (prefixes) and LyCORIS' ``wrapper.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError
from lora_analysis.formats.unet_names import diffusers_form

_COMPONENTS = {
    "lora_unet": "unet",
    "lora_transformer": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lycoris": "",
}
_UNDERSCORED = re.compile(rf"(?P<prefix>{'|'.join(_COMPONENTS)})_+(?P<path>[^._][^.]*)\Z")
_PREFIXES = {
    "unet": ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model."),
    "text_encoder": (
        "text_encoder.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
    # kohya calls Flux' T5 the third encoder, diffusers the second.
    "text_encoder_3": ("text_encoder_3.", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
    "": (),
}
"""What pipelines and single-file checkpoints put before a component's paths, the likelier first."""

_PIPELINE = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
"""diffusers' own prefixes, which stay in a module's name."""

_NUMBERED = re.compile(r"_[0-9]+\.\Z")
_UNET_BLOCKS = ("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block", "time_embed")
_MAX_DEPTH = 5
"""Components of a base's name that may come before a component's own path."""

_UNKNOWN = 100
"""Rank of a prefix that no list knows."""


class Stem(NamedTuple):
    """An adapter's name of a module, taken apart."""

    component: str
    path: str
    """Underscored."""


class Resolved(NamedTuple):
    """A module's name, and the base's own name of its weight."""

    module: str
    tensor: str


@dataclass(slots=True)
class _Hits:
    """What one prefix of the base offers to the stems of one component."""

    paths: dict[str, list[str]] = field(default_factory=dict)


def parsed(stem: str) -> Stem:
    """The component and the underscored path of a stem; no component where the prefix is none known.

    Examples
    --------
    >>> parsed("lora_te2_text_model_encoder_layers_0_mlp_fc1")
    Stem(component='text_encoder_2', path='text_model_encoder_layers_0_mlp_fc1')
    >>> parsed("diffusion_model.blocks.0.ffn")
    Stem(component='unet', path='blocks_0_ffn')
    """
    if match := _UNDERSCORED.match(stem):
        return Stem(_COMPONENTS[match["prefix"]], match["path"])
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if stem.startswith(prefix):
                return Stem(component, stem.removeprefix(prefix).replace(".", "_"))
    return Stem("", stem.replace(".", "_"))


def resolved(shapes: Mapping[str, tuple[int, int]], base: BaseWeights, where: str) -> dict[str, Resolved]:
    """The base tensors of an adapter's stems; those that the base does not hold are left out.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        Stems, and the shapes (d_out, d_in) of their updates.
    base : BaseWeights
    where : str
        The adapter's file, for messages.

    Raises
    ------
    BaseWeightsError
        If the base holds none of them, or a stem could be either of two tensors.
    """
    index = _index(base)
    by_component: dict[str, dict[str, str]] = {}
    for stem in shapes:
        component, path = parsed(stem)
        by_component.setdefault(component, {})[stem] = path
    found: dict[str, Resolved] = {}
    misfits: dict[str, str] = {}
    for component, paths in by_component.items():
        hits = _hits(component, paths, shapes, index, base, misfits)
        if hits:
            found |= _chosen(component, hits, base, where)
    if not found:
        raise BaseWeightsError(_none_found(shapes, misfits, base, where))
    owners: dict[str, str] = {}
    for stem, (_, tensor) in found.items():
        if owners.setdefault(tensor, stem) != stem:
            raise BaseWeightsError(
                f"{where}: {owners[tensor]!r} and {stem!r} could both be {tensor!r} of {base.source}. Give a base "
                "whose names tell its components apart (text_encoder., text_encoder_2., …)."
            )
    return found


def _index(base: BaseWeights) -> dict[str, list[tuple[str, str]]]:
    """Every ending of the base's paths, underscored, with what comes before it and the whole path."""
    index: dict[str, list[tuple[str, str]]] = {}
    for tensor in base:
        path = tensor.removesuffix(".weight")
        if path == tensor:
            continue
        start = 0
        for _ in range(_MAX_DEPTH):
            ending = diffusers_form(path[start:].replace(".", "_"))
            index.setdefault(ending, []).append((path[:start], path))
            start = path.find(".", start) + 1
            if not start:
                break
    return index


def _hits(
    component: str,
    paths: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    index: Mapping[str, list[tuple[str, str]]],
    base: BaseWeights,
    misfits: dict[str, str],
) -> dict[str, _Hits]:
    """What each prefix of the base offers to a component's stems, where the shapes fit."""
    own = _PREFIXES[component]
    foreign = tuple(p for others in _PREFIXES.values() for p in others if p not in own) if component else ()
    hits: dict[str, _Hits] = {}
    for stem, path in paths.items():
        for form in _forms(component, path):
            for prefix, whole in index.get(diffusers_form(form), ()):
                if prefix.startswith(foreign) and not prefix.startswith(own):
                    continue
                stored = base.shape(f"{whole}.weight")
                if not _fits(stored, shapes[stem]):
                    misfits.setdefault(stem, f"{whole}.weight has shape {stored}")
                    continue
                offered = hits.setdefault(prefix, _Hits()).paths.setdefault(stem, [])
                if whole not in offered:
                    offered.append(whole)
    return hits


def _forms(component: str, path: str) -> Iterator[str]:
    yield path
    # transformers 5 dropped this level from CLIP's text models.
    if component.startswith("text_encoder") and path.startswith("text_model_"):
        yield path.removeprefix("text_model_")


def _fits(stored: tuple[int, ...], shape: tuple[int, int]) -> bool:
    if len(stored) < 2:
        return False
    unfolded = (stored[0], math.prod(stored[1:]))
    return shape == unfolded or (len(stored) == 2 and shape == stored[::-1])


def _chosen(component: str, hits: Mapping[str, _Hits], base: BaseWeights, where: str) -> dict[str, Resolved]:
    """The stems under the prefix that offers the most of them."""
    own = _PREFIXES[component]

    def order(prefix: str) -> tuple[int, int]:
        # Wan's "transformer_2" has the layers of its "transformer", and no less right to a file.
        known = prefix if prefix in own else _NUMBERED.sub(".", prefix)
        rank = own.index(known) if known in own else len(own) if not prefix else _UNKNOWN
        return -len(hits[prefix].paths), rank

    first, *others = sorted(hits, key=order)
    offered = hits[first].paths
    for other in others:
        theirs = hits[other].paths
        if order(other) == order(first) and theirs != offered:
            stem = next(stem for stem in offered if offered[stem] != theirs.get(stem))
            raise BaseWeightsError(_ambiguous(stem, [offered[stem][0], *theirs.get(stem, [other])[:1]], base, where))
    for stem, paths in offered.items():
        if len(paths) > 1:
            raise BaseWeightsError(_ambiguous(stem, paths, base, where))
    named = _name(component, first, [paths[0] for paths in offered.values()])
    return {
        stem: Resolved(named + path.removeprefix(first) if component else path, f"{path}.weight")
        for stem, (path,) in offered.items()
    }


def _name(component: str, prefix: str, paths: list[str]) -> str:
    """What a component is called in the names of its modules."""
    if prefix in _PIPELINE:
        return prefix
    if component == "unet":
        convolutional = any(path.removeprefix(prefix).startswith(_UNET_BLOCKS) for path in paths)
        return "unet." if convolutional else "transformer."
    return f"{component}."


def _ambiguous(stem: str, paths: list[str], base: BaseWeights, where: str) -> str:
    first, second = (f"{path}.weight" for path in paths[:2])
    return (
        f"{where}: {stem!r} could be {first!r} or {second!r} of {base.source}. Give the component's own weights as "
        "the base, or leave base= out and keep the file's names."
    )


def _none_found(
    shapes: Mapping[str, tuple[int, int]], misfits: Mapping[str, str], base: BaseWeights, where: str
) -> str:
    stem, shape = next(iter(shapes.items()))
    reason = "no name fits"
    if misfits:
        stem, reason = next(iter(misfits.items()))
        shape = shapes[stem]
    return (
        f"{where}: expected the base to hold its {len(shapes)} modules, found none among the {len(base)} tensors of "
        f"{base.source} ({stem!r}, {shape[0]}x{shape[1]}: {reason}). Is this the model the adapter was trained on?"
    )
