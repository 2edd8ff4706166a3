"""Names out of untrusted files, as text that can be shown."""

from __future__ import annotations

import unicodedata

_HIDDEN_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def plain_text(text: str) -> str:
    r"""The text with control, format and direction characters as visible escapes.

    Examples
    --------
    >>> plain_text("query\x1b[31m")
    'query\\x1b[31m'
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN_CATEGORIES else char
        for char in text
    )
