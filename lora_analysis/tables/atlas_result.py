"""What an atlas of many adapters says: cosines, groups, an order, and who stands apart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lora_analysis.notebook import html_table

Matrix = npt.NDArray[np.float64]

FEWEST = 6
"""Adapters from which one can be an outlier."""

OUTLYING = 3.5
"""Robust standard scores from which an adapter counts as an outlier (Iglewicz and Hoaglin 1993)."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Atlas:
    """What many adapters have in common.

    Parameters
    ----------
    sources : tuple of str, length N
    cosine : array, shape (N, N)
        Of the whole updates, all modules together; in [-1, 1], by chance 0.
    cosine_null_sd : array, shape (N, N)
        Standard deviation of that by chance.
    norm : array, shape (N,)
        Of the whole updates.
    start : array of int, shape (N,)
        Groups of adapters that began with the same A, by number; as far as trained A's tell.
    linkage : array, shape (N - 1, 4)
        Average linkage by ``1 - cosine``, as scipy's ``dendrogram`` takes it.
    growth : DataFrame
        How many directions hold 90 % of the energy of the first n adapters, beside chance: ``adapters`` ("all", or
        "one of each start"), ``count``, ``side``, ``k90``, ``k90_chance``, ``top_share`` (of the first 16 directions)
        and ``top_share_chance``, each the mean over the modules that were sampled.
    mean_share : float
        Energy of the mean update over the mean energy of updates: 1 where all are alike, 1 / N by chance.
    """

    sources: tuple[str, ...]
    cosine: Matrix
    cosine_null_sd: Matrix
    norm: Matrix
    start: npt.NDArray[np.int64]
    linkage: Matrix
    growth: pd.DataFrame
    mean_share: float

    def __repr__(self) -> str:
        return f"Atlas({len(self.sources)} adapters, {len(set(self.start.tolist()))} starts)"

    def _repr_html_(self) -> str:
        table = self.adapters().iloc[self.order()]
        rows = [
            (row.adapter, f"{row.norm:.3g}", f"{row.mean_cosine:.2f}", row.start, "outlier" if row.outlier else "")
            for row in table.itertuples()
        ]
        caption = f"Atlas of {len(self.sources)} adapters, likest side by side"
        return html_table(caption, ["adapter", "‖ΔW‖", "mean cos", "start", ""], rows)

    def order(self) -> list[int]:
        """The adapters' numbers as the dendrogram orders its leaves, likest side by side."""
        from scipy.cluster import hierarchy

        if len(self.sources) < 2:
            return list(range(len(self.sources)))
        return [int(number) for number in hierarchy.leaves_list(self.linkage)]

    def clusters(self, cosine: float) -> npt.NDArray[np.int64]:
        """Numbers of clusters whose members are on average at least so like each other."""
        from scipy.cluster import hierarchy

        if len(self.sources) < 2:
            return np.ones(len(self.sources), dtype=np.int64)
        found = hierarchy.fcluster(self.linkage, 1 - cosine, criterion="distance")
        return np.asarray(found, dtype=np.int64)

    def adapters(self) -> pd.DataFrame:
        """One row per adapter: norm, cosines with the others, robust scores of both, and whether it stands apart."""
        others = self.cosine.copy()
        np.fill_diagonal(others, np.nan)
        known = np.isfinite(others)
        mean = np.where(known.any(axis=1), np.nan_to_num(others).sum(axis=1) / np.maximum(known.sum(axis=1), 1), np.nan)
        likest = np.where(known, others, -np.inf)
        nearest = [self.sources[int(row.argmax())] if np.isfinite(row.max()) else "" for row in likest]
        table = pd.DataFrame(
            {
                "adapter": list(self.sources),
                "norm": self.norm,
                "mean_cosine": mean,
                "nearest": nearest,
                "nearest_cosine": np.where(known.any(axis=1), likest.max(axis=1), np.nan),
                "start": self.start,
                "norm_score": _robust_scores(np.log(np.maximum(self.norm, 1e-300))),
                "cosine_score": _robust_scores(mean),
            }
        )
        # Few tell nothing of who stands apart, and to be like the others is not to.
        apart = (table["norm_score"].abs() > OUTLYING) | (table["cosine_score"] < -OUTLYING)
        table["outlier"] = apart & (len(table) >= FEWEST)
        return table

    def pairs(self) -> pd.DataFrame:
        """One row per pair of adapters, the likest first."""
        rows = [
            {
                "adapter_a": self.sources[a],
                "adapter_b": self.sources[b],
                "cosine": self.cosine[a, b],
                "cosine_null_sd": self.cosine_null_sd[a, b],
                "same_start": bool(self.start[a] == self.start[b]),
            }
            for a, b in itertools.combinations(range(len(self.sources)), 2)
        ]
        columns = ["adapter_a", "adapter_b", "cosine", "cosine_null_sd", "same_start"]
        return pd.DataFrame(rows, columns=columns).sort_values("cosine", ascending=False, ignore_index=True)


def _robust_scores(values: Matrix) -> Matrix:
    """``0.6745 (x - median) / MAD``, and where most are alike ``(x - median) / (1.2533 mean deviation)``; 0 if all are.

    Iglewicz and Hoaglin 1993.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values))
    middle = np.median(known)
    deviations = np.abs(known - middle)
    spread = np.median(deviations) / 0.6745 or 1.2533 * deviations.mean()
    if not spread > 0:
        return np.zeros(len(values))
    scores: Matrix = (values - middle) / spread
    return scores
