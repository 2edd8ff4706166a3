"""How updates change the lengths and directions of the rows of the matrices they are added to, module by module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError
from lora_analysis.measures.magnitude import magnitude_direction_change
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.tables.pool import over_modules

COLUMNS = (
    "adapter",
    "module",
    "d_out",
    "d_in",
    "axis",
    "magnitude_change",
    "magnitude_change_relative",
    "direction_change",
    "flags",
)


def magnitude_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Mean change of length and of direction of the rows, or columns, of every base matrix under its update.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    base : BaseWeights
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module. ``axis`` is 1 for vectors that are rows, one per output, 0 for columns, as DoRA's
        magnitudes in the file run, rows where it has none. ``magnitude_change`` is the mean of ``|m'_k - m_k|``,
        in the unit of W; ``magnitude_change_relative`` the same over the mean of ``m_k``, and
        ``direction_change`` the mean of ``1 - cos``, both dimensionless. NaN where the scale is unknown, for all
        depend on it. Of a DoRA file they are those of the merged weight where the adapter was given its base.

    Raises
    ------
    BaseWeightsError
        If the base lacks a matrix that an adapter updates, its shape does not fit, or it holds NaN or infinities.

    References
    ----------
    Liu et al. 2024, arXiv:2402.09353, section 3.2, eq. 3 and 4. There, LoRA's changes of length and of direction
    go together over layers and steps, full fine-tuning's and DoRA's against each other.
    """
    items = [
        (item, name, replace(module.target, tensor=names[module.target.tensor]))
        for item in as_adapters(adapter)
        for names in [base.find_all(module.target.tensor for module in item.modules.values())]
        for name, module in item.modules.items()
    ]
    rows = over_modules(
        lambda item: _row(*item, base), items, workers=workers, progress=progress, description="Magnitudes"
    )
    return frame(rows, COLUMNS)


def _row(adapter: Adapter, name: str, target: Target, base: BaseWeights) -> dict[str, Any]:
    module = adapter.modules[name]
    weight = base.matrix(target, module.shape)
    flags = module_flags(module)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
        "adapter": adapter.source,
        "module": name,
        "d_out": module.shape[0],
        "d_in": module.shape[1],
        "axis": module.magnitude_axis,
    }
    if module.scale_source != "unknown":
        update = adapter[name]
        try:
            flags += ["zero"] * (update.norm() == 0)
            found = magnitude_direction_change(weight, update, axis=module.magnitude_axis)
        except UndefinedUpdateError:
            flags.append("nonfinite")
        except BaseWeightsError as error:
            raise BaseWeightsError(f"{base.source}: {target.tensor!r}: {error}") from error
        else:
            length = float(found.magnitudes.mean())
            flags += ["zero-base"] * (length == 0)
            row |= {
                "magnitude_change": found.magnitude_change,
                "magnitude_change_relative": found.magnitude_change / length if length else math.nan,
                "direction_change": found.direction_change,
            }
    return row | {"flags": " ".join(flags)}
