"""The spectrum of every update: singular values, rank measures, and what of it storage noise leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures import precision, spectrum
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import LowRankUpdate, Update, with_scale

COLUMNS = (
    "adapter",
    "module",
    "d_out",
    "d_in",
    "r",
    "scale",
    "scale_source",
    "norm",
    "sigma_max",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "effective_rank_energy",
    "nuclear_ratio",
    "numerical_rank",
    "k90",
    "k95",
    "k99",
    "resolved_rank",
    "singular_values",
    "noise_floors",
    "flags",
)
_COUNTS = ("numerical_rank", "k90", "k95", "k99", "resolved_rank")


def spectrum_table(
    adapter: Adapter | Sequence[Adapter], *, workers: int | None = None, progress: bool = False
) -> pd.DataFrame:
    """Singular values and rank measures of every module's ΔW.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module. ``norm`` is Frobenius; ``k90 k95 k99`` are the least k that hold that share of
        ‖ΔW‖²; ``resolved_rank`` counts the singular values of at least three noise floors; ``singular_values``
        and ``noise_floors`` are lists. See ``lora_analysis.tables`` for ``flags``.

    References
    ----------
    The measures: ``lora_analysis.measures.spectrum`` and ``lora_analysis.measures.precision``.
    """
    items = [(item, name) for item in as_adapters(adapter) for name in item]
    rows = over_modules(
        lambda item: _row(*item), items, workers=workers, progress=progress, description="Singular values"
    )
    return frame(rows, COLUMNS, counts=_COUNTS)


def _row(adapter: Adapter, name: str) -> dict[str, Any]:
    module = adapter.modules[name]
    known = module.scale_source != "unknown"
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
        "adapter": adapter.source,
        "module": name,
        "d_out": module.shape[0],
        "d_in": module.shape[1],
        "r": module.r,
        "scale": module.scale,
        "scale_source": module.scale_source,
        "numerical_rank": pd.NA,
        "resolved_rank": pd.NA,
        "k90": pd.NA,
        "k95": pd.NA,
        "k99": pd.NA,
        "singular_values": None,
        "noise_floors": None,
    }
    flags = module_flags(module)
    update = adapter[name]
    try:
        S, floors = singular_values_and_floors(update if known else with_scale(update, 1.0))
    except UndefinedUpdateError:
        return row | {"flags": " ".join([*flags, "nonfinite"])}
    rank = spectrum.numerical_rank(S, module.shape)
    resolved = None if floors is None else precision.resolved_rank(S, floors)
    if rank == 0:
        flags.append("zero")
    if resolved is not None and resolved < rank:
        flags.append("storage-noise")
    row |= {
        "stable_rank": spectrum.stable_rank(S),
        "participation_ratio": spectrum.participation_ratio(S),
        "effective_rank": spectrum.effective_rank(S),
        "effective_rank_energy": spectrum.effective_rank_energy(S),
        "nuclear_ratio": spectrum.nuclear_ratio(S),
        "numerical_rank": rank,
        "k90": spectrum.energy_rank(S, 0.90),
        "k95": spectrum.energy_rank(S, 0.95),
        "k99": spectrum.energy_rank(S, 0.99),
        "resolved_rank": pd.NA if resolved is None else resolved,
        "flags": " ".join(flags),
    }
    if known:
        row |= {
            "norm": float(S.norm()),
            "sigma_max": float(S[0]) if len(S) else 0.0,
            "singular_values": S.tolist(),
            "noise_floors": None if floors is None else floors.tolist(),
        }
    return row


def singular_values_and_floors(update: Update) -> tuple[Tensor, Tensor | None]:
    """Singular values with their storage-noise floors, None where those are unknown."""
    if not isinstance(update, LowRankUpdate) or math.isnan(update.eps):
        return update.singular_values(), None
    r_up, r_down = update.core()
    S: Tensor = abs(update.scale) * torch.linalg.svdvals(r_up @ r_down.mT)
    return S, precision.noise_floors(r_up, r_down, scale=update.scale, eps=update.eps)
