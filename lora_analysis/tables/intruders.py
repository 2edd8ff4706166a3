"""Which of the adapted model's top directions are new to it, for every module, beside chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights
from lora_analysis.measures.adapted_directions import (
    SIDES,
    AdaptedDirections,
    Side,
    adapted_directions,
    random_directions,
)
from lora_analysis.measures.intruders import Intruders, intruders
from lora_analysis.measures.triples import Triples, leading_triples
from lora_analysis.measures.weight import weight_norm
from lora_analysis.tables.base_matrices import Rows, over_base_matrices
from lora_analysis.tables.directions import usable_svd
from lora_analysis.tables.frames import as_adapters, frame

COLUMNS = (
    "adapter", "module", "side", "k", "threshold",
    "intruders", "undecided", "energy_share", "undecided_share", "control_share", "control_se", "max_cosine_min",
    "flags",
)  # fmt: skip

_KNOWN = 64
"""Singular vectors of W computed at least where not all are: each decides for the old directions close to it."""


def intruder_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights,
    *,
    ks: Sequence[int] = (10,),
    thresholds: Sequence[float] = (0.5,),
    complete: bool | None = None,
    draws: int = 10,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Intruders among the top k singular vectors of W + ΔW, on both sides, with a control of equal spectrum.

    W is decomposed once for all adapters, and W + ΔW never: the first adapter of a matrix pays for an SVD of W,
    another for milliseconds.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
        Several adapters of one base share the decomposition of its matrices.
    base : BaseWeights
    ks : sequence of int
        How many of the top directions of W + ΔW to look at.
    thresholds : sequence of float
        A direction is an intruder where its cosine with every singular vector of W is below this.
    complete : bool, optional
        Whether to compute all singular vectors of W, which decides every direction but takes time by the cube of its
        smaller side: about 1 s at 1024, 5 s at 2048, a minute at 4096. By default up to 2048; else the top ones and,
        for what they do not decide, a certificate by Lanczos, which leaves some directions undecided: those close to a
        threshold, and old ones from the middle of W's spectrum.
    draws, seed : int
        Of the control; 0 leaves it out.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module, side (``out`` for left singular vectors, ``in`` for right ones), k and threshold.
        ``energy_share`` is the share of ``sum(sigma_l(W + ΔW)**2 for l <= k)`` in intruders, ``undecided_share``
        that in directions which may be; ``control_share`` is the mean of ``energy_share`` over random updates
        of the same singular values, ``control_se`` the standard error of that mean. ``max_cosine_min`` is the
        largest cosine of the newest direction; its upper bound on rows flagged ``base-top-only``, where not all
        of W was decomposed. Rows with k beyond the smaller side are missing, flagged ``beyond-rank``, and so are
        those of an update of unknown scale, since it decides how strong the update is.

    Raises
    ------
    ValueError
        If a k or a threshold is none.
    BaseWeightsError
        If the base lacks a matrix that an adapter updates, or its shape does not fit.

    References
    ----------
    Shuttleworth et al. 2024, arXiv:2410.21228; peft's ``reduce_intruder_dimension`` counts on the ``out`` side.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> flat = torch.full((16, 1), 0.25)
    >>> adapter = la.Adapter({"m": la.LowRankUpdate(flat, flat.mT, scale=40.0)})
    >>> base = la.load_base({"m.weight": torch.diag(torch.arange(16.0, 0.0, -1.0))})
    >>> la.intruder_table(adapter, base, ks=[1], draws=0)[["side", "intruders", "energy_share"]].values.tolist()
    [['out', 1, 1.0], ['in', 1, 1.0]]
    """
    ks, thresholds = sorted({int(k) for k in ks}), sorted({float(value) for value in thresholds})
    if not ks or ks[0] < 1:
        raise ValueError(f"ks: expected positive integers, such as (10,), got {ks}.")
    if not thresholds or not all(0 < value <= 1 for value in thresholds):
        raise ValueError(f"thresholds: expected cosines above 0 and up to 1, such as (0.5,), got {thresholds}.")
    if draws < 0:
        raise ValueError(f"draws: expected 0 or more, got {draws}.")

    def rows_of_matrix(weight: Tensor, modules: list[Module]) -> list[Rows]:
        norm = weight_norm(weight)
        most = max([k for k in ks if k <= min(weight.shape)], default=0)
        whole = None
        if most and norm > 0:
            whole = leading_triples(weight, min(max(_KNOWN, 2 * most), *weight.shape), complete=complete, seed=seed)
        return [_rows(module, weight, norm, whole, most) for module in modules]

    def _rows(module: Module, weight: Tensor, norm: float, whole: Triples | None, most: int) -> Rows:
        svd, flags = usable_svd(module, scale_bound=True)
        if norm == 0:
            flags.append("zero-base")
        found: AdaptedDirections | None = None
        control: list[AdaptedDirections] = []
        if svd is not None and whole is not None:
            if not whole.complete:
                flags.append("base-top-only")
            found = adapted_directions(weight, whole, svd, most, thresholds=thresholds, seed=seed)
            control = random_directions(whole, norm, module.shape, svd.S, most, draws=draws, seed=seed)
        return [
            _row(found if k <= most else None, control, side, k, threshold, flags + ["beyond-rank"] * (k > most))
            for side in SIDES
            for k in ks
            for threshold in thresholds
        ]

    rows = over_base_matrices(
        rows_of_matrix, as_adapters(adapter), base, workers=workers, progress=progress, description="Intruders"
    )
    return frame(rows, COLUMNS, counts=("intruders", "undecided"))


def _row(
    found: AdaptedDirections | None,
    control: list[AdaptedDirections],
    side: Side,
    k: int,
    threshold: float,
    flags: list[str],
) -> dict[str, Any]:
    """One row of one module; missing values where there is nothing to count."""
    values: dict[str, Any] = dict.fromkeys(Intruders._fields[2:], math.nan)
    shares: list[float] = []
    if found is not None:
        values = intruders(found, side, k, threshold)._asdict()
        shares = [intruders(draw, side, k, threshold).energy_share for draw in control]
    return {
        "side": side,
        "k": k,
        "threshold": threshold,
        **values,
        "control_share": statistics.mean(shares) if shares else math.nan,
        "control_se": statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan,
        "flags": " ".join(flags),
    }
