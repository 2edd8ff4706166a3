"""Which projections to adapt with a number of parameters: C1 and C2, the paper's Table 5.

Conventions
-----------
Runs are compared at equal numbers of trainable parameters: {q,v} at r/2 with one projection at r. Of several such
budgets, the one at which most single projections were run is judged; of equals, the one nearest to the paper's r = 4.
The "best" single projection is picked on the same data: ``gains.extreme`` has the interval for that. A difference
matters from the share of {q,v}'s gain on that ``margins.sufficiency`` leaves.

Values
------
``pair_against_one``, ``one_against_pair``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.1, Table 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_analysis.study.claims.claim import Claim, directional
from lora_analysis.study.claims.gains import Config, Gains, extreme, span, unanswered
from lora_analysis.study.plan import Plan


def pair_against_one(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C1: {q,v} at half the rank gains more than any one projection with as many parameters."""
    asked = Claim(
        "C1",
        "Adapting q and v at half the rank beats adapting any one projection with as many parameters (section 7.1, "
        "Table 5; there by 0.5 points on WikiSQL and 0.0 on MultiNLI over the best one, 3.3 and 0.3 over q).",
        "gain of {q,v} at r/2 minus that of the best single projection at r, nats per item, paired by seed and item; "
        "p one-sided",
        "not_attempted",
        "",
    )
    return _judged(asked, gains, right, plan, ("q", "k", "v", "o"), above=True)


def one_against_pair(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C2: q alone and k alone gain less than {q,v} with as many parameters."""
    asked = Claim(
        "C2",
        "Putting all the parameters in q, or all in k, does clearly worse than q and v together (section 7.1, Table 5; "
        "there by 3.3 and 3.7 points on WikiSQL, 0.3 and 0.5 on MultiNLI).",
        "gain of q alone or k alone at r, whichever is more, minus that of {q,v} at r/2, nats per item, paired by seed "
        "and item; p one-sided",
        "not_attempted",
        "",
    )
    return _judged(asked, gains, right, plan, ("q", "k"), above=False)


def _judged(asked: Claim, gains: Gains, right: Gains, plan: Plan, names: Sequence[str], *, above: bool) -> Claim:
    """The claim that {q,v} lies above all of these single projections, stated as the difference or its opposite."""
    confidence = plan.margins.confidence
    pair, singles = _equal_budget(gains, names)
    needs = f"runs of {{q,v}} and of {', '.join(names)} alone with as many trainable parameters (plan.budget)"
    compared = [pair, *singles]
    stands = unanswered(asked, gains, compared if singles else [], confidence, needs=needs, tests=1)
    if stands is not None:
        return stands
    differences = [gains.contrast({pair: 1.0, single: -1.0}) for single in singles]
    least = extreme(differences, confidence)
    closest = singles[least.which]
    estimate, interval = (
        (least.value, least.interval) if above else (-least.value, (-least.interval[1], -least.interval[0]))
    )
    gained = gains.contrast({pair: 1.0})
    effect = (1 - plan.margins.sufficiency) * gained.value
    first, second = (pair, closest) if above else (closest, pair)
    beside = (
        f"; of this one alone {right.told(right.contrast({first: 1.0, second: -1.0}), confidence)}"
        if right.sums
        else ""
    )
    each = ", ".join(
        f"{single} {(d if above else -d).value:+.4f} {span((d if above else -d).interval(confidence))}"
        for single, d in zip(singles, differences, strict=True)
    )
    absent = ", ".join(name for name in names if name not in [single.targets for single in singles])
    missing = f" ({absent} alone not run)" if absent else ""
    why = (
        f"{first} minus {second}, {gains.parameters[pair]:,} parameters each: {estimate:+.4f} nats per item "
        f"{span(interval)} ({100 * confidence:g} % interval, as all here), null 0, "
        f"allowing for having picked one of {len(singles)}{beside}; "
        f"{'{q,v} minus each' if above else 'each minus {q,v}'}: {each}"
        f"{missing}; {pair} gained "
        f"{gains.told(gained, confidence)}, of which {effect:.4f} would matter; {least.mde:.4f} could be seen with "
        "power 0.8."
    )
    return replace(
        asked,
        verdict=directional(estimate, interval, threshold=0.0, above=above, mde=least.mde, effect=effect),
        why=why,
        estimate=estimate,
        interval=interval,
        null_mean=0.0,
        null_sd=differences[least.which].se,
        p=least.p,
        runs=gains.count(compared),
        cells=len(gains.items),
        mde=least.mde,
    )


def _equal_budget(gains: Gains, names: Sequence[str]) -> tuple[Config, list[Config]]:
    """{q,v}, and single projections of as many parameters that share a seed with it."""
    whole = [config for config in gains.sums if config.method == "lora" and config.size is None]
    found = []
    for pair in (config for config in whole if config.targets == "q+v"):
        equals = [one for one in whole if gains.parameters[one] == gains.parameters[pair] and gains.seeds(one, pair)]
        found.append((pair, [one for name in names for one in equals if one.targets == name]))
    return max(found, key=lambda one: (len(one[1]), -abs(one[0].r - 4)), default=(Config("lora", "q+v", 4), []))
