"""Notes of a reader, so that a file of a thousand modules does not say one thing a thousand times."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_MOST_ALIKE = 3
"""How many notes may differ in their numbers alone: files whose r is chosen for each module have dozens of them."""


def first_of_each(notes: Iterable[tuple[str, str]]) -> list[str]:
    """The first note of every kind, and how many more there are of it.

    Kinds that differ in numbers alone are one where there are more than three of them.

    Parameters
    ----------
    notes : iterable of (str, str)
        Kind and text of each.

    Examples
    --------
    >>> first_of_each([("r", "'a': r=2."), ("alpha", "'a': 1."), ("r", "'b': r=3."), ("r", "'c': r=3.")])
    ["'a': r=2. The same of 2 others.", "'a': 1."]
    >>> first_of_each((f"r={r}.", f"{name!r}: r={r}.") for r, name in enumerate("abcd"))
    ["'a': r=0. The like of 3 others, with other numbers."]
    """
    by_kind: dict[str, list[str]] = {}
    for kind, text in notes:
        by_kind.setdefault(kind, []).append(text)
    alike: dict[str, list[str]] = {}
    for kind in by_kind:
        alike.setdefault(_NUMBER.sub("#", kind), []).append(kind)
    found = []
    for kinds in alike.values():
        if len(kinds) > _MOST_ALIKE:
            others = sum(len(by_kind[kind]) for kind in kinds) - 1
            found.append(f"{by_kind[kinds[0]][0]} The like of {others} others, with other numbers.")
        else:
            found += [_with_count(*by_kind[kind]) for kind in kinds]
    return found


def _with_count(first: str, *others: str) -> str:
    return first if not others else f"{first} The same of {len(others)} other{'s' if len(others) > 1 else ''}."
