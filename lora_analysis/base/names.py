"""The names of a base's tensors against the names that an adapter has for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\Z")
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "base_layer"}
_PREFIXES = ("module.", "base_model.model.")
_MAX_DROPPED = 2
_LONGEST_END = 4


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers (DDP, FSDP, compile, PEFT) and parametrisations add to it.

    Examples
    --------
    >>> plain_name("module.model.q_proj.base_layer.weight"), plain_name("attn.parametrizations.in_proj_weight.original")
    ('model.q_proj.weight', 'attn.in_proj_weight')
    """
    # Wrappers first: compile may lie round DDP and PEFT, and would hide their prefixes.
    name = ".".join(component for component in name.split(".") if component not in _WRAPPERS)
    name = _PARAMETRIZED.sub(r"\1\2", name)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


class NamesByEnd:
    """Names, found by what they end in: a base of experts has tens of thousands, and is asked as often.

    Examples
    --------
    >>> names = NamesByEnd(["unet.mid.to_q.weight", "mid.to_q.weight", "unet.mid.to_k.weight"])
    >>> names.longer_than("mid.to_q.weight")
    ['unet.mid.to_q.weight']
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    @cached_property
    def _by_end(self) -> dict[tuple[str, ...], list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self._names:
            components = name.rsplit(".", _LONGEST_END)[-_LONGEST_END:]
            for count in range(1, len(components) + 1):
                found.setdefault(tuple(components[-count:]), []).append(name)
        return found

    def longer_than(self, ending: str) -> list[str]:
        """The names that end in this one after a dot."""
        end = tuple(ending.rsplit(".", _LONGEST_END)[-_LONGEST_END:])
        return [name for name in self._by_end.get(end, ()) if name.endswith(f".{ending}")]


def one_change_of_prefix(
    wanted: Sequence[str],
    there: Callable[[str], bool],
    names: NamesByEnd,
    stored_as: Callable[[str], Iterable[str]],
) -> list[dict[str, str]]:
    """The names under which a base has all of an adapter's tensors, by each change of prefix that serves them all.

    Parameters
    ----------
    wanted : sequence of str
        The adapter's names, without doubles.
    there : callable
        Whether the base has a tensor, stored in whichever way.
    names : NamesByEnd
        The base's own names.
    stored_as : callable
        The names of a tensor that a base may have instead of one.

    Returns
    -------
    list of dict of str to str
        One for names as they are or without up to two leading components that all share; else one for each prefix
        that can be put before them; empty if there is none.
    """
    if all(there(tensor) for tensor in wanted):  # also where there are none
        return [{tensor: tensor for tensor in wanted}]
    parts = [tensor.split(".") for tensor in wanted]
    for dropped in range(1, min(_MAX_DROPPED, min(map(len, parts)) - 2) + 1):
        if len({tuple(components[:dropped]) for components in parts}) == 1:
            shorter = {tensor: ".".join(c[dropped:]) for tensor, c in zip(wanted, parts, strict=True)}
            if all(there(name) for name in shorter.values()):
                return [shorter]
    # Every name of the base that ends in the first one proposes a prefix.
    prefixes = dict.fromkeys(
        name.removesuffix(ending) for ending in (wanted[0], *stored_as(wanted[0])) for name in names.longer_than(ending)
    )
    fitting = [prefix for prefix in prefixes if all(there(prefix + tensor) for tensor in wanted)]
    return [{tensor: prefix + tensor for tensor in wanted} for prefix in fitting]
