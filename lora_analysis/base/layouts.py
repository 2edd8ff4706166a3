"""How a base may store a matrix under other names: fused, apart, or in stacks of experts.

Conventions
-----------
A *recipe* is the list of a base's tensors, or blocks of them, that give one matrix, one below the other as
(d_out, d_in). The rules are written out, each for a layout that is the same in every model that has such names:

=====================================  ==============================================================
asked for                              stored as
=====================================  ==============================================================
``self_attn.q_proj`` (k, v)            ``self_attn.qkv_proj``: q, k, v (Phi-3: beside ``mlp.gate_up_proj``)
``q_proj`` (k, v)                      ``in_proj_weight``: three equal blocks (torch's MultiheadAttention)
``gate_proj`` (up)                     ``gate_up_proj``: gate, up
``experts.3.gate_proj`` (up, down)     number 3 of ``experts.gate_up_proj`` (gate, up) and ``experts.down_proj``
``experts.gate_up_proj`` of number 3   ``experts.3.gate_proj`` and ``experts.3.up_proj``
``gate_proj``, ``up_proj``,            ``w1``, ``w3``, ``w2``, and ``mlp.experts`` as ``block_sparse_moe.experts``
``down_proj`` of experts               (Mixtral)
=====================================  ==============================================================

Not written out, and so refused: ``query_key_value`` (BLOOM and GPT-NeoX interleave it by heads, Falcon by groups,
GLM does not), ``c_attn`` and ``qkv`` (which differ between models of the same names), and blocks of
``experts.gate_up_proj`` beside a ``gate_up_proj_bias`` (GPT-OSS interleaves its rows).

Sources: transformers ``models/phi3``, ``models/mixtral``, ``models/qwen3_moe``, ``models/gpt_oss`` and
``conversion_mapping.py``; torch ``nn/modules/activation.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

FUSED = ("query_key_value", "c_attn", "qkv", "qkv_proj", "Wqkv", "W_pack", "wqkv", "to_qkv", "in_proj", "gate_up_proj")
"""What fused weights are called, for messages where no rule applies."""

_EXPERT = re.compile(
    r"(?P<owner>.*\bexperts)\.(?P<number>[0-9]+)\.(?P<role>gate_proj|up_proj|down_proj|w[123])\.weight"
)
_STACK = re.compile(r"(?P<owner>.*\bexperts)\.(?P<role>gate_up_proj|down_proj)")
_ATTENTION = re.compile(r"(?P<owner>.+)\.(?P<role>[qkv])_proj\.weight")
_GATED = re.compile(r"(?P<owner>.+)\.(?P<role>gate|up)_proj\.weight")
_ROLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_HALVES = ("first half", "second half")


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the base, or a block of its rows as (d_out, d_in).

    Parameters
    ----------
    tensor : str
        Its name.
    expert : int, optional
        Index into its first axis.
    block : str, optional
        ``"q"``, ``"k"`` or ``"v"`` of one fused weight, where k and v have the same rows and q as many or more;
        ``"first third"``, … of three equal blocks; ``"first half"``, ….
    """

    tensor: str
    expert: int | None = None
    block: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Parts that give one matrix, one below the other.

    Parameters
    ----------
    parts : tuple of Part
    beside, without : str, optional
        A tensor that the base must have, or must not have, for the rule to hold.
    """

    parts: tuple[Part, ...]
    beside: str | None = None
    without: str | None = None


def is_stack(tensor: str) -> bool:
    """Whether a name is that of a stack of experts' matrices."""
    return _STACK.fullmatch(tensor) is not None


def recipes(tensor: str, expert: int | None) -> Iterator[Recipe]:
    """Every other way in which a base may store a tensor, the likeliest first.

    Examples
    --------
    >>> [recipe.parts[0] for recipe in recipes("mlp.up_proj.weight", None)]
    [Part(tensor='mlp.gate_up_proj.weight', expert=None, block='second half')]
    >>> [part.tensor for part in next(recipes("mlp.experts.gate_up_proj", 3)).parts]
    ['mlp.experts.3.gate_proj.weight', 'mlp.experts.3.up_proj.weight']
    """
    if found := _EXPERT.fullmatch(tensor):
        yield from _of_one_expert(found["owner"], int(found["number"]), found["role"])
    elif found := _STACK.fullmatch(tensor):
        yield from _of_a_stack(found["owner"], expert, found["role"])
    elif found := _ATTENTION.fullmatch(tensor):
        owner, role = found["owner"], found["role"]
        if owner.endswith("self_attn"):
            sibling = owner.removesuffix("self_attn") + "mlp.gate_up_proj.weight"
            yield Recipe((Part(f"{owner}.qkv_proj.weight", block=role),), beside=sibling)
        third = ("first third", "second third", "last third")["qkv".index(role)]
        yield Recipe((Part(f"{owner}.in_proj_weight", block=third),))
    elif found := _GATED.fullmatch(tensor):
        half = _HALVES[("gate", "up").index(found["role"])]
        yield Recipe((Part(f"{found['owner']}.gate_up_proj.weight", block=half),))


def _of_one_expert(owner: str, number: int, role: str) -> Iterator[Recipe]:
    place = next(roles.index(role) for roles in _ROLES if role in roles)
    for other in _owners(owner):
        for roles in _ROLES:
            if (other, roles[place]) != (owner, role):
                yield Recipe((Part(f"{other}.{number}.{roles[place]}.weight"),))
        if place < 2:
            half = Part(f"{other}.gate_up_proj", expert=number, block=_HALVES[place])
            yield Recipe((half,), without=f"{other}.gate_up_proj_bias")
        else:
            yield Recipe((Part(f"{other}.down_proj", expert=number),))


def _of_a_stack(owner: str, expert: int | None, role: str) -> Iterator[Recipe]:
    for other in _owners(owner):
        if other != owner:
            yield Recipe((Part(f"{other}.{role}", expert=expert),))
        if expert is not None:
            for gate, up, down in _ROLES:
                names = (gate, up) if role == "gate_up_proj" else (down,)
                yield Recipe(tuple(Part(f"{other}.{expert}.{name}.weight") for name in names))


def _owners(owner: str) -> tuple[str, ...]:
    """A list of experts' own name, and Mixtral's other one."""
    for old, new in (("block_sparse_moe.experts", "mlp.experts"), ("mlp.experts", "block_sparse_moe.experts")):
        if owner.endswith(old):
            return owner, owner.removesuffix(old) + new
    return (owner,)


def block_rows(block: str | None, rows: int, d_out: int | None) -> tuple[int, int] | None:
    """The rows of a block, or None where it cannot be one.

    Parameters
    ----------
    block : str or None
        As in ``Part``; None is the whole weight.
    rows : int
        Of the whole weight.
    d_out : int or None
        Rows that the block must have; q, k and v of a fused weight cannot be told apart without.

    Examples
    --------
    >>> [block_rows(block, 48, d_out) for block, d_out in (("q", 32), ("k", 8), ("v", 8))]
    [(0, 32), (32, 40), (40, 48)]
    >>> block_rows("second half", 48, None)
    (24, 48)
    """
    if block is None:
        return (0, rows) if d_out in (None, rows) else None
    equal = {"first half": (0, 2), "second half": (1, 2)}
    equal |= {f"{name} third": (i, 3) for i, name in enumerate(("first", "second", "last"))}
    if block in equal:
        number, count = equal[block]
        size = rows // count
        return (number * size, (number + 1) * size) if rows % count == 0 and d_out in (None, size) else None
    if d_out is None:
        return None
    keys = (rows - d_out) // 2 if block == "q" else d_out
    queries = rows - 2 * keys
    if keys < 1 or queries < keys or (block == "q" and queries != d_out):
        return None
    start = {"q": 0, "k": queries, "v": queries + keys}[block]
    return start, start + d_out
