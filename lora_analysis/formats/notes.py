"""Notes of a reader, so that a file of a thousand modules does not say one thing a thousand times."""

from __future__ import annotations

from collections.abc import Iterable


def first_of_each(notes: Iterable[tuple[str, str]]) -> list[str]:
    """The first note of every kind, and how many more there are of it.

    Parameters
    ----------
    notes : iterable of (str, str)
        Kind and text of each.

    Examples
    --------
    >>> first_of_each([("r", "'a': r=2."), ("alpha", "'a': 1."), ("r", "'b': r=3."), ("r", "'c': r=3.")])
    ["'a': r=2. The same of 2 others.", "'a': 1."]
    """
    by_kind: dict[str, list[str]] = {}
    for kind, text in notes:
        by_kind.setdefault(kind, []).append(text)
    return [
        first if not others else f"{first} The same of {len(others)} other{'s' if len(others) > 1 else ''}."
        for first, *others in by_kind.values()
    ]
