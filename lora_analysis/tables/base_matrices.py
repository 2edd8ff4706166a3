"""The loop over the matrices of a base, each read and decomposed once for all adapters that update it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_analysis.adapter import Adapter, Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError
from lora_analysis.tables.pool import over_modules

Rows = list[dict[str, Any]]
Place = tuple[Target, tuple[int, int]]


def over_base_matrices(
    rows_of_matrix: Callable[[Tensor, list[Module]], list[Rows]],
    adapters: Sequence[Adapter],
    base: BaseWeights,
    *,
    workers: int | None = None,
    progress: bool = False,
    description: str = "",
) -> Rows:
    """The rows of every module of every adapter, in the adapters' order, with ``adapter`` and ``module`` before them.

    Parameters
    ----------
    rows_of_matrix : callable
        From a base matrix and the modules that update it to the rows of each.
    adapters : sequence of Adapter
    base : BaseWeights
    workers, progress, description
        See ``over_modules``.

    Raises
    ------
    BaseWeightsError
        If the base lacks a matrix, its shape does not fit, or it holds NaN or infinities.
    """
    users: dict[Place, list[tuple[int, str]]] = {}
    for number, adapter in enumerate(adapters):
        names = base.find_all(module.target.tensor for module in adapter.modules.values())
        for name, module in adapter.modules.items():
            target = replace(module.target, tensor=names[module.target.tensor])
            users.setdefault((target, module.shape), []).append((number, name))

    def work(item: tuple[Place, list[tuple[int, str]]]) -> dict[tuple[int, str], Rows]:
        (target, shape), places = item
        weight = base.matrix(target, shape)
        modules = [adapters[number].modules[name] for number, name in places]
        try:
            return dict(zip(places, rows_of_matrix(weight, modules), strict=True))
        except BaseWeightsError as error:
            raise BaseWeightsError(f"{base.source}: {target.tensor!r}: {error}") from error

    found: dict[tuple[int, str], Rows] = {}
    for part in over_modules(work, list(users.items()), workers=workers, progress=progress, description=description):
        found |= part
    return [
        {"adapter": adapter.source, "module": name, **row}
        for number, adapter in enumerate(adapters)
        for name in adapter
        for row in found[number, name]
    ]
