"""Putting LoRA into a model: which weights, of what r, and what trains beside the factors.

Values
------
``inject``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2; DoRA: Liu et
al. 2024, arXiv:2402.09353; PiSSA: Meng et al. 2024, arXiv:2404.02948; LoRA-FA: Zhang et al. 2023, arXiv:2308.03303.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.training.factors import Beside, Block, LoraFactors
from lora_analysis.training.initial import Init, initial_factors, principal_factors
from lora_analysis.training.kinds import EMBEDDING
from lora_analysis.training.layers import row_norms, sites
from lora_analysis.training.slots import BlocksGiven, blocks_of
from lora_analysis.training.spots import Spot, place_factors, spots_of, to_weight
from lora_analysis.training.switching import activate, require_new
from lora_analysis.training.targets import Targets, matching, peft_layers

Bias = Literal["none", "lora_only", "all"]
"""Which biases train: none, those of adapted layers, or all of the model's."""


def inject(
    model: nn.Module,
    targets: Targets = (),
    *,
    r: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "kaiming",
    freeze_A: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    slots: Mapping[str, BlocksGiven] | None = None,
    parameters: Iterable[str] | Mapping[str, tuple[int, int] | None] = (),
    bias: Bias = "none",
    modules_to_save: Iterable[str] = (),
    adapter: str = "default",
) -> list[str]:
    """Freeze a model and put trainable low-rank updates on some of its weights, in place.

    Parameters
    ----------
    model : Module
        Any model. Its ``torch.nn.Linear``, ``Embedding``, ``Conv1d``, ``Conv2d`` and ``Conv3d`` and transformers'
        ``Conv1D`` layers can be adapted, and any other parameter through ``parameters``.
    targets : str, type, or iterable of them
        As PEFT's ``target_modules``. A list holds full names or dotted suffixes (``"query"``, ``"attn.c_proj"``) or
        types (``nn.Conv2d``); unlike in PEFT, each must match. A string is a regular expression for the whole name,
        or ``"all-linear"``: every linear layer but the output embedding of a language model.
    r : int
        Inner dimension, at least 1; may exceed the sides of a matrix.
    alpha : float
        The scale is alpha / r.
    seed : int
        With the module's name and r, determines the initial factors.
    dropout : float
        On the input of A while training, in [0, 1); not on the tokens of an embedding, nor on ``parameters``.
    rslora : bool
        Scale alpha / sqrt(r) instead.
    dora : bool
        Train the norm of each output's row of weights apart from its direction. Linear layers and convolutions.
    init : {"kaiming", "gaussian", "orthogonal", "pissa"}
        How the factors begin; see ``lora_analysis.training.initial``. PiSSA begins at the weight's leading singular
        triples; the model still begins as its base, which is not touched.
    freeze_A : bool
        Train B alone (LoRA-FA).
    rank_pattern, alpha_pattern : mapping of str, optional
        Names or regular expressions to the r and the alpha of the modules they match, as PEFT's: the first key that
        matches the end of a module's name counts. Each must match.
    slots : mapping of str, optional
        Names or dotted suffixes of fused weights to the blocks of their rows that are adapted, each with factors of
        its own: ``{"c_attn": "q,v"}``, or ``{"qkv_proj": {"q": (0, 4096), "v": (5120, 6144)}}`` where they differ.
    parameters : iterable or mapping of str, optional
        Names or dotted suffixes of parameters that the model reads by itself: packed projections
        (``"in_proj_weight"``), stacked experts (``"experts.gate_up_proj"``). A mapping gives the matrix shape that a
        tensor's numbers are viewed as, or None for the tensor's own: (first axis, all others), and of three axes
        (experts, d_out, d_in), or (experts, d_in, d_out) where the module says ``is_transposed``.
    bias : {"none", "lora_only", "all"}
        Which biases train as well.
    modules_to_save : iterable of str
        Names or dotted suffixes of modules that train in full, such as a classifier's head.
    adapter : str
        Its name. A second one is put beside the first, and alone acts and trains until ``activate`` says otherwise.

    Returns
    -------
    list of str
        Names of the adapted weights, as ``extract`` gives them. Nothing else of the model trains but what ``bias`` and
        ``modules_to_save`` say.

    Raises
    ------
    ValueError
        If an argument is out of range, a name or pattern matches nothing or something that cannot be adapted, or the
        adapter is there already. The model is left as it was.

    Examples
    --------
    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    >>> inject(model, ["query"], r=2)
    ['query']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['query.adapters.default.lora_A', 'query.adapters.default.lora_B']
    """
    seed, r = operator.index(seed), _rank("r", r)
    require_dropout(dropout)
    require_adapter_name(adapter)
    if bias not in get_args(Bias):
        raise ValueError(f"bias: expected one of {get_args(Bias)}, got {bias!r}.")
    if init not in get_args(Init):
        raise ValueError(f"init: expected one of {get_args(Init)}, got {init!r}.")
    require_no_peft(model)
    require_new(model, adapter)
    spots = spots_of(model, targets, parameters)
    fused = blocks_of(spots, slots or {})
    ranks = _patterned("rank_pattern", rank_pattern, spots)
    alphas = _patterned("alpha_pattern", alpha_pattern, spots)
    beside = Beside(bias, _saved(model, modules_to_save, spots))
    made: list[tuple[Spot, LoraFactors]] = []
    for spot in spots:
        one = _rank("rank_pattern", ranks.get(spot.name, r))
        own = alphas.get(spot.name, alpha)
        if not math.isfinite(own):
            raise ValueError(f"alpha: expected a finite number, got {own}.")
        scale = own / math.sqrt(one) if rslora else own / one
        _require_options(spot, dora=dora, freeze_A=freeze_A, slots=spot.name in fused)
        A, B = _start(spot, fused.get(spot.name, ()), r=one, scale=scale, seed=seed, init=init)
        factors = LoraFactors(
            A,
            B,
            d_out=spot.storage.matrix_shape[0],
            scale=scale,
            alpha=own,
            dropout=dropout,
            blocks=fused.get(spot.name, ()),
            less_initial=init == "pissa",
            freeze_A=freeze_A,
        )
        factors.beside = beside
        to_weight(factors, spot.weight)
        if dora:
            norms = row_norms(spot.weight, spot.storage, factors)
            if not norms.is_meta and not norms.all():
                raise ValueError(
                    f"{spot.name!r}: dora= divides by the norm of every row of the weight, and row "
                    f"{int(norms.argmin())} is zero. Leave this module out, or use plain LoRA."
                )
            factors.lora_magnitude = nn.Parameter(norms)
        made.append((spot, factors))
    model.requires_grad_(False)
    for spot, factors in made:
        place_factors(model, spot, adapter, factors)
    activate(model, adapter)
    return [spot.name for spot in spots]


def require_no_peft(model: nn.Module) -> None:
    """Refuse a model that has LoRA layers of peft."""
    if foreign := peft_layers(model):
        raise ValueError(
            f"{foreign[0]!r}: expected a model without LoRA layers, got one with {len(foreign)} of peft. "
            "Take the base model out of it with its unload() first."
        )


def require_dropout(dropout: float) -> None:
    """Refuse what is not a probability below one."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}.")


def require_adapter_name(name: str) -> None:
    """Refuse what cannot be a component of a tensor's name."""
    if not name or "." in name:
        raise ValueError(f"adapter: expected a name without dots, got {name!r}.")


def _saved(model: nn.Module, names: Iterable[str], spots: Sequence[Spot]) -> tuple[str, ...]:
    """The modules that train in full, none of which may hold an adapted weight."""
    given = [names] if isinstance(names, str) else list(names)
    saved = dict.fromkeys(place.names[0] for name in given for place in matching(model, [name]))
    for module in saved:
        for adapted in [*sites(model), *(spot.name for spot in spots)]:
            if adapted == module or adapted.startswith(f"{module}."):
                raise ValueError(
                    f"modules_to_save: expected modules without adapted weights, got {module!r} with {adapted!r}. "
                    "Name it as one or as the other."
                )
    return tuple(saved)


def _rank(what: str, r: int) -> int:
    r = operator.index(r)
    if r < 1:
        raise ValueError(f"{what}: expected at least 1, got {r}.")
    return r


def _require_options(spot: Spot, *, dora: bool, freeze_A: bool, slots: bool) -> None:
    if dora and slots:
        raise ValueError(f"{spot.name!r}: dora= is for whole weights, and slots= takes blocks of this one. Choose one.")
    if dora and (spot.kind is None or spot.kind is EMBEDDING):
        what = "a parameter" if spot.kind is None else "an embedding"
        raise ValueError(f"{spot.name!r}: dora= is for linear layers and convolutions, and this is {what}.")
    if freeze_A and spot.kind is EMBEDDING:
        raise ValueError(f"{spot.name!r}: freeze_A= would keep A of an embedding at zero, where it begins.")


def _start(
    spot: Spot, blocks: Sequence[Block], *, r: int, scale: float, seed: int, init: Init
) -> tuple[Tensor, Tensor]:
    """A and B of a weight, one below the other for blocks, stacked for experts."""
    d_out, d_in = spot.storage.matrix_shape
    if init == "pissa":
        matrix = spot.storage.matrix(spot.weight.detach())
        parts = [matrix[block.start : block.stop] for block in blocks] or [matrix]
        pairs = [principal_factors(part, r=r, scale=scale) for part in parts]
        return torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -2)
    random = "down" if spot.kind is None else spot.kind.random
    if spot.storage.experts is not None:
        names = [(f"{spot.name}.{e}", d_out) for e in range(spot.storage.experts)]
    else:
        names = [(f"{spot.name}.{block.name}", block.stop - block.start) for block in blocks] or [(spot.name, d_out)]
    pairs = [initial_factors(rows, d_in, r=r, module=name, seed=seed, init=init, random=random) for name, rows in names]
    join = torch.stack if spot.storage.experts is not None else torch.cat
    return join([A for A, _ in pairs]), join([B for _, B in pairs])


def _patterned(what: str, pattern: Mapping[str, Any] | None, spots: Sequence[Spot]) -> dict[str, Any]:
    """Module to the value of the first key that matches its name."""
    found: dict[str, Any] = {}
    unmatched = set(pattern or {})
    for key, value in (pattern or {}).items():
        try:
            regex = pattern_regex(key)
        except (ValueError, re.error) as error:
            raise ValueError(
                f"{what}: {key!r}: expected a regular expression that is quick to match: {error}."
            ) from None
        for spot in spots:
            if regex.match(spot.name):
                unmatched.discard(key)
                found.setdefault(spot.name, value)
    if unmatched:
        raise ValueError(f"{what}: expected an adapted module that matches {sorted(unmatched)[0]!r}, got none.")
    return found
