"""Every claim of the paper on subspaces and amplification, with what a study says of it.

Values
------
``subspace_claims``.

References
----------
Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3, appendices G and H.
"""

from __future__ import annotations

from lora_analysis.study.claims import amplification, calibration, overlap, seeds
from lora_analysis.study.claims.claim import Claim
from lora_analysis.study.claims.overlap import Tables
from lora_analysis.study.plan import Plan

CLAIMS = (
    overlap.shared_top_direction,
    overlap.unshared_tail,
    overlap.mutual_inclusion,
    seeds.shared_between_seeds,
    seeds.query_shares_more,
    calibration.random_factors,
    overlap.all_layers,
    amplification.aligned_with_base,
    amplification.not_the_top,
    amplification.amplification_factor,
    amplification.amplified_signs,
    amplification.falling_with_rank,
    amplification.more_of_the_top,
    seeds.task_directions,
)
"""C4, C4b, C5, C6, C6b, C7, C8, C9, C10, C11, C11b, C12, C13, C17, in this order."""


def subspace_claims(tables: Tables, plan: Plan) -> list[Claim]:
    """The fourteen claims, each whatever its outcome.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        ``subspace_evidence.subspace_tables`` of a study, or the same read back from files; what is missing makes
        claims ``not_attempted``.
    plan : Plan

    Returns
    -------
    list of Claim

    Examples
    --------
    >>> from lora_analysis.study.plan import Recipe
    >>> found = subspace_claims({}, Plan({}, "task", Recipe(1, 1, {"lora": 1e-3}, 8.0)))
    >>> len(found), {claim.verdict for claim in found}
    (14, {'not_attempted'})
    """
    return [claim(tables, plan) for claim in CLAIMS]
