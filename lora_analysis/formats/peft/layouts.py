"""Which parameter each pair of factors belongs to, and which way it lies: what shapes and versions tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from lora_analysis.base import BaseWeights
from lora_analysis.errors import AdapterFormatError, AmbiguousAdapterError, BaseWeightsError
from lora_analysis.formats.peft.configuration import Remark, about
from lora_analysis.formats.peft.names import Layer

_MAX_CANDIDATES = 6
_STORED_BY_LINEAR_MAP = (0, 19)
"""The version of PEFT since which A belongs to the inputs, however a parameter is stored."""


class Level(NamedTuple):
    """The factors of one parameter: A (rows, a), B (b, rows)."""

    layer: Layer
    rows: int
    a: int
    b: int


class Assignment(NamedTuple):
    """Which parameters a module's wrappers belong to, innermost first, and what may be otherwise."""

    paths: tuple[str, ...]
    doubts: tuple[Remark, ...]


class Layout(NamedTuple):
    """How a parameter lies: whether A is the side of inputs, and whether it is stored as (B_e A_e).T; None: open."""

    reads_inputs: bool | None
    product_transposed: bool | None


def peft_version(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The version of PEFT that wrote a file, as far as it matters.

    Examples
    --------
    >>> peft_version({"peft_version": "0.19.0.dev0@abc"}), peft_version({})
    ((0, 19), None)
    """
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version") or ""), re.ASCII)
    return (int(found[1]), int(found[2])) if found else None


def base_shapes(paths: Sequence[str], base: BaseWeights | None) -> dict[str, tuple[int, ...]]:
    """Shapes of those parameters that the base has."""
    shapes = {}
    for path in paths if base is not None else ():
        try:
            shapes[path] = base.shape(path)  # type: ignore[union-attr]
        except BaseWeightsError:
            continue
    return shapes


def assigned(
    owner: str,
    levels: Sequence[Level],
    paths: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    version: tuple[int, int] | None,
    where: str,
) -> Assignment:
    """The parameters of the levels, as shapes, versions and widths tell; the configuration's order where they do not.

    Parameters
    ----------
    owner : str
        The module that holds the parameters.
    levels : sequence of Level
        Innermost first.
    paths : sequence of str
        The parameters that the configuration targets there, in its order.
    shapes : mapping of str to tuple of int
        Of those that the base has.
    version : (int, int), optional
    where : str
        The file, for messages.

    Raises
    ------
    AdapterFormatError
        If no parameters fit.
    AmbiguousAdapterError
        If there are more of them than factors, and no base.
    """
    present = [path for path in paths if path in shapes] if shapes else list(paths)
    if len(present) < len(levels):
        raise AdapterFormatError(
            f"{where}: {owner!r}: expected as many parameters in target_parameters (and in the base) as there are "
            f"wrappers, {len(levels)}, found {len(present)}: {', '.join(map(repr, present)) or 'none'}."
        )
    if len(present) > _MAX_CANDIDATES or (len(present) > len(levels) and not shapes):
        raise AmbiguousAdapterError(
            f"{where}: {owner!r}: {len(levels)} of {len(present)} parameters of target_parameters, and nothing says "
            "which. Pass base=."
        )
    possible = [
        choice
        for choice in permutations(present, len(levels))
        if all(path not in shapes or _fits(level, shapes[path]) for level, path in zip(levels, choice, strict=True))
        and len(_kinds(levels, choice, shapes)) <= 1
    ]
    if not possible:
        first, path = levels[0], present[0]
        raise AdapterFormatError(
            f"{where}: {owner!r}: expected factors that fit the base's {path!r} {shapes[path]}, got lora_A "
            f"({first.rows}, {first.a}) and lora_B ({first.b}, {first.rows}). Is this the model the adapter was "
            "trained on?"
        )
    if version is not None and not _is_new(version):
        # Development versions wrote the new layout under the old number, so that this is no more than a preference.
        possible = [choice for choice in possible if False not in _kinds(levels, choice, shapes)] or possible
    possible = [choice for choice in possible if _gated(levels, choice, version) is not None] or possible
    if len(possible) == 1:
        return Assignment(possible[0], ())
    # As a module declares its parameters, so do people list them.
    chosen = possible[0]
    doubt = (
        f"nothing says which of {len(levels)} pairs of factors belongs to which of {len(present)} parameters; the "
        f"innermost is taken for {chosen[0].rpartition('.')[2]!r}, the first in target_parameters."
        + ("" if shapes else " Pass base=, whose shapes may tell.")
    )
    return Assignment(chosen, (about(owner, doubt),))


def _fits(level: Level, stored: tuple[int, ...]) -> bool:
    if len(stored) == 3:
        sides = stored[1:] in ((level.a, level.b), (level.b, level.a))
        return sides and stored[0] > 0 and level.rows % stored[0] == 0
    return stored == (level.b, level.a)


def _kinds(levels: Sequence[Level], paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> set[bool]:
    """Whether parameters are stored as the transpose of B_e·A_e, as the shapes of those that are not square tell.

    One module stores all its parameters one way.
    """
    stacked = [(level, shapes.get(path, ())) for level, path in zip(levels, paths, strict=True)]
    return {
        (level.a, level.b) == stored[1:] for level, stored in stacked if len(stored) == 3 and stored[1] != stored[2]
    }


def _gated(levels: Sequence[Level], paths: Sequence[str], version: tuple[int, int] | None) -> bool | None:
    """Whether A is the side of inputs, as the widths of ``gate_up_proj`` and ``down_proj`` tell; None if not."""
    named = {path.rpartition(".")[2]: level for level, path in zip(levels, paths, strict=True)}
    if not named.keys() >= {"gate_up_proj", "down_proj"}:
        return None
    gate, down = named["gate_up_proj"], named["down_proj"]
    if gate.a == down.b and gate.b == 2 * down.a:
        return True
    if gate.b == down.a and gate.a == 2 * down.b and not _is_new(version):
        return False
    return None


def _is_new(version: tuple[int, int] | None) -> bool:
    return version is not None and version >= _STORED_BY_LINEAR_MAP


def layouts(
    levels: Sequence[Level],
    assignment: Assignment,
    shapes: Mapping[str, tuple[int, ...]],
    version: tuple[int, int] | None,
) -> list[Layout]:
    """How the parameters lie: one module, one way."""
    told = _kinds(levels, assignment.paths, shapes)
    old = version is not None and not _is_new(version)
    stored = next(iter(told), True if old else None)
    reads = True if _is_new(version) or stored is False else _gated(levels, assignment.paths, version)
    if reads is False:  # which only PEFT before 0.19 writes
        stored = True
    return [Layout(reads, stored)] * len(levels)
