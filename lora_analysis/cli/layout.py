"""How a table of text becomes lines of at most so many columns, with nothing cropped.

Values never shrink. Names give way: first by the components that all of them share, then in their middle, then
to numbers with a legend of full names. Flags stand in a last column if that has room, else below their row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len

Kind = Literal["name", "text", "number", "flags"]
"""What a column holds: names are shortened, numbers stand right, flags are words and stand last."""

_LONG_NAME = 26
_LEAST_ELIDED = 16
_INDENT = "    "


class Page(NamedTuple):
    """A table as lines: what its names stand for, the headings, and the rows."""

    legend: list[str]
    heading: str
    lines: list[str]


def laid_out(headings: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[Kind], width: int) -> Page:
    r"""The lines of a table, none but the legend's wider than ``width`` if values and numbered names fit at all.

    Parameters
    ----------
    headings : sequence of str, length n
    rows : sequence of sequences of str, each of length n
        Cells without control characters.
    kinds : sequence of Kind, length n
        At most one ``"flags"``, and that the last.
    width : int
        Columns of the screen.

    Returns
    -------
    Page
        Flags that are empty in all rows have no column.

    Examples
    --------
    >>> names = ["lm_head", "model.language_model.layers.0.self_attn.q_proj"]
    >>> rows = [[name, "1.23e-05", "zero"] for name in names]
    >>> page = laid_out(["module", "norm", "flags"], rows, ["name", "number", "flags"], 40)
    >>> print(page.heading, *page.lines, sep="\n")
    module                       norm  flags
    lm_head                  1.23e-05  zero
    model.l…elf_attn.q_proj  1.23e-05  zero
    """
    count = len(kinds) - ("flags" in kinds)
    flags = [row[-1] for row in rows] if count < len(kinds) else []
    columns = [[headings[c], *(row[c] for row in rows)] for c in range(count)]
    names = [c for c in range(count) if kinds[c] == "name"]
    values = sum(_widest(columns[c]) for c in range(count) if c not in names)
    labels, gap, beside = _fitting(
        [[row[c] for row in rows] for c in names],
        [cell_len(headings[c]) for c in names],
        {gap: width - values - gap * (count - 1) for gap in (2, 1)},
        _widest([headings[-1], *(word for cell in flags for word in cell.split())]) if any(flags) else None,
    )
    for c in names:
        columns[c] = [headings[c], *(labels[row[c]] for row in rows)]
    widths = [_widest(column) for column in columns]
    right = [kind == "number" for kind in kinds]
    heading, *lines = (
        (" " * gap).join(_padded(cell, widths[c], right=right[c]) for c, cell in enumerate(row))
        for row in zip(*columns, strict=True)
    )
    if any(flags):
        left = sum(widths) + gap * count
        if beside:
            heading = heading + " " * gap + headings[-1]
            lines = [line for row, words in zip(lines, flags, strict=True) for line in _beside(row, words, left, width)]
        else:
            lines = [line for row, words in zip(lines, flags, strict=True) for line in (row, *_below(words, width))]
    return Page(_legend(labels), heading.rstrip(), [line.rstrip() for line in lines])


def _fitting(
    names: Sequence[Sequence[str]], headings: Sequence[int], rooms: dict[int, int], flags: int | None
) -> tuple[dict[str, str], int, bool]:
    """A label for every name, the gap between columns, and whether flags fit beside the row.

    ``rooms`` is what values leave to names and flags, by gap; ``flags`` is the least width of these.
    """
    distinct = list(dict.fromkeys(name for column in names for name in column))
    short = _shortened(distinct)
    numbered = {name: f"#{number}" for number, name in enumerate(distinct, start=1)}
    for gap, room in rooms.items():
        for style in ("short", "elided", "numbered"):
            for beside in (False,) if flags is None else (True, False):
                left = room - (flags + gap if beside and flags is not None else 0)
                limit = left // max(1, len(names))
                if style == "elided":
                    if limit < _LEAST_ELIDED:
                        continue
                    labels = {name: _middle_elided(label, limit) for name, label in short.items()}
                else:
                    labels = short if style == "short" else numbered
                needed = sum(
                    max(heading, _widest([labels[name] for name in column]))
                    for heading, column in zip(headings, names, strict=True)
                )
                if needed <= left and len(set(labels.values())) == len(distinct):
                    return labels, gap, beside
    return numbered, 1, False


def _legend(labels: dict[str, str]) -> list[str]:
    """All names if they are numbered, else one example of how they are shortened, if they are."""
    changed = [f"{label} is {name}" for name, label in labels.items() if label != name]
    return changed if all(label.startswith("#") for label in labels.values()) else changed[:1]


def _beside(row: str, flags: str, left: int, width: int) -> list[str]:
    first, *more = _wrapped(flags, width - left) or [""]
    return [_padded(row, left) + first, *(" " * left + words for words in more)]


def _below(flags: str, width: int) -> list[str]:
    return [_INDENT + words for words in _wrapped(flags, width - len(_INDENT))]


def _wrapped(flags: str, width: int) -> list[str]:
    return textwrap.wrap(flags, max(1, width), break_long_words=False, break_on_hyphens=False)


def _widest(cells: Sequence[str]) -> int:
    return max(map(cell_len, cells), default=0)


def _padded(cell: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def _shortened(names: Sequence[str]) -> dict[str, str]:
    """Distinct names, or paths, without the components that all of them share, if they are long.

    Numbers stay: in names of several numbered levels one that is everywhere is not always the same level.
    """
    if len(names) < 2 or max(map(cell_len, names)) <= _LONG_NAME:
        return {name: name for name in names}
    separator = "/" if all("/" in name for name in names) else "."
    parts = {name: name.split(separator) for name in names}
    shared = set.intersection(*(set(components) for components in parts.values()))
    common = {component for component in shared if not component.isdigit()}
    short = {name: _without(components, common, separator) for name, components in parts.items()}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _without(components: Sequence[str], common: set[str], separator: str) -> str:
    kept: list[str] = []
    for component in components:
        if component not in common:
            kept.append(component)
        elif kept and kept[-1] != "…":
            kept.append("…")
    while kept and kept[-1] == "…":
        kept.pop()
    return separator.join(kept).replace(f"{separator}…{separator}", "…") or separator.join(components)


def _middle_elided(name: str, width: int) -> str:
    """The name in so many columns: a third of them its beginning, the rest its end, which tells most."""
    if cell_len(name) <= width:
        return name
    head = _beginning(name, (width - 1) // 3)
    return head + "…" + _beginning(name[::-1], width - 1 - cell_len(head))[::-1]


def _beginning(text: str, width: int) -> str:
    """As many characters as fit; wide ones take two columns."""
    used = 0
    for index, char in enumerate(text):
        used += cell_len(char)
        if used > width:
            return text[:index]
    return text
