"""Which runs of a study are compared with which, fixed by its plan before the first one.

Conventions
-----------
All of it is on the plan's main target set:

=============  =====================================================================================================
ranks          r = 8 (or the largest rank up to 8) against the largest, of one seed: different draws of A, one order
ranks_crossed  the same of different seeds: nothing in common but task and base
seeds          the largest rank, each two seeds
same_init      the largest rank, one draw of A and two orders of the data
same_order     the largest rank, two draws of A and one order
task_seeds     the rank that tasks share, each two seeds, of one task
tasks          the rank that tasks share, of different seeds, of two tasks
=============  =====================================================================================================

Runs of two tasks with one seed begin with the same A, so they are not compared.

Values
------
``compared_pairs``, ``grid``, ``rank_pair``, ``task_rank``, ``amplified_ranks``, ``top_directions_shape``.

References
----------
Hu et al. 2021, arXiv:2106.09685, figures 3, 4 and 8, table 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lora_analysis.study.plan import Plan, Run


def rank_pair(plan: Plan) -> tuple[int, int] | None:
    """The two ranks whose directions are compared: the largest up to 8, and the largest of all."""
    most = max(plan.ranks)
    small = [r for r in plan.ranks if r <= 8 and r < most]
    return (max(small), most) if small else None


def task_rank(plan: Plan) -> int:
    """The rank at which tasks are compared."""
    return 8 if 8 in plan.ranks else max(plan.ranks)


def amplified_ranks(plan: Plan) -> tuple[int, int]:
    """The paper's r = 4 (or the smallest rank from 2 on), and the largest."""
    most = max(plan.ranks)
    return (4 if 4 in plan.ranks else min([r for r in plan.ranks if r >= 2] or [most])), most


def top_directions_shape(plan: Plan) -> int:
    """How many of an update's first directions are sought in W: the paper's 4, or as many as two ranks have."""
    ordered = sorted(set(plan.ranks))
    return min(4, ordered[-2] if len(ordered) > 1 else ordered[-1])


def compared_pairs(plan: Plan) -> Iterator[tuple[str, Run, Run]]:
    """The pairs of runs that are compared, with their kind."""

    def run(r: int, init: int, data: int | None = None, task: str = plan.task) -> Run:
        return Run(task, "lora", plan.main, r, init, init if data is None else data)

    ranks, most = rank_pair(plan), max(plan.ranks)
    for a, b in itertools.product(plan.seeds, repeat=2) if ranks else ():
        yield "ranks" if a == b else "ranks_crossed", run(min(ranks or ()), a), run(most, b)
    for a, b in itertools.combinations(plan.seeds, 2):
        yield "seeds", run(most, a), run(most, b)
    first, last = plan.seeds[0], plan.seeds[-1]
    if first != last:
        yield "same_init", run(most, first), run(most, first, last)
        yield "same_init", run(most, last), run(most, last, first)
        yield "same_order", run(most, first), run(most, last, first)
        yield "same_order", run(most, last), run(most, first, last)
    tasks, shared = (plan.task, *plan.other_tasks), task_rank(plan)
    if not plan.other_tasks:
        return
    for task, (a, b) in itertools.product(tasks, itertools.combinations(plan.seeds, 2)):
        yield "task_seeds", run(shared, a, task=task), run(shared, b, task=task)
    for (one, other), (a, b) in itertools.product(
        itertools.combinations(tasks, 2), itertools.permutations(plan.seeds, 2)
    ):
        yield "tasks", run(shared, a, task=one), run(shared, b, task=other)


def grid(plan: Plan) -> list[Run]:
    """The runs of the main target set on the main task, at every rank and seed."""
    return [Run(plan.task, "lora", plan.main, r, seed, seed) for r in plan.ranks for seed in plan.seeds]
