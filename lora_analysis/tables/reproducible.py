"""What trainings of one task from different seeds have in common: the directions that are reproduced."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError
from lora_analysis.measures.null import largest_cosine_null
from lora_analysis.measures.reproducible import shared_directions
from lora_analysis.measures.shared_start import shared_rows
from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.tables.directions import leading
from lora_analysis.tables.frames import frame, module_flags
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, Svd, with_scale

COLUMNS = (
    "adapter_a",
    "adapter_b",
    "module",
    "side",
    "d",
    "m",
    "n",
    "reproduced",
    "largest_cosine",
    "chance_edge",
    "p",
    "rows_shared",
    "flags",
)

_SHARED = 0.1
"""Share of A's rows from which two adapters count as begun alike."""


def reproducible_table(
    adapters: Sequence[Adapter],
    *,
    draws: int = 2000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """How many directions of each update every two adapters have in common beyond chance.

    Parameters
    ----------
    adapters : sequence of Adapter
        Two or more, of one task and base, trained from different seeds and in different orders of the data.
    draws, seed : int
        Of the null.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per pair of adapters, module they both have, and side. ``m`` and ``n`` are the directions compared (the
        numerical ranks, of unbounded ones at most ``max(r, 64)``), ``reproduced`` counts the principal cosines above
        ``chance_edge``, the 99 % quantile of the largest by chance; ``p`` is that of the largest. ``rows_shared`` is
        the share of A's rows that the two began with in common, as far as their trained A's tell: from a tenth on the
        row is flagged ``same-start``, and similarity on the side ``in`` is no sign of learning. Dimensionless.

    Raises
    ------
    ValueError
        If there are fewer than two adapters.
    LoraAnalysisError
        If they have no module in common.

    Warns
    -----
    UserWarning
        If some adapter lacks modules that another has.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2, figure 4; ``measures.reproducible``, ``measures.shared_start``.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> e = torch.eye(300)
    >>> a = la.Adapter({"q": la.LowRankUpdate(e[:, :2] * torch.tensor([2.0, 1.0]), e[:2], scale=1.0)})
    >>> b = la.Adapter({"q": la.LowRankUpdate(e[:, 1:3] * torch.tensor([2.0, 1.0]), e[1:3], scale=1.0)})
    >>> reproducible_table([a, b], draws=199)[["side", "reproduced"]].values.tolist()
    [['in', 1], ['out', 1]]
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters: expected two or more, got {len(adapters)}.")
    names = [name for name in adapters[0] if all(name in other for other in adapters)]
    if not names:
        raise LoraAnalysisError(f"{adapters[0].source}: expected modules that all adapters have, got none.")
    if apart := {name for item in adapters for name in item} - set(names):
        warnings.warn(f"{len(apart)} modules are not in every adapter and have no rows.", stacklevel=2)
    found = over_modules(
        lambda item: _decomposed(*item),
        [(item, name) for item in adapters for name in names],
        workers=workers,
        progress=progress,
        description="Singular vectors",
    )
    bases = {
        (number, name): svd
        for (number, name), svd in zip(itertools.product(range(len(adapters)), names), found, strict=True)
    }
    nulls: dict[tuple[int, int, int], Tensor] = {}
    rows = []
    for (a, b), name in itertools.product(itertools.combinations(range(len(adapters)), 2), names):
        flags = list(
            dict.fromkeys([*module_flags(adapters[a].modules[name]), *module_flags(adapters[b].modules[name])])
        )
        flags = [flag for flag in flags if flag != "unknown-scale"]
        share = _rows_shared(adapters[a], adapters[b], name)
        flags += ["same-start"] * (share >= _SHARED)
        for side in ("in", "out"):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
                "adapter_a": adapters[a].source,
                "adapter_b": adapters[b].source,
                "module": name,
                "side": side,
                "reproduced": pd.NA,
                "rows_shared": share,
            }
            first, second = (_basis(bases[number, name], side) for number in (a, b))
            if first is None or second is None:
                rows.append(row | {"m": 0, "n": 0, "d": 0, "flags": " ".join([*flags, "nonfinite"])})
                continue
            d, m, n = len(first), first.shape[1], second.shape[1]
            row |= {"d": d, "m": m, "n": n}
            if len(second) != d or not (m and n):
                rows.append(row | {"flags": " ".join([*flags, "zero" if len(second) == d else "other-shape"])})
                continue
            key = (d, min(m, n), max(m, n))
            if key not in nulls:
                nulls[key] = largest_cosine_null(*key, draws=draws, seed=seed)
            shared = shared_directions(first, second, nulls[key])
            rows.append(
                row
                | {
                    "reproduced": shared.shared,
                    "largest_cosine": shared.largest,
                    "chance_edge": shared.edge,
                    "p": shared.p,
                    "flags": " ".join(flags),
                }
            )
    return frame(rows, COLUMNS, counts=("reproduced",))


def _decomposed(adapter: Adapter, name: str) -> Svd | None:
    module = adapter.modules[name]
    update = adapter[name] if module.scale_source != "unknown" else with_scale(adapter[name], 1.0)
    try:
        svd = update.svd(leading(module, update))
    except UndefinedUpdateError:
        return None
    return svd.top(numerical_rank(svd.S, module.shape))


def _basis(svd: Svd | None, side: str) -> Tensor | None:
    if svd is None:
        return None
    return svd.V if side == "in" else svd.U


def _rows_shared(a: Adapter, b: Adapter, name: str) -> float:
    """Share of A's rows that the two began with in common; NaN where their updates have no such factor."""
    updates = a[name], b[name]
    if any(adapter.modules[name].embedding for adapter in (a, b)):  # A begins at zero
        return math.nan
    if not all(isinstance(update, LowRankUpdate) and update.finite for update in updates):
        return math.nan
    first, second = (update.down for update in updates if isinstance(update, LowRankUpdate))
    return shared_rows(first, second, trained=True) if first.shape[1] == second.shape[1] else math.nan
