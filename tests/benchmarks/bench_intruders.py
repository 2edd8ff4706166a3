"""Intruders among the top 10 of W + ΔW, both sides, against the procedure of peft.

1. Of W, 2048 x 2048 float32, heavy-tailed, r = 16: what a first adapter pays (all of W's singular vectors, or its top
   64), and what every further adapter of the same W pays, without and with a control of 10 random updates, against
   * peft's ``reduce_intruder_dimension`` on one layer: SVDs of W and W + ΔW to detect, one more to write the mitigated
     adapter, three in all in float32 (1 run), and the two of detection alone (1 run),
   * floors: the update's 2 r singular vectors in the bases of W, what no route with all of W known can go below; two
     products with W of 10 float64 columns, what no check of an adapted triple can go below.
2. Counts of every route beside that of the dense definition in float64 (1 run).

    python tests/benchmarks/bench_intruders.py [--quick] [--threads N]
"""

from __future__ import annotations

import torch
from timing import arguments, medians, seconds, table, threads
from torch import Tensor

from lora_analysis import LowRankUpdate
from lora_analysis.measures.adapted_directions import adapted_directions, random_directions
from lora_analysis.measures.intruders import intruders, largest_cosine
from lora_analysis.measures.triples import leading_triples
from lora_analysis.measures.weight import weight_norm, weight_product

TOP, THRESHOLD = 10, 0.5


def detection(weight: Tensor, delta_w: Tensor) -> Tensor:
    """Which of the top are intruders on the output side, by two dense decompositions, as peft detects them."""
    old = torch.linalg.svd(weight, full_matrices=False).U
    new = torch.linalg.svd(weight + delta_w, full_matrices=False).U
    return largest_cosine(new[:, :TOP], old) < THRESHOLD


def three_decompositions(weight: Tensor, delta_w: Tensor) -> None:
    """The decompositions of ``reduce_intruder_dimension`` for one layer; its products are left out."""
    detection(weight, delta_w)
    torch.linalg.svd(delta_w, full_matrices=False)


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    d, r, rounds = (256, 8, 3) if options.quick else (2048, 16, 5)
    with threads(options.threads):
        weight = (torch.randn(d, d) * torch.arange(1, d + 1) ** -0.3) @ torch.randn(d, d) / d
        strength = float(torch.linalg.matrix_norm(weight, 2)) / d
        update = LowRankUpdate(torch.randn(d, r), torch.randn(r, d), scale=0.7 * strength)
        delta_w, norm = update.dense().float(), weight_norm(weight)
        whole = leading_triples(weight, TOP, complete=True)
        top = leading_triples(weight, 64 if d // 5 >= 64 else TOP, complete=False)
        svd = update.svd()
        vectors = svd.U[:, : min(r, TOP)].contiguous()
        U, V = whole.svd.U, whole.svd.V
        floors = ["floor: ΔW's vectors in W's bases", "floor: W @ X and W.T @ X, 10 columns"]
        ours = "ours: another adapter, all of W known"
        times = medians(
            {
                ours: lambda: adapted_directions(weight, whole, update.svd(), TOP),
                "ours: the same and its control, 10 draws": lambda: (
                    adapted_directions(weight, whole, update.svd(), TOP),
                    random_directions(whole, norm, (d, d), svd.S, TOP),
                ),
                "ours: another adapter, top of W known": lambda: adapted_directions(weight, top, update.svd(), TOP),
                floors[0]: lambda: (svd.U.mT @ U, svd.Vh @ V),
                floors[1]: lambda: (weight_product(weight, vectors), weight_product(weight.mT, vectors)),
            },
            rounds=rounds,
        )
        times["ours: all of W, once (1 run)"] = seconds(lambda: leading_triples(weight, TOP, complete=True))
        times["ours: the top 64 of W, once (1 run)"] = seconds(lambda: leading_triples(weight, 64, complete=False))
        times["peft: three SVDs in float32 (1 run)"] = seconds(lambda: three_decompositions(weight, delta_w))
        times["peft: the two of detection (1 run)"] = seconds(lambda: detection(weight, delta_w))
        table(
            f"Intruders of W + ΔW, float32 W {d} x {d}, r = {r}, top {TOP}",
            times,
            ours=ours,
            floors=floors,
            target="peft's three SVDs >= 10 x ours, of another adapter",
        )
        exact = int(detection(weight.double(), update.dense()).sum())
        print(f"  intruders on the output side, dense definition in float64: {exact}")
        for name, base in {"all of W": whole, "top of W": top}.items():
            found = intruders(adapted_directions(weight, base, svd, TOP), "out", TOP, THRESHOLD)
            print(f"  ours, {name} known: {found.intruders}, undecided {found.undecided}")


if __name__ == "__main__":
    main()
