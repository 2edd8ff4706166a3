"""Every table of the adapters of a report, made once, and split by adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.lint import Finding, lint
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.report.data import short_names
from lora_analysis.tables import (
    amplification_table,
    intruder_table,
    spectrum_table,
    strength_table,
    used_rank_table,
)

Shape = tuple[int, int, int]
"""d_out, d_in and r."""

_LARGEST = 256
"""Largest r whose spectrum by chance is drawn; the cost of a draw grows with its cube."""
_BAND = (0.05, 0.5, 0.95)


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of every adapter by itself.

    Parameters
    ----------
    adapters : sequence of Adapter
        Of different sources.
    base : BaseWeights, optional
    findings : sequence of list of Finding
        Of the linter, for each adapter.
    rank, strength : DataFrame
        One row per module: ``used_rank_table`` with ``scale scale_source norm`` and the singular values of
        ``spectrum_table``; ``strength_table`` with ``rounding``, the share of ‖W‖ that a bfloat16 merge rounds away.
    amplification, intruders : DataFrame, optional
        None without a base.
    """

    adapters: Sequence[Adapter]
    base: BaseWeights | None
    findings: Sequence[list[Finding]]
    rank: pd.DataFrame
    strength: pd.DataFrame
    amplification: pd.DataFrame | None
    intruders: pd.DataFrame | None

    @cached_property
    def names(self) -> list[str]:
        """What the pages call each adapter."""
        return short_names(adapter.source for adapter in self.adapters)

    @cached_property
    def bands(self) -> dict[Shape, list[list[float]]]:
        """By shape, the 5 %, 50 % and 95 % quantiles of σ_k / ‖ΔW‖ of random factors."""
        shapes = {tuple(row) for row in self.rank[["d_out", "d_in", "r"]].itertuples(index=False, name=None)}
        return {shape: _band(shape) for shape in sorted(shapes) if min(shape) > 0 and shape[2] <= _LARGEST}

    def of(self, number: int) -> dict[str, pd.DataFrame]:
        """The tables of one adapter, those that there are."""
        source = self.adapters[number].source
        return {name: parts[source] for name, parts in self._parts.items() if source in parts}

    @cached_property
    def _parts(self) -> Mapping[str, Mapping[str, pd.DataFrame]]:
        tables = {
            "rank": self.rank,
            "strength": self.strength,
            "amplification": self.amplification,
            "intruders": self.intruders,
        }
        return {
            name: {str(source): rows for source, rows in table.groupby("adapter", sort=False)}
            for name, table in tables.items()
            if table is not None
        }


def measure(
    adapters: Sequence[Adapter],
    base: BaseWeights | None,
    *,
    draws: int,
    seed: int,
    workers: int | None,
    progress: bool,
    say: Callable[[str], None],
) -> Measured:
    """Make the tables; ``say`` is told which, one after the other."""
    options: dict[str, Any] = {"workers": workers, "progress": progress}
    say("linting")
    findings = [lint(adapter, base) for adapter in adapters]
    say("did I waste rank?")
    spectrum = spectrum_table(adapters, **options)
    rank = used_rank_table(adapters, draws=draws, seed=seed, **options)
    for column in ("scale", "scale_source", "norm", "singular_values", "noise_floors"):
        rank[column] = spectrum[column]
    say("which layers learned?")
    strength = strength_table(adapters, base, seed=seed, **options)
    strength["rounding"] = strength["relative_norm"] / strength["merge_signal_to_noise"].replace(0.0, np.nan)
    amplified = intruding = None
    if base is not None:
        say("what did it amplify?")
        amplified = amplification_table(adapters, base, draws=draws, seed=seed, **options)
        intruding = intruder_table(adapters, base, seed=seed, **options)
    return Measured(adapters, base, findings, rank, strength, amplified, intruding)


def at_largest_k(amplification: pd.DataFrame) -> pd.DataFrame:
    """Of every module the row of its largest k."""
    return amplification.groupby(["adapter", "module"], sort=False).tail(1)


def _band(shape: Shape) -> list[list[float]]:
    d_out, d_in, r = shape
    S = spectrum_null((d_out, d_in), r, draws=400)
    shares = S / S.norm(dim=1, keepdim=True)
    found: list[list[float]] = torch.quantile(shares, torch.tensor(_BAND, dtype=S.dtype), dim=0).tolist()
    return found
