"""Are two updates the same thing? Asked of their start, their size, their subspaces and what they do to inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.measures.activations import Activations
from lora_analysis.measures.haar_frames import update_cosine_null
from lora_analysis.measures.interference import update_cosine, update_cosine_null_sd
from lora_analysis.measures.null import SimilarityNull, similarity_null
from lora_analysis.measures.spectrum import energy_rank
from lora_analysis.measures.subspace import corrected_similarity, grassmann_distance, subspace_similarity
from lora_analysis.tables.directions import energy_left, usable_svd
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import frame
from lora_analysis.tables.pairs import Pairs, module_pairs
from lora_analysis.tables.pool import over_modules
from lora_analysis.tables.starts import rows_shared, same_start
from lora_analysis.update import Svd, Update, with_scale

SIDES = ("in", "out")
_ENERGY = 0.9
_BY_SIDE = (
    *("m", "n", "phi", "phi_corrected", "phi_p", "phi_q"),
    *("k90_a", "k90_b", "chordal", "chordal_chance", "geodesic"),
)
COLUMNS = (
    "adapter_a",
    "adapter_b",
    "module_a",
    "module_b",
    "rows_shared",
    "cosine",
    "cosine_null_sd",
    "cosine_p",
    "cosine_q",
    "norm_ratio",
    *(f"{name}_{side}" for side in SIDES for name in _BY_SIDE),
    "agreement",
    "flags",
)
_COUNTS = tuple(f"{name}_{side}" for side in SIDES for name in ("m", "n", "k90_a", "k90_b"))


def sameness_table(
    a: Adapter,
    b: Adapter | None = None,
    *,
    pairs: Pairs = None,
    activations: Activations | None = None,
    draws: int = 1999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Every sense in which two updates can be the same: of two adapters, or of the layers of one.

    Parameters
    ----------
    a, b : Adapter
        Of one base. Without ``b``, modules of ``a`` against each other.
    pairs : {"same", "all"} or sequence of (str, str), optional
        As in ``similarity_table``; pairs of different shapes have no row.
    activations : Activations, optional
        Of ``collect_activations`` for [a, b], for ``agreement``.
    draws, seed : int
        Of the nulls that have no closed form.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per pair of modules. ``rows_shared`` is the share of A's rows that both began with, as far as trained
        A's tell; where, over all modules, that is a tenth, rows are flagged ``same-start``: likeness on the side ``in``
        is then no sign of learning. ``cosine`` is that of the updates as vectors, ``cosine_p`` two-sided against
        updates of the same spectra turned at random; ``norm_ratio`` is the smaller norm over the larger. On either
        side: ``phi`` of all m and n directions (1 where one subspace holds the other), ``phi_corrected`` (0 by chance),
        ``phi_p``; each p has a q, adjusted for the number of pairs (``tables.discoveries``); and between the directions
        that hold 90 % of the energy, ``k90_a`` and ``k90_b`` of them, ``chordal`` with its root mean square by chance,
        and ``geodesic`` (radians). ``agreement`` is linear CKA of what two updates of one module add to its output on
        the same inputs. Where a scale is unknown ``norm_ratio`` is NaN and all else holds.

    Raises
    ------
    LoraAnalysisError
        If there is nothing to compare: no pair of modules of one shape.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2; Ye and Lim 2016, arXiv:1407.0900 (different dimensions); Kornblith et
    al. 2019, arXiv:1905.00414.

    Examples
    --------
    >>> import lora_analysis as la
    >>> e = torch.eye(64)
    >>> a, b = (la.Adapter({"q": la.LowRankUpdate(e[:, :2], e[i : i + 2], scale=1.0)}) for i in (0, 1))
    >>> row = sameness_table(a, b, draws=99).iloc[0]
    >>> [round(float(row[column]), 12) for column in ("phi_in", "phi_out", "cosine")]
    [0.5, 1.0, 0.0]
    """
    other = a if b is None else b
    found = module_pairs(a, b, pairs)
    listed = [(x, y) for x, y in found if a.modules[x].shape == other.modules[y].shape]
    if not listed:
        raise LoraAnalysisError(f"{a.source}: expected modules of one shape to compare, got none.")
    rows = over_modules(
        lambda pair: _row(a, other, pair, activations, draws, seed),
        listed,
        workers=workers,
        progress=progress,
        description="Sameness",
    )
    shares, few = [row["rows_shared"] for row in rows], [row["_rows"] for row in rows]
    alike = same_start(shares, few, two_adapters=b is not None)
    nulls: dict[tuple[int, int, int], SimilarityNull] = {}
    for row, began_alike in zip(rows, alike, strict=True):
        row["flags"] = " ".join([*row["flags"].split(), *["same-start"] * began_alike])
        for side in SIDES:
            _add_chance(row, side, nulls, draws, seed)
    families: dict[str, list[str]] = {"cosine_p": [], "phi_p_in": [], "phi_p_out": []}
    return with_discoveries(frame(rows, COLUMNS, counts=_COUNTS), families)


def _row(
    a: Adapter, b: Adapter, pair: tuple[str, str], activations: Activations | None, draws: int, seed: int
) -> dict[str, Any]:
    modules = a.modules[pair[0]], b.modules[pair[1]]
    shape = modules[0].shape
    found = [usable_svd(module, scale_bound=False, leading_only=True) for module in modules]
    flags = list(dict.fromkeys(word for _, words in found for word in words))
    known = "unknown-scale" not in flags
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | dict.fromkeys(_COUNTS, pd.NA)
    row |= {
        "adapter_a": a.source,
        "adapter_b": b.source,
        "module_a": pair[0],
        "module_b": pair[1],
        "cosine_null_sd": update_cosine_null_sd(shape),
        "_d": shape,
    }
    row["rows_shared"] = rows_shared(*modules)
    row["_rows"] = min(module.r for module in modules)
    tops = [svd for svd, _ in found if svd is not None and len(svd.S)]
    if len(tops) < 2:
        return row | {"flags": " ".join(flags)}
    updates = [
        module.read() if module.scale_source != "unknown" else with_scale(module.read(), 1.0) for module in modules
    ]
    cosine = update_cosine(*updates)
    null = update_cosine_null(tops[0].S, tops[1].S, shape, draws=draws, seed=seed)
    row |= {"cosine": cosine, "cosine_p": (1 + int((null.abs() >= abs(cosine)).sum())) / (draws + 1)}
    if known:
        norms = sorted(update.norm() for update in updates)
        row["norm_ratio"] = norms[0] / norms[1]
    for side in SIDES:
        row |= {f"{field}_{side}": value for field, value in _subspaces(tops, updates, side).items()}
    if activations is not None and pair[0] == pair[1]:
        places = [(number, pair[0]) in activations.moments for number in (0, 1)]
        row["agreement"] = activations.agreement(0, 1, pair[0]) if all(places) else math.nan
    return row | {"flags": " ".join(flags)}


def _subspaces(svds: Sequence[Svd], updates: Sequence[Update], side: str) -> dict[str, Any]:
    first, second = ((svd.V if side == "in" else svd.U) for svd in svds)
    found = {"m": len(svds[0].S), "n": len(svds[1].S), "phi": float(subspace_similarity(first, second)[-1, -1])}
    held = [1 - energy_left(update, svd) for update, svd in zip(updates, svds, strict=True)]
    if min(held) < _ENERGY:
        return found
    # Of the whole energy, of which the triples at hand may be a part.
    k_a, k_b = (energy_rank(svd.S, min(1.0, _ENERGY / share)) for svd, share in zip(svds, held, strict=True))
    most = first[:, :k_a], second[:, :k_b]
    return found | {
        "k90_a": k_a,
        "k90_b": k_b,
        "chordal": grassmann_distance(*most),
        "geodesic": grassmann_distance(*most, kind="geodesic"),
    }


def _add_chance(
    row: dict[str, Any], side: str, nulls: dict[tuple[int, int, int], SimilarityNull], draws: int, seed: int
) -> None:
    if row[f"m_{side}"] is pd.NA:
        return
    d, m, n = row["_d"][1 if side == "in" else 0], row[f"m_{side}"], row[f"n_{side}"]
    if (d, m, n) not in nulls:
        nulls[d, m, n] = similarity_null(d, m, n, draws=draws, seed=seed)
    null, phi = nulls[d, m, n], torch.tensor([row[f"phi_{side}"]], dtype=torch.float64)
    mean = torch.tensor([max(m, n) / d], dtype=torch.float64)
    row[f"phi_corrected_{side}"] = float(corrected_similarity(phi, mean))
    row[f"phi_p_{side}"] = float(null.p(phi, cells=[(m, n)]))
    k_a, k_b = row[f"k90_a_{side}"], row[f"k90_b_{side}"]
    if k_a is pd.NA:
        return
    # E of the squared chordal distance: p - ij/d principal angles, and 1 for each dimension that is missing.
    row[f"chordal_chance_{side}"] = math.sqrt(max(k_a, k_b) - k_a * k_b / d)
