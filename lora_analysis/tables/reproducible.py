"""What trainings of one task from different seeds have in common: the directions that are reproduced."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.measures.null import largest_cosine_null
from lora_analysis.measures.reproducible import shared_directions
from lora_analysis.tables.directions import usable_svd
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import frame
from lora_analysis.tables.pool import over_modules
from lora_analysis.tables.starts import rows_shared, same_start
from lora_analysis.update import Svd

COLUMNS = (
    "adapter_a",
    "adapter_b",
    "module",
    "side",
    "d",
    "m",
    "n",
    "reproduced",
    "largest_cosine",
    "chance_edge",
    "p",
    "q",
    "rows_shared",
    "flags",
)


def reproducible_table(
    adapters: Sequence[Adapter],
    *,
    draws: int = 2000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """How many directions of each update every two adapters have in common beyond chance.

    Parameters
    ----------
    adapters : sequence of Adapter
        Two or more, of one task and base, trained from different seeds and in different orders of the data.
    draws, seed : int
        Of the null.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    DataFrame
        One row per pair of adapters, module they both have, and side. ``m`` and ``n`` are the directions compared (the
        numerical ranks, of unbounded ones at most ``max(r, 64)``), ``reproduced`` counts the principal cosines above
        ``chance_edge``, the 99 % quantile of the largest by chance; ``p`` is that of the largest, and ``q`` adjusted
        for the number of modules (``tables.discoveries``). ``rows_shared`` is the share of A's rows that the two began
        with in common, as far as their trained A's tell: where, over all modules, that is a tenth, rows are flagged
        ``same-start``, and similarity on the side ``in`` is no sign of learning. Dimensionless.

    Raises
    ------
    ValueError
        If there are fewer than two adapters.
    LoraAnalysisError
        If they have no module in common.

    Warns
    -----
    UserWarning
        If some adapter lacks modules that another has.

    References
    ----------
    Hu et al. 2021, arXiv:2106.09685, section 7.2, figure 4; ``measures.reproducible``, ``measures.shared_start``.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> e = torch.eye(300)
    >>> a = la.Adapter({"q": la.LowRankUpdate(e[:, :2] * torch.tensor([2.0, 1.0]), e[:2], scale=1.0)})
    >>> b = la.Adapter({"q": la.LowRankUpdate(e[:, 1:3] * torch.tensor([2.0, 1.0]), e[1:3], scale=1.0)})
    >>> reproducible_table([a, b], draws=199)[["side", "reproduced"]].values.tolist()
    [['in', 1], ['out', 1]]
    """
    if len(adapters) < 2:
        raise ValueError(f"adapters: expected two or more, got {len(adapters)}.")
    names = [name for name in adapters[0] if all(name in other for other in adapters)]
    if not names:
        raise LoraAnalysisError(f"{adapters[0].source}: expected modules that all adapters have, got none.")
    if apart := {name for item in adapters for name in item} - set(names):
        warnings.warn(f"{len(apart)} modules are not in every adapter and have no rows.", stacklevel=2)
    places = list(itertools.product(range(len(adapters)), names))
    found = over_modules(
        lambda place: usable_svd(adapters[place[0]].modules[place[1]], scale_bound=False, leading_only=True),
        places,
        workers=workers,
        progress=progress,
        description="Singular vectors",
    )
    known = dict(zip(places, found, strict=True))
    pairs = list(itertools.combinations(range(len(adapters)), 2))
    shares: dict[tuple[int, int, str], float] = {}
    alike: dict[tuple[int, int, str], bool] = {}
    for a, b in pairs:
        both = [(adapters[a].modules[name], adapters[b].modules[name]) for name in names]
        found_shares = [rows_shared(*modules) for modules in both]
        began = same_start(found_shares, [min(module.r for module in modules) for modules in both])
        shares |= {(a, b, name): share for name, share in zip(names, found_shares, strict=True)}
        alike |= {(a, b, name): word for name, word in zip(names, began, strict=True)}
    nulls: dict[tuple[int, int, int], Tensor] = {}
    rows = []
    for (a, b), name in itertools.product(pairs, names):
        words = itertools.chain(known[a, name][1], known[b, name][1])
        share = shares[a, b, name]
        flags = [word for word in dict.fromkeys(words) if word != "unknown-scale"]
        flags += ["same-start"] * alike[a, b, name]
        for side in ("in", "out"):
            row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {
                "adapter_a": adapters[a].source,
                "adapter_b": adapters[b].source,
                "module": name,
                "side": side,
                "reproduced": pd.NA,
                "rows_shared": share,
            }
            first, second = (_basis(known[number, name][0], side) for number in (a, b))
            if first is None or second is None:
                rows.append(row | {"m": 0, "n": 0, "d": 0, "flags": " ".join(flags)})
                continue
            d, m, n = len(first), first.shape[1], second.shape[1]
            row |= {"d": d, "m": m, "n": n}
            if len(second) != d or not (m and n):
                rows.append(row | {"flags": " ".join(flags + ["other-shape"] * (len(second) != d))})
                continue
            key = (d, min(m, n), max(m, n))
            if key not in nulls:
                nulls[key] = largest_cosine_null(*key, draws=draws, seed=seed)
            shared = shared_directions(first, second, nulls[key])
            rows.append(
                row
                | {
                    "reproduced": shared.shared,
                    "largest_cosine": shared.largest,
                    "chance_edge": shared.edge,
                    "p": shared.p,
                    "flags": " ".join(flags),
                }
            )
    table = frame(rows, COLUMNS, counts=("reproduced",))
    return with_discoveries(table, {"p": ["adapter_a", "adapter_b", "side"]})


def _basis(svd: Svd | None, side: str) -> Tensor | None:
    if svd is None:
        return None
    return svd.V if side == "in" else svd.U
