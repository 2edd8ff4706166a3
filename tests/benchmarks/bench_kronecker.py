"""Singular values and vectors of Kronecker products, LoKr's full factors, against the dense matrix.

``KroneckerUpdate.singular_values`` and ``.svd(16)`` of a side of 2048 = 32 · 64 and of 4096 = 64 · 64, against

* the dense matrix: ``torch.linalg.svdvals(kron(left, right))`` in float64, one run at half the side, times 8,
* floor: the decompositions of the two factors alone, float64, resident.

    python tests/benchmarks/bench_kronecker.py [--quick] [--threads N]
"""

from __future__ import annotations

import torch
from timing import arguments, medians, seconds, table, threads

from lora_analysis import KroneckerUpdate


def decompositions(left: int, right: int, rounds: int) -> None:
    d = left * right
    update = KroneckerUpdate(torch.randn(left, left), torch.randn(right, right), scale=0.5)
    sides = [update.left.matrix.double(), update.right.matrix.double()]  # type: ignore[union-attr]
    half = torch.kron(torch.randn(left // 2, left // 2).double(), sides[1])
    dense = f"dense (1 run at {d // 2}, times 8)"
    for ours, call, floor, alone in (
        ("ours: singular_values()", update.singular_values, "floor: values of both factors", torch.linalg.svdvals),
        ("ours: svd(16)", lambda: update.svd(16), "floor: SVD of both factors", torch.linalg.svd),
    ):
        times = medians({ours: call, floor: lambda alone=alone: [alone(side) for side in sides]}, rounds=rounds)
        times[dense] = 8 * seconds(lambda alone=alone: alone(half))
        title = f"{d} x {d} = {left} x {left} by {right} x {right}, {ours.removeprefix('ours: ')}"
        table(title, times, ours=ours, floors=[floor], target="<= 1.5 x floor, milliseconds at 2048")


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    rounds = 3 if options.quick else 7
    with threads(options.threads):
        for left, right in [(16, 16)] if options.quick else [(32, 64), (64, 64)]:
            decompositions(left, right, rounds)


if __name__ == "__main__":
    main()
