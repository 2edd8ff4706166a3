"""Which of a table's many tests are findings once their number is counted.

A table tests every module: of a hundred without any effect one has p below 0.01. Beside each p stands therefore a q,
Benjamini and Hochberg's adjusted p: those with q of at most 0.05 are *findings*, of which on average at most one in
twenty is none, and the others are *consistent with chance*. The rate holds for independent tests and for positively
dependent ones, which modules of one training are at worst; Holm's correction would hold for any, but needs p smaller
than Monte Carlo gives. A lone finding among n modules needs p of at most 0.05 / n, and so 20 n draws.

References
----------
Benjamini and Hochberg 1995, *Controlling the false discovery rate*, J. R. Statist. Soc. B 57; Benjamini and Yekutieli
2001, *The control of the false discovery rate in multiple testing under dependency*, Ann. Statist. 29.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

RATE = 0.05
"""Expected share of false ones among findings."""


def with_discoveries(table: pd.DataFrame, families: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The table with a ``q`` for every ``p``: adjusted among the rows of one family.

    Parameters
    ----------
    table : DataFrame
    families : mapping of str to sequence of str
        From a column of p-values, whose name has the word ``p``, to the columns that tell families apart: the rows
        that agree in these are the tests that are counted. NaN is no test.

    Returns
    -------
    DataFrame
        ``sti_p`` has a ``sti_q``, ``phi_p_in`` a ``phi_q_in``: where the table has that column, else at its end.

    Examples
    --------
    >>> table = pd.DataFrame({"module": ["a", "b", "c", "d"], "sti_p": [0.01, 0.02, 0.9, float("nan")]})
    >>> with_discoveries(table, {"sti_p": []})["sti_q"].round(2).tolist()
    [0.03, 0.03, 0.9, nan]
    """
    return table.assign(
        **{
            "_".join("q" if word == "p" else word for word in column.split("_")): _adjusted(
                table[column].astype(float), [table[key] for key in family]
            )
            for column, family in families.items()
        }
    )


def findings(q: pd.Series[float], what: str) -> str:
    """How many tests hold once their number is counted, as a sentence.

    Examples
    --------
    >>> findings(pd.Series([0.01, 0.4, float("nan")]), "Gain")
    'Gain: beyond chance in 1 of 2, 1 consistent with chance (false discovery rate 5%).'
    """
    known = q.dropna()
    if known.empty:
        return f"{what}: not tested."
    found = int((known <= RATE).sum())
    if not found:
        return f"{what}: consistent with chance in all {len(known)}."
    rest = len(known) - found
    others = f", {rest} consistent with chance" if rest else ""
    return f"{what}: beyond chance in {found} of {len(known)}{others} (false discovery rate {RATE:.0%})."


def _adjusted(p: pd.Series[float], family: Sequence[pd.Series[Any]]) -> pd.Series[float]:
    keys = [*family] or [pd.Series(0, index=p.index)]
    groups = p.groupby(keys, dropna=False)
    # Of equal p the last rank counts, so that all of them have the least of their values.
    scaled = p * groups.transform("count") / groups.rank(method="max")
    falling = p.sort_values(ascending=False, kind="stable").index
    least = scaled.loc[falling].groupby([key.loc[falling] for key in keys], dropna=False).cummin()
    return least.reindex(p.index)
