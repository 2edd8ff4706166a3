"""How far rank one gets: C3 and C3b, the paper's Table 6.

Conventions
-----------
``rho = gain(r = 1) / gain(r_max)``, dimensionless. The reference is the plan's largest rank, fixed before the runs,
not the best one, which would be picked on the same data: where a smaller rank gains more than the largest, rho is
larger than a share of the best would be, and the sentence says which rank has the largest gain.

Values
------
``rank_one_suffices``, ``rank_one_of_q``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.2, Table 6.
"""

from __future__ import annotations

from dataclasses import replace

from lora_analysis.study.claims.claim import Claim, directional
from lora_analysis.study.claims.gains import Config, Gains, span, unanswered
from lora_analysis.study.plan import Plan
from lora_analysis.study.resampling import crossed_mean, fieller, linearised_ratio


def rank_one_suffices(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C3: r = 1 reaches the sufficient share of the largest rank's gain (non-inferiority)."""
    share, confidence = plan.margins.sufficiency, plan.margins.confidence
    asked = Claim(
        "C3",
        "A rank as small as one suffices for adapting q and v (section 7.2, Table 6; there 73.4 against 73.5 points on "
        "WikiSQL and 91.3 against 91.4 on MultiNLI at r = 64).",
        f"rho = gain(r=1) / gain(largest rank) of {_braced(plan.main)}, dimensionless, to be at least {share:g}; "
        "p one-sided",
        "not_attempted",
        "",
    )
    one, most = _ends(plan.main, plan)
    needs = f"runs of {one} and {most}"
    configs = [one, most] if min(plan.ranks) == 1 < max(plan.ranks) else []
    stands = unanswered(asked, gains, configs, confidence, needs=needs, reference=most)
    if stands is not None:
        return stands
    seeds = gains.seeds(one, most)
    reference = gains.contrast({most: 1.0}, seeds)
    rho, interval = fieller(gains.of(one, seeds), gains.of(most, seeds), gains.items, confidence=confidence)
    beyond = gains.contrast({one: 1.0, most: -share}, seeds)
    mde = beyond.mde(confidence) / reference.value
    why = (
        f"{one} has rho = {rho:.3f} {span(interval, '.3f')} ({100 * confidence:g} %, Fieller) of the gain of {most}, "
        f"{gains.told(reference, confidence)}; asked for is an interval above {share:g}, where the tested difference "
        f"gain(r=1) - {share:g} gain(r={most.r}) is {gains.told(beyond, confidence)}"
        f"{_accuracies(right, one, most, confidence)}{_best(gains, plan.main, most)}; a distance "
        f"of {mde:.3f} from {share:g} could be seen with power 0.8."
    )
    return replace(
        asked,
        verdict=directional(rho, interval, threshold=share, above=True, mde=mde, effect=1 - share),
        why=why,
        estimate=rho,
        interval=interval,
        p=beyond.p(0.0, above=True),
        runs=gains.count([one, most]),
        cells=len(gains.items),
        mde=mde,
    )


def rank_one_of_q(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C3b: of q alone, r = 1 reaches a smaller share of the largest rank's gain than of {q,v}."""
    margins = plan.margins
    asked = Claim(
        "C3b",
        "q alone needs a larger rank than q and v together (section 7.2, Table 6; there 68.8 against 70.0 points on "
        "WikiSQL at r = 1 and 64, but 90.7 at both on MultiNLI).",
        "rho of q alone minus rho of {q,v}, each rho = gain(r=1) / gain(largest rank), dimensionless, paired by seed "
        "and item; p one-sided",
        "not_attempted",
        "",
    )
    configs = [*_ends(("q",), plan), *_ends(("q", "v"), plan)]
    needs = f"runs of {', '.join(map(str, configs))}"
    compared = configs if min(plan.ranks) == 1 < max(plan.ranks) else []
    q_one, q_most, pair_one, pair_most = configs
    for most in (q_most, pair_most):
        # Both have to gain, so there is no correction for there being two.
        stands = unanswered(asked, gains, compared, margins.confidence, needs=needs, reference=most)
        if stands is not None:
            return stands
    seeds = gains.seeds(*configs)
    rho_q, sums_q = linearised_ratio(gains.of(q_one, seeds), gains.of(q_most, seeds), gains.items)
    rho_pair, sums_pair = linearised_ratio(gains.of(pair_one, seeds), gains.of(pair_most, seeds), gains.items)
    difference = replace(crossed_mean(sums_q - sums_pair, gains.items), value=rho_q - rho_pair)
    interval, mde = difference.interval(margins.confidence), difference.mde(margins.confidence)
    effect = 1 - margins.sufficiency
    told = []
    for one, most in ((q_one, q_most), (pair_one, pair_most)):
        rho, limits = fieller(gains.of(one, seeds), gains.of(most, seeds), gains.items, confidence=margins.confidence)
        told.append(
            f"{_braced(one.targets.split('+'))} {rho:.3f} {span(limits, '.3f')} of "
            f"{gains.told(gains.contrast({most: 1.0}, seeds), margins.confidence)}"
            f"{_accuracies(right, one, most, margins.confidence)}"
        )
    why = (
        f"rho of q minus rho of {{q,v}}: {difference.value:+.3f} {span(interval, '.3f')} "
        f"({100 * margins.confidence:g} % intervals), null 0; r=1 reaches of the gain at r={q_most.r}: "
        f"{'; '.join(told)}; {effect:.2f} would matter; {mde:.3f} could be seen with power 0.8."
    )
    return replace(
        asked,
        verdict=directional(difference.value, interval, threshold=0.0, above=False, mde=mde, effect=effect),
        why=why,
        estimate=difference.value,
        interval=interval,
        null_mean=0.0,
        null_sd=difference.se,
        p=difference.p(0.0, above=False),
        runs=gains.count(configs),
        cells=len(gains.items),
        mde=mde,
    )


def _ends(targets: tuple[str, ...], plan: Plan) -> tuple[Config, Config]:
    """Rank one and the largest rank of a target set."""
    return Config("lora", "+".join(targets), 1), Config("lora", "+".join(targets), max(plan.ranks))


def _accuracies(right: Gains, one: Config, most: Config, confidence: float) -> str:
    if not right.sums:
        return ""
    difference = right.contrast({one: 1.0, most: -1.0})
    return f"; {one} minus {most}: {right.told(difference, confidence)}"


def _best(gains: Gains, targets: tuple[str, ...], most: Config) -> str:
    """Which rank has the largest gain, where it is not the reference."""
    swept = [c for c in gains.sums if c.method == "lora" and c.targets == "+".join(targets) and c.size is None]
    means = {c: sum(x.sum() for x in gains.sums[c].values()) / len(gains.sums[c]) for c in swept}
    best = max(means, key=lambda config: means[config])
    return "" if best == most else f"; the largest gain has r={best.r}, {means[best] / means[most]:.3f} of that"


def _braced(targets: list[str] | tuple[str, ...]) -> str:
    return f"{{{','.join(targets)}}}"
