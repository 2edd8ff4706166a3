"""W seen from an update, and the top of W's spectrum, against whole-matrix routes.

1. ``projected_weight`` of a bfloat16 W, 4096 x 4096, r = 8 and 64, float64, against
   * the naive ``U.T @ (W.float() @ V)`` in float32, and the same in float64,
   * float32 blocks of 256 rows in a reused buffer, what float32 would cost without a copy of W,
   * floors: ``W @ V`` on a W that is resident in float32, and in float64.
   Each route's error against float64 stands below: a ratio of times between precisions is no like for like.
2. ``weight_norm`` of the same W against the norm of its float32 copy.
3. ``weight_spectrum`` (top 64, with residual bound) of a heavy-tailed W, 4096 x 4096, against
   * dense ``svdvals`` in float64 (1 run), the oracle of the errors below, and ``eigvalsh`` of its Gram matrix (1 run),
   * ``torch.svd_lowrank(W, q=128, niter=2)``, the usual short cut.

    python tests/benchmarks/bench_amplification.py [--quick] [--threads N]
"""

from __future__ import annotations

import torch
from timing import arguments, medians, seconds, table, threads
from torch import Tensor

from lora_analysis import LowRankUpdate
from lora_analysis.measures.weight import projected_weight, weight_norm, weight_spectrum


def naive(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return U.mT @ (weight.to(V.dtype) @ V)


def in_blocks(weight: Tensor, U: Tensor, V: Tensor, rows: int = 256) -> Tensor:
    buffer = torch.empty(rows, weight.shape[1], dtype=V.dtype)
    G = V.new_zeros(U.shape[1], V.shape[1])
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        G += U[start : start + rows].mT @ (buffer[: len(block)].copy_(block) @ V)
    return G


def projection(d: int, r: int, rounds: int) -> None:
    weight = torch.randn(d, d).bfloat16()
    svd = LowRankUpdate(torch.randn(d, r), torch.randn(r, d), scale=1.0).svd()
    U32, V32 = svd.U.float(), svd.V.float().contiguous()
    single, double = weight.float(), weight.double()
    V = svd.V.contiguous()
    floors = ["floor: W @ V, W resident in float32", "floor: W @ V, W resident in float64"]
    routes = {
        "ours: projected_weight (float64)": lambda: projected_weight(weight, svd),
        "naive, float32 copy of W": lambda: naive(weight, U32, V32),
        "naive, float64 copy of W": lambda: naive(weight, svd.U, V),
        "float32 blocks of 256 rows": lambda: in_blocks(weight, U32, V32),
    }
    resident = {floors[0]: lambda: single @ V32, floors[1]: lambda: double @ V}
    table(
        f"U.T @ W @ V, bfloat16 W {d} x {d}, r = {r}",
        medians(routes | resident, rounds=rounds),
        ours="ours: projected_weight (float64)",
        floors=floors,
        target=f"naive float32 >= {3 if r < 64 else 2} x ours; ours <= 1.1 x the float32 floor",
    )
    exact = svd.U.mT @ double @ svd.V
    for name, route in routes.items():
        print(f"  {name}: relative error {float((route() - exact).norm() / exact.norm()):.1g}")


def norm(d: int, rounds: int) -> None:
    weight = torch.randn(d, d).bfloat16()
    table(
        f"||W||_F, bfloat16 W {d} x {d}",
        medians(
            {
                "ours: weight_norm (float64)": lambda: weight_norm(weight),
                "norm of a float32 copy": lambda: weight.float().norm(),
            },
            rounds=rounds,
        ),
        ours="ours: weight_norm (float64)",
    )


def top(d: int, k: int, rounds: int) -> None:
    # A product of Gaussians, its inner axis weighted: the singular values fall about as l**-0.5.
    weight = (torch.randn(d, d) * torch.arange(1, d + 1) ** -0.5) @ torch.randn(d, d) / d
    times = medians(
        {
            "ours: weight_spectrum": lambda: weight_spectrum(weight, k),
            "svd_lowrank(niter=2)": lambda: torch.svd_lowrank(weight, q=2 * k, niter=2),
        },
        rounds=rounds,
    )
    exact = weight.double()
    true: list[Tensor] = []
    times["dense svdvals, float64 (1 run)"] = seconds(lambda: true.append(torch.linalg.svdvals(exact)))
    times["eigvalsh of W.T @ W, float64 (1 run)"] = seconds(lambda: torch.linalg.eigvalsh(exact.mT @ exact))
    table(
        f"Top {k} singular values of a heavy-tailed float32 W {d} x {d}",
        times,
        ours="ours: weight_spectrum",
        target="dense >= 18 x at a relative error of 1e-5",
    )
    spectrum = weight_spectrum(weight, k)
    found = {"ours": spectrum.S, "svd_lowrank(niter=2)": torch.svd_lowrank(weight, q=2 * k, niter=2)[1][:k].double()}
    for name, S in found.items():
        print(f"  {name}: largest relative error {float((S / true[0][:k] - 1).abs().max()):.1g}")
    print(f"  ours: residual bound {spectrum.bound / float(spectrum.S[-1]):.1g} of sigma_{k}")


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    d, rounds = (1152, 3) if options.quick else (4096, 7)
    with threads(options.threads):
        for r in (8, 64):
            projection(d, r, rounds)
        norm(d, rounds)
        top(d, 64, 3)


if __name__ == "__main__":
    main()
