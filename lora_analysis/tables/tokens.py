"""What directions of an update say in tokens, through the base's embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError
from lora_analysis.measures.spectrum import numerical_rank
from lora_analysis.measures.tokens import largest_token_cosine_null, nearest_tokens
from lora_analysis.tables.discoveries import with_discoveries
from lora_analysis.tables.frames import as_adapters, frame, module_flags
from lora_analysis.tables.pool import over_modules
from lora_analysis.update import with_scale

COLUMNS = ("adapter", "module", "side", "k", "share", "tokens", "token_ids", "cosines", "p", "q", "flags")

_INPUT = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embd", "embed_in", "shared")
_OUTPUT = ("lm_head", "embed_out", "output", "decoder")
"""Last names of embeddings and unembeddings, the likeliest first."""


def token_table(
    adapter: Adapter | Sequence[Adapter],
    base: BaseWeights,
    decode: Callable[[int], str],
    *,
    directions: int = 2,
    top: int = 5,
    embedding: str | None = None,
    unembedding: str | None = None,
    draws: int = 199,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The tokens closest to the first singular directions of every update.

    Parameters
    ----------
    adapter : Adapter or sequence of Adapter
    base : BaseWeights
        With the embedding.
    decode : callable
        ``decode(id)`` gives a token's text, such as ``lambda i: tokenizer.decode([i])``.
    directions : int
        First directions of each update.
    top : int
        Tokens of each direction.
    embedding, unembedding : str, optional
        Names of the weights in the base; found by their usual names by default. Where there is no unembedding it is
        taken to be tied to the embedding.
    draws, seed : int
        Random directions that the largest cosine is held against.
    workers : int, optional
    progress : bool

    Returns
    -------
    DataFrame
        One row per module, side and direction, for sides of the embedding's width alone: ``in`` through the embedding
        (what modules that read the residual stream look for), ``out`` through the unembedding (what modules that write
        to it say). ``share`` is that of ΔW's energy; ``tokens``, ``token_ids`` and ``cosines`` are lists; ``p`` is that
        of the largest ``|cos|`` among random directions, at least 1 / (draws + 1), and ``q`` adjusted for the number of
        modules (``tables.discoveries``).

    Raises
    ------
    BaseWeightsError
        If the base has no embedding, or its width is that of no update.

    References
    ----------
    ``measures.tokens``.

    Examples
    --------
    >>> import torch, lora_analysis as la
    >>> base = la.load_base({"wte.weight": torch.eye(4), "h.0.q.weight": torch.eye(4)})
    >>> update = la.LowRankUpdate(torch.eye(4)[:, 2:3], torch.eye(4)[1:2], scale=1.0)
    >>> table = token_table(la.Adapter({"h.0.q": update}), base, "abcd".__getitem__, top=1)
    >>> table[["side", "tokens"]].values.tolist()
    [['in', ['b']], ['out', ['c']]]
    """
    where = embedding or _named(base, _INPUT)
    if where is None:
        raise BaseWeightsError(
            f"{base.source}: expected an embedding of tokens, called {', '.join(_INPUT)}, got none. Pass embedding=."
        )
    head = unembedding or _named(base, _OUTPUT) or where
    rows = {"in": base.matrix(Target(where))}
    rows["out"] = rows["in"] if head == where else base.matrix(Target(head))
    nulls = {"in": largest_token_cosine_null(rows["in"], draws=draws, seed=seed)}
    same = rows["out"] is rows["in"]
    nulls["out"] = nulls["in"] if same else largest_token_cosine_null(rows["out"], draws=draws, seed=seed)
    items = [(item, name) for item in as_adapters(adapter) for name in item]
    found = over_modules(
        lambda item: _rows(*item, rows, nulls, decode, directions, top),
        items,
        workers=workers,
        progress=progress,
        description="Tokens",
    )
    flat = [row for part in found for row in part]
    if items and not flat:
        raise BaseWeightsError(
            f"{base.source}: expected updates with a side of the width of {where!r}, {rows['in'].shape[1]}, got none."
        )
    return with_discoveries(frame(flat, COLUMNS), {"p": ["adapter", "side", "k"]})


def _rows(
    adapter: Adapter,
    name: str,
    embeddings: dict[str, Tensor],
    nulls: dict[str, Tensor],
    decode: Callable[[int], str],
    directions: int,
    top: int,
) -> list[dict[str, Any]]:
    module = adapter.modules[name]
    flags = [flag for flag in module_flags(module) if flag != "unknown-scale"]
    sides = [s for s, d in (("in", module.shape[1]), ("out", module.shape[0])) if d == embeddings[s].shape[1]]
    update = adapter[name] if module.scale_source != "unknown" else with_scale(adapter[name], 1.0)
    empty = {"k": 0, "share": math.nan, "tokens": None, "token_ids": None, "cosines": None, "p": math.nan}
    start = {"adapter": adapter.source, "module": name}
    try:
        svd = update.svd(directions)
    except UndefinedUpdateError:
        return [{**start, "side": side, **empty, "flags": " ".join([*flags, "nonfinite"])} for side in sides]
    count = min(directions, numerical_rank(svd.S, module.shape))
    if not count:
        return [{**start, "side": side, **empty, "flags": " ".join([*flags, "zero"])} for side in sides]
    whole = update.norm() ** 2
    made = []
    for side in sides:
        basis = svd.V if side == "in" else svd.U
        nearest = nearest_tokens(basis[:, :count].to(embeddings[side].device), embeddings[side], top=top)
        for k in range(count):
            ids, cosines = nearest.ids[k].tolist(), nearest.cosines[k].tolist()
            reached = int((nulls[side] >= abs(cosines[0])).sum())
            made.append(
                {
                    **start,
                    "side": side,
                    "k": k + 1,
                    "share": float(svd.S[k] ** 2 / whole),
                    "tokens": [decode(i) for i in ids],
                    "token_ids": ids,
                    "cosines": cosines,
                    "p": (1 + reached) / (len(nulls[side]) + 1),
                    "flags": " ".join(flags),
                }
            )
    return made


def _named(base: BaseWeights, names: Sequence[str]) -> str | None:
    for name in names:
        fitting = [t for t in base if t.removesuffix(".weight").split(".")[-1] == name and len(base.shape(t)) == 2]
        # "output" and "decoder" name other layers as well: an unembedding is by far taller than wide.
        fitting = [t for t in fitting if name in _INPUT or base.shape(t)[0] > base.shape(t)[1]]
        if len(fitting) == 1:
            return fitting[0]
    return None
