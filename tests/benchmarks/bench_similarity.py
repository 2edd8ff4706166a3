"""The similarity grid phi and the table of an adapter pair, against loops and the products they cannot do without.

1. ``subspace_similarity`` of two bases of 64 columns, d = 4096, float64: all 64 x 64 cells, against
   * a loop of norms, ``||(A.T @ B)[:i, :j]||**2 / min(i, j)``, the product taken once,
   * the double loop of the formula, ``||A[:, :i].T @ B[:, :j]||**2 / min(i, j)`` (once),
   * floor: the product ``A.T @ B``.
2. ``similarity_table`` of two adapters of 8 layers of Llama-2-7B's shape (56 modules, r = 64, bfloat16) on both
   sides, with one and two workers, with 2000 draws for p and with one, against
   * the decompositions alone, ``svd()`` of all 112 updates one after another,
   * those, and a loop of norms for every pair and side (loop extrapolated from one),
   * floor: the flops of the method at the rate of a square product measured in this run: QR with its Q
     (4 d r**2 a factor), turning it by the core's vectors (2 d r**2), and phi (2 d r**2 a side and pair).

    python tests/benchmarks/bench_similarity.py [--quick] [--threads N]
"""

from __future__ import annotations

import torch
from timing import arguments, gemm_rate, medians, seconds, table, threads
from torch import Tensor

from lora_analysis import Adapter, LowRankUpdate, similarity_table, subspace_similarity

SHAPES = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
"""(d_out, d_in) of the linear layers of one layer of Llama-2-7B."""


def basis(d: int, k: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q
    return Q


def loop_of_norms(A: Tensor, B: Tensor) -> Tensor:
    overlap = A.mT @ B
    phi = torch.empty_like(overlap)
    for i in range(1, overlap.shape[0] + 1):
        for j in range(1, overlap.shape[1] + 1):
            phi[i - 1, j - 1] = overlap[:i, :j].norm() ** 2 / min(i, j)
    return phi


def double_loop(A: Tensor, B: Tensor) -> Tensor:
    phi = torch.empty(A.shape[1], B.shape[1], dtype=A.dtype)
    for i in range(1, A.shape[1] + 1):
        for j in range(1, B.shape[1] + 1):
            phi[i - 1, j - 1] = (A[:, :i].mT @ B[:, :j]).norm() ** 2 / min(i, j)
    return phi


def grid(d: int, r: int, rounds: int) -> float:
    """Prints the table; seconds of one loop of norms."""
    A, B = basis(d, r), basis(d, r)
    difference = float((subspace_similarity(A, B) - double_loop(A, B)).abs().max())
    floor = "floor: the product A.T @ B"
    times = medians(
        {
            "ours: subspace_similarity": lambda: subspace_similarity(A, B),
            "a loop of norms": lambda: loop_of_norms(A, B),
            floor: lambda: A.mT @ B,
        },
        rounds=rounds,
    )
    times["the double loop (1 run)"] = seconds(lambda: double_loop(A, B))
    table(
        f"phi, {r} x {r} cells, d = {d}, float64",
        times,
        ours="ours: subspace_similarity",
        floors=[floor],
        target="<= 1.8 x the product, loop of norms >= 100 x",
    )
    print(f"  largest difference from the double loop: {difference:.1g}")
    return times["a loop of norms"]


def random_adapter(layers: int, r: int, divide: int) -> Adapter:
    updates = {}
    for number in range(layers):
        for place, (d_out, d_in) in enumerate(SHAPES):
            up, down = torch.randn(d_out // divide, r).bfloat16(), torch.randn(r, d_in // divide).bfloat16()
            updates[f"layers.{number}.{place}"] = LowRankUpdate(up, down, scale=2.0)
    return Adapter(updates)


def pair_of_adapters(layers: int, r: int, divide: int, one_loop: float, rounds: int) -> None:
    a, b = (random_adapter(layers, r, divide) for _ in range(2))
    dimensions = sum(sum(module.shape) for module in a.modules.values())
    flops = dimensions * r**2 * (2 * (4 + 2) + 2)
    floor = "floor: flops of the method at the rate of 1 thread"
    alone = "the decompositions alone"
    times = medians(
        {
            "ours: similarity_table, 1 worker": lambda: similarity_table(a, b, workers=1),
            "ours: 2 workers": lambda: similarity_table(a, b, workers=2),
            "ours: 1 worker, 1 draw": lambda: similarity_table(a, b, workers=1, draws=1),
            "ours: 1 worker, all cells, 1 draw": lambda: similarity_table(a, b, workers=1, cells="all", draws=1),
            alone: lambda: [update.svd() for adapter in (a, b) for update in adapter.values()],
        },
        rounds=rounds,
    )
    times[f"those and {2 * len(a)} loops of norms (extrapolated)"] = times[alone] + 2 * len(a) * one_loop
    torch.set_num_threads(1)
    times[floor] = flops / gemm_rate(torch.float64)
    table(
        f"similarity_table of 2 adapters of {len(a)} modules, r = {r}, bfloat16, both sides, {flops / 1e9:.3g} Gflop",
        times,
        ours="ours: similarity_table, 1 worker",
        floors=[floor],
    )


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    d, r, rounds = (512, 32, 3) if options.quick else (4096, 64, 7)
    with threads(options.threads):
        one_loop = grid(d, r, rounds)
        pair_of_adapters(1 if options.quick else 8, r, 8 if options.quick else 1, one_loop, 3 if options.quick else 5)


if __name__ == "__main__":
    main()
