"""Which modules of two adapters, or of one, are compared with which."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Literal

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError

Pairs = Literal["same", "all"] | Sequence[tuple[str, str]] | None
"""A rule by its name, the pairs of names, or None for the rule that is usual for one adapter or two."""


def module_pairs(a: Adapter, b: Adapter | None, pairs: str | Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """The pairs of modules that are compared, by name.

    Parameters
    ----------
    a, b : Adapter
        Without ``b``, modules of ``a`` against each other.
    pairs : {"same", "all"} or sequence of (str, str), optional
        Modules of like name (the default with ``b``); every module of ``a`` against every module of ``b``,
        or each pair within ``a`` once (the default without ``b``); or the pairs listed.

    Raises
    ------
    ValueError
        If ``pairs`` is none of these.
    LoraAnalysisError
        If there are none, a listed module is not there, or modules of one name have two shapes.

    Warns
    -----
    UserWarning
        If modules stay out of a comparison by name because one adapter lacks them.
    """
    if pairs is None:
        pairs = "all" if b is None else "same"
    if pairs == "all":
        found = list(itertools.combinations(a, 2)) if b is None else list(itertools.product(a, b))
        if not found:
            raise LoraAnalysisError(
                f"{a.source}: expected two modules or more to compare, got {len(a)}."
                if b is None
                else f"{a.source} and {b.source}: expected modules in both, got {len(a)} and {len(b)}."
            )
        return found
    if pairs == "same":
        if b is None:
            raise ValueError("pairs: expected 'all' or a list for one adapter; a module is always like itself.")
        return _same_names(a, b)
    if isinstance(pairs, str):
        raise ValueError(f"pairs: expected 'same', 'all' or a list of pairs, got {pairs!r}.")
    other = a if b is None else b
    listed = [(first, second) for first, second in pairs]
    for first, second in listed:
        for adapter, name in ((a, first), (other, second)):
            if name not in adapter:
                raise LoraAnalysisError(f"{adapter.source}: no module {name!r} (first: {next(iter(adapter), None)!r}).")
    return listed


def _same_names(a: Adapter, b: Adapter) -> list[tuple[str, str]]:
    shared = [name for name in a if name in b]
    if not shared:
        raise LoraAnalysisError(
            f"{a.source} and {b.source}: expected modules of like name, found none (first: "
            f"{next(iter(a), None)!r} and {next(iter(b), None)!r}). Compare with pairs='all'."
        )
    for name in shared:
        if a.modules[name].shape != b.modules[name].shape:
            raise LoraAnalysisError(
                f"{name!r}: expected one shape, got {a.modules[name].shape} in {a.source} and "
                f"{b.modules[name].shape} in {b.source}. Were they trained on one base model?"
            )
    alone = len(a) + len(b) - 2 * len(shared)
    if alone:
        warnings.warn(
            f"{alone} modules stay out of the comparison, since only one of the adapters has them; "
            f"{len(shared)} are compared.",
            stacklevel=4,
        )
    return [(name, name) for name in shared]
