"""How values show themselves in a notebook: small HTML tables, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST = 12
"""Rows shown; what is left out is counted."""


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with the first rows.

    Names come from files that anyone may have written, so nothing of them is markup.

    Examples
    --------
    >>> html_table("a < b", ["name"], [])
    '<div><p>a &lt; b</p></div>'
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows[:MOST])
    left = len(rows) - MOST
    more = f"<p>and {left} more</p>" if left > 0 else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return f"<div><p>{escape(caption)}</p>{table}{more}</div>"
