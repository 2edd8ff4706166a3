"""Singular values and vectors of updates, against dense decompositions and the products they cannot do without.

1. ``LowRankUpdate.singular_values`` of one update, float32 factors, against
   * numpy's dense values of ``up @ down`` (float32, one run at half the side, times 8: the cost is cubic),
   * ``torch.svd_lowrank(up @ down, q=2 r, niter=2)`` in float32, as kohya's resize does beyond a side of 2048,
   * floor: the two Gram matrices of the factors, float64, resident.
2. ``LowRankUpdate.svd`` against the same by hand: two float64 QR, SVD of the core, two products; and against
   the Gram route to the vectors, whose orthogonality is printed because it is not QR's.
   Floor: the four float64 products of the Gram route.
3. ``spectrum_table`` of a whole adapter of Llama-2-7B's shape (32 layers of 7 modules, r = 64, bfloat16) with
   one and two workers, against kohya's way (one layer, times 32). Floor: the flops of the float64 Gram
   matrices at the rate of a square product measured in this run, with as many threads as workers.

    python tests/benchmarks/bench_spectrum.py [--quick] [--threads N]
"""

from __future__ import annotations

import numpy as np
import torch
from timing import arguments, gemm_rate, medians, seconds, table, threads
from torch import Tensor

from lora_analysis import Adapter, LowRankUpdate, spectrum_table

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
"""(d_out, d_in) of the linear layers of Llama-2-7B."""


def random_update(d_out: int, d_in: int, r: int, dtype: torch.dtype) -> LowRankUpdate:
    return LowRankUpdate(torch.randn(d_out, r).to(dtype), torch.randn(r, d_in).to(dtype), scale=2.0)


def kohya(update: LowRankUpdate) -> Tensor:
    S: Tensor = torch.svd_lowrank(update.up.float() @ update.down.float(), q=2 * update.r, niter=2)[1]
    return S


def values(d: int, r: int, rounds: int) -> None:
    update = random_update(d, d, r, torch.float32)
    up, down = update.up.double(), update.down.double()
    times = medians(
        {
            "ours: singular_values()": update.singular_values,
            "kohya's way: svd_lowrank(BA)": lambda: kohya(update),
            "floor: two float64 Gram matrices": lambda: (up.mT @ up, down @ down.mT),
        },
        rounds=rounds,
    )
    small = random_update(d // 2, d // 2, r, torch.float32)
    half = (small.up @ small.down).numpy()
    times[f"numpy, dense BA (1 run at {d // 2}, times 8)"] = 8 * seconds(lambda: np.linalg.svd(half, compute_uv=False))
    table(
        f"Singular values of one update, {d} x {d}, r = {r}, float32 factors",
        times,
        ours="ours: singular_values()",
        floors=["floor: two float64 Gram matrices"],
        target="dense >= 1000 x, kohya's way >= 200 x (r = 16)",
    )
    error = kohya(update)[:r].double() * update.scale / update.singular_values() - 1
    print(f"  kohya's way: largest relative error of a value {float(error.abs().max()):.1g}")


def qr_by_hand(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    U, S, Vh = torch.linalg.svd(r_up @ r_down.mT)
    return q_up @ U, S, Vh @ q_down.mT


def gram_by_hand(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    up, down = up.double(), down.double()
    l_up, l_down = torch.linalg.cholesky(up.mT @ up), torch.linalg.cholesky(down @ down.mT)
    U, S, Vh = torch.linalg.svd(l_up.mT @ l_down)
    left = torch.linalg.solve_triangular(l_up.mT, U, upper=True)
    right = torch.linalg.solve_triangular(l_down, Vh, upper=False, left=False)
    return up @ left, S, right @ down


def vectors(d: int, r: int, rounds: int) -> None:
    update = random_update(d, d, r, torch.float32)
    up, down = update.up.double(), update.down.double()
    square = torch.randn(r, r, dtype=torch.float64)
    floor = "floor: its four float64 products"
    times = medians(
        {
            "ours: svd()": update.svd,
            "float64 QR by hand": lambda: qr_by_hand(update.up, update.down),
            "float64 Gram route by hand": lambda: gram_by_hand(update.up, update.down),
            floor: lambda: (up.mT @ up, down @ down.mT, up @ square, square @ down),
        },
        rounds=rounds,
    )
    table(
        f"Singular vectors, {d} x {d}, r = {r}, float32 factors",
        times,
        ours="ours: svd()",
        floors=[floor],
        target="<= 0.5 x float64 QR at an orthogonality of 1e-10",
    )
    bases = {"ours": update.svd().U, "Gram route": gram_by_hand(update.up, update.down)[0]}
    for name, U in bases.items():
        deviation = float((U.mT @ U - torch.eye(r, dtype=torch.float64)).abs().max())
        print(f"  {name}: |U.T @ U - I| <= {deviation:.1g} on these random, well conditioned factors")


def whole_adapter(layers: int, r: int, divide: int, rounds: int) -> None:
    layer = {
        name: random_update(d_out // divide, d_in // divide, r, torch.bfloat16)
        for name, (d_out, d_in) in SHAPES.items()
    }
    adapter = Adapter(
        {
            f"layers.{number}.{name}": random_update(*update.shape, r, torch.bfloat16)
            for number in range(layers)
            for name, update in layer.items()
        }
    )
    flops = sum(2 * r**2 * sum(module.shape) for module in adapter.modules.values())
    before = torch.get_num_threads()
    floors = {}
    for workers in (1, 2):
        torch.set_num_threads(workers)
        floors[f"floor: Gram flops at the rate of {workers} thread{'s' * (workers > 1)}"] = flops / gemm_rate(
            torch.float64
        )
    torch.set_num_threads(before)
    times = medians(
        {
            "ours: 1 worker": lambda: spectrum_table(adapter, workers=1),
            "ours: 2 workers": lambda: spectrum_table(adapter, workers=2),
        },
        rounds=rounds,
    )
    way = f"kohya's way (1 layer, times {layers})"
    times[way] = layers * seconds(lambda: [kohya(update) for update in layer.values()])
    title = f"A whole adapter: {len(adapter)} modules, r = {r}, bfloat16, {flops / 1e9:.3g} Gflop of Gram matrices"
    for workers, floor in zip((1, 2), floors, strict=True):
        ours = f"ours: {workers} worker{'s' * (workers > 1)}"
        shown = {ours: times[ours], floor: floors[floor], way: times[way]}
        table(title, shown, ours=ours, floors=[floor], target="<= 2 x floor")


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    d, rounds = (512, 3) if options.quick else (4096, 7)
    with threads(options.threads):
        for r in (16, 64):
            values(d, r, rounds)
        vectors(d, 64, 3 * rounds)
        whole_adapter(2 if options.quick else 32, 64, divide=8 if options.quick else 1, rounds=rounds)


if __name__ == "__main__":
    main()
