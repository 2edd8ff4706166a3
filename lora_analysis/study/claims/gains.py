"""What training gained on held-out items, by configuration and seed: what the claims on performance are computed from.

Conventions
-----------
The gain of a run is the held-out loss of the frozen model of its task minus its own, in nats per item; on accuracy, its
own share right minus the frozen model's. A configuration is what runs share that differ in their seeds only. Seeds are
pairs of equal seeds of initial factors and of data, as the grid has them, so that the runs that are compared share
both; the two crossed runs of the plan are left out.

A claim on gains says something only where there is a gain: a plateau, a ratio or an equality of nothing is
*not testable at this scale* (``any_gain``), whatever its interval.

Values
------
``Config``, ``Gains``, ``held_out_gains``, ``any_gain``, ``unanswered``, ``Extreme``, ``extreme``, ``span``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from lora_analysis.study.claims.claim import Claim
from lora_analysis.study.plan import Plan
from lora_analysis.study.resampling import Array, Estimate, crossed_mean


class Config(NamedTuple):
    """What runs share that differ in their seeds only.

    ``targets`` is joined by ``+``; ``size`` is None for the whole training set.

    Examples
    --------
    >>> str(Config("lora", "q+v", 4)), str(Config("full", "", 0, 100))
    ('{q,v} r=4', 'full fine-tuning on 100 items')
    """

    method: str
    targets: str = ""
    r: int = 0
    size: int | None = None

    def __str__(self) -> str:
        what = {"lora": f"{{{self.targets.replace('+', ',')}}} r={self.r}", "full": "full fine-tuning"}
        return what.get(self.method, self.method) + ("" if self.size is None else f" on {self.size} items")


@dataclass(frozen=True)
class Gains:
    """Gains of the runs of a plan's task on one metric.

    Parameters
    ----------
    metric : {"loss", "accuracy"}
    items : ndarray, shape (G,)
        Numbers of held-out items of the groups.
    sums : mapping of Config to mapping of int to ndarray of shape (G,)
        By configuration and seed, the gain summed over the items of each group; empty without a frozen run.
    parameters : mapping of Config to int
        How many train.
    """

    metric: Literal["loss", "accuracy"]
    items: Array
    sums: Mapping[Config, Mapping[int, Array]]
    parameters: Mapping[Config, int]

    def seeds(self, *configs: Config) -> list[int]:
        """The seeds that all of these configurations were run with."""
        found = [set(self.sums.get(config, {})) for config in configs]
        return sorted(set.intersection(*found)) if found else []

    def of(self, config: Config, seeds: Sequence[int]) -> Array:
        """Gains summed over items, shape (S, G)."""
        return np.stack([self.sums[config][seed] for seed in seeds])

    def count(self, configs: Iterable[Config]) -> int:
        """How many runs these are."""
        return sum(len(self.sums[config]) for config in configs)

    def contrast(self, weights: Mapping[Config, float], seeds: Sequence[int] | None = None) -> Estimate:
        """A weighted sum of gains per item over the seeds that the configurations share."""
        seeds = self.seeds(*weights) if seeds is None else seeds
        sums = [weight * self.of(config, seeds) for config, weight in weights.items()]
        return crossed_mean(np.sum(sums, axis=0), self.items)

    def told(self, estimate: Estimate, confidence: float) -> str:
        """An estimate in words, with its unit and interval."""
        if self.metric == "loss":
            return f"{estimate.value:+.4f} nats per item {span(estimate.interval(confidence))}"
        low, high = estimate.interval(confidence)
        return f"{100 * estimate.value:+.1f} points of accuracy {span((100 * low, 100 * high), '.1f')}"


def held_out_gains(
    runs: pd.DataFrame, outcomes: pd.DataFrame, plan: Plan, *, metric: Literal["loss", "accuracy"] = "loss"
) -> Gains:
    """Gains of the runs of a plan's task.

    Parameters
    ----------
    runs, outcomes : DataFrame
        As ``evidence.Study`` has them.
    plan : Plan
    metric : {"loss", "accuracy"}
        Without any accuracy, those on ``"accuracy"`` are empty.
    """
    column, sign = ("loss_sum", -1.0) if metric == "loss" else ("correct_sum", 1.0)
    rows = runs[(runs["task"] == plan.task) & (runs["init_seed"] == runs["data_seed"])]
    names, methods = rows["run"].tolist(), rows["method"].tolist()
    shown = outcomes[outcomes["run"].isin(names)]
    values = shown[column].to_numpy(np.float64)
    if "frozen" not in methods or not len(values) or np.isnan(values).any():
        return Gains(metric, np.zeros(0), {}, {})
    group, _ = pd.factorize(shown["group"], sort=True)
    place = pd.Index(names).get_indexer(shown["run"]), group
    sums, items = (np.full((len(names), int(group.max()) + 1), np.nan) for _ in range(2))
    sums[place], items[place] = values, shown["items"].to_numpy(np.float64)
    if (items != items[0]).any():
        raise ValueError(f"outcomes: expected all runs of {plan.task!r} to have the same groups of items, got others.")
    changes = sign * (sums - sums[methods.index("frozen")])
    gains: dict[Config, dict[int, Array]] = {}
    parameters: dict[Config, int] = {}
    fields = [rows[field].tolist() for field in ("targets", "r", "size", "init_seed", "trainable_parameters")]
    for change, method, targets, r, size, seed, count in zip(changes, methods, *fields, strict=True):
        if method != "frozen":
            config = Config(method, targets, int(r), None if math.isnan(size) else int(size))
            gains.setdefault(config, {})[int(seed)] = change
            parameters[config] = int(count)
    return Gains(metric, items[0], gains, parameters)


def any_gain(gains: Gains, configs: Iterable[Config], confidence: float, *, tests: int) -> bool:
    """Whether any of these configurations gained anything: an interval of its gain lies above 0.

    Bonferroni's over ``tests``: with as many as there are configurations, yes has a probability of at most
    ``(1 - confidence) / 2`` where nothing gained.
    """
    strict = 1 - (1 - confidence) / tests
    return any(gains.contrast({config: 1.0}).interval(strict)[0] > 0 for config in configs)


def unanswered(
    asked: Claim,
    gains: Gains,
    configs: Sequence[Config],
    confidence: float,
    *,
    needs: str,
    reference: Config | None = None,
    tests: int | None = None,
) -> Claim | None:
    """The claim as it stands where it cannot be tested: runs are missing, or nothing gained; None where it can.

    Parameters
    ----------
    asked : Claim
        With its id, text and statistic.
    gains : Gains
    configs : sequence of Config
        What is compared; empty if the plan has no such runs.
    confidence : float
    needs : str
        What it takes.
    reference : Config, optional
        The one that has to have gained; by default any of ``configs``.
    tests : int, optional
        How many tests the interval of a gain is corrected for; by default as many as there are gains. A claim that is
        reproduced by a difference needs no correction, as chance reproduces it no more often than its own level; one
        that is reproduced by equality does.
    """
    if not gains.sums:
        return replace(asked, why=f"Needs {needs}, and the frozen run of the task beside them.")
    seeds = gains.seeds(*configs)
    if not seeds:
        return replace(asked, why=f"Needs {needs}, of equal seeds; the study has no finished runs of them.")
    count = gains.count(configs)
    if len(seeds) < 2 or len(gains.items) < 2:
        why = f"Needs two seeds and two groups of held-out items at least; got {len(seeds)} and {len(gains.items)}."
        return replace(asked, verdict="not_testable_at_this_scale", why=why, runs=count)
    gaining = configs if reference is None else [reference]
    tests = len(gaining) if tests is None else tests
    if any_gain(gains, gaining, confidence, tests=tests):
        return None
    found = {config: gains.contrast({config: 1.0}) for config in gaining}
    most = max(found, key=lambda config: found[config].value)
    why = (
        f"No gain is shown, so there is nothing to compare: {'the most has ' if len(gaining) > 1 else ''}{most}, "
        f"{gains.told(found[most], confidence)}, null 0; asked for is a {100 * confidence:g} % interval above 0"
        f"{f' at the level of one in {tests} (Bonferroni)' if tests > 1 else ''}."
    )
    return replace(asked, verdict="not_testable_at_this_scale", why=why, runs=count)


class Extreme(NamedTuple):
    """The smallest of several means: which, an interval of the smallest of the true ones, and the least certain p."""

    which: int
    value: float
    interval: tuple[float, float]
    p: float
    mde: float


def extreme(estimates: Sequence[Estimate], confidence: float) -> Extreme:
    """The smallest of several means over the same data, without the optimism of having picked it.

    That all lie above 0 is shown by every one of them (an intersection-union test needs no correction), that one lies
    below by Bonferroni's: the interval is from the smallest of the lower limits to the smallest of the upper ones at
    the level of one among ``len(estimates)``, and holds the smallest true mean at least as often as stated.

    ``p`` is one-sided, that not all lie above 0; ``mde`` is the largest of the parts.
    """
    values = [estimate.value for estimate in estimates]
    strict = 1 - (1 - confidence) / len(estimates)
    return Extreme(
        int(np.argmin(values)),
        min(values),
        (
            min(estimate.interval(confidence)[0] for estimate in estimates),
            min(estimate.interval(strict)[1] for estimate in estimates),
        ),
        max(estimate.p(0.0, above=True) for estimate in estimates),
        max(estimate.mde(confidence) for estimate in estimates),
    )


def span(interval: tuple[float, float], form: str = ".4f") -> str:
    """An interval in brackets.

    Examples
    --------
    >>> span((-0.25, 1.0), ".2f")
    '[-0.25, +1.00]'
    """
    return f"[{interval[0]:+{form}}, {interval[1]:+{form}}]"
