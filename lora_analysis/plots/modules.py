"""Module names as a figure says them: the paper's W_q and a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_SYMBOLS = {
    "q": ("query", "q_proj", "q_lin", "to_q", "wq", "q"),
    "k": ("key", "k_proj", "k_lin", "to_k", "wk", "k"),
    "v": ("value", "v_proj", "v_lin", "to_v", "wv", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "to_out", "wo", "o"),
}
_SUBSCRIPTS = {name: subscript for subscript, names in _SYMBOLS.items() for name in names}


class Place(NamedTuple):
    """Where in the model a module is."""

    layer: int | None
    """The first number in its path; None if there is none."""
    kind: str
    """The path with that number taken out: equal for the same projection of all layers."""


def place(module: str) -> Place:
    """Layer and kind of a module.

    Examples
    --------
    >>> place("encoder.layer.3.attention.self.query")
    Place(layer=3, kind='encoder.layer.attention.self.query')
    """
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return Place(int(part), ".".join(parts[:index] + parts[index + 1 :]))
    return Place(None, module)


def kind_labels(kinds: Iterable[str], *, update: bool = False) -> dict[str, str]:
    """What to call each kind: ``$W_q$`` and the like, else its shortest ending that no other kind has.

    Examples
    --------
    >>> kind_labels(["layer.attention.query", "layer.attention.output.dense", "layer.output.dense"])
    {'layer.attention.query': '$W_q$', 'layer.attention.output.dense': 'attention.output.dense', \
'layer.output.dense': 'layer.output.dense'}
    """
    distinct = list(dict.fromkeys(kinds))
    result = {}
    for kind in distinct:
        parts = kind.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in distinct if other != kind]
        ending = next((end for end in endings if not any(_ends_with(other, end) for other in others)), kind)
        result[kind] = _symbol(ending, update=update)
    return result


def module_label(module: str, *, update: bool = False) -> str:
    """One module in words.

    Examples
    --------
    >>> module_label("encoder.layer.3.attention.self.query")
    '$W_q$, layer 3'
    """
    where = place(module)
    (label,) = kind_labels([where.kind], update=update).values()
    return label if where.layer is None else f"{label}, layer {where.layer}"


def plain(text: str) -> str:
    """Text that is drawn as it stands: a dollar sign would begin a formula."""
    return re.sub(r"(?<!\\)\$", r"\\$", text)


def _symbol(ending: str, *, update: bool) -> str:
    subscript = _SUBSCRIPTS.get(ending.lower())
    if subscript is None:
        return plain(ending)
    return rf"$\Delta W_{subscript}$" if update else f"$W_{subscript}$"


def _ends_with(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
