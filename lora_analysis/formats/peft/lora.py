"""PEFT's LoRA: the product of two factors per module, and what DoRA makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lora_analysis.adapter import Adapter, Contents, Module, ScaleSource
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats.ledger import unused_tensors
from lora_analysis.formats.notes import first_of_each
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.peft import experts, split
from lora_analysis.formats.peft.configuration import (
    Remark,
    Scaling,
    about,
    disagreement_on_r,
    flag,
    require_types,
)
from lora_analysis.formats.peft.factors import Recipe, read_magnitude, read_update
from lora_analysis.formats.peft.fields import require_known
from lora_analysis.formats.peft.initial import compared_scales, initial_adapter, initial_update, require_agreement
from lora_analysis.formats.peft.names import FACTOR, MAGNITUDE, Layer, layers, module_name, plain, stem_of
from lora_analysis.formats.peft.places import Live, Place, place

LOW_RANK_PART = "dora-low-rank-part"
LESS_INITIAL = "less-initial"
_REFUSED_TENSORS = (
    (r"\.lora_diag(\.|$)", "KaSA"),
    (r"\.lora_monteclora_sampler\.", "MonteCLoRA"),
    (r"\.lora_arrow\.", "Arrow routing"),
)
_SIDE_TENSORS = (
    (r"\.lora_B(\.[^.]+)?\.bias$", "lora_bias: adds scale times it to the output, no part of ΔW"),
    (r"\.original_module\.", "the base's own tensor, kept beside modules_to_save"),
    (r"\.modules_to_save\.", "modules_to_save: a full tensor in place of the base's"),
    (r"\.token_adapter\.|trainable_tokens", "trainable tokens: rows in place of the embedding's"),
    (r"\.base_layer\.weight$", "the base's own tensor"),
)


def read(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    options: ReadOptions,
    live: Mapping[str, Live] | None = None,
) -> Contents:
    """Describe every tensor of a PEFT LoRA adapter.

    Parameters
    ----------
    checkpoint : Checkpoint
    config : mapping
        ``adapter_config.json``; empty where there is none.
    options : ReadOptions
    live : mapping of str to Live, optional
        What the layers of a live model say of themselves, by their names; it wins over the configuration.
    """
    where = options.where
    require_types(config, where)
    notes = require_known(config, where)
    _refuse_tensors(checkpoint, where)
    initial, said = initial_adapter(config, options)
    notes += said
    split.require_all(options)
    if options.heads is not None and options.split is None:
        raise UnsupportedAdapterError(
            f"{where}: heads= says how split= cuts a fused weight of a PEFT LoRA, and has no other meaning here. Leave "
            "heads= out."
        )
    scaling = Scaling(config, options.alpha, where)
    notes += scaling.notes
    found = layers(checkpoint, options)
    if not found:
        return Contents({})
    placed = {one.name: one for one in _places(checkpoint, found, config, scaling, options, live or {})}
    if initial is not None:
        require_agreement(initial, placed, where)
    notes += _notes_on_the_whole(config, found, options)
    modules: dict[str, Module] = {}
    remarks: list[Remark] = []
    for one in placed.values():
        remarks += _remarks_on_r(one, scaling)
        scale, source = scaling.scale(one.path, one.r)
        if live and one.layer.stem in live:
            own = live[one.layer.stem].scale
            if not math.isclose(own, scale, rel_tol=1e-12):
                text = f"the layer's own scale, {own:g}, wins over the configuration's {scale:g}."
                remarks.append(about(one.name, text))
            scale = own
        else:
            remarks += [("alpha_pattern", doubt) for doubt in scaling.doubts(one.path)]
        if initial is not None:
            remarks += compared_scales(initial.modules[one.name].scale, scale, one.name, where)
        modules |= _modules(checkpoint, one, scale, source, initial, options)
    if options.split is not None and all(module.target.rows is None for module in modules.values()):
        raise UnsupportedAdapterError(
            f"{where}: split= names the slots of a fused weight, but no module of the file is known as one "
            f"({', '.join(split.CONTIGUOUS)}). Leave split= out."
        )
    unused = unused_tensors(
        checkpoint,
        {key for module in modules.values() for key in module.tensors},
        {stem for stem in map(stem_of, checkpoint) if stem is not None},
        partial(reason, config=config),
        otherwise="a full tensor, no part of any update",
        where=where,
    )
    # Experts of one parameter have one path, and say the same once.
    return Contents(modules, unused, (*notes, *first_of_each(dict.fromkeys(remarks))))


def _places(
    checkpoint: Checkpoint,
    found: Mapping[str, Layer],
    config: Mapping[str, Any],
    scaling: Scaling,
    options: ReadOptions,
    live: Mapping[str, Live],
) -> Iterator[Place]:
    transposed = flag(config, "fan_in_fan_out", options.where)
    owners = experts.wrapped(checkpoint, found, config, scaling, options, live)
    inner = {layer.stem: owner for owner, wrappers in owners.items() for layer in wrappers}
    seen: dict[str, Place] = {}
    for stem, layer in found.items():
        if stem not in inner:
            turned = live[stem].transposed if stem in live else transposed
            made: Iterable[Place] = [place(checkpoint, layer, found, transposed=turned, where=options.where)]
        elif layer is owners[inner[stem]][0]:
            owner = inner[stem]
            made = experts.places(checkpoint, owner, owners[owner], config, scaling, options, live)
        else:
            continue
        for one in made:
            if (other := seen.setdefault(one.name, one)) is not one:
                raise AdapterFormatError(
                    f"{options.where}: expected one update of {one.name!r}, got two, of {other.layer.down!r} and "
                    f"{one.layer.down!r}."
                )
            yield _with_magnitude(checkpoint, one, config, options.where)


def _with_magnitude(checkpoint: Checkpoint, one: Place, config: Mapping[str, Any], where: str) -> Place:
    """The place, its magnitudes checked."""
    key = one.layer.magnitude
    if key is None:
        if flag(config, "use_dora", where):
            raise AdapterFormatError(
                f"{where}: {one.name!r}: use_dora is set: expected magnitudes, lora_magnitude_vector is missing."
            )
        return one
    shape = checkpoint.shape(key)
    if math.prod(shape) != one.shape[0] or one.expert is not None:
        raise AdapterFormatError(
            f"{where}: {one.name!r}: expected {one.shape[0]} magnitudes, one for each output, got {shape} in {key!r}."
        )
    if config and not flag(config, "use_dora", where):
        text = "holds DoRA's magnitudes though use_dora is not set; read as DoRA."
        return replace(one, remarks=(*one.remarks, about(one.name, text)))
    return one


def _modules(
    checkpoint: Checkpoint,
    one: Place,
    scale: float,
    source: ScaleSource,
    initial: Adapter | None,
    options: ReadOptions,
) -> dict[str, Module]:
    """The module of a place, or one for each slot of its fused weight."""
    layer = one.layer
    recipe = Recipe(checkpoint, layer.down, layer.up, scale, options.device, expert=one.expert)
    r, flags = one.r, one.flags
    if initial is not None:
        recipe = replace(recipe, initial=initial_update(initial, one.name, options.where))
        r += initial.modules[one.name].r
        flags += (LESS_INITIAL,)
    if layer.magnitude is not None:
        # Without a scale there is no merged weight to rescale.
        base = None if math.isnan(scale) else options.base
        recipe = replace(recipe, magnitude=layer.magnitude, base=base)
        flags += (LOW_RANK_PART,) if base is None else ()
    slots = dict(split.slots(one, options)) if options.split is not None else {}
    made = {}
    for slot, rows in slots.items() or [("", None)]:
        target = one.target if rows is None else replace(one.target, rows=rows)
        piece = replace(recipe, target=target, rows=rows)
        made[f"{one.name}.{slot}" if slot else one.name] = Module(
            shape=one.shape if rows is None else (rows[1] - rows[0], one.shape[1]),
            r=r,
            scale=scale,
            scale_source=source,
            target=target,
            tensors=(layer.down, layer.up, *([] if layer.magnitude is None else [layer.magnitude])),
            read=partial(read_update, piece),
            flags=flags,
            magnitude=None if layer.magnitude is None else partial(read_magnitude, piece),
            embedding=layer.embedding,
        )
    return made


def _remarks_on_r(one: Place, scaling: Scaling) -> list[Remark]:
    remarks = list(one.remarks)
    if one.expert is None:
        remarks += disagreement_on_r(one.name, scaling.declared_r(one.path), one.r)
    if one.r == 0:
        remarks.append(about(one.name, "r=0, an update of zero whatever its scale; alpha / r is given as 0."))
    return remarks


def _notes_on_the_whole(config: Mapping[str, Any], found: Mapping[str, Layer], options: ReadOptions) -> list[str]:
    notes = []
    if options.base is None and any(layer.magnitude is not None for layer in found.values()):
        notes.append(
            "DoRA: each update is its low-rank part s·B·A; the magnitudes rescale base and update together. Pass base= "
            "for the whole of what it changes."
        )
    if config.get("alora_invocation_tokens"):
        notes.append("activated LoRA: the updates act from the invocation tokens on, and not before.")
    if not config:
        text = "r·E rows of experts cannot be told from r rows without adapter_config.json; read as one matrix."
        notes += first_of_each(about(stem, text) for stem in found if stem.rpartition(".")[2] == "experts")
    return notes


def _refuse_tensors(checkpoint: Checkpoint, where: str) -> None:
    for pattern, title in _REFUSED_TENSORS:
        if key := next((key for key in checkpoint if re.search(pattern, key)), None):
            raise UnsupportedAdapterError(f"{where}: {key!r} belongs to {title}, which is not read yet.")


def reason(key: str, config: Mapping[str, Any]) -> str | None:
    """Why PEFT has a tensor of this name, if it has."""
    if FACTOR.match(plain(key)) or MAGNITUDE.match(plain(key)):
        return "a factor of another adapter in the same file"
    for pattern, reason in _SIDE_TENSORS:
        if re.search(pattern, key):
            return reason
    saved = config.get("modules_to_save") or ()
    if not key.endswith("bias") and any(part in saved for part in module_name(key).split(".")):
        return "modules_to_save: a full tensor in place of the base's"
    return None
