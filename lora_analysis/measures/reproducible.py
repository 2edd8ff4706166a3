"""How many directions two trainings have in common: the part of an update that is signal and not luck.

Conventions
-----------
Two subspaces of one space, of two updates that should agree: trained on one task from different seeds. Their principal
cosines are compared with the *largest* one of independent random subspaces of the same dimensions; those above its
99 % quantile count as shared. The largest is tested exactly, the count is conservative after that. A shared
initialisation or one order of the data makes directions common too: only seeds that have neither in common tell.

Measures
--------
``shared_directions``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2 and figure 4 (two seeds); Björck and Golub 1973, *Numerical methods for
computing angles between linear subspaces*.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lora_analysis.measures.subspace import principal_angles

LEVEL = 0.99
"""Quantile of the largest principal cosine by chance, above which a direction counts as shared."""


class SharedDirections(NamedTuple):
    """What two subspaces have in common.

    Attributes
    ----------
    shared : int
        Principal cosines above ``edge``.
    largest : float
        The largest principal cosine, in [0, 1].
    p : float
        Of the largest: (1 + draws at least as large) / (draws + 1).
    edge : float
        Quantile ``LEVEL`` of the largest by chance.
    """

    shared: int
    largest: float
    p: float
    edge: float


def shared_directions(basis_a: Tensor, basis_b: Tensor, null: Tensor) -> SharedDirections:
    """How many directions of two subspaces are closer than chance brings any.

    Parameters
    ----------
    basis_a : Tensor, shape (d, m)
    basis_b : Tensor, shape (d, n)
        Orthonormal columns.
    null : Tensor, shape (draws,)
        ``measures.null.largest_cosine_null(d, m, n)``.

    Returns
    -------
    SharedDirections

    Raises
    ------
    ValueError
        If the bases are not orthonormal or of different dimensions, or the null is empty.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.measures.null import largest_cosine_null
    >>> e = torch.eye(400, dtype=torch.float64)
    >>> shared_directions(e[:, :4], e[:, 3:7], largest_cosine_null(400, 4, 4, draws=199)).shared
    1
    """
    if not len(null):
        raise ValueError("null: expected draws, got none.")
    cosines = principal_angles(basis_a, basis_b).cos()
    ordered = null.sort().values
    edge = float(ordered[min(len(ordered) - 1, math.ceil(LEVEL * (len(ordered) + 1)) - 1)])
    largest = float(cosines.max()) if len(cosines) else math.nan
    return SharedDirections(
        shared=int((cosines > edge).sum()),
        largest=largest,
        p=(1 + int((ordered >= largest - 1e-12).sum())) / (len(ordered) + 1) if len(cosines) else math.nan,
        edge=edge,
    )
