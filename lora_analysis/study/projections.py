"""The paper's Wq, Wk, Wv and Wo in the models of others, and back.

Values
------
``PROJECTIONS``, ``placement``, ``projection_of``, ``layer_of``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

PROJECTIONS = {
    "q": ("query", "q_proj", "query_proj", "q_lin", "q"),
    "k": ("key", "k_proj", "key_proj", "k_lin", "k"),
    "v": ("value", "v_proj", "value_proj", "v_lin", "v"),
    "o": ("attention.output.dense", "o_proj", "out_proj", "out_lin", "attn.c_proj", "o"),
}
"""What the projections of an attention are called: BERT and RoBERTa, Llama and its like, DeBERTa-v2, DistilBERT, T5."""

FUSED = ("c_attn",)
"""Weights of q, k and v in equal thirds: GPT-2."""


def placement(model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """``targets=`` and ``slots=`` of ``training.inject`` for projections of a model.

    Parameters
    ----------
    model : Module
    targets : sequence of str
        Of q, k, v and o, or names of the model's own modules; ``"all-linear"`` alone is every linear layer.

    Raises
    ------
    ValueError
        If the model has no module of a projection's usual names.

    Examples
    --------
    >>> model = nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)})
    >>> placement(model, ("q", "v"))
    {'targets': ['query', 'value'], 'slots': {}}
    """
    if tuple(targets) == ("all-linear",):
        return {"targets": "all-linear", "slots": {}}
    names = [name for name, _ in model.named_modules()]
    fused = next((name for name in FUSED if any(_ends_in(own, name) for own in names)), None)
    found: list[str] = []
    slots: list[str] = []
    for target in targets:
        if target in ("q", "k", "v") and fused is not None:
            slots.append(target)
            continue
        usual = PROJECTIONS.get(target, (target,))
        match = next((name for name in usual if any(_ends_in(own, name) for own in names)), None)
        if match is None:
            raise ValueError(
                f"targets: expected a projection {target!r} in {type(model).__name__}, called {', '.join(usual)}; "
                "got none. Pass the names of its own modules."
            )
        found.append(match)
    if slots and fused is not None:
        found.insert(0, fused)
    return {"targets": found, "slots": {fused: ",".join(slots)} if slots else {}}


def projection_of(module: str) -> str:
    """Which of q, k, v and o a module is; its own last name if none.

    Examples
    --------
    >>> projection_of("encoder.layer.0.attention.self.query"), projection_of("h.0.attn.c_attn.v")
    ('q', 'v')
    """
    return next(
        (letter for letter, names in PROJECTIONS.items() if any(_ends_in(module, name) for name in names)),
        module.rpartition(".")[2],
    )


def layer_of(module: str) -> int:
    """The number of the layer a module is in, from 0; -1 if its name has no number.

    Examples
    --------
    >>> layer_of("encoder.layer.11.attention.self.query"), layer_of("classifier")
    (11, -1)
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(number[1]) if number else -1


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
