"""The names of a base's tensors against the names that an adapter has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "base_layer"}
_PREFIXES = ("module.", "base_model.model.")
_MAX_DROPPED = 2


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers (DDP, FSDP, compile, PEFT) add to it.

    Examples
    --------
    >>> plain_name("module.model.q_proj.base_layer.weight")
    'model.q_proj.weight'
    """
    # Wrappers first: compile may lie round DDP and PEFT, and would hide their prefixes.
    name = ".".join(component for component in name.split(".") if component not in _WRAPPERS)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def one_change_of_prefix(
    wanted: Sequence[str],
    there: Callable[[str], bool],
    names: Iterable[str],
    stored_as: Callable[[str], Iterable[str]],
) -> list[dict[str, str]]:
    """The names under which a base has all of an adapter's tensors, by each change of prefix that serves them all.

    Parameters
    ----------
    wanted : sequence of str
        The adapter's names, without doubles.
    there : callable
        Whether the base has a tensor, stored in whichever way.
    names : iterable of str
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
    endings = tuple(f".{name}" for name in (wanted[0], *stored_as(wanted[0])))
    prefixes = {
        name.removesuffix(ending[1:]): None
        for name in names
        if name.endswith(endings)
        for ending in endings
        if name.endswith(ending)
    }
    fitting = [prefix for prefix in prefixes if all(there(prefix + tensor) for tensor in wanted)]
    return [{tensor: prefix + tensor for tensor in wanted} for prefix in fitting]
