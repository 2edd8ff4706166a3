"""Which runs of a study began with the same A that should have begun apart.

Values
------
``shared_starts``.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from lora_analysis.measures.shared_start import SHARED


def shared_starts(table: pd.DataFrame | None, kinds: Collection[str]) -> list[str]:
    """Pairs of runs that should have started apart and did not, as ``"run and run (97 % of rows)"``.

    Parameters
    ----------
    table : DataFrame or None
        ``initialisation`` of ``subspace_evidence``.
    kinds : collection of str
        Kinds of pairs to look at.
    """
    if table is None or table.empty:
        return []
    own = table[table["kind"].isin(list(kinds)) & ~table["expected"] & table["rows_shared"].notna()]
    found = []
    for (run_a, run_b), rows in own.groupby(["run_a", "run_b"], sort=True):
        share = float(np.average(rows["rows_shared"], weights=rows[["r_a", "r_b"]].min(axis=1)))
        if share >= SHARED:
            found.append(f"{run_a} and {run_b} ({share:.0%} of rows)")
    return found
