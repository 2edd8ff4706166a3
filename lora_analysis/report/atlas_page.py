"""What the atlas page says: every two adapters' cosine, a tree, who stands apart, and what all have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.report.columns import Column
from lora_analysis.report.data import rounded, shown
from lora_analysis.tables import Atlas, atlas

UNIT = 1e-4
"""Cosines are stored as whole multiples of this: a thousand adapters have half a million."""

_PAIRS = 1000
_STARTS = 400_000
"""Pairs of factors by which starts are told; a shelf with more pairs is sampled in fewer modules."""

_ADAPTERS = (
    Column("adapter", "adapter", "name", "As it was named, without what all share."),
    Column("norm", "‖ΔW‖", "number", "Of the whole update, in the unit of the weights."),
    Column("mean_cosine", "mean cos", "number", "With all others; 0 by chance."),
    Column("nearest", "likest", "name", "The adapter of the largest cosine."),
    Column("nearest_cosine", "largest cos", "number", "The cosine with it."),
    Column("start", "start", "count", "Adapters of one number began with the same A."),
    Column("norm_score", "norm score", "number", "Robust standard score of log ‖ΔW‖."),
    Column("cosine_score", "cos score", "number", "Robust standard score of the mean cosine."),
    Column("outlier", "stands apart", "text", "Whether either score is beyond 3.5."),
)
_LIKEST = (
    Column("adapter_a", "A", "name", "An adapter."),
    Column("adapter_b", "B", "name", "Another."),
    Column("cosine", "cos", "number", "Of the whole updates; 0 by chance."),
    Column("cosine_null_sd", "chance sd", "number", "Standard deviation of it by chance."),
    Column("same_start", "same start", "text", "Whether both began with the same A."),
)
_GROWTH = (
    Column("adapters", "adapters", "text", "All, or one of each start."),
    Column("side", "side", "text", "in: what updates read; out: what they write."),
    Column("count", "first n", "count", "How many adapters together."),
    Column("k90", "k90", "number", "Directions that hold 90 % of their energy, mean over modules."),
    Column("k90_chance", "chance", "number", "The same for updates turned at random."),
    Column("top_share", "top 16 hold", "share", "Share of energy in the first 16 directions."),
    Column("top_share_chance", "chance", "share", "The same for updates turned at random."),
)


def atlas_data(
    adapters: Sequence[Adapter], names: Sequence[str], *, seed: int, workers: int | None, progress: bool
) -> dict[str, Any] | str:
    """The atlas as a page shows it, or why there is none."""
    count = len(adapters)
    sampled = max(1, min(8, _STARTS * 2 // count**2))
    try:
        found = atlas(adapters, sampled=sampled, seed=seed, workers=workers, progress=progress)
    except LoraAnalysisError as error:
        return f"No atlas: {error}"
    called = dict(zip((adapter.source for adapter in adapters), names, strict=True))
    upper = found.cosine[np.triu_indices(count, 1)]
    return {
        "names": rounded(list(names)),
        "order": found.order(),
        "unit": UNIT,
        "cosine": [None if np.isnan(value) else round(value / UNIT) for value in upper.tolist()],
        "chance_sd": rounded(_mean_sd(found), 3),
        "norm": rounded(found.norm.tolist()),
        "start": found.start.tolist(),
        "linkage": rounded(found.linkage[:, :3].tolist()),
        "mean_share": rounded(found.mean_share, 3),
        "sampled": sampled,
        "adapters": shown(_adapters(found, called), _ADAPTERS, "atlas-adapters", pages=list(range(1, count + 1))),
        "pairs": shown(
            found.pairs()
            .head(_PAIRS)
            .replace({"adapter_a": called, "adapter_b": called})
            .replace(_words("same_start")),
            _LIKEST,
            "atlas-pairs",
        ),
        "growth": shown(found.growth, _GROWTH, "atlas-growth"),
    }


def _adapters(found: Atlas, called: dict[str, str]) -> Any:
    table = found.adapters()
    table["adapter"] = table["adapter"].map(called)
    table["nearest"] = table["nearest"].map(called)
    return table.replace(_words("outlier"))


def _words(column: str) -> dict[str, dict[bool, str]]:
    return {column: {True: "yes", False: "no"}}


def _mean_sd(found: Atlas) -> float | None:
    upper = found.cosine_null_sd[np.triu_indices(len(found.sources), 1)]
    known = upper[np.isfinite(upper)]
    return float(known.mean()) if len(known) else None
