"""What cutting updates to fewer directions left out of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.tables.frames import as_adapters, frame, module_flags

COLUMNS = (
    "adapter",
    "module",
    "d_out",
    "d_in",
    "r",
    "norm",
    "truncation_error",
    "truncation_error_relative",
    "flags",
)


def truncation_table(adapter: Adapter | Sequence[Adapter]) -> pd.DataFrame:
    """How far each truncated update is off the matrix it stands for.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
        From ``diff`` with ``r`` or ``energy``, or from ``resize``.

    Returns
    -------
    DataFrame
        One row per module. ``norm`` is the Frobenius norm of the update that is held, ``truncation_error`` that
        of what was left out; ``truncation_error_relative`` is its share of the whole,
        ``error / sqrt(norm**2 + error**2)``, dimensionless in [0, 1], 0 where nothing was cut.

    References
    ----------
    Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> after = {"lin.weight": torch.diag(torch.tensor([4.0, 3.0]))}
    >>> table = truncation_table(la.diff(after, {"lin.weight": torch.zeros(2, 2)}, r=1))
    >>> table.loc[0, ["norm", "truncation_error", "truncation_error_relative"]].tolist()
    [4.0, 3.0, 0.6]
    """
    return frame((_row(item, name) for item in as_adapters(adapter) for name in item), COLUMNS)


def _row(adapter: Adapter, name: str) -> dict[str, Any]:
    module = adapter.modules[name]
    flags = module_flags(module)
    error = module.truncation_error
    norm = math.nan
    if module.scale_source != "unknown":
        try:
            norm = adapter[name].norm()
            flags += ["zero"] * (norm == 0)
        except UndefinedUpdateError:
            flags.append("nonfinite")
    whole = math.hypot(norm, error)
    return {
        "adapter": adapter.source,
        "module": name,
        "d_out": module.shape[0],
        "d_in": module.shape[1],
        "r": module.r,
        "norm": norm,
        "truncation_error": error,
        "truncation_error_relative": error / whole if error else 0.0,
        "flags": " ".join(flags),
    }
