"""The difference of two checkpoints, matrix by matrix, whole or truncated with the error measured."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Contents, Module, Origin, Unused
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.diff.pairs import Pair, paired
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures.spectrum import energy_rank
from lora_analysis.update import DenseUpdate, LowRankUpdate

Weights = BaseWeights | str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]
"""A model's weights: opened, or what ``load_base`` opens."""

FORMAT = "diff"


def diff(
    tuned: Weights,
    base: Weights,
    *,
    r: int | None = None,
    energy: float | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Adapter:
    """What full fine-tuning did to every matrix: ``ΔW = W_tuned - W_base``.

    Without ``r`` and ``energy`` nothing is read but shapes: ``adapter[module]`` reads both matrices and gives
    their difference whole, each time, and a matrix that did not change gives zero. With one of them every
    difference is decomposed now, one after another, and its best approximation of that rank is held.

    Parameters
    ----------
    tuned, base : BaseWeights, path, nn.Module or mapping
        A model after and before; whatever ``load_base`` opens. LoRA layers of a live model count as far as they
        are merged into its weights.
    r : int, optional
        Keep the first r singular triples of each difference.
    energy : float, optional
        Keep as many as hold this share of ‖ΔW‖², in (0, 1].
    device : str or torch.device
        Where matrices are put and decomposed.
    progress : bool
        Show a progress bar on stderr while truncating.

    Returns
    -------
    Adapter
        ``DenseUpdate``s; with ``r`` or ``energy`` ``LowRankUpdate``s, whose ``modules[name].truncation_error`` is
        ``‖ΔW - up @ down‖_F`` as measured on the factors held, sqrt(sum of the squared singular values left
        out) and their rounding; ``notes`` sum it up. Everything that is no matrix of both is in ``unused``, as
        are matrices found identical while truncating; its names are those of the checkpoint it lies in.

    Raises
    ------
    BaseWeightsError
        If a checkpoint cannot be read, or they have no matrix in common.
    UndefinedUpdateError
        If a difference that is to be truncated holds NaN or infinities.
    ValueError
        If both ``r`` and ``energy`` are given, or one is out of range.

    Notes
    -----
    The whole difference pickles as the way to open it again, a truncated one with its factors, for finding them
    again takes a singular value decomposition of every matrix.

    Examples
    --------
    >>> before = {"lin.weight": torch.zeros(2, 3), "lin.bias": torch.zeros(2)}
    >>> after = {"lin.weight": torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), "lin.bias": torch.ones(2)}
    >>> diff(after, before)["lin"].singular_values().tolist()
    [4.0, 3.0]
    >>> first = diff(after, before, r=1)
    >>> first["lin"].r, first.modules["lin"].truncation_error, first.ledger["lin.bias"]
    (1, 3.0, 'no matrix: of shape (2,)')

    References
    ----------
    Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.
    """
    if r is not None and energy is not None:
        raise ValueError("r, energy: expected one of them, got both.")
    if r is not None and r < 1:
        raise ValueError(f"r: expected at least 1, got {r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy}.")
    embeddings = {name for model in (tuned, base) if isinstance(model, nn.Module) for name in _embeddings(model)}
    before = _opened(base, device)
    # A live tuned model may have LoRA merged into it, which is meant; as a base that would be a mistake.
    after = _opened(tuned.state_dict() if isinstance(tuned, nn.Module) else tuned, device)
    sides = _Sides(after, before, torch.device(device), frozenset(embeddings))
    if r is None and energy is None:
        return _whole(sides)
    return _truncated(sides, r, energy, progress=progress)


class _Sides(NamedTuple):
    """Both checkpoints, where to compute, and what is known of the live models they were."""

    tuned: BaseWeights
    base: BaseWeights
    device: torch.device
    embeddings: frozenset[str]


def _whole(sides: _Sides) -> Adapter:
    """All differences, read when asked for."""
    found = paired(sides.tuned, sides.base, sides.embeddings)
    modules = {
        pair.module: Module(
            shape=pair.shape,
            r=min(pair.shape),
            scale=1.0,
            scale_source="format default",
            target=pair.target,
            tensors=(pair.tuned,),
            read=partial(_difference, sides, pair),
            embedding=pair.embedding,
        )
        for pair in found.pairs
    }
    read = tuple(f"{side.source}: {note}" for side in (sides.tuned, sides.base) for note in side.notes)
    return Adapter.from_contents(
        Contents(modules, found.unused, (*found.notes, *read)),
        source=sides.tuned.source,
        format=FORMAT,
        origin=Origin(_whole, (sides,)),
        config={"base_model_name_or_path": sides.base.source},
    )


def _difference(sides: _Sides, pair: Pair) -> DenseUpdate:
    target = replace(pair.target, tensor=pair.tuned)
    before = sides.base.matrix(pair.target, pair.shape).to(sides.device)
    after = sides.tuned.matrix(target, pair.shape).to(sides.device)
    if sides.tuned.transposed(target, pair.shape) != sides.base.transposed(pair.target, pair.shape):
        after = after.mT  # a square weight, stored alike in both, of which only one knows that it is transposed
    return DenseUpdate(after.double() - before.double(), stored_eps=math.nan)


class _Truncation(NamedTuple):
    """A matrix's best approximation by one of lower rank, and how far it is off."""

    update: LowRankUpdate
    error: float
    """Frobenius norm of the matrix minus the update."""
    norm: float
    """Frobenius norm of the matrix."""


def _truncated(sides: _Sides, r: int | None, energy: float | None, *, progress: bool) -> Adapter:
    """Every difference by its first singular triples, one matrix in memory at a time."""
    whole = _whole(sides)
    modules: dict[str, Module] = {}
    found: dict[str, _Truncation] = {}
    identical: dict[str, str] = {}
    for name in _shown(list(whole), progress=progress):
        module, update = whole.modules[name], whole[name]
        matrix = update.dense()
        if not bool(matrix.isfinite().all()):
            raise UndefinedUpdateError(
                f"{whole.source}: {name!r}: expected numbers to truncate, got NaN or infinities in the difference."
            )
        if not bool(matrix.any()):
            identical[name] = module.tensors[0]
            continue
        found[name] = _best(matrix, r, energy, _factor_dtype(sides, module))
        modules[name] = replace(
            module,
            r=found[name].update.r,
            read=partial(_held, found[name].update),
            truncation_error=found[name].error,
        )
    used = {tensor for module in modules.values() for tensor in module.tensors}
    unused = tuple(
        Unused(tensor, f"identical in {sides.base.source}", _nbytes(sides.tuned, tensor))
        for tensor in dict.fromkeys(identical.values())
        if tensor not in used
    )
    notes = [*whole.notes, *_summary(found)]
    if parts := [name for name, tensor in identical.items() if tensor in used]:
        notes.append(f"{len(parts)} experts of stacks that changed did not and are no modules (first: {parts[0]!r}).")
    contents = Contents(modules, (*whole.unused, *unused), tuple(notes))
    return _restored(contents, whole.source, whole.config)


def _best(matrix: Tensor, r: int | None, energy: float | None, dtype: torch.dtype) -> _Truncation:
    """The first singular triples of a matrix as two factors of one size, in ``dtype``."""
    svd = DenseUpdate(matrix).svd()
    k = min(r, len(svd.S)) if r is not None else energy_rank(svd.S, float(energy or 1))
    U, S, Vh = svd.top(k)
    up, down = (U * S.sqrt()).to(dtype), (S.sqrt()[:, None] * Vh).to(dtype)
    # Of the rounded factors, and by no bound: this is what an adapter with them is off.
    error = float((matrix - up.double() @ down.double()).norm())
    return _Truncation(LowRankUpdate(up, down, 1.0, stored_eps=math.nan), error, float(matrix.norm()))


def _factor_dtype(sides: _Sides, module: Module) -> torch.dtype:
    """float32 holds differences of weights of up to 32 bits as well as their singular vectors are known."""
    dtypes = (sides.tuned.dtype(module.tensors[0]), sides.base.dtype(module.target.tensor))
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _summary(found: Mapping[str, _Truncation]) -> list[str]:
    """What was left out, in sum and where most."""
    if not found:
        return []
    error, norm = (math.hypot(*(getattr(item, field) for item in found.values())) for field in ("error", "norm"))
    worst = max(found, key=lambda name: found[name].error / found[name].norm)
    return [
        f"truncated: what is left out has norm {error:.3g} of {norm:.3g} over all {len(found)} modules, a share of "
        f"{error / norm:.2g}; at most {found[worst].error / found[worst].norm:.2g}, in {worst!r}."
    ]


def _held(update: LowRankUpdate) -> LowRankUpdate:
    return update


def _restored(contents: Contents, source: str, config: Mapping[str, Any]) -> Adapter:
    origin = Origin(_restored, (contents, source, config))
    return Adapter.from_contents(contents, source=source, format=FORMAT, origin=origin, config=config)


def _opened(weights: Any, device: str | torch.device) -> BaseWeights:
    return weights if isinstance(weights, BaseWeights) else load_base(weights, device=device)


def _embeddings(model: nn.Module) -> Iterable[str]:
    """Names of the embedding tables of a live model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield f"{name}.weight"


def _nbytes(weights: BaseWeights, tensor: str) -> int:
    return math.prod(weights.shape(tensor)) * weights.dtype(tensor).itemsize


def _shown(names: list[str], *, progress: bool) -> Iterable[str]:
    if not progress:
        return names
    from rich.console import Console
    from rich.progress import track

    return track(names, "Decomposing", console=Console(stderr=True), transient=True)
