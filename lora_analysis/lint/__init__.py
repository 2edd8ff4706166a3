"""A linter for adapters: what is wrong, wasted, undecidable or unportable about one, before it is used.

Conventions
-----------
A finding has a fixed code, a severity, the module it is about and one line with the cure. ``error``: the adapter
cannot act as it was trained; ``warning``: something is wrong or wasted; ``info``: right here, misread elsewhere or
larger than need be; ``undecided``: a check that needs what is not there (alpha, the base).

As ``lora-analysis lint`` it ends with exit code 0 where nothing was found; 3 where anything was, whatever its severity;
4 where all that was found are checks that could not be decided; 1 where the adapter could not be read at all, with one
line on stderr; 2 for wrong usage. ``--ignore`` leaves out a code that is known and meant, or a severity such as
``info``, before the exit code is made up.

Values
------
``lint``, ``Finding``, ``CODES`` (every code and what it means), ``SEVERITIES`` (those that each code may have).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import (
    AmbiguousAdapterError,
    BaseWeightsError,
    LoraAnalysisError,
    MutatedBaseError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.lint.configuration import configuration_findings
from lora_analysis.lint.finding import CODES, SEVERITIES, Finding, Findings, Severity
from lora_analysis.lint.initial import ORTHOGONAL, Edge, edge_of, initial_findings, orthogonal_finding
from lora_analysis.lint.numbers import number_findings
from lora_analysis.lint.placement import placement_findings
from lora_analysis.lint.portability import portability_findings
from lora_analysis.lint.scales import scale_findings
from lora_analysis.lint.storage import storage_findings

__all__ = ["CODES", "SEVERITIES", "Finding", "Findings", "Severity", "lint"]


def lint(
    adapter: Adapter | str | os.PathLike[str],
    base: BaseWeights | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Findings:
    """What is wrong, wasted, undecidable or unportable about an adapter.

    Reads every tensor once or twice, one module at a time.

    Parameters
    ----------
    adapter : Adapter or path
        What ``load_adapter`` takes; a path is opened here, so that an adapter that cannot be read without more
        knowledge gives a finding instead of an error.
    base : BaseWeights or path, optional
        The base it is meant for: then also whether every update has a place there, and whether full tensors of the
        file are the base's own.
    **options
        Of ``load_adapter``, for a path.

    Returns
    -------
    Findings
        A list of ``Finding``, in a notebook a table; empty for a clean adapter. Those about the whole adapter come
        first, then module by module.

    Raises
    ------
    AdapterFormatError, UnsupportedAdapterError
        If the adapter cannot be read at all.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.update import LowRankUpdate
    >>> trained, dead = (LowRankUpdate(up, torch.ones(2, 8), scale=2.0) for up in (torch.ones(8, 2), torch.zeros(8, 2)))
    >>> found = lint(Adapter({"query": trained, "value": dead}))
    >>> [(finding.code, finding.severity, finding.module) for finding in found]
    [('zero-update', 'warning', 'value')]
    """
    if base is not None and not isinstance(base, BaseWeights):
        base = load_base(base)
    if isinstance(adapter, Adapter):
        return _findings(adapter, base, {})
    bare: dict[object, Module] = {}
    try:
        opened = _opened(adapter, base, options)
    except MutatedBaseError as error:
        return Findings([Finding("mutated-base", "error", "", str(error))])
    except AmbiguousAdapterError as error:
        return Findings([Finding("ambiguous-layout", "undecided", "", str(error))])
    if base is not None and any(module.magnitude is not None for module in opened.modules.values()):
        bare = _without_base(adapter, options)
    return _findings(opened, base, bare)


def _findings(adapter: Adapter, base: BaseWeights | None, bare: dict[object, Module]) -> Findings:
    """The findings of an adapter that is open; ``bare`` has what modules are without the base."""
    found = [
        *scale_findings(adapter),
        *configuration_findings(adapter),
        *portability_findings(adapter),
        *storage_findings(adapter, base),
    ]
    if base is not None:
        found += placement_findings(adapter, base)
    found += _module_findings(adapter, bare)
    order = {"": -1} | {name: i for i, name in enumerate(adapter)}
    return Findings(sorted(found, key=lambda finding: order[finding.module]))


def _opened(source: str | os.PathLike[str], base: BaseWeights | None, options: dict[str, Any]) -> Adapter:
    """The adapter; a PEFT folder whose modules have alphas of their own, as diffusers and its kin read it.

    PEFT ignores these alphas, so that such a folder is refused as PEFT's.
    """
    try:
        return load_adapter(source, base=base, **options)
    except UnsupportedAdapterError as refused:
        if options.get("format") is not None or isinstance(refused, AmbiguousAdapterError | MutatedBaseError):
            raise
        try:
            adapter = load_adapter(source, base=base, **options | {"format": "diffusers"})
        except LoraAnalysisError:
            raise refused from None
        own = any(module.scale_source == "tensor" for module in adapter.modules.values())
        if not own or "peft_type" not in adapter.config:
            raise
        return adapter


def _without_base(source: str | os.PathLike[str], options: dict[str, Any]) -> dict[object, Module]:
    """The modules as they are without their base, by their tensors: DoRA's are then the product of the factors."""
    try:
        modules = load_adapter(source, **options).modules
    except AmbiguousAdapterError:
        return {}
    return {_identity(module): module for module in modules.values()}


def _identity(module: Module) -> object:
    return module.tensors, module.target.expert, module.target.rows


def _module_findings(adapter: Adapter, bare: dict[object, Module]) -> Iterator[Finding]:
    """What the numbers of each module show, and those of all together."""
    edges: dict[str, Edge] = {}
    found: list[Finding] = []
    orthogonal = str(adapter.config.get("init_lora_weights")).lower() in ORTHOGONAL
    for name, module in adapter.modules.items():
        chosen = bare.get(_identity(module), module)
        try:
            update = chosen.read()
        except BaseWeightsError:  # placement says it, with the base
            continue
        own = list(number_findings(name, chosen, update))
        found += own
        if not {"nonfinite", "zero-update"} & {finding.code for finding in own}:
            if edge := edge_of(update):
                edges[name] = edge
            if orthogonal and (finding := orthogonal_finding(name, update)):
                found.append(finding)
    inert = sum(finding.code == "zero-update" for finding in found) == len(adapter)
    for finding in found:
        if inert and finding.code == "zero-update":
            yield replace(finding, severity="error")  # all of them: the adapter does nothing
        else:
            yield finding
    yield from initial_findings(edges)
