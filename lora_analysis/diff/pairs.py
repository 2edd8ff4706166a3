"""Which tensors of two checkpoints are the same matrix of one model, by names and shapes alone.

Conventions
-----------
Names may differ by one prefix (a fine-tuned ``BertForSequenceClassification`` against the bare ``BertModel``).
A tensor (out, in) is a linear map, turned where the base is known to store it as (d_in, d_out); one of three
axes or more is a convolution's kernel, unfolded, but for stacks of experts, (experts, ., .), whose matrices come
apart; an embedding table (vocab, dim) is turned to (dim, vocab). In a live model the type of a module tells
embeddings; in a file its name does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lora_analysis.adapter import Target, Unused
from lora_analysis.base import BaseWeights
from lora_analysis.errors import BaseWeightsError

EMBEDDINGS = frozenset(
    (
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embedding",
        "position_embeddings",
        "relative_attention_bias",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    )
)
"""Last components of the names that embedding tables have in transformers, torchtune and CLIP."""

_MAX_DROPPED = 2
_EXPERTS = "experts"
_LEAST_BYTES = 2


class Pair(NamedTuple):
    """One matrix that both checkpoints hold."""

    module: str
    tuned: str
    """The tensor's name in the fine-tuned checkpoint."""
    target: Target
    """Where it lies in the base."""
    shape: tuple[int, int]
    embedding: bool = False


class Pairs(NamedTuple):
    """What two checkpoints have in common, and what they do not."""

    pairs: tuple[Pair, ...]
    unused: tuple[Unused, ...]
    notes: tuple[str, ...]


def holds_embedding(tensor: str) -> bool:
    """Whether a tensor of this name is an embedding table, by the names that models give them.

    Examples
    --------
    >>> holds_embedding("model.embed_tokens.weight"), holds_embedding("lm_head.weight")
    (True, False)
    """
    return tensor.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def paired(tuned: BaseWeights, base: BaseWeights, embeddings: Collection[str] = ()) -> Pairs:
    """The matrices that two checkpoints share, and every other tensor of both with a reason.

    Parameters
    ----------
    tuned, base : BaseWeights
    embeddings : collection of str
        Names of tensors known to be embedding tables, in either model.

    Raises
    ------
    BaseWeightsError
        If they share no matrix, or their names fit in several ways.
    """
    names, notes = _matched(tuned, base)
    pairs: list[Pair] = []
    unused: list[Unused] = []
    turned = 0
    stacks = 0
    for name in tuned:
        other = names.get(name)
        if other is None:
            unused.append(_unused(tuned, name, f"only in {tuned.source}"))
        elif reason := _no_matrix(tuned, name, base, other):
            unused.append(_unused(tuned, name, reason))
        else:
            known = holds_embedding(other) or other in embeddings or name in embeddings
            found = list(_pairs(base, name, other, known=known))
            turned += found[0].embedding
            stacks += found[0].target.expert is not None
            pairs += found
    matched = set(names.values())
    unused += [_unused(base, name, f"only in {base.source}") for name in base if name not in matched]
    if not pairs:
        reason = f"first: {unused[0].tensor!r}, {unused[0].reason}" if unused else "both are empty"
        raise BaseWeightsError(
            f"{tuned.source}: expected matrices that {base.source} has too, found none ({reason}). "
            "Are these the same model before and after?"
        )
    if turned:
        notes.append(
            f"{turned} embedding tables, known by their modules or names, are read as (dim, vocab) instead of "
            "(vocab, dim) as stored."
        )
    if stacks:
        notes.append(f"{stacks} stacks of experts are read as stored: whether (out, in) or (in, out), no shape tells.")
    if any("lora_" in item.tensor for item in unused):
        notes.append("tensors of LoRA are no part of the difference: it is of the weights alone. Merge them first.")
    return Pairs(tuple(pairs), tuple(unused), tuple(notes))


def _matched(tuned: BaseWeights, base: BaseWeights) -> tuple[dict[str, str], list[str]]:
    """Names of tuned's tensors to the base's, under the one change of prefix that serves most of them."""
    # (dropped, added), none of both first.
    fitting = Counter({("", ""): sum(name in base for name in tuned)})
    fitting.update((prefix, "") for name in tuned for prefix in _prefixes(name) if name.removeprefix(prefix) in base)
    fitting.update(("", prefix) for name in base for prefix in _prefixes(name) if name.removeprefix(prefix) in tuned)
    most = max(fitting.values())
    best = [change for change, count in fitting.items() if count == most]
    if most and len(best) > 1 and best[0] != ("", ""):
        raise BaseWeightsError(
            f"{tuned.source}: its names fit those of {base.source} in {len(best)} ways "
            f"({_change(*best[0])}; {_change(*best[1])}). Give the component's own weights."
        )
    dropped, added = best[0]
    changed = {name: added + name.removeprefix(dropped) for name in tuned if name.startswith(dropped)}
    note = [] if best[0] == ("", "") else [f"names differ from the base's by a prefix: {_change(dropped, added)}."]
    return {name: other for name, other in changed.items() if other in base}, note


def _prefixes(name: str) -> Iterator[str]:
    """The beginnings of a name, of one component and of two, each with the dot."""
    parts = name.split(".")
    for count in range(1, min(_MAX_DROPPED, len(parts) - 1) + 1):
        yield ".".join(parts[:count]) + "."


def _change(dropped: str, added: str) -> str:
    return f"{dropped!r} dropped" if dropped else f"{added!r} put before"


def _no_matrix(tuned: BaseWeights, name: str, base: BaseWeights, other: str) -> str | None:
    """Why a pair of tensors is no matrix before and after, if it is not."""
    shape, before = tuned.shape(name), base.shape(other)
    if shape != before:
        return f"of shape {shape}, in {base.source} of {before}"
    if len(shape) < 2:
        return f"no matrix: of shape {shape}"
    if not math.prod(shape):
        return f"empty: of shape {shape}"
    for weights, tensor in ((tuned, name), (base, other)):
        dtype = weights.dtype(tensor)
        if not dtype.is_floating_point or dtype.itemsize < _LEAST_BYTES:
            return f"no floating-point weights of two bytes or more: {dtype} in {weights.source}"
    return None


def _pairs(base: BaseWeights, tuned: str, tensor: str, *, known: bool) -> Iterator[Pair]:
    """The matrices of one tensor of both: one, or one per expert. ``known``: it is an embedding table."""
    stored = base.shape(tensor)
    module = tensor.removesuffix(".weight")
    if module != tensor and module in base:  # a parameter beside a module of its name
        module = tensor
    if len(stored) == 3 and _EXPERTS in tensor.split("."):
        for expert in range(stored[0]):
            yield _oriented(base, f"{module}.{expert}", tuned, Target(tensor, expert=expert), stored[1:])
    elif len(stored) > 2:
        target = Target(tensor, kernel=stored[2:])
        yield Pair(module, tuned, target, (stored[0], math.prod(stored[1:])))
    elif known and base.transposed(Target(tensor, transposed=True), (stored[1], stored[0])):
        yield Pair(module, tuned, Target(tensor, transposed=True), (stored[1], stored[0]), embedding=True)
    else:
        yield _oriented(base, module, tuned, Target(tensor), stored)


def _oriented(base: BaseWeights, module: str, tuned: str, target: Target, stored: tuple[int, ...]) -> Pair:
    if base.transposed(target):
        return Pair(module, tuned, Target(target.tensor, transposed=True, expert=target.expert), (stored[1], stored[0]))
    return Pair(module, tuned, target, (stored[0], stored[1]))


def _unused(weights: BaseWeights, name: str, reason: str) -> Unused:
    return Unused(name, reason, math.prod(weights.shape(name)) * weights.dtype(name).itemsize)
