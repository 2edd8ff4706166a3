"""The paper's claims on performance, C1 to C3b and C14 to C16, judged from what the runs of a study gained.

Conventions
-----------
Intervals are those of ``study.resampling``: over seeds and groups of held-out items, paired. Nothing is said of a claim
where nothing was gained. What a rule needs is in the plan's margins, fixed before the runs.

Values
------
``PERFORMANCE_CLAIMS``, ``performance_claims``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from lora_analysis.study.claims.budgets import one_against_pair, pair_against_one
from lora_analysis.study.claims.claim import Claim
from lora_analysis.study.claims.gains import Gains, held_out_gains
from lora_analysis.study.claims.plateaus import plateau, slope
from lora_analysis.study.claims.ranks import rank_one_of_q, rank_one_suffices
from lora_analysis.study.claims.sample_efficiency import few_items
from lora_analysis.study.plan import Plan

PERFORMANCE_CLAIMS: Mapping[str, Callable[[Gains, Gains, Plan], Claim]] = {
    "C1": pair_against_one,
    "C2": one_against_pair,
    "C3": rank_one_suffices,
    "C3b": rank_one_of_q,
    "C14": plateau,
    "C15": slope,
    "C16": few_items,
}
"""Of gains in loss, gains in accuracy (empty where nothing is classified) and the plan."""


def performance_claims(runs: pd.DataFrame, outcomes: pd.DataFrame, plan: Plan) -> list[Claim]:
    """All seven claims on performance, in the paper's order, each with a verdict.

    Parameters
    ----------
    runs, outcomes : DataFrame
        As ``evidence.Study`` has them.
    plan : Plan
    """
    loss, accuracy = held_out_gains(runs, outcomes, plan), held_out_gains(runs, outcomes, plan, metric="accuracy")
    return [judged(loss, accuracy, plan) for judged in PERFORMANCE_CLAIMS.values()]
