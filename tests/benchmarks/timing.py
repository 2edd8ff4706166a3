"""Medians of contenders that take turns, and the table of their ratios.

On a machine that others use, times drift by the minute; contenders that take turns drift together, so
their ratios hold where their times do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lora_analysis.tables.pool import available_cores

TURN = 0.02
"""Seconds a turn takes at least, so that the clock and the first touch of a cold cache do not show."""


def arguments(description: str | None) -> argparse.Namespace:
    """``--quick`` and ``--threads`` of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of numpy's BLAS (1)")
    return parser.parse_args()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch and the BLAS of numpy and scipy, and say so, with the load others put on the machine."""
    with threadpool_limits(count):
        torch.set_num_threads(count)
        libraries = sorted(
            {f"{pool['internal_api']} {pool.get('version') or ''}".strip() for pool in threadpool_info()}
        )
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
        print(f"{count} thread{'s' * (count > 1)} on {available_cores()} cores, load of the last minute {load}")
        print(f"torch {torch.__version__}; {', '.join(libraries)}")
        yield


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(contenders: Mapping[str, Callable[[], object]], *, rounds: int = 7) -> dict[str, float]:
    """Median seconds a call of each contender, after one call that does not count.

    In every round each has one turn: a call, or as many as fill ``TURN``.
    """
    calls = {}
    for name, function in contenders.items():
        function()
        calls[name] = max(1, round(TURN / seconds(function)))
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            turns[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in turns.items()}


def gemm_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """Multiplications and additions a second of a square product that fits no cache, with the threads set now."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / medians({"product": lambda: a @ b}, rounds=5)["product"]


def table(title: str, times: Mapping[str, float], *, ours: str, floors: Collection[str] = (), target: str = "") -> None:
    """Print times with their ratios: of peers to ours, and of ours to floors."""
    width = max(len(name) for name in times)
    print(f"\n{title}")
    for name, value in times.items():
        ratio = "" if name == ours else f"{value / times[ours]:10.2f} x ours"
        if name in floors:
            ratio = f"  ours is {times[ours] / value:.2f} x this"
        print(f"  {name:<{width}}  {_readable(value):>10}  {ratio.rstrip()}")
    if target:
        print(f"  target: {target}")


def _readable(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
