"""Docstrings as Markdown: they are written so that ``help()`` reads well, and turned here for the site.

Five things differ: ``::`` before an indented block; definition lists; examples outside a section of that name; arXiv
ids, which become links; and types, which griffe takes for Python where it can: ``Tensor, shape (d, m)`` for a tuple.
"""

import re

import griffe

_PARSED = ("Parameters", "Returns", "Yields", "Raises", "Warns", "Attributes", "Examples")
"""Sections that griffe reads; the text of others goes through Markdown as it is."""


class Markdown(griffe.Extension):
    """Turns each docstring once, when its object has been read from the source."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring of the package, without its indentation, as Markdown with griffe's numpy sections."""
    turned: list[str] = []
    lines = text.split("\n")
    section, at = "", 0
    while at < len(lines):
        line = lines[at]
        following = lines[at + 1] if at + 1 < len(lines) else ""
        if line and re.fullmatch(r"-{4,}", following):
            section = line
        if section not in _PARSED:
            if line.endswith("::"):
                end = _end_of_block(lines, at + 1)
                block = "\n".join(lines[at + 1 : end]).strip("\n")
                indent = " " * (len(line) - len(line.lstrip()))
                turned += [*([line[:-1]] if line.strip() != "::" else []), "", *_fenced(block, "text", indent), ""]
                at = end
                continue
            if line.startswith(">>> "):
                end = next((i for i in range(at, len(lines)) if not lines[i]), len(lines))
                turned += ["", *_fenced("\n".join(lines[at:end]), "pycon", "")]
                at = end
                continue
        if section not in _PARSED and line and not line[0].isspace() and re.match(r" {4}\S", following):
            turned += ["", line]
            end = _end_of_block(lines, at + 1)
            block = lines[at + 1 : end]
            turned += [":   " + block[0].lstrip(), *block[1:]]
            at = end
            continue
        typed = section in _PARSED and section != "Examples" and line and not line[0].isspace()
        turned.append(_type_line(line) if typed else line)
        at += 1
    return re.sub(r"arXiv:(\d{4}\.\d{4,5}|math/\d{7})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n".join(turned))


def _type_line(line: str) -> str:
    """A line of names and types that is no Python expression, and looks as before: a no-break space does it."""
    return line.replace("``", "").replace("shape (", "shape\N{NO-BREAK SPACE}(")


def _end_of_block(lines: list[str], start: int) -> int:
    """The first line from ``start`` on that is neither empty nor further in than the line before ``start``."""
    outer = len(lines[start - 1]) - len(lines[start - 1].lstrip())
    for i in range(start, len(lines)):
        if lines[i] and len(lines[i]) - len(lines[i].lstrip()) <= outer:
            return i
    return len(lines)


def _fenced(block: str, language: str, indent: str) -> list[str]:
    lines = block.split("\n")
    depth = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return [indent + f"```{language}", *(indent + line[depth:] for line in lines), indent + "```"]
