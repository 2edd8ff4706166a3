"""What an adapter is, from names, shapes and configuration alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.tables.frames import as_adapters, frame, module_flags

COLUMNS = ("adapter", "module", "d_out", "d_in", "r", "scale", "scale_source", "flags")


def inspect_table(adapter: Adapter | Sequence[Adapter]) -> pd.DataFrame:
    """Shape, r, scale and its source of every module, without reading a number.

    Returns
    -------
    DataFrame
        Columns ``adapter module d_out d_in r scale scale_source flags``.
    """
    rows = []
    for item in as_adapters(adapter):
        for name, module in item.modules.items():
            d_out, d_in = module.shape
            rows.append(
                {
                    "adapter": item.source,
                    "module": name,
                    "d_out": d_out,
                    "d_in": d_in,
                    "r": module.r,
                    "scale": module.scale,
                    "scale_source": module.scale_source,
                    "flags": " ".join(module_flags(module)),
                }
            )
    return frame(rows, COLUMNS)
