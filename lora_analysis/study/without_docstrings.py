"""Python source without its docstrings: code that a decoder can learn from without reading prose.

Values
------
``without_docstrings``.
"""

from __future__ import annotations

import ast
import warnings


def without_docstrings(source: str) -> str:
    r"""Python source without its docstrings; ``pass`` where nothing else would be left.

    Strings that follow a docstring, and would take its place, go with it, and so does a comment behind it.
    Everything else stays as written.

    Parameters
    ----------
    source : str

    Returns
    -------
    str

    Raises
    ------
    SyntaxError, ValueError
        If the source is no Python.

    Examples
    --------
    >>> print(without_docstrings("def f(x):\n    '''What f is.'''\n    return x  # as it is"))
    def f(x):
        return x  # as it is
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes are not our caller's business
        tree = ast.parse(source)
    lines = source.encode().split(b"\n")  # positions of ast are bytes, and only \n ends a line
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    data = b"\n".join(lines)
    cuts: list[tuple[int, int, bytes]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        leading = 0
        while leading < len(node.body) and _is_text(node.body[leading]):
            leading += 1
        needed = leading == len(node.body) and not isinstance(node, ast.Module)
        for number, statement in enumerate(node.body[:leading]):
            assert statement.end_lineno is not None  # ast.parse sets both
            assert statement.end_col_offset is not None
            start = starts[statement.lineno - 1] + statement.col_offset
            end = starts[statement.end_lineno - 1] + statement.end_col_offset
            before = data[starts[statement.lineno - 1] : start]
            after = data[end : starts[statement.end_lineno] - 1].strip()
            if (needed and number == 0) or before.strip() or (after and not after.startswith(b"#")):
                cuts.append((start, end, b"pass"))
            else:
                cuts.append((start - len(before), starts[statement.end_lineno], b""))
    for start, end, instead in sorted(cuts, reverse=True):
        data = data[:start] + instead + data[end:]
    return data.decode()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
