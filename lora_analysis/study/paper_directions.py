"""Where in W the directions of ΔW lie: the tables that figure 8 of the paper is drawn from.

Values
------
``top_directions``, a ``TopDirections``.

References
----------
Hu et al. 2021, arXiv:2106.09685v2, appendix H.4, figure 8; Staats et al. 2024, arXiv:2410.17770 (small singular values
matter).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lora_analysis.measures.null import similarity_null
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.study.evidence import Study
from lora_analysis.study.paper_runs import (
    kinds_of,
    layers_of,
    main_ranks,
    main_run,
    middle,
    module_at,
    nearest,
    require_base,
)
from lora_analysis.study.plan import Side

_TOP = 0.1
"""The share of W's directions that figure 8 goes to."""
_COUNTED = 4
"""Top directions of ΔW whose place in W's spectrum is shown; the paper's text speaks of four."""


class TopDirections(NamedTuple):
    """What figure 8 is drawn from. ``series`` is ``"r = 8"`` or the like, or ``"Gaussian, seed 0"``: the control."""

    cells: pd.DataFrame
    """``series r module side d i j phi null_mean``; i to a tenth of W's min(d_out, d_in) directions."""
    parts: pd.DataFrame
    """``series r module side d part directions j share null_mean null_low null_high`` by tenths of W's directions.

    ``share`` is ``||W_part.T @ V_j||_F**2 / j``, dimensionless; over the parts it adds to 1. Where d exceeds
    min(d_out, d_in), the last part is ``"null"``, where W is 0. Between ``null_low`` and ``null_high`` lie 95 % of
    random directions.
    """


def top_directions(study: Study, *, side: Side = "in", seed: int = 0) -> TopDirections:
    """Where in W the directions of ΔW lie, for the paper's ranks 4, 8 and 64 or those nearest.

    The module is q of the middle layer, decomposed whole.

    Parameters
    ----------
    study : Study
    side : {"in", "out"}
        Right or left singular vectors, of both.
    seed : int
        Of the random control, an orthonormalised Gaussian matrix of the largest rank's size.

    Returns
    -------
    TopDirections

    Raises
    ------
    Unavailable
        If no run of the main target set has finished, or the pretrained weights are not there.
    """
    module, basis, directions = _seen(study, side, seed)
    d, count = basis.shape
    j = min(_COUNTED, *(V.shape[1] for V in directions.values()))
    tenths = [part for part in np.array_split(np.arange(count), 10) if len(part)]
    bounds = {size: _chance_share(d, size, j) for size in {len(part) for part in tenths} | {d - count} - {0}}
    cells, rows = [], []
    for name, V in directions.items():
        fixed = {"series": name, "r": V.shape[1], "module": module, "side": side, "d": d}
        phi = subspace_similarity(basis[:, : max(1, round(_TOP * count))], V).numpy()
        chance = similarity_null(d, *phi.shape).mean.numpy().ravel()
        up_to = np.indices(phi.shape) + 1
        grid = {"i": up_to[0].ravel(), "j": up_to[1].ravel(), "phi": phi.ravel(), "null_mean": chance}
        cells.append(pd.DataFrame(fixed | grid))
        squares = (basis.mT @ V[:, :j]).square().sum(1).numpy() / j
        shares = [(f"{10 * k}–{10 * k + 10}", len(part), squares[part].sum()) for k, part in enumerate(tenths)]
        if d > count:
            shares.append(("null", d - count, max(0.0, 1.0 - squares.sum())))
        for part, size, share in shares:
            mean, low, high = bounds[size]
            found = {"part": part, "directions": size, "j": j, "share": float(share)}
            rows.append(fixed | found | {"null_mean": mean, "null_low": low, "null_high": high})
    return TopDirections(pd.concat(cells, ignore_index=True), pd.DataFrame(rows))


def _chance_share(d: int, size: int, j: int) -> tuple[float, float, float]:
    """Mean share of j random directions in ``size`` fixed ones, and where 95 % of such shares lie."""
    null = similarity_null(d, size, j)
    low, high = (float(null.quantile(q, cells=[(size, j)])) * min(size, j) / j for q in (0.025, 0.975))
    return size / d, low, high


def _seen(study: Study, side: Side, seed: int) -> tuple[str, Tensor, dict[str, Tensor]]:
    """The module, W's singular directions (d, min(d_out, d_in)), and by series those of updates (d, r)."""
    ranks = list(dict.fromkeys(nearest(r, main_ranks(study)) for r in (4, 8, 64)))
    base = require_base(study)
    adapters = {r: study.adapter(main_run(study, r)) for r in ranks}
    first = adapters[ranks[0]]
    module = module_at(first, kinds_of(first)[0], middle(layers_of(first)))
    target, shape = first.modules[module].target, first.modules[module].shape
    names = base.find_all(other.target.tensor for other in first.modules.values())
    weight = base.matrix(replace(target, tensor=names[target.tensor]), shape).double()
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    basis = Vh.mT if side == "in" else U
    directions = {}
    for r in ranks:
        svd = adapters[r][module].svd(r)
        directions[f"r = {r}"] = svd.V if side == "in" else svd.U
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(len(basis), max(ranks), dtype=torch.float64, generator=generator)
    directions[f"Gaussian, seed {seed}"] = torch.linalg.svd(gaussian, full_matrices=False).U
    return module, basis, directions
