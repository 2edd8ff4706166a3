"""The five questions, each answered in a line with what chance gives beside it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pandas as pd

from lora_analysis.report.measured import at_largest_k
from lora_analysis.tables.discoveries import RATE, findings

_RANKS = 4
"""Most r that are told one by one."""


class Verdict(NamedTuple):
    """A question, its answer, and what it is held against."""

    question: str
    answer: str
    chance: str
    section: str
    """Where on the page its table is."""


def wasted_rank(rank: pd.DataFrame) -> Verdict:
    """Did I waste rank? Effective rank against random factors, and what of A its random start does not explain."""
    question, section = "Did I waste rank?", "rank"
    known = rank[rank["effective_rank_low"].notna() & rank["effective_rank"].notna()]
    if len(rank) and bool((rank["numerical_rank"] == 0).all()):
        return Verdict(question, "All of it: every ΔW is zero.", "", section)
    if known.empty:
        return Verdict(question, "No update has a spectrum whose chance is known.", "", section)
    below = int((known["effective_rank"] < known["effective_rank_low"]).sum())
    above = int((known["effective_rank"] > known["effective_rank_high"]).sum())
    counts = [(below, "below chance"), (above, "above it"), (len(known) - below - above, "consistent with chance")]
    told = ", ".join(f"{count} {words}" for count, words in counts if count)
    # Medians over several r would be of none of them.
    by_r = known.groupby("r")[["effective_rank", "k90"]].median()
    ranks, held = (
        ", ".join(f"{_figure(by_r.loc[r, column])} of {r}" for r in by_r.index[:_RANKS])
        for column in ("effective_rank", "k90")
    )
    more = " and so on" if len(by_r) > _RANKS else ""
    answer = (
        f"Median effective rank {ranks}{more}; of {_modules(len(known))}, {told}. Directions that hold 90 % "
        f"of ‖ΔW‖²: {held}{more}."
    )
    if rank["learned_q"].notna().any():
        answer += f" {findings(rank['learned_q'], 'Directions learned in A')}"
    chance = (
        f"random factors of the same shapes: effective rank {_figure(known['effective_rank_low'].min())} to "
        f"{_figure(known['effective_rank_high'].max())}, k90 {_figure(known['k90_low'].min())} to "
        f"{_figure(known['k90_high'].max())}"
    )
    return Verdict(question, answer, chance, section)


def layers_learned(strength: pd.DataFrame) -> Verdict:
    """Which layers learned? Size beside the weight, and what a merge keeps."""
    question, section = "Which layers learned?", "strength"
    relative = strength["relative_norm"].dropna()
    if relative.empty:
        norms = strength["norm_update"].dropna()
        if norms.empty:
            return Verdict(question, "The scale is unknown, so sizes are: pass --alpha.", "", section)
        if norms.max() == 0:
            return Verdict(question, "None: every ΔW is zero.", "", section)
        most = strength["module"].iloc[int(strength["norm_update"].argmax())]
        answer = f"Largest ‖ΔW‖ {_figure(norms.max())} in {most}, median {_figure(norms.median())}."
        return Verdict(question, answer, "a norm by itself has no chance level: pass --base for ‖W‖ beside it", section)
    most = strength["module"].iloc[int(strength["relative_norm"].argmax())]
    noise = strength["rounding"].dropna()
    answer = (
        f"‖ΔW‖ / ‖W‖ from {_share(relative.min())} to {_share(relative.max())}, median {_share(relative.median())}, "
        f"most in {most}. A bfloat16 merge keeps at least {_share(strength['merge_kept'].min())} of an update."
    )
    chance = f"rounding W + ΔW to bfloat16 moves it by {_share(noise.median())}" if len(noise) else ""
    return Verdict(question, answer, chance, section)


def amplified(amplification: pd.DataFrame | None, intruders: pd.DataFrame | None) -> Verdict:
    """What did it amplify? Gain over random directions, and directions new to the model."""
    question, section = "What did it amplify?", "amplification"
    if amplification is None or intruders is None:
        return Verdict(question, "Not asked: it needs the base model's weights, --base.", "", section)
    last = at_largest_k(amplification)
    gain = last["gain"].dropna()
    if gain.empty:
        return Verdict(question, "No update has directions to project W on.", "", section)
    answer = f"{findings(last['q'], 'Gain at the largest k')} Median gain {_figure(gain.median())}."
    chance = "gain 1"
    out = intruders[(intruders["side"] == "out") & intruders["energy_share"].notna()]
    if not out.empty:
        answer += (
            f" Of the energy of W + ΔW's top {out['k'].iloc[0]} directions {_share(out['energy_share'].mean())} is in "
            "new ones."
        )
        chance += f"; random updates of the same strength: {_share(out['control_share'].mean())} in new ones"
    return Verdict(question, answer, chance, section)


def same(pairs: pd.DataFrame, name: str | None) -> Verdict:
    """Are these the same? Cosines and subspaces of every pair, or of one adapter with the others."""
    question, section = "Are these the same?", "same"
    if pairs.empty or pairs["cosine"].isna().all():
        return Verdict(question, "Not asked: there is no other adapter of the same matrices.", "", section)
    top = pairs.iloc[int(pairs["cosine"].abs().argmax())]
    found = sum(int(text.split(" of ")[0]) > 0 for text in pairs["cosine_found"])
    answer = _in_some_module("Cosine", found, len(pairs), name)
    answer += (
        f" Likest: {_partner(top, name)}, mean cosine {_figure(top['cosine'])}, beyond chance in "
        f"{top['cosine_found']} modules; φ* {_figure(top['phi_in'])} on the side in, {_figure(top['phi_out'])} out."
    )
    shared = pairs["rows_shared"].max()
    if shared >= 0.1:
        answer += f" Some began with the same A ({shared:.0%} of its rows): likeness on the side in is no learning."
    chance = f"cosine 0 ± {_figure(top['cosine_null_sd'])}, φ* 0; beyond chance where q ≤ {RATE:g}"
    return Verdict(question, answer, chance, section)


def merging(pairs: pd.DataFrame, name: str | None) -> Verdict:
    """Will they merge? Interference of every pair, or of one adapter with the others."""
    question, section = "Will they merge?", "merge"
    known = pairs[pairs["sti"].notna()] if len(pairs) else pairs
    if known.empty:
        why = "there is no other adapter of the same matrices" if pairs.empty else "a scale is unknown: pass --alpha"
        return Verdict(question, f"Not asked: {why}.", "", section)
    over = known["sti"] / known["sti_chance"]
    worst = known.iloc[int(over.argmax())]
    found = [int(text.split(" of ")[0]) > 0 for text in known["sti_found"]]
    answer = _in_some_module("Interference (STI)", sum(found), len(known), name)
    answer += (
        f" Most over chance: {_partner(worst, name)}, STI {_figure(worst['sti'])} Σσ, beyond chance in "
        f"{worst['sti_found']} modules."
    )
    chance = f"the same spectra turned at random: {_figure(worst['sti_chance'])} Σσ. No measure decides a merge"
    return Verdict(question, answer, chance, section)


def found_of(q: pd.Series[float]) -> str:
    """How many tests are findings, of how many.

    Examples
    --------
    >>> found_of(pd.Series([0.01, 0.2, float("nan")]))
    '1 of 2'
    """
    known = q.dropna()
    return f"{int((known <= RATE).sum())} of {len(known)}"


def _in_some_module(what: str, found: int, count: int, name: str | None) -> str:
    """In how many pairs, or with how many others, some module is beyond chance."""
    joined, word = ("in", "pair") if name is None else ("with", "other")
    words = word if count == 1 else f"{word}s"
    if not found:
        every = "the" if count == 1 else f"all {count}"
        return f"{what}: consistent with chance in every module {joined} {every} {words}."
    return f"{what}: beyond chance in some module {joined} {found} of {count} {words}."


def _partner(pair: pd.Series[Any], name: str | None) -> str:
    if name is None:
        return f"{pair['a']} and {pair['b']}"
    return str(pair["b"] if pair["a"] == name else pair["a"])


def _figure(value: Any) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def _share(value: Any) -> str:
    if pd.isna(value):
        return "-"
    # Just below the whole, which is not said of what is not.
    if 0.99 < value < 1:
        return f"{math.floor(1e4 * value) / 100:g} %"
    return f"{100 * value:,.0f} %" if value >= 1 else f"{100 * value:.2g} %"


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"
