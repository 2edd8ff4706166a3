"""LoRA against full fine-tuning on few training items: C16, the paper's Table 16.

Conventions
-----------
Non-inferiority with a margin that is a share of what fine-tuning gains: ``gain(LoRA) - s gain(full) > 0`` with
``s = margins.sufficiency``. Where full fine-tuning does worse than no training, its gain is negative and this asks
for more than equality. It has to hold at every size at which either of the two gained anything.

Values
------
``few_items``.

References
----------
Hu et al. 2021, arXiv:2106.09685, appendix F.3, Table 16.
"""

from __future__ import annotations

from dataclasses import replace

from lora_analysis.study.claims.claim import Claim, directional
from lora_analysis.study.claims.gains import Config, Gains, any_gain, extreme, span, unanswered
from lora_analysis.study.plan import Plan


def few_items(gains: Gains, right: Gains, plan: Plan) -> Claim:
    """C16: on few training items LoRA gains at least about what full fine-tuning gains."""
    share, confidence = plan.margins.sufficiency, plan.margins.confidence
    asked = Claim(
        "C16",
        "On few training items LoRA does no worse than full fine-tuning (appendix F.3, Table 16; there 63.8 against "
        "60.2 points on 100 items of MultiNLI, 85.6 against 85.8 on 1,000, 89.2 against 88.9 on 10,000).",
        f"gain of LoRA minus {share:g} times that of full fine-tuning on as many items, nats per item, the smallest "
        "over sizes, paired by seed and item; p one-sided",
        "not_attempted",
        "",
    )
    main = "+".join(plan.main)
    compared = [
        (config, Config("full", size=config.size))
        for config in gains.sums
        if config.method == "lora" and config.targets == main and config.size in plan.sizes
    ]
    compared = sorted((one for one in compared if gains.seeds(*one)), key=lambda one: one[0].size or 0)
    needs = f"runs of {{{main.replace('+', ',')}}} and of full fine-tuning on as few items (plan.sizes)"
    flat = [config for one in compared for config in one]
    stands = unanswered(asked, gains, flat, confidence, needs=needs)
    if stands is not None:
        return stands
    testable = [one for one in compared if any_gain(gains, one, confidence, tests=len(flat))]
    contrasts = [gains.contrast({lora: 1.0, full: -share}) for lora, full in testable]
    least = extreme(contrasts, confidence)
    effect = (1 - share) * max(0.0, gains.contrast({testable[least.which][1]: 1.0}).value)
    told = []
    for lora, full in testable:
        text = (
            f"{lora.size} items: LoRA (r={lora.r}) gained {gains.told(gains.contrast({lora: 1.0}), confidence)}, full "
            f"fine-tuning {gains.told(gains.contrast({full: 1.0}), confidence)}, LoRA minus full "
            f"{gains.told(gains.contrast({lora: 1.0, full: -1.0}), confidence)}"
        )
        if right.sums:
            text += f" and {right.told(right.contrast({lora: 1.0, full: -1.0}), confidence)}"
        told.append(text)
    nothing = ", ".join(str(one[0].size) for one in compared if one not in testable)
    absent = ", ".join(str(size) for size in plan.sizes if size not in [lora.size for lora, _ in compared])
    why = (
        f"LoRA minus {share:g} times full fine-tuning: {least.value:+.4f} nats per item {span(least.interval)} "
        f"({100 * confidence:g} % intervals), to lie above 0 (margin {100 * (1 - share):g} % of full fine-tuning's "
        f"gain, {effect:.4f}); {'; '.join(told)}"
        f"{f'; neither is shown to gain on {nothing} items' if nothing else ''}"
        f"{f'; not run on {absent} items' if absent else ''}; a distance of {least.mde:.4f} could be seen "
        "with power 0.8."
    )
    return replace(
        asked,
        verdict=directional(least.value, least.interval, threshold=0.0, above=True, mde=least.mde, effect=effect),
        why=why,
        estimate=least.value,
        interval=least.interval,
        null_mean=0.0,
        null_sd=contrasts[least.which].se,
        p=least.p,
        runs=gains.count(flat),
        cells=len(gains.items),
        mde=least.mde,
    )
