"""Adapters of one base merged into one adapter, in float64, with what cutting it to a rank leaves out stated.

Values
------
``merge``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from lora_analysis.adapter import Adapter, Contents, Module, Origin
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.measures.merging import Method, merged_svd
from lora_analysis.measures.spectrum import energy_rank, numerical_rank
from lora_analysis.tables.directions import WHOLE, energy_left, leading
from lora_analysis.update import LowRankUpdate, Svd, Update


def merge(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "sum",
    density: float = 0.2,
    keep: float | None = None,
    r: int | None = None,
    energy: float | None = None,
) -> Adapter:
    """One adapter in the place of several of one base.

    Parameters
    ----------
    adapters : sequence of Adapter
        Modules that one of them lacks count as zero updates of its.
    weights : sequence of float, optional
        Of each adapter; 1 by default. Of the mean: 1 / T.
    method : {"sum", "tsv", "iso-c", "knots"}
        See ``measures.merging``.
    density, keep : float
        Of knots and tsv.
    r : int, optional
        Cut every module to so many directions; all that the merge has by default, up to the sum of the r's.
    energy : float, optional
        Or to the least number that holds this share of its energy, in (0, 1].

    Returns
    -------
    Adapter
        ``LowRankUpdate``s of scale 1, rounded to float32, held in memory; ``modules[name].truncation_error`` states
        what was cut off, and ``notes`` the largest relative error.

    Raises
    ------
    ValueError
        If there are no adapters, or an argument is out of range.
    LoraAnalysisError
        If a module has different shapes or targets in two adapters.
    UndefinedUpdateError
        If a scale is unknown, or an update holds NaN or infinities.
    UnsupportedAdapterError
        If a module is the low-rank part of DoRA: its update is not the product alone.

    Examples
    --------
    >>> e = torch.eye(4)
    >>> pair = [Adapter({"q": LowRankUpdate(e[:, i : i + 1], e[i : i + 1], scale=2.0)}) for i in (0, 1)]
    >>> merged = merge(pair, weights=[0.5, 0.5])
    >>> merged["q"].r, round(float(merged["q"].dense().trace()), 6)
    (2, 2.0)
    """
    if not adapters:
        raise ValueError("adapters: expected at least one, got none.")
    if r is not None and (energy is not None or r < 1):
        raise ValueError(f"r, energy: expected one of them, r at least 1, got r={r}, energy={energy}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy}.")
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    modules: dict[str, Module] = {}
    worst = (0.0, "")
    for name in names:
        owners = [adapter for adapter in adapters if name in adapter]
        first = owners[0].modules[name]
        svds = [_svd(adapter, name, first) for adapter in adapters]
        merged = merged_svd(svds, weights=weights, method=method, density=density, keep=keep)
        update, error, norm = _cut(merged, first.shape, r, energy)
        relative = error / norm if norm else 0.0
        worst = max(worst, (relative, name))
        modules[name] = Module(
            shape=first.shape,
            r=update.r,
            scale=1.0,
            scale_source="caller",
            target=first.target,
            tensors=(),
            read=partial(_given, update),
            truncation_error=error,
            embedding=first.embedding,
        )
    sources = ", ".join(adapter.source for adapter in adapters)
    settings = [f"weights {', '.join(f'{weight:g}' for weight in weights)}"] if weights is not None else []
    if method == "knots":
        settings.append(f"density {density:g}")
    if keep is not None:
        settings.append(f"keep {keep:g}")
    note = f"merged by {method}{''.join(f', {setting}' for setting in settings)}, from {sources}."
    if worst[0] > 0:
        note += f" What was cut off is at most {worst[0]:.2%} of a module's norm ({worst[1]!r})."
    config = {
        key: value
        for key in ("base_model_name_or_path",)
        if len({value := adapter.config.get(key) for adapter in adapters}) == 1 and value is not None
    }
    return _restored(Contents(modules, (), (note,)), f"{len(adapters)} adapters", config)


def _svd(adapter: Adapter, name: str, first: Module) -> Svd:
    """The update of a module, and one of no directions where the adapter lacks it."""
    if name not in adapter:
        d_out, d_in = first.shape
        return Svd(torch.zeros(d_out, 0), torch.zeros(0), torch.zeros(0, d_in))
    module = adapter.modules[name]
    where = f"{adapter.source}: {name!r}"
    same = replace(module.target, transposed=first.target.transposed) == first.target
    if module.shape != first.shape or not same:
        raise LoraAnalysisError(
            f"{where}: expected the shape and place it has in the other adapters, {first.shape}, got {module.shape}. "
            "Merge adapters of one base."
        )
    if "dora-low-rank-part" in module.flags:
        raise UnsupportedAdapterError(
            f"{where}: expected an update, got DoRA's product without its magnitudes. Load the adapter with base=."
        )
    if module.scale_source == "unknown":
        raise UndefinedUpdateError(f"{where}: expected a known scale, got none. Pass alpha= when loading the adapter.")
    update = adapter[name]
    try:
        svd = update.svd() if isinstance(update, LowRankUpdate) else update.svd(leading(module, update))
    except UndefinedUpdateError as error:
        raise UndefinedUpdateError(f"{where}: {error} Merge adapters of finite numbers.") from error
    _require_whole(update, svd, where)
    return svd.top(numerical_rank(svd.S, module.shape))


def _require_whole(update: Update, svd: Svd, where: str) -> None:
    left = energy_left(update, svd)
    if left > WHOLE:
        raise UnsupportedAdapterError(
            f"{where}: expected an update of low rank, got one of which {len(svd.S)} directions leave "
            f"{math.sqrt(left):.1%} out. Cut it first: lora_analysis.resize."
        )


def _cut(svd: Svd, shape: tuple[int, int], r: int | None, energy: float | None) -> tuple[LowRankUpdate, float, float]:
    """The first directions as float32 factors, the norm of what they miss, and that of the whole."""
    rank = numerical_rank(svd.S, shape)
    wanted = rank if r is None and energy is None else energy_rank(svd.S, energy) if energy is not None else r
    k = max(1, min(rank, wanted or rank))
    if not len(svd.S):
        return LowRankUpdate(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]), 1.0), 0.0, 0.0
    root = svd.S[:k].sqrt()
    update = LowRankUpdate((svd.U[:, :k] * root).float(), (root[:, None] * svd.Vh[:k]).float(), 1.0)
    norm = float(svd.S.norm())
    return update, float(svd.S[k:].norm()), norm


def _given(update: LowRankUpdate) -> LowRankUpdate:
    return update


def _restored(contents: Contents, source: str, config: dict[str, object]) -> Adapter:
    """The merged adapter, which pickles with its factors."""
    return Adapter.from_contents(
        contents,
        source=source,
        format="memory",
        origin=Origin(_restored, (contents, source, config)),
        config=config,
    )
