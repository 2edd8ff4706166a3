"""Keys of PEFT's ``rank_pattern`` and ``alpha_pattern``: regular expressions out of a file nobody vouches for.

Python's ``re`` has no limit of time, and a key like ``(a+)+b`` takes years to fail. So a key is looked over before
it is compiled: its length, how many of its parts may vary, and no repeated group whose body may vary.

Most keys are names of modules, or ends of them, with dots that match any character, and a mixture of experts has
thousands: these are looked up, not tried one after the other.
"""

from __future__ import annotations

import re

_MAX_LENGTH = 1000
_MAX_VARYING = 6
"""Parts like ``.*`` or ``(q|v)`` on one path through a key: each multiplies the work of a failed match."""

_NAME = re.compile(r"\^?(?:[\w/-]|\\[^\w\n]|\.)+")
"""A key without anything that varies but dots: characters that stand for themselves, escaped ones, and dots."""
_CHARACTER = re.compile(r"\\?.")
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP = re.compile(r"\((?:\?(?::|=|!|<=|<!|P<\w+>))?")
_QUANTIFIER = re.compile(r"(?P<kind>[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})[?+]?")


def pattern_regex(key: str) -> re.Pattern[str]:
    r"""PEFT's rule for a key of ``rank_pattern`` or ``alpha_pattern``, to ``match`` against a module's name.

    The key is itself a regular expression, dots unescaped, for a dotted suffix of the name:
    ``(.*\.)?({key})$``, as in PEFT's ``get_pattern_key``. The first key that matches counts.

    Raises
    ------
    ValueError
        If matching the key could take very long.
    re.error
        If it is no regular expression.

    Examples
    --------
    >>> [key for key in ("proj", "q_proj", r".*\.0\.q") if pattern_regex(key).match("layers.0.q_proj")]
    ['q_proj']
    """
    if danger := _danger(key):
        raise ValueError(danger)
    return re.compile(rf"(.*\.)?({key})$")


class PatternKeys:
    r"""The keys of a pattern in their order, and which of them match a module's name: the first counts.

    Examples
    --------
    >>> keys = PatternKeys()
    >>> for key in ("q", ".*proj", "0.q_proj", r"^layers\.0\.q_proj"):
    ...     keys.append(key)
    >>> keys.matching("layers.0.q_proj"), keys.matching("q_proj")
    ([1, 2, 3], [1])
    """

    def __init__(self) -> None:
        self._count = 0
        # Keys that are names: by length, anchor and the positions of their dots; there, by what is between the dots.
        self._names: dict[tuple[int, bool, tuple[int, ...]], dict[str, list[int]]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []

    def append(self, key: str) -> None:
        """Add the next key.

        Raises
        ------
        ValueError, re.error
            Of ``pattern_regex``, if it is none that may be matched.
        """
        index = self._count
        self._count += 1
        if _NAME.fullmatch(key) is None or len(key) > _MAX_LENGTH:
            self._others.append((index, pattern_regex(key)))
            return
        characters = _CHARACTER.findall(key.removeprefix("^"))
        text = "".join(character[-1] for character in characters)
        dots = tuple(i for i, character in enumerate(characters) if character == ".")
        self._names.setdefault((len(text), key.startswith("^"), dots), {}).setdefault(text, []).append(index)

    def matching(self, module: str) -> list[int]:
        """Positions of the keys that match, ascending."""
        found = [index for index, regex in self._others if regex.match(module)]
        name = module.removesuffix("\n")  # an end is before it, too
        for (length, anchored, dots), names in self._names.items() if "\n" not in name else ():
            start = len(name) - length
            if start == 0 or (start > 0 and name[start - 1] == "." and not anchored):
                characters = list(name[start:])
                for dot in dots:
                    characters[dot] = "."
                found += names.get("".join(characters), ())
        return sorted(found)


def _danger(key: str) -> str | None:
    r"""Why a key might take very long to match, if it might. Conservative: harmless keys can be named too.

    Examples
    --------
    >>> _danger("(a+)+b")
    'a repeated group whose body varies'
    >>> _danger(r"layers\.[0-9]+\.(q|v)_proj") is None
    True
    """
    if len(key) > _MAX_LENGTH:
        return f"more than {_MAX_LENGTH} characters"
    # One entry for each open group: the varying parts of the branch being read, the most of its other
    # branches, and whether there are any.
    open_groups = [(0, 0, False)]
    position = 0
    while position < len(key):
        branch, most, branched = open_groups[-1]
        inner, closes = 0, False
        if found := _ESCAPE.match(key, position) or _CLASS.match(key, position):
            position = found.end()
        elif found := _GROUP.match(key, position):
            if key.startswith("?", found.end()):
                return f"the construct {key[position : position + 3]!r}"
            open_groups.append((0, 0, False))
            position = found.end()
            continue
        elif key[position] == "|":
            open_groups[-1] = (0, max(branch, most), True)
            position += 1
            continue
        elif key[position] == ")":
            if len(open_groups) == 1:  # which would close the group that the key is put into
                return "a parenthesis that closes none"
            open_groups.pop()
            inner, closes = max(branch, most) + branched, True
            branch, most, branched = open_groups[-1]
            position += 1
        else:
            position += 1
        quantifier = _QUANTIFIER.match(key, position)
        if quantifier:
            position = quantifier.end()
            if closes and inner and quantifier["kind"] != "?":
                return "a repeated group whose body varies"
            inner += quantifier["kind"] in "*+?" or "," in quantifier["kind"]
        open_groups[-1] = (branch + inner, most, branched)
        if branch + inner > _MAX_VARYING:
            return f"more than {_MAX_VARYING} parts that vary"
    return None
