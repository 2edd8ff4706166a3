"""A linter for adapters: what is wrong, wasted, undecidable or unportable about one, before it is used.

Conventions
-----------
A finding has a fixed code, a severity, the module it is about and one line with the cure. ``error``: the adapter
cannot act as it was trained; ``warning``: something is wrong or wasted; ``info``: right here, misread elsewhere;
``undecided``: a check that needs what is not there (alpha, the base).

Values
------
``lint``, ``Finding``, ``CODES`` (every code and what it means).
"""

from __future__ import annotations

import os
from typing import Any

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import AmbiguousAdapterError, MutatedBaseError
from lora_analysis.formats import load_adapter
from lora_analysis.lint.finding import CODES, Finding, Severity
from lora_analysis.lint.numbers import number_findings
from lora_analysis.lint.placement import placement_findings
from lora_analysis.lint.statements import statement_findings
from lora_analysis.lint.storage import storage_findings

__all__ = ["CODES", "Finding", "Severity", "lint"]


def lint(
    adapter: Adapter | str | os.PathLike[str],
    base: BaseWeights | str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[Finding]:
    """What is wrong, wasted, undecidable or unportable about an adapter.

    Reads every factor once, one module at a time.

    Parameters
    ----------
    adapter : Adapter or path
        What ``load_adapter`` takes; a path is opened here, so that an adapter that cannot be read without more
        knowledge gives a finding instead of an error.
    base : BaseWeights or path, optional
        The base it is meant for: then also whether every update has a place there.
    **options
        Of ``load_adapter``, for a path.

    Returns
    -------
    list of Finding
        Empty for a clean adapter. Those about the whole adapter come first, then module by module.

    Raises
    ------
    AdapterFormatError, UnsupportedAdapterError
        If the adapter cannot be read at all.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.update import LowRankUpdate
    >>> adapter = Adapter({"query": LowRankUpdate(torch.zeros(8, 2), torch.ones(2, 8), scale=2.0)})
    >>> [(finding.code, finding.severity, finding.module) for finding in lint(adapter)]
    [('zero-update', 'warning', 'query')]
    """
    if base is not None and not isinstance(base, BaseWeights):
        base = load_base(base)
    if not isinstance(adapter, Adapter):
        try:
            adapter = load_adapter(adapter, base=base, **options)
        except MutatedBaseError as error:
            return [Finding("mutated-base", "error", "", str(error))]
        except AmbiguousAdapterError as error:
            return [Finding("ambiguous-layout", "undecided", "", str(error))]
    found = [*statement_findings(adapter), *storage_findings(adapter)]
    if base is not None:
        found += placement_findings(adapter, base)
    for name, module in adapter.modules.items():
        found += number_findings(name, module, adapter[name])
    order = {"": -1} | {name: i for i, name in enumerate(adapter)}
    return sorted(found, key=lambda finding: order[finding.module])
