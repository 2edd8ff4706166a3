"""How much of its r each update uses, beside what chance, storage and the random start of A give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures import precision, spectrum
from lora_analysis.measures.learned import LearnedDirections, initial_spectrum_null, kaiming_sd, learned_directions
from lora_analysis.measures.plateau import NoisePlateau, noise_plateau
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.tables.pool import over_modules
from lora_analysis.tables.spectrum import singular_values_and_floors
from lora_analysis.update import LowRankUpdate, with_scale

MEASURES: dict[str, Callable[[Tensor], float]] = {
    "stable_rank": spectrum.stable_rank,
    "participation_ratio": spectrum.participation_ratio,
    "effective_rank": spectrum.effective_rank,
    "effective_rank_energy": spectrum.effective_rank_energy,
    "nuclear_ratio": spectrum.nuclear_ratio,
    "k90": lambda S: spectrum.energy_rank(S, 0.90),
    "k95": lambda S: spectrum.energy_rank(S, 0.95),
    "k99": lambda S: spectrum.energy_rank(S, 0.99),
}
"""What is set beside its quantiles by chance."""

LOW, HIGH = 0.01, 0.99
"""Quantiles of chance between which a measure is consistent with it."""

_WIDE = 2**14
"""d_in beyond which normal entries stand for uniform ones, whose singular values vary a little less."""

_CONSISTENT = 0.01
"""p of the bulk of A from which its variance is taken to be that of a start."""
_LIKE = 1.5
"""Most that the bulk of A may be off a start, as a factor, and still be taken to come from it."""

COLUMNS = (
    "adapter",
    "module",
    "d_out",
    "d_in",
    "r",
    "numerical_rank",
    "resolved_rank",
    *(name + ending for name in MEASURES for ending in ("", "_low", "_high")),
    "truncation_errors",
    "start",
    "bulk",
    "bulk_p",
    "learned_directions",
    "learned_p",
    "learned_q",
    "plateau_p",
    "above_noise",
    "above_threshold",
    "flags",
)
_COUNTS = ("numerical_rank", "resolved_rank", "learned_directions", "above_noise", "above_threshold")


class _Chance(NamedTuple):
    """What chance gives for one shape."""

    quantiles: dict[str, tuple[float, float]]
    starts: dict[str, Tensor]


def used_rank_table(
    adapter: Adapter | Sequence[Adapter],
    *,
    draws: int = 999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Every measure of rank beside its quantiles by chance, and what stands above noise.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    draws, seed : int
        Monte Carlo draws of every null, and their seed.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per module, everything dimensionless. Beside each measure of ``measures.spectrum`` stand ``_low`` and
        ``_high``, the 1 % and 99 % quantiles of independent Gaussian factors of the same shape: between them it is
        *consistent with chance*. They are NaN for updates that are no product of two factors, flagged ``no-chance``.

        ``truncation_errors`` is a list: ``‖ΔW - ΔW_k‖_F / ‖ΔW‖_F`` for k = 1 to r. ``resolved_rank`` counts singular
        values of at least three storage-noise floors.

        ``start`` says which random start A's bulk is like, ``uniform`` (PEFT's default, loralib) or ``normal`` of
        variance 1/r² (PEFT's ``gaussian``, diffusers'); ``bulk`` is a singular value three quarters down its spectrum
        over that of the start, ``bulk_p`` its p. ``learned_directions`` counts those that the start cannot account for,
        with ``learned_p`` for the largest, and ``learned_q`` adjusted for the number of modules. Where the bulk is off
        by a little (``bulk_p`` below 0.01), the count does without the variance, flagged ``start-rescaled``; where it
        is off by more than half, or r is 1, there is no count, flagged ``start-unknown``: another start, or most
        directions learned.

        ``plateau_p`` is that of a plateau of noise at the end of the spectrum; where it is not rejected,
        ``above_noise`` counts the singular values above its edge, and ``above_threshold`` those above Gavish and
        Donoho's threshold. Elsewhere both are missing: not applicable.

    References
    ----------
    ``measures.spectrum_null``, ``measures.learned``, ``measures.plateau``, ``measures.precision``.

    Examples
    --------
    >>> import lora_analysis as la
    >>> generator = torch.Generator().manual_seed(0)
    >>> up, down = torch.randn(64, 8, generator=generator), torch.randn(8, 48, generator=generator)
    >>> row = used_rank_table(la.Adapter({"q": la.LowRankUpdate(up, down, scale=1.0)})).iloc[0]
    >>> bool(row["stable_rank_low"] < row["stable_rank"] < row["stable_rank_high"] < 8)  # chance, not 8
    True
    """
    items = [(item, name) for item in as_adapters(adapter) for name in item]
    shapes = sorted({(*item.modules[name].shape, item.modules[name].r) for item, name in items})
    found = over_modules(
        lambda shape: _chance(*shape, draws=draws, seed=seed),
        shapes,
        workers=workers,
        progress=progress,
        description="Chance",
    )
    chance = dict(zip(shapes, found, strict=True))
    rows = over_modules(
        lambda item: _row(*item, chance, draws=draws, seed=seed),
        items,
        workers=workers,
        progress=progress,
        description="Used rank",
    )
    return with_discoveries(frame(rows, COLUMNS, counts=_COUNTS), {"learned_p": ["adapter"]})


def _chance(d_out: int, d_in: int, r: int, *, draws: int, seed: int) -> _Chance:
    if min(d_out, d_in, r) < 1:
        return _Chance({}, {})
    spectra = spectrum_null((d_out, d_in), r, draws=draws, seed=seed)
    quantiles = {}
    for name, measure in MEASURES.items():
        values = torch.tensor([measure(S) for S in spectra], dtype=torch.float64)
        low, high = values.quantile(torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
        quantiles[name] = (low, high)
    starts = {"normal": initial_spectrum_null(r, d_in, law="normal", draws=draws, seed=seed)}
    starts["uniform"] = (
        starts["normal"] if d_in > _WIDE else initial_spectrum_null(r, d_in, law="uniform", draws=draws, seed=seed)
    )
    return _Chance(quantiles, starts)


def _row(
    adapter: Adapter, name: str, chance: dict[tuple[int, int, int], _Chance], *, draws: int, seed: int
) -> dict[str, Any]:
    module = adapter.modules[name]
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | dict.fromkeys(_COUNTS, pd.NA)
    row |= {
        "adapter": adapter.source,
        "module": name,
        "d_out": module.shape[0],
        "d_in": module.shape[1],
        "r": module.r,
        "truncation_errors": None,
        "start": "",
    }
    flags = module_flags(module)
    update = adapter[name] if module.scale_source != "unknown" else with_scale(adapter[name], 1.0)
    try:
        S, floors = singular_values_and_floors(update)
    except UndefinedUpdateError:
        return row | {"flags": " ".join([*flags, "nonfinite"])}
    rank = spectrum.numerical_rank(S, module.shape)
    row |= {"numerical_rank": rank} | {measure: function(S) for measure, function in MEASURES.items()}
    if floors is not None:
        row["resolved_rank"] = precision.resolved_rank(S, floors)
        flags += ["storage-noise"] * (row["resolved_rank"] < rank)
    if rank == 0:
        return row | {"flags": " ".join([*flags, "zero"])}
    left = S.square().flip(0).cumsum(0).flip(0).sqrt()
    row["truncation_errors"] = [*(left[1:] / left[0]).tolist(), 0.0]
    by_chance = chance[*module.shape, module.r]
    # LoHa's factors are products themselves, of r² columns; what began with a product has two of them.
    if not isinstance(update, LowRankUpdate) or update.r != module.r or "less-initial" in flags:
        return row | {"flags": " ".join([*flags, "no-chance"])}
    for measure, (low, high) in by_chance.quantiles.items():
        row |= {f"{measure}_low": low, f"{measure}_high": high}
    if module.r <= module.shape[0]:
        row |= _plateau(noise_plateau(S, module.shape[0], draws=draws, seed=seed))
    if not module.embedding:  # whose A begins at zero
        found, word = _learned(update, by_chance.starts)
        row |= found
        flags += [word] if word else []
    return row | {"flags": " ".join(flags)}


def _plateau(found: NoisePlateau) -> dict[str, Any]:
    counts = {"above_noise": found.above_edge, "above_threshold": found.above_threshold}
    return {"plateau_p": found.p} | {name: pd.NA if value is None else value for name, value in counts.items()}


def _learned(update: LowRankUpdate, starts: dict[str, Tensor]) -> tuple[dict[str, Any], str]:
    """The count against the start that A's bulk is like, or without a variance where it is a little off; and a flag."""
    sds = {"uniform": kaiming_sd(update.shape[1]), "normal": 1 / update.r}
    found: dict[str, LearnedDirections] = {
        start: learned_directions(update.down, null, sd=sds[start]) for start, null in starts.items()
    }

    def unlikeness(start: str) -> float:
        return abs(math.log(found[start].bulk)) if found[start].bulk > 0 else math.inf

    nearest = min(found, key=unlikeness)
    of = found[nearest]
    row = {"start": nearest, "bulk": of.bulk, "bulk_p": of.bulk_p}
    if of.bulk_p >= _CONSISTENT:
        return row | {"learned_directions": of.learned, "learned_p": of.p}, ""
    if update.r > 1 and unlikeness(nearest) <= math.log(_LIKE):
        return row | {"learned_directions": of.learned_rescaled, "learned_p": of.p_rescaled}, "start-rescaled"
    return {"start": "unknown"}, "start-unknown"
