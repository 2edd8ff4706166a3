"""Whether the metric is flat in the rank: C14 and C15, the paper's Tables 18 and 15.

Conventions
-----------
Two one-sided tests: the difference has to lie within ``±k sigma``, with ``k = margins.equivalence_sds`` and sigma the
standard deviation of a run between seeds. Three seeds of one configuration do not tell sigma, so it is pooled over all
target sets at ranks of the plateau. With ``x[c, s]`` of configuration c and seed s, seeds shared, an analysis of
variance splits it: ``MS_seed``, what a seed does to all configurations alike, S - 1 degrees of freedom, and
``MS_rest``, (C - 1)(S - 1); ``sigma**2 = (MS_seed + (C - 1) MS_rest) / C``, the pooled variance. Differences between
ranks vary with ``MS_rest`` alone, and between groups of items.

The margin is itself estimated. What is tested is ``|difference| - k sigma < 0``: the interval of the difference is
widened by ``k (sigma - sigma_low)``, in squares (Zou and Donner), where ``sigma_low`` is the one-sided limit of the sum
of mean squares (Graybill and Wang). *Contradicted* asks for the same with the upper limit. A margin that is no smaller
than the gain itself shows nothing: the claim is then not testable, unless contradicted.

Values
------
``plateau``, ``slope``.

References
----------
Hu et al. 2021, arXiv:2106.09685, appendices F.2 and H.2, Tables 15 and 18. Schuirmann 1987, Journal of
Pharmacokinetics and Biopharmaceutics 15. Graybill and Wang 1980, Journal of the American Statistical Association 75.
Zou and Donner 2008, Statistics in Medicine 27.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import special

from lora_analysis.study.claims.claim import Claim, Verdict, equivalent
from lora_analysis.study.claims.gains import Config, Gains, span, unanswered
from lora_analysis.study.plan import Plan
from lora_analysis.study.resampling import Estimate

TOO_WIDE = "; the margin is no smaller than the gain, so equality within it would say nothing"


class Spread(NamedTuple):
    """Standard deviation of a run between seeds, pooled over configurations.

    ``low`` and ``high`` are its one-sided limits; ``rest`` is the mean square of what is left of configuration x seed.
    """

    sd: float
    low: float
    high: float
    rest: float
    df_rest: float
    configurations: int
    seeds: int


class Flatness(NamedTuple):
    """A difference that should be none, with an interval widened by what is not known of the margin."""

    value: float
    interval: tuple[float, float]
    margin: float
    p: float
    verdict: Verdict


def plateau(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C14: from some rank on, larger ranks have the same loss."""
    margins = plan.margins
    level = 2 * margins.confidence - 1
    asked = Claim(
        "C14",
        "The loss has a plateau in the rank (appendix H.2, Table 18; there 1.18 at r = 4, 1.17 at 8, 1.16 from 16 to "
        "512 and 1.17 at 1024).",
        f"gain at a larger rank minus that at the smallest rank from {margins.plateau_from} on, of "
        f"{{{','.join(plan.main)}}}, the one farthest from 0, nats per item; interval of confidence {level:.2f} for "
        "two one-sided tests, widened by the uncertainty of the margin; p against the margin as estimated",
        "not_attempted",
        "",
    )
    swept = _swept(gains, plan)
    needs = f"runs of {{{','.join(plan.main)}}} at two ranks from {margins.plateau_from} on"
    stands = unanswered(asked, gains, swept if len(swept) > 1 else [], margins.confidence, needs=needs)
    if stands is not None:
        return stands
    seeds = gains.seeds(*swept)
    spread = _spread(gains, plan, seeds, margins.confidence)
    first, *larger = swept
    differences = [_difference(gains, {one: 1.0, first: -1.0}, seeds, spread) for one in larger]
    flat = [_flatness(one, spread, margins.equivalence_sds, margins.confidence) for one in differences]
    # That all are equal needs no correction; that one is not does.
    strict = 1 - (1 - margins.confidence) / len(flat)
    broken = [_flatness(one, spread, margins.equivalence_sds, strict).verdict == "contradicted" for one in differences]
    which = int(np.argmax([abs(one.value) for one in flat]))
    gained = gains.contrast({swept[-1]: 1.0}, seeds)
    too_wide = margins.equivalence_sds * spread.sd >= gained.value
    verdict = _together([one.verdict for one in flat], contradicted=any(broken), too_wide=too_wide)
    told = ", ".join(
        f"r={config.r} minus r={first.r} {one.value:+.4f} {span(one.interval)}"
        for config, one in zip(larger, flat, strict=True)
    )
    mde = max(_mde(one, spread, margins.equivalence_sds, margins.confidence) for one in differences)
    accuracy = right.contrast({larger[which]: 1.0, first: -1.0}) if right.sums else None
    beside = f"; r={larger[which].r} minus r={first.r}: {right.told(accuracy, level)}" if accuracy else ""
    why = (
        f"Gains in nats per item, {100 * level:g} % intervals: {told}; margin "
        f"{_margin(flat[which], spread, margins.equivalence_sds)}; "
        f"the least margin to show equality with power 0.8 is {mde:.4f}{beside}; {swept[-1]} gained "
        f"{gains.told(gained, margins.confidence)} ({100 * margins.confidence:g} %)"
        f"{TOO_WIDE if too_wide else ''}."
    )
    return replace(
        asked,
        verdict=verdict,
        why=why,
        estimate=flat[which].value,
        interval=flat[which].interval,
        null_mean=0.0,
        null_sd=differences[which].se,
        p=max(one.p for one in flat),
        runs=gains.count(swept),
        cells=len(gains.items),
        mde=mde,
    )


def slope(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C15: the metric does not depend on the number of parameters beyond a small rank."""
    margins = plan.margins
    level = 2 * margins.confidence - 1
    gains = right if right.sums else gains
    unit = "share of items right" if right.sums else "nats per item"
    asked = Claim(
        "C15",
        "The metric is stable in the number of trainable parameters (appendix F.2, Table 15; there 73.7, 73.8 and 73.6 "
        "points on WikiSQL at r = 4, 8 and 64 of {q,v}, 91.3, 91.6 and 91.4 on MultiNLI).",
        f"slope of {'accuracy' if right.sums else 'the gain in loss'} on log2(r) from r = {margins.plateau_from} on, "
        f"of {{{','.join(plan.main)}}}, {unit} per doubling; interval of confidence {level:.2f} for two one-sided "
        "tests, widened by the uncertainty of the margin; p against the margin as estimated",
        "not_attempted",
        "",
    )
    swept = _swept(gains, plan)
    needs = f"runs of {{{','.join(plan.main)}}} at two ranks from {margins.plateau_from} on"
    stands = unanswered(asked, gains, swept if len(swept) > 1 else [], margins.confidence, needs=needs)
    if stands is not None:
        return stands
    seeds = gains.seeds(*swept)
    spread = _spread(gains, plan, seeds, margins.confidence)
    x = np.log2([config.r for config in swept])
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    doublings = float(x[-1] - x[0])
    fitted = _difference(gains, dict(zip(swept, weights.tolist(), strict=True)), seeds, spread)
    # Over all doublings together the fitted line may rise by the margin.
    sds = margins.equivalence_sds / doublings
    flat = _flatness(fitted, spread, sds, margins.confidence)
    mde = _mde(fitted, spread, sds, margins.confidence)
    too_wide = margins.equivalence_sds * spread.sd >= gains.contrast({swept[-1]: 1.0}, seeds).value
    factor, short = (100.0, "points") if right.sums else (1.0, "nats per item")
    form = ".3f" if right.sums else ".5f"
    ends = ", ".join(f"r={config.r} {factor * gains.contrast({config: 1.0}, seeds).value:+{form}}" for config in swept)
    why = (
        f"{factor * flat.value:+{form}} {short} per doubling "
        f"{span((factor * flat.interval[0], factor * flat.interval[1]), form)}, margin "
        f"{_margin(flat, spread, sds, factor, form)} {short} per doubling, which is {margins.equivalence_sds:g} "
        f"standard deviations between seeds over {doublings:g} doublings; gains: {ends} {short}"
        f"{'; with two ranks the slope is their difference' if len(swept) == 2 else ''}; the least "
        f"margin to show equality with power 0.8 is {factor * mde:{form}}{TOO_WIDE if too_wide else ''}."
    )
    return replace(
        asked,
        verdict=_together([flat.verdict], contradicted=flat.verdict == "contradicted", too_wide=too_wide),
        why=why,
        estimate=flat.value,
        interval=flat.interval,
        null_mean=0.0,
        null_sd=fitted.se,
        p=flat.p,
        runs=gains.count(swept),
        cells=len(gains.items),
        mde=mde,
    )


def _swept(gains: Gains, plan: Plan) -> list[Config]:
    """The main target set at the plateau's ranks, ascending."""
    main = "+".join(plan.main)
    found = [config for config in _level(gains, plan) if config.targets == main]
    return sorted(found, key=lambda config: config.r)


def _level(gains: Gains, plan: Plan) -> list[Config]:
    """All target sets at the plateau's ranks."""
    return [
        config
        for config in gains.sums
        if config.method == "lora" and config.size is None and config.r >= plan.margins.plateau_from
    ]


def _spread(gains: Gains, plan: Plan, seeds: Sequence[int], confidence: float) -> Spread:
    """Between seeds, pooled over the configurations that have all of these."""
    configs = [config for config in _level(gains, plan) if set(seeds) <= set(gains.seeds(config))]
    x = np.array([gains.of(config, seeds).sum(1) for config in configs]) / gains.items.sum()
    C, S = x.shape
    ms_seed = C * float(x.mean(0).var(ddof=1))
    df_seed, df_rest = S - 1.0, (C - 1.0) * (S - 1.0)
    ms_rest = float(np.sum((x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()) ** 2)) / df_rest
    parts = np.array([ms_seed / C, (C - 1) * ms_rest / C])
    df = np.array([df_seed, df_rest])
    variance = float(parts.sum())
    # Graybill and Wang: exact where one part is all of it.
    below = 1 - df / special.chdtri(df, 1 - confidence)
    above = df / special.chdtri(df, confidence) - 1
    low = max(0.0, variance - math.sqrt(float(np.sum((below * parts) ** 2))))
    high = variance + math.sqrt(float(np.sum((above * parts) ** 2)))
    return Spread(math.sqrt(variance), math.sqrt(low), math.sqrt(high), ms_rest, df_rest, C, S)


def _difference(gains: Gains, weights: Mapping[Config, float], seeds: Sequence[int], spread: Spread) -> Estimate:
    """A contrast between ranks, its variance between seeds pooled."""
    own = gains.contrast(weights, seeds)
    pooled = spread.rest * sum(weight**2 for weight in weights.values()) / spread.seeds
    return Estimate(own.value, (pooled, own.variances[1]), (spread.df_rest, own.dfs[1]))


def _flatness(difference: Estimate, spread: Spread, sds: float, confidence: float) -> Flatness:
    margin = sds * spread.sd
    if margin == 0:
        return Flatness(difference.value, (-math.inf, math.inf), 0.0, 1.0, "not_testable_at_this_scale")
    half = _widened(difference, spread, sds, confidence)
    interval = (difference.value - half, difference.value + half)
    verdict = equivalent(interval, margin=margin)
    wider = math.hypot(difference.half_width(2 * confidence - 1), sds * (spread.high - spread.sd))
    if verdict == "contradicted" and abs(difference.value) - wider <= margin:
        verdict = "not_reproduced"
    p = max(difference.p(-margin, above=True), difference.p(margin, above=False))
    return Flatness(difference.value, interval, margin, p, verdict)


def _widened(difference: Estimate, spread: Spread, sds: float, confidence: float) -> float:
    """The half-width for two one-sided tests against an estimated margin."""
    return math.hypot(difference.half_width(2 * confidence - 1), sds * (spread.sd - spread.low))


def _mde(difference: Estimate, spread: Spread, sds: float, confidence: float) -> float:
    """The margin that a difference of none would have been shown to lie in."""
    return math.hypot(difference.equivalence_mde(2 * confidence - 1), sds * (spread.sd - spread.low))


def _together(verdicts: Sequence[Verdict], *, contradicted: bool, too_wide: bool) -> Verdict:
    """The verdict on several differences that should all be none."""
    if contradicted:
        return "contradicted"
    if too_wide or "not_testable_at_this_scale" in verdicts:
        return "not_testable_at_this_scale"
    if "not_reproduced" in verdicts or "contradicted" in verdicts:
        return "not_reproduced"
    return "consistent_underpowered" if "consistent_underpowered" in verdicts else "reproduced"


def _margin(flat: Flatness, spread: Spread, sds: float, factor: float = 1.0, form: str = ".4f") -> str:
    return (
        f"±{factor * flat.margin:{form}} (at least {factor * sds * spread.low:{form}}; the standard deviation between "
        f"seeds is {factor * spread.sd:{form}}, pooled over {spread.configurations} configurations x {spread.seeds} "
        f"seeds, {spread.configurations * (spread.seeds - 1)} degrees of freedom, {spread.df_rest:g} of what seeds "
        "do not share)"
    )
