"""Which layers learned: how strong each update is beside its weight, and whether a merge keeps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError
from lora_analysis.measures import spectrum
from lora_analysis.measures.activations import Activations
from lora_analysis.measures.survival import merge_survival
from lora_analysis.measures.weight import weight_spectrum
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import with_scale

WEIGHTS = (
    "norm_update",
    "norm_base",
    "relative_norm",
    "sigma_update",
    "sigma_base",
    "sigma_ratio",
    "merge_signal_to_noise",
    "merge_kept",
    "merge_error",
    "merge_changed",
)
INPUTS = (
    "inputs",
    "relative_output",
    "input_gain",
    "input_gain_low",
    "input_gain_high",
    "input_stable_rank",
    "input_effective_rank",
    "mean_input_cosine",
)
COLUMNS = ("adapter", "module", "d_out", "d_in", "r", *WEIGHTS, *INPUTS, "flags")
_SCALE_BOUND = ("relative_output",)


def strength_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights | None = None,
    *,
    activations: Activations | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Size of every update beside its weight, what a merge keeps of it, and what it does to inputs.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    base : BaseWeights, optional
        Columns that need it are NaN without.
    activations : Activations, optional
        Of ``collect_activations`` for the same adapters in the same order; its columns are NaN without.
    dtype : torch.dtype
        What a merged weight would be stored in.
    seed : int
        Of the solver of σ₁(W) and of what chance gives.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module. ``relative_norm`` is ``‖ΔW‖_F / ‖W‖_F`` and ``sigma_ratio`` is ``σ₁(ΔW) / σ₁(W)``,
        dimensionless; norms and σ are in the unit of W. ``merge_…`` are those of ``measures.survival``: ``kept`` is
        the share of the update that a merge in ``dtype`` leaves, 1 at best.

        ``relative_output`` is ``‖ΔW X‖_F / ‖W X‖_F`` over ``inputs`` tokens; ``input_gain`` how much more the update's
        input directions see than random ones, 1 by chance, with the 1 % and 99 % quantiles of chance in ``_low`` and
        ``_high``; ``input_stable_rank`` and ``input_effective_rank`` are those of ``ΔW Σ^{1/2}``; and
        ``mean_input_cosine`` is that of its first direction with the mean input, which near 1 tells little.

        Where the scale is unknown all that depends on it is NaN.

    Raises
    ------
    BaseWeightsError
        If the base lacks a matrix that an adapter updates, its shape does not fit, or it holds NaN or infinities.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, table 7 (‖W‖ and ‖ΔW‖); ``measures.survival``, ``lora_analysis.activations``.

    Examples
    --------
    >>> import lora_analysis as la
    >>> adapter = la.Adapter({"q": la.LowRankUpdate(torch.eye(2, 1), torch.eye(1, 2), scale=0.5)})
    >>> strength_table(adapter, la.load_base({"q.weight": torch.eye(2)}))[["relative_norm", "sigma_ratio"]].values
    array([[0.35355339, 0.5       ]])
    """
    items: list[tuple[int, Adapter, str, Target | None]] = []
    for number, item in enumerate(as_adapters(adapter)):
        names = {} if base is None else base.find_all(module.target.tensor for module in item.modules.values())
        for name, module in item.modules.items():
            target = None if base is None else replace(module.target, tensor=names[module.target.tensor])
            items.append((number, item, name, target))

    def row(item: tuple[int, Adapter, str, Target | None]) -> dict[str, Any]:
        number, owner, name, target = item
        return _row(number, owner, name, target, base, activations, dtype, seed)

    rows = over_modules(row, items, workers=workers, progress=progress, description="Strength")
    return frame(rows, COLUMNS, counts=("inputs",))


def _row(
    number: int,
    adapter: Adapter,
    name: str,
    target: Target | None,
    base: BaseWeights | None,
    activations: Activations | None,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    module = adapter.modules[name]
    known = module.scale_source != "unknown"
    flags = module_flags(module)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
        "adapter": adapter.source,
        "module": name,
        "d_out": module.shape[0],
        "d_in": module.shape[1],
        "r": module.r,
        "inputs": pd.NA,
    }
    update = adapter[name] if known else with_scale(adapter[name], 1.0)
    try:
        S = update.singular_values()
    except UndefinedUpdateError:
        return row | {"flags": " ".join([*flags, "nonfinite"])}
    norm, largest = float(S.norm()), float(S[0]) if len(S) else 0.0
    flags += ["zero"] * (norm == 0)
    if known:
        row |= {"norm_update": norm, "sigma_update": largest}
    if base is not None and target is not None:
        weight = base.matrix(target, module.shape)
        try:
            whole = weight_spectrum(weight, 1, seed=seed)
            row |= {"norm_base": whole.norm, "sigma_base": float(whole.S[0])}
            if known:
                survived = merge_survival(update, weight, dtype=dtype)
                row |= {f"merge_{field}": value for field, value in survived._asdict().items()}
        except BaseWeightsError as error:
            raise BaseWeightsError(f"{base.source}: {target.tensor!r}: {error}") from error
        flags += ["zero-base"] * (whole.norm == 0)
        if known and whole.norm > 0:
            row |= {"relative_norm": norm / whole.norm, "sigma_ratio": largest / float(whole.S[0])}
    if activations is not None and (number, name) in activations.moments:
        row |= _on_inputs(activations, number, name, seed) | ({} if known else dict.fromkeys(_SCALE_BOUND, math.nan))
    elif activations is not None:
        flags.append("inputs-unseen")
    return row | {"flags": " ".join(flags)}


def _on_inputs(activations: Activations, number: int, name: str, seed: int) -> dict[str, Any]:
    moments = activations.moments[number, name]
    row: dict[str, Any] = {"inputs": moments.count}
    if not len(moments.svd.S) or float(moments.svd.S[0]) == 0:
        return row
    low, high = moments.chance_gains(seed=seed).quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    weighted = moments.singular_values()
    return row | {
        "relative_output": moments.relative,
        "input_gain": moments.gain,
        "input_gain_low": low,
        "input_gain_high": high,
        "input_stable_rank": spectrum.stable_rank(weighted),
        "input_effective_rank": spectrum.effective_rank(weighted),
        "mean_input_cosine": moments.mean_cosine,
    }
