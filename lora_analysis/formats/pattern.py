"""Any file of factors, by a pattern of names that the caller gives: formats that nobody else writes.

Conventions
-----------
``down=lora_layers.{module}.lora_A.T up=lora_layers.{module}.lora_B.T alpha=lora_layers.{module}.alpha``: names of
tensors, with ``{module}`` where the module's own name stands. ``down`` is (r, d_in[, k, k]) and ``up`` (d_out, r), or
the other way round where ``.T`` follows the name. ``alpha`` is a tensor of one number, and the scale is alpha / r;
without it the scale is unknown unless the caller passes ``alpha=``. ``as=network.{module}`` says what the base calls
a module, which is otherwise called as in the file.

Only what the pattern names is read; the file's other tensors are listed. It is never detected, but always asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_analysis.adapter import Contents, Module, ScaleSource, Target, Unused
from lora_analysis.checkpoint import Checkpoint, nbytes
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.kohya.scaling import scalar
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.products import low_rank
from lora_analysis.update import LowRankUpdate

NAME = "pattern"
TAKES = ()

_MODULE = "{module}"
_FACTORS = ("down", "up")
_KEYS = (*_FACTORS, "alpha", "as")
_EXAMPLE = "'down=layers.{module}.lora_A up=layers.{module}.lora_B'"


@dataclass(frozen=True, slots=True)
class Template:
    """A name with a hole where the module's stands.

    Examples
    --------
    >>> template = Template("layers.", ".lora_A", transposed=False)
    >>> template.module("layers.0.q.lora_A"), template.module("layers..lora_A"), template.name("0.q")
    ('0.q', None, 'layers.0.q.lora_A')
    """

    before: str
    after: str
    transposed: bool

    def __str__(self) -> str:
        return self.name(_MODULE)

    def name(self, module: str) -> str:
        """What a module's tensor is called."""
        return f"{self.before}{module}{self.after}"

    def module(self, name: str) -> str | None:
        """The module of a tensor of this name; None where it is called otherwise."""
        longer = len(name) > len(self.before) + len(self.after)
        if longer and name.startswith(self.before) and name.endswith(self.after):
            return name[len(self.before) : len(name) - len(self.after)]
        return None


def parse_pattern(text: str) -> dict[str, Template]:
    """The templates of a pattern, by ``down``, ``up``, ``alpha`` and ``as``.

    Parameters
    ----------
    text : str
        ``key=template`` with spaces between; ``down`` and ``up`` must be there.

    Raises
    ------
    ValueError
        If it is no such text.

    Examples
    --------
    >>> templates = parse_pattern("down=a.{module}.T up=b.{module}")
    >>> templates["down"]
    Template(before='a.', after='', transposed=True)
    >>> str(templates["up"])
    'b.{module}'
    """
    templates: dict[str, Template] = {}
    for part in text.split():
        key, equals, name = part.partition("=")
        if not equals or key not in _KEYS:
            raise ValueError(f"pattern: expected {', '.join(f'{key}=' for key in _KEYS)} parts, got {part!r}.")
        if key in templates:
            raise ValueError(f"pattern: expected {key}= once, got it again as {part!r}.")
        transposed = key in _FACTORS and name.endswith(".T")
        before, hole, after = name.removesuffix(".T" if transposed else "").partition(_MODULE)
        if not hole or _MODULE in after:
            raise ValueError(f"pattern: expected exactly one {_MODULE} in {key}=, got {name!r}.")
        if re.search(r"[{}]", before + after):
            raise ValueError(f"pattern: expected no braces but those of {_MODULE} in {key}=, got {name!r}.")
        templates[key] = Template(before, after, transposed)
    if missing := [key for key in _FACTORS if key not in templates]:
        raise ValueError(f"pattern: expected down= and up=, {missing[0]}= is missing in {text!r}. Such as {_EXAMPLE}.")
    names = [str(templates[key]) for key in ("down", "up", "alpha") if key in templates]
    if len(set(names)) < len(names):
        raise ValueError(f"pattern: expected different names for down, up and alpha, got {' and '.join(names)}.")
    return templates


def matches(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Never: a pattern is given by the caller, and is then not asked whether it matches."""
    return False


def read(checkpoint: Checkpoint, config: Mapping[str, Any], options: ReadOptions) -> Contents:
    """Describe every tensor that the pattern names, and list the others.

    Raises
    ------
    ValueError
        If there is no pattern, or it is none.
    AdapterFormatError
        If a module lacks a tensor, or its tensors do not fit.
    """
    where = options.where
    if options.pattern is None:
        raise ValueError(f"pattern: expected names of tensors beside format='pattern', such as {_EXAMPLE}.")
    templates = parse_pattern(options.pattern)
    renamed = templates.pop("as", Template("", "", transposed=False))
    modules: dict[str, Module] = {}
    notes = []
    for found, keys in _keys(checkpoint, templates, where).items():
        r, shape, kernel = _layout(checkpoint, found, keys, templates, where)
        module = renamed.name(found)
        scale, source = _scale(checkpoint, keys.get("alpha"), r, options)
        if r > max(shape):
            notes.append(f"{module!r}: r={r} exceeds both sides of {shape[0]}x{shape[1]}; is .T missing in pattern=?")
        modules[module] = Module(
            shape=shape,
            r=r,
            scale=scale,
            scale_source=source,
            target=Target(f"{module}.weight", kernel=kernel),
            tensors=tuple(keys.values()),
            read=partial(
                _read_update,
                checkpoint,
                (keys["up"], keys["down"]),
                (templates["up"].transposed, templates["down"].transposed),
                scale,
                options.device,
            ),
        )
    if "alpha" not in templates and options.alpha is None:
        notes.append("the pattern names no alpha: the scale is unknown. Pass alpha=, or name its tensors by alpha=….")
    used = {key for module in modules.values() for key in module.tensors}
    unused = tuple(
        Unused(key, "not named by the pattern", nbytes(checkpoint, key)) for key in checkpoint if key not in used
    )
    return Contents(modules, unused, tuple(notes))


def _keys(checkpoint: Checkpoint, templates: Mapping[str, Template], where: str) -> dict[str, dict[str, str]]:
    """Module -> the names of its tensors, by what they are."""
    found: dict[str, dict[str, str]] = {}
    owners: dict[str, str] = {}
    for kind, template in templates.items():
        for key in checkpoint:
            if (module := template.module(key)) is None:
                continue
            if key in owners:
                raise AdapterFormatError(
                    f"{where}: {key!r}: expected a tensor of one kind, got one that both {owners[key]}= and {kind}= of "
                    "the pattern name. Make their ends different."
                )
            owners[key] = kind
            found.setdefault(module, {})[kind] = key
    if not found:
        first = next(iter(checkpoint), None)
        raise AdapterFormatError(
            f"{where}: expected tensors called {str(templates['down'])!r}, found none among {len(checkpoint)} "
            f"(first: {first!r})."
        )
    for module, keys in found.items():
        if missing := [kind for kind in templates if kind not in keys]:
            raise AdapterFormatError(
                f"{where}: {module!r}: expected {', '.join(templates)}, {templates[missing[0]].name(module)!r} "
                f"({missing[0]}) is missing."
            )
    return found


def _layout(
    checkpoint: Checkpoint, module: str, keys: Mapping[str, str], templates: Mapping[str, Template], where: str
) -> tuple[int, tuple[int, int], tuple[int, ...]]:
    """(r, (d_out, d_in), kernel)."""
    stored = [checkpoint.shape(keys[kind]) for kind in _FACTORS]
    down, up = (
        shape[::-1] if templates[kind].transposed and len(shape) == 2 else shape
        for kind, shape in zip(_FACTORS, stored, strict=True)
    )
    # What turned a matrix round says nothing of where a kernel's axes would go.
    flat = all(len(shape) == 2 or not templates[kind].transposed for kind, shape in zip(_FACTORS, stored, strict=True))
    if not flat or len(down) < 2 or len(up) < 2 or down[0] != up[1] or math.prod(up[2:]) != 1 or 0 in down + up:
        forms = ["(r, d_in)", "(d_out, r)"]
        turned = ["(d_in, r)", "(r, d_out)"]
        expected = [turned[i] if templates[kind].transposed else forms[i] for i, kind in enumerate(_FACTORS)]
        raise AdapterFormatError(
            f"{where}: {module!r}: expected down {expected[0]} and up {expected[1]} to share r, got {stored[0]} and "
            f"{stored[1]}. A factor that is stored the other way round takes .T behind its name."
        )
    return down[0], (up[0], math.prod(down[1:])), down[2:]


def _scale(checkpoint: Checkpoint, key: str | None, r: int, options: ReadOptions) -> tuple[float, ScaleSource]:
    if options.alpha is not None:
        return options.alpha / r, "caller"
    if key is None:
        return math.nan, "unknown"
    return scalar(checkpoint, key, options.where) / r, "tensor"


def _read_update(
    checkpoint: Checkpoint, keys: tuple[str, str], transposed: tuple[bool, bool], scale: float, device: torch.device
) -> LowRankUpdate:
    up, down = (
        checkpoint[key].to(device).mT if turned else checkpoint[key].to(device)
        for key, turned in zip(keys, transposed, strict=True)
    )
    return low_rank(up, down, scale)
