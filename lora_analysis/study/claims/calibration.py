"""Does the tool see nothing where there is nothing? C7, without which no other claim is to be read.

Conventions
-----------
Random Gaussian factors of the study's own shapes go the way of its updates. Their p-values have to be uniform, and
their standard scores to have mean 0.

Values
------
``random_factors`` (C7).

References
----------
Hu et al. 2021, arXiv:2106.09685, figure 4 (right).
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from lora_analysis.study.claims.claim import Claim, Verdict, holm
from lora_analysis.study.claims.overlap import Tables, pairs_of
from lora_analysis.study.claims.replicates import unattempted
from lora_analysis.study.plan import Plan

TOO_RARE = 0.001
"""Level at which the tool's own calibration is rejected (C7): a tenth of a per cent of sound tools."""

CALIBRATED = 0.5
"""Half-width, in standard scores, that the mean score of random factors has to lie in (C7)."""

STOP = " The tool is not calibrated: stop, and read no other claim."


def random_factors(tables: Tables, plan: Plan) -> Claim:
    """C7, which calibrates the tool itself: if it fails, no other claim is to be read."""
    about = (
        "C7",
        "Random Gaussian matrices share no directions (figure 4, right)",
        "mean standard score of phi(r, r') of random factors of the study's shapes; 0 by chance",
    )
    rows = pairs_of(tables, "gaussian")
    if rows.empty:
        return unattempted(*about, f"one run with targets {'+'.join(plan.main)}, for its shapes")
    named = {name: rows[name].dropna() for name in ("p_11", "p_1n", "p_m1", "p_mn", "p_largest", "p_tail")}
    tests = {name: float(stats.kstest(values, "uniform").pvalue) for name, values in named.items() if len(values)}
    smallest = min(holm(list(tests.values())))
    scores = rows["z_mn"].dropna().to_numpy(dtype=float)
    if not len(scores):
        wrong = smallest < TOO_RARE
        stop = STOP if wrong else ""
        why = (
            f"{len(rows)} pairs of random matrices have no standard scores, as phi at r = 1 is strongly skewed; "
            f"p-values of {len(tests)} statistics against uniform, smallest Holm-p {smallest:.2g}.{stop}"
        )
        return Claim(
            *about, "contradicted" if wrong else "not_testable_at_this_scale", why, p=smallest, cells=len(rows)
        )
    mean, half = float(scores.mean()), float(stats.norm.ppf(0.9995) / np.sqrt(len(scores)))
    verdict: Verdict = "reproduced"
    if smallest < TOO_RARE or abs(mean) - half > CALIBRATED:
        verdict = "contradicted"
    elif len(rows) < 20 or abs(mean) + half > CALIBRATED:
        verdict = "consistent_underpowered"
    stop = STOP if verdict == "contradicted" else ""
    why = (
        f"{len(rows)} pairs of random matrices: p-values of {len(tests)} statistics against uniform, smallest "
        f"Holm-p {smallest:.2g}; {np.mean(named['p_11'] < 0.05):.1%} of phi(1,1) below .05; mean score of phi(r,r') "
        f"{mean:.2g} ± {half:.2g} (99.9 %).{stop}"
    )
    bounds = (mean - half, mean + half)
    return Claim(*about, verdict, why, mean, bounds, 0.0, 1 / len(scores) ** 0.5, p=smallest, runs=0, cells=len(rows))
