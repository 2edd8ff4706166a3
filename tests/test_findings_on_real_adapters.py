"""What is found on adapters that others trained, against dense matrices and draws made here another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from scipy.linalg import subspace_angles

import lora_analysis as la

R, D = 16, 768
MODULES = range(0, 24, 6)
"""Every sixth of the 24, whose dense decompositions take seconds."""
Matrix = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def raw(shared_adapters: Path) -> list[dict[int, Matrix]]:
    """ΔW of two trainings at r = 16, as their files' own tensors give it."""
    found = []
    for training in ("round_a", "round_b"):
        tensors = load_file(shared_adapters / "sam_lora" / training / f"lora_rank{R}.safetensors")
        found.append(
            {
                number: tensors[f"w_b_{number:03d}"].astype(np.float64) @ tensors[f"w_a_{number:03d}"]
                for number in MODULES
            }
        )
    return found


@pytest.fixture(scope="module")
def adapters(shared_adapters: Path) -> list[la.Adapter]:
    return [
        la.load_adapter(shared_adapters / "sam_lora" / training / f"lora_rank{R}.safetensors")
        for training in ("round_a", "round_b")
    ]


def test_reproduced_directions_are_those_of_dense_matrices(
    raw: list[dict[int, Matrix]], adapters: list[la.Adapter]
) -> None:
    rng = np.random.default_rng(0)
    frames = (np.linalg.qr(rng.standard_normal((D, R)))[0] for _ in range(800))
    largest = [np.linalg.norm(a.T @ b, 2) for a, b in zip(frames, frames, strict=True)]
    edge = float(np.quantile(largest, 0.99))
    table = la.reproducible_table(adapters, draws=4000)
    names = list(adapters[0])
    for number in MODULES:
        (Ua, _, Va), (Ub, _, Vb) = (np.linalg.svd(part[number]) for part in raw)
        for side, bases in {"out": (Ua[:, :R], Ub[:, :R]), "in": (Va[:R].T, Vb[:R].T)}.items():
            row = table[(table["module"] == names[number]) & (table["side"] == side)].iloc[0]
            cosines = np.cos(subspace_angles(*bases))
            assert row["largest_cosine"] == pytest.approx(cosines.max(), abs=1e-6)
            assert row["chance_edge"] == pytest.approx(edge, rel=0.03)  # of 400 draws here
            assert row["reproduced"] == (cosines > row["chance_edge"]).sum()
    counts = table.groupby("side")["reproduced"].median()
    # What is reported of them: about half of the output directions are found again, and one input direction.
    assert 7 <= counts["out"] <= 11
    assert counts["in"] == 1


def test_cosines_are_those_of_dense_matrices(raw: list[dict[int, Matrix]], adapters: list[la.Adapter]) -> None:
    table = la.sameness_table(*adapters, draws=99).set_index("module_a")
    names = list(adapters[0])
    for number in MODULES:
        a, b = (part[number] for part in raw)
        dense = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert table.loc[names[number], "cosine"] == pytest.approx(dense, rel=1e-6)
    assert (table["cosine"] > 50 * table["cosine_null_sd"]).all()
    assert (table["rows_shared"] == 0).all()


def test_effective_ranks_lie_below_those_of_gaussian_products(
    raw: list[dict[int, Matrix]], adapters: list[la.Adapter]
) -> None:
    def effective(S: Matrix) -> float:
        shares = S[:R] / S[:R].sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(200):  # ‖BA‖'s values from QR of whole factors, which the sampler never draws
        tops = (np.linalg.qr(rng.standard_normal((D, R)))[1] for _ in range(2))
        drawn.append(effective(np.linalg.svd(next(tops) @ next(tops).T, compute_uv=False)))
    table = la.used_rank_table(adapters[0]).set_index("module")
    names = list(adapters[0])
    for number in MODULES:
        row = table.loc[names[number]]
        assert row["effective_rank"] == pytest.approx(
            effective(np.linalg.svd(raw[0][number], compute_uv=False)), rel=1e-6
        )
        assert row["effective_rank_low"] == pytest.approx(np.quantile(drawn, 0.01), abs=0.02)
        assert row["effective_rank_high"] == pytest.approx(np.quantile(drawn, 0.99), abs=0.02)
    assert (table["effective_rank"] < table["effective_rank_low"]).all()
