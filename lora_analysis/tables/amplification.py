"""What updates do to the base matrices they are added to: the paper's Table 7 for every module and k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter, Module
from lora_analysis.base import BaseWeights
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures import spectrum
from lora_analysis.measures.amplification import Amplification, amplification, gains_of, projected_null_rms, sign_p
from lora_analysis.measures.projection_null import projection_null, projection_null_draws
from lora_analysis.measures.weight import WeightSpectrum, weight_rows, weight_spectrum
from lora_analysis.tables.base_matrices import Rows, over_base_matrices
from lora_analysis.tables.directions import last_k
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.update import with_scale

SPLIT = ("gain_out", "gain_out_z", "gain_in", "sign_p")
COLUMNS = ("adapter", "module", "k", *Amplification._fields, "projected_top_error", *SPLIT, "q", "sign_q", "flags")
_SCALE_BOUND = ("norm_update", "amplification", "amplification_null")


def amplification_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights,
    ks: Sequence[int] | None = None,
    *,
    draws: int = 999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Projection of each base matrix on the update's top directions, with gain, ceiling, sign and null.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
        Several adapters of one base share the reading and the decomposition of its matrices.
    base : BaseWeights
    ks : sequence of int, optional
        Truncations k; powers of two up to r, and r, by default (of a matrix without an r of its own up to 64).
    draws, seed : int
        Of the Monte Carlo p, at least 1 / (draws + 1); 0 leaves p out.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module and k; the columns are those of ``measures.amplification.Amplification``, and
        ``projected_top_error``, which ``projected_top`` is within by the residuals of W's decomposition. The gain is
        the product of ``gain_out``, that of the output directions (with its standard score ``gain_out_z``), and
        ``gain_in``, that of the input directions given those: 1 while A is still random. ``sign_p`` is the exact p
        of ``signed_positive``. ``q`` and ``sign_q`` are adjusted for the number of modules (``tables.discoveries``).
        At k
        everything uses the best rank-k part ΔW_k, so k = r is the paper's figure. Rows with k beyond the
        numerical rank are NaN, flagged ``beyond-rank``; where the scale is unknown, ``norm_update`` and the
        two amplifications are NaN.

    Raises
    ------
    BaseWeightsError
        If the base lacks a matrix that an adapter updates, or its shape does not fit.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.3, table 7 and appendix H.4.
    """
    if ks is not None:
        ks = sorted({int(k) for k in ks})
        if not ks or min(ks) < 1:
            raise ValueError(f"ks: expected positive integers, got {ks}.")

    def rows_of_matrix(weight: Tensor, modules: list[Module]) -> list[Rows]:
        shape = (weight.shape[0], weight.shape[1])
        wanted = [ks or _default_ks(module) for module in modules]
        most = max([1, *(k for values in wanted for k in values if k <= min(shape))])
        whole = weight_spectrum(weight, most, seed=seed)
        null = projection_null_draws(whole, shape, most, draws=draws, seed=seed) if draws else None
        return [_rows(module, weight, whole, null, values) for module, values in zip(modules, wanted, strict=True)]

    rows = over_base_matrices(
        rows_of_matrix, as_adapters(adapter), base, workers=workers, progress=progress, description="Amplification"
    )
    return with_discoveries(frame(rows, COLUMNS), {"p": ["adapter", "k"], "sign_p": ["adapter", "k"]})


def _default_ks(module: Module) -> list[int]:
    most = last_k(module)
    return sorted({2**power for power in range(most.bit_length())} | {most})


def _rows(module: Module, weight: Tensor, whole: WeightSpectrum, null: Tensor | None, ks: Sequence[int]) -> Rows:
    """The rows of one module of one adapter."""
    known = module.scale_source != "unknown"
    flags = module_flags(module)
    update = module.read() if known else with_scale(module.read(), 1.0)
    try:
        svd = update.svd(max(ks))
        rank = spectrum.numerical_rank(svd.S, module.shape)
        flags += ["zero"] * (rank == 0)
    except UndefinedUpdateError:
        svd, rank = None, 0
        flags.append("nonfinite")
    usable = [k for k in ks if k <= rank]
    figures: dict[int, dict[str, float]] = {}
    if svd is not None and usable:
        top = svd.top(max(usable))
        rows_of_weight = weight_rows(weight, top)
        G = rows_of_weight @ top.V
        measured = amplification(G, top.S, whole, module.shape, usable, null_draws=null)
        columns = {field: getattr(measured, field).tolist() for field in Amplification._fields}
        lengths = rows_of_weight.square().sum(1).cumsum(0).sqrt()
        split = [_split(float(lengths[k - 1]), float(G[:k, :k].norm()), whole, k, module.shape) for k in usable]
        columns |= {field: [values[field] for values in split] for field in SPLIT[:3]}
        positive = columns["signed_positive"]
        columns["sign_p"] = [math.nan if math.isnan(x) else sign_p(x, k) for x, k in zip(positive, usable, strict=True)]
        figures = {k: {field: columns[field][row] for field in columns} for row, k in enumerate(usable)}
    hidden = {} if known else dict.fromkeys(_SCALE_BOUND, math.nan)
    rows = []
    for k in ks:
        found = figures.get(k) or _without_update(whole, module.shape, k, zero="zero" in flags)
        words = [*flags, *(["beyond-rank"] if k not in figures else []), *(["zero-base"] if whole.norm == 0 else [])]
        words += ["outside-base"] * math.isinf(found["amplification"])
        rows.append(
            {
                "k": k,
                **found,
                **hidden,
                # Each value is within the bound of a singular value, and so their root sum of squares.
                "projected_top_error": math.sqrt(k) * whole.bound if k <= len(whole.S) else math.nan,
                "flags": " ".join(words),
            }
        )
    return rows


def _split(
    one_sided: float, projected: float, whole: WeightSpectrum, k: int, shape: tuple[int, int]
) -> dict[str, float]:
    gain_out, gain_in = gains_of(one_sided, projected, whole.norm, k, shape)
    # U.T @ W is U.T @ W @ V for a V that is a whole basis.
    mean, variance = projection_null(shape, k, shape[1], whole.norm**2, whole.fourth_moment)
    z = (one_sided**2 - mean) / math.sqrt(variance) if k > 1 and variance > 0 else math.nan
    return {"gain_out": gain_out, "gain_out_z": z, "gain_in": gain_in}


def _without_update(whole: WeightSpectrum, shape: tuple[int, int], k: int, *, zero: bool) -> dict[str, float]:
    """The columns that hold without any direction of ΔW to project on."""
    known = k <= len(whole.S)
    return dict.fromkeys((*Amplification._fields, *SPLIT), math.nan) | {
        "norm_update": 0.0 if zero else math.nan,
        "norm_base": whole.norm,
        "projected_top": float(whole.S[:k].norm()) if known else math.nan,
        "projected_null_rms": projected_null_rms(whole.norm, k, shape) if known else math.nan,
    }
