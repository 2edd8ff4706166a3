"""LoRA on parameters (``target_parameters``): experts stacked in one tensor, one by one, and plain matrices.

Conventions
-----------
For a parameter of E experts A is (r·E, a) with the expert slowest and B (b, r·E) with the expert fastest:
``A_e = A[e·r:(e+1)·r]``, ``B_e = B[:, e::E]``, and alpha / r uses r, not r·E. Since PEFT 0.19 a is the side of inputs
and b that of outputs, whichever way the parameter is stored (``is_transposed`` of its module says); before, a was
the parameter's second axis and b its third.

Names say less than that. PEFT wraps the module that owns the parameters, once for each: the first of them in the
order of the module is ``<module>.base_layer.lora_A``, inside ``<module>.lora_A``. Which parameter is whose, and which
way it is stored, the following tell, as far as they do: a single candidate; shapes of ``base=``; two parameters
called ``gate_up_proj`` and ``down_proj``, where one's side of inputs is the other's of outputs and twice as wide as
its inputs; ``peft_version``. What stays open is flagged ``ambiguous-layout`` and noted.

Facts from PEFT's ``tuners/lora/layer.py`` (``ParamWrapper``) and ``tuners/tuners_utils.py`` (``_inject_parameters``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_analysis.adapter import Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError, AmbiguousAdapterError
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.formats.peft.configuration import Remark, Scaling, about, disagreement_on_r, short
from lora_analysis.formats.peft.factors import Expert
from lora_analysis.formats.peft.layouts import Assignment, Layout, Level, assigned, base_shapes, layouts, peft_version
from lora_analysis.formats.peft.names import Layer
from lora_analysis.formats.peft.places import NESTED, Live, Place

AMBIGUOUS = "ambiguous-layout"
_DEFAULT_R = 8
_MAX_TARGETS = 5000


def target_parameters(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The parameters that the configuration targets, in its order.

    Raises
    ------
    AdapterFormatError
        If the field is no list of names, or of more than any model has.
    """
    found = config.get("target_parameters") or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) and name for name in found):
        raise AdapterFormatError(f"{where}: target_parameters: expected a list of names, got {short(found)}.")
    if len(found) > _MAX_TARGETS:  # each is compared with each module
        raise AdapterFormatError(
            f"{where}: target_parameters: expected at most {_MAX_TARGETS} names, got {len(found)}."
        )
    return tuple(dict.fromkeys(found))


def candidates(module: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The parameters of a module that are targeted, by PEFT's rule: a dotted suffix of the parameter's whole name."""
    paths = (f"{module}.{target.rpartition('.')[2]}" for target in targets)
    return tuple(
        path for path, target in zip(paths, targets, strict=True) if path == target or path.endswith(f".{target}")
    )


def wrapped(
    checkpoint: Checkpoint,
    layers: Mapping[str, Layer],
    config: Mapping[str, Any],
    scaling: Scaling,
    options: ReadOptions,
    live: Mapping[str, Live],
) -> dict[str, list[Layer]]:
    """The layers that are LoRA on parameters, by the module that owns these, innermost first.

    Raises
    ------
    AdapterFormatError
        If layers are nested otherwise than PEFT nests them.
    """
    where, base = options.where, options.base
    targets = target_parameters(config, where)
    found: dict[str, list[Layer]] = {}
    for stem, layer in layers.items():
        owner = stem
        while owner.endswith(NESTED):
            owner = owner.removesuffix(NESTED)
        if not layer.embedding and f"{stem}{NESTED}.out_proj" not in layers:
            found.setdefault(owner, []).append(layer)
    kept = {}
    for owner, levels in found.items():
        levels.sort(key=lambda layer: -len(layer.stem))
        nested = levels[0].stem != owner
        if nested and [layer.stem for layer in levels] != [owner + NESTED * i for i in reversed(range(len(levels)))]:
            raise AdapterFormatError(
                f"{where}: {owner!r}: expected one pair of factors at each level of base_layer, found them at "
                f"{', '.join(repr(layer.stem) for layer in levels)}."
            )
        named = live[owner].parameter is not None if owner in live else None
        if nested or named or (named is None and _owns(checkpoint, owner, levels[0], targets, config, scaling, base)):
            kept[owner] = levels
    return kept


def places(
    checkpoint: Checkpoint,
    owner: str,
    layers: Sequence[Layer],
    config: Mapping[str, Any],
    scaling: Scaling,
    options: ReadOptions,
    live: Mapping[str, Live],
) -> Iterator[Place]:
    """The modules that the factors of one owner's parameters are: one for each expert, or one for a matrix.

    Parameters
    ----------
    checkpoint : Checkpoint
    owner : str
        The module that holds the parameters.
    layers : sequence of Layer
        Its wrappers, innermost first.
    config : mapping
    scaling : Scaling
    options : ReadOptions
    live : mapping of str to Live
        What the layers of a live model say of themselves.

    Raises
    ------
    AdapterFormatError
        If the factors fit no parameter that the configuration targets.
    UnsupportedAdapterError
        If nothing says which parameters are meant.
    """
    where = options.where
    levels = [_level(checkpoint, layer, where) for layer in layers]
    if levels[0].layer.stem in live:
        said = [live[level.layer.stem] for level in levels]
        assignment = Assignment(tuple(f"{owner}.{layer.parameter}" for layer in said), ())
        lying = [Layout(layer.reads_inputs, layer.transposed) for layer in said]
        shapes = {path: layer.stored for path, layer in zip(assignment.paths, said, strict=True)}
    else:
        paths = candidates(owner, target_parameters(config, where))
        if not paths:
            raise AmbiguousAdapterError(
                f"{where}: {owner!r}: holds LoRA on parameters, and nothing says which. adapter_config.json with "
                "target_parameters belongs beside the file."
            )
        shapes = base_shapes(paths, options.base)
        version = peft_version(config)
        assignment = assigned(owner, levels, paths, shapes, version, where)
        lying = layouts(levels, assignment, shapes, version)
    for level, path, layout in zip(levels, assignment.paths, lying, strict=True):
        stored = shapes.get(path)
        r, count, remarks = _r_and_count(level, path, stored, scaling, where)
        if count > 1 or (stored is not None and len(stored) == 3):
            doubts = (*assignment.doubts, *_doubts(path, level, layout, config))
            yield from _experts(level, path, r, count, layout, (*remarks, *doubts), bool(doubts))
        else:
            yield Place(
                name=path.removesuffix(".weight"),
                path=path,
                layer=level.layer,
                shape=(level.b, level.a),
                r=r,
                target=Target(path),
                flags=(AMBIGUOUS,) if assignment.doubts else (),
                remarks=assignment.doubts,
            )


def _owns(
    checkpoint: Checkpoint,
    owner: str,
    layer: Layer,
    targets: Sequence[str],
    config: Mapping[str, Any],
    scaling: Scaling,
    base: BaseWeights | None,
) -> bool:
    """Whether a layer without nesting is LoRA on a parameter rather than on the module of its name."""
    fitting = [target for target in targets if candidates(owner, [target])]
    shape = checkpoint.shape(layer.down)
    if not fitting or len(shape) != 2:
        return False
    if base is not None:
        return bool(base_shapes(candidates(owner, fitting), base))
    if any("." in target for target in fitting):
        return True
    # A target without a module, "gate_up_proj", may be a parameter of any; what target_modules names is a module.
    modules = config.get("target_modules")
    if modules != "all-linear":
        return not _targeted(owner, modules)
    # Which has its r and no more rows.
    return shape[0] != (scaling.declared_r(owner) or _DEFAULT_R)


def _targeted(module: str, targets: object) -> bool:
    """Whether ``target_modules``, a regular expression for the whole name or a list of ends of names, has a module."""
    if isinstance(targets, str):
        try:
            return pattern_regex(f"^(?:{targets})").match(module) is not None
        except (ValueError, re.error, RecursionError, OverflowError):  # dangerous, or none at all
            return False
    names = targets if isinstance(targets, list) else []
    return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names)


def _level(checkpoint: Checkpoint, layer: Layer, where: str) -> Level:
    shape_a, shape_b = checkpoint.shape(layer.down), checkpoint.shape(layer.up)
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or shape_a[0] == 0:
        raise AdapterFormatError(
            f"{where}: {layer.stem!r}: expected the lora_A (r·E, d) and lora_B (d, r·E) of a parameter with E experts "
            f"to share r·E, got {shape_a} and {shape_b}."
        )
    return Level(layer, shape_a[0], shape_a[1], shape_b[0])


def _r_and_count(
    level: Level,
    path: str,
    stored: tuple[int, ...] | None,
    scaling: Scaling,
    where: str,
) -> tuple[int, int, list[Remark]]:
    """R of one expert, and how many experts there are: by the base, else by the configuration's r."""
    declared = scaling.declared_r(path) or _DEFAULT_R
    if stored is None:
        if level.rows % declared:
            raise AdapterFormatError(
                f"{where}: {path!r}: expected lora_A with r·E rows, r={declared} by the configuration, got "
                f"{level.rows}. Pass base=, which tells the number of experts E."
            )
        return declared, level.rows // declared, []
    count = stored[0] if len(stored) == 3 else 1
    r = level.rows // count
    return r, count, disagreement_on_r(path, declared, r)


def _doubts(path: str, level: Level, layout: Layout, config: Mapping[str, Any]) -> Iterator[Remark]:
    if layout.reads_inputs is None:
        yield about(
            path,
            "PEFT before 0.19 may have written the side of outputs into A, and nothing here says which version did or "
            "which way the parameter is stored: U and V may have to be exchanged.",
        )
    if layout.product_transposed is None and level.a == level.b:
        yield about(
            path,
            "square, and nothing says which way the base stores it: taken as (experts, out, in), the rule where a "
            "module does not say is_transposed.",
        )
    mapping = config.get("auto_mapping")
    makers = [str(config.get("base_model_name_or_path")), *(mapping if isinstance(mapping, dict) else ())]
    if any("unsloth" in maker.lower() for maker in makers):
        yield about(path, "Unsloth for a time wrote B with the expert slowest; read by PEFT's rule, expert fastest.")


def _experts(
    level: Level, path: str, r: int, count: int, layout: Layout, remarks: tuple[Remark, ...], doubtful: bool
) -> Iterator[Place]:
    turned = layout.reads_inputs is False
    transposed = bool(layout.product_transposed) != turned
    shape = (level.a, level.b) if turned else (level.b, level.a)
    for index in range(count):
        yield Place(
            name=f"{path}.{index}",
            path=path,
            layer=level.layer,
            shape=shape,
            r=r,
            target=Target(path, transposed=transposed, expert=index),
            expert=Expert(index, count, r, turned),
            flags=(AMBIGUOUS,) if doubtful else (),
            remarks=remarks if index == 0 else (),
        )
