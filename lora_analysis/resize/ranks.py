"""How many directions to keep, from spectra alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_TIE = 1e-12
"""Relative slack of a threshold, as of energies in ``measures.spectrum``: a value that is equal counts as equal,
whatever the rounding of the threshold."""


def threshold_rank(S: Tensor, threshold: float) -> int:
    """Number of singular values that are at least a part of the largest.

    ``#{k : S[k] >= threshold * (1 - 1e-12) * S[0]}``, exactly those. Versions of kohya's ``resize_lora.py`` keep one
    more: they add one to the count, as if it were an index.

    Parameters
    ----------
    S : Tensor, shape (k,)
        Singular values, descending.
    threshold : float
        In (0, 1).

    Returns
    -------
    int
        A count, in 1 .. k; 0 if all values are zero.

    Raises
    ------
    ValueError
        If the threshold is out of range.

    Examples
    --------
    >>> import torch
    >>> threshold_rank(torch.tensor([4.0, 2.0, 1.0]), 0.5)
    2
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a part of the largest singular value in (0, 1), got {threshold}.")
    values = S.double()
    if not values.numel() or not float(values[0]):
        return 0
    return int((values >= threshold * (1 - _TIE) * values[0]).sum())


def budget_ranks(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks whose parameters fit into a budget, for the least squared error of all modules together.

    Minimises ``sum_m sum_{k > r_m} S_m[k]**2`` subject to ``sum_m r_m costs[m] <= budget``: directions are taken by
    ``S**2 / cost``, the largest first, and one that no longer fits is passed over for later ones that do.

    The result is optimal where all costs are equal, and where nothing had to be passed over. Otherwise its squared
    error is above the optimum's by less than ``S**2`` of the first direction that was passed over: up to there,
    every parameter went where it removes most, and less than that direction costs was left.

    Parameters
    ----------
    spectra : mapping of str to Tensor, shape (k,)
        Singular values of each module, descending, in the unit of ΔW. Zeros are never taken.
    costs : mapping of str to int
        Parameters of one direction, d_out + d_in.
    budget : int
        Parameters of all modules together.

    Returns
    -------
    dict of str to int
        Of every module, 0 where none of its directions was taken.

    Examples
    --------
    >>> import torch
    >>> budget_ranks({"q": torch.tensor([4.0, 1.0]), "v": torch.tensor([3.0, 2.0])}, {"q": 10, "v": 10}, 30)
    {'q': 1, 'v': 2}
    """
    steps = [
        (value * value / costs[name], position, k, name)
        for position, (name, S) in enumerate(spectra.items())
        for k, value in enumerate(S.tolist())
        if value > 0
    ]
    # Equal ones in the order of the modules. Within a module they descend, so that k is taken before k + 1; and what
    # is left only shrinks, so that after a k which did not fit no later one does.
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    ranks = dict.fromkeys(spectra, 0)
    left = budget
    for *_, name in steps:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
