"""Merging in a small basis, against the same formulas on whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lora_analysis.measures.interference import singular_task_interference
from lora_analysis.measures.merging import merged_svd
from lora_analysis.measures.shared_basis import (
    averaging_error,
    interference_null,
    shared_basis,
    subspace_alignment_ratio,
    union_rank,
)
from lora_analysis.update import LowRankUpdate, Svd


def updates(count: int = 3, *, d_out: int = 30, d_in: int = 20, r: int = 3, seed: int = 0) -> list[LowRankUpdate]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRankUpdate(torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator), 0.5)
        for _ in range(count)
    ]


def dense(svd: Svd) -> torch.Tensor:
    return (svd.U * svd.S) @ svd.Vh


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r", [1, 3, 9])  # 3 · 9 is more than there are columns
def test_the_basis_holds_every_update(r: int) -> None:
    made = updates(r=r)
    basis = shared_basis([update.svd() for update in made])
    for core, update in zip(basis.cores, made, strict=True):
        close(basis.Q_out @ core @ basis.Q_in.mT, update.dense())


@pytest.mark.parametrize("r", [1, 3, 9])
def test_sums_are_sums(r: int) -> None:
    made = updates(r=r)
    merged = merged_svd([update.svd() for update in made], weights=[0.5, -2.0, 1.0])
    close(dense(merged), 0.5 * made[0].dense() - 2 * made[1].dense() + made[2].dense())
    assert bool((merged.S.diff() <= 1e-12).all())
    alone = merged_svd([made[0].svd()])
    close(dense(alone), made[0].dense())


def test_the_order_of_updates_does_not_matter() -> None:
    svds = [update.svd() for update in updates()]
    for method in ("sum", "tsv", "iso-c", "knots"):
        one, other = (dense(merged_svd(s, method=method)) for s in (svds, svds[::-1]))  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_iso_c_has_the_directions_of_the_sum_and_one_singular_value() -> None:
    made = updates()
    U, S, Vh = torch.linalg.svd(sum(update.dense() for update in made), full_matrices=False)  # type: ignore[arg-type]
    close(dense(merged_svd([update.svd() for update in made], method="iso-c")), S[:9].mean() * U[:, :9] @ Vh[:9])


@pytest.mark.parametrize(("keep", "k"), [(None, 1), (1.0, 3), (0.7, 2)])
def test_tsv_is_the_formula_on_whole_matrices(keep: float | None, k: int) -> None:
    made = updates()
    parts = [torch.linalg.svd(update.dense(), full_matrices=False) for update in made]
    U = torch.hstack([part[0][:, :k] for part in parts])
    V = torch.hstack([part[2][:k].mT for part in parts])
    S = torch.cat([part[1][:k] for part in parts])

    def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right

    expected = (orthonormal(U) * S) @ orthonormal(V).mT
    close(dense(merged_svd([update.svd() for update in made], method="tsv", keep=keep)), expected)


def test_tsv_of_updates_that_share_nothing_is_their_sum() -> None:
    e = torch.eye(12, dtype=torch.float64)
    svds = [Svd(e[:, i : i + 2], torch.tensor([2.0, 1.0]), e[i : i + 2]) for i in (0, 2, 4)]
    close(dense(merged_svd(svds, method="tsv", keep=1.0)), dense(merged_svd(svds)))


@pytest.mark.parametrize("method", ["tsv", "iso-c"])
def test_updates_that_are_one_leave_no_arbitrary_directions(method: str) -> None:
    svd = updates()[0].svd()
    merged = merged_svd([svd, svd], method=method, keep=1.0)  # type: ignore[arg-type]
    assert len(merged.S) == 3
    if method == "tsv":  # each is a half of the direction they share
        close(dense(merged), dense(svd))
    else:
        close(dense(merged), 2 * svd.S.mean() * svd.U @ svd.Vh)


@pytest.mark.parametrize("method", ["sum", "tsv", "iso-c", "knots"])
def test_an_update_without_directions_changes_nothing(method: str) -> None:
    svd = updates()[0].svd()
    none = Svd(svd.U[:, :0], svd.S[:0], svd.Vh[:0])
    with_it, alone = (merged_svd(svds, method=method) for svds in ([svd, none], [svd]))  # type: ignore[arg-type]
    close(dense(with_it), dense(alone))
    assert len(merged_svd([none, none], method=method).S) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["sum", "tsv", "iso-c", "knots"])
def test_a_weight_of_zero_leaves_an_update_out(method: str) -> None:
    one, other = (update.svd() for update in updates(2))
    both = merged_svd([one, other], weights=[1.0, 0.0], method=method, keep=0.5)  # type: ignore[arg-type]
    close(dense(both), dense(merged_svd([one], method=method, keep=0.5)))  # type: ignore[arg-type]
    assert len(merged_svd([one, other], weights=[0.0, 0.0], method=method).S) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["sum", "tsv", "iso-c", "knots"])
def test_an_update_and_its_negative_in_another_gauge_cancel(method: str) -> None:
    update = updates(1)[0]
    gauge = torch.randn(update.r, update.r, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    opposite = LowRankUpdate(-update.up.double() @ gauge, torch.linalg.solve(gauge, update.down.double()), update.scale)
    pair = [update.svd(), opposite.svd()]
    if method in ("sum", "iso-c"):
        assert len(merged_svd(pair, method=method).S) == 0  # type: ignore[arg-type]
    # No sign is elected of entries that cancel, nor is a direction kept that is rounding.
    same = [update.svd(), Svd(-update.svd().U, update.svd().S, update.svd().Vh)]
    assert float(merged_svd(same, method=method).S.sum()) < 1e-9  # type: ignore[arg-type]
    assert subspace_alignment_ratio(shared_basis(pair).cores).isnan().all()


def test_updates_that_cancel_are_nothing() -> None:
    svd = updates()[0].svd()
    merged = merged_svd([svd, svd], weights=[1.0, -1.0], method="iso-c")
    assert float(merged.S.sum()) < 1e-12


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots_is_ties_in_the_basis_of_all_outputs(density: float) -> None:
    made = updates(2, d_out=12, d_in=10, r=2)
    U, S, Vh = torch.linalg.svd(torch.hstack([update.dense() for update in made]), full_matrices=False)
    U, S, parts = U[:, :4], S[:4], torch.stack([Vh[:4, :10], Vh[:4, 10:]])
    kept = max(1, round(density * 40))
    for part in parts:
        smallest = part.abs().flatten().sort(descending=True).values[kept - 1]
        part[part.abs() < smallest] = 0
    sign = parts.sum(0).sign()
    agree = parts * (parts.sign() == sign)
    expected = (U * S) @ (agree.sum(0) / (agree != 0).sum(0).clamp_min(1))
    close(dense(merged_svd([update.svd() for update in made], method="knots", density=density)), expected)


def test_alignment_is_that_of_whole_matrices() -> None:
    made = updates()
    total = sum(update.dense() for update in made)
    U, S, _ = torch.linalg.svd(total)  # type: ignore[call-overload]
    k = next(k for k in range(1, 10) if S[:k].norm() >= 0.95 * S.norm())
    expected = [float((U[:, :k].mT @ update.dense()).norm() / update.norm()) for update in made]
    found = subspace_alignment_ratio(shared_basis([update.svd() for update in made]).cores)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    alone = subspace_alignment_ratio(shared_basis([made[0].svd()]).cores, norm_share=1.0)
    assert float(alone) == pytest.approx(1)


def test_union_rank_counts_what_is_shared_once() -> None:
    e = torch.eye(9, dtype=torch.float64)
    same = Svd(e[:, :2], torch.ones(2), e[:2])
    assert union_rank([same, same]) == (2, 2)
    assert union_rank([same, Svd(e[:, 4:6], torch.ones(2), e[1:3])]) == (4, 3)
    assert union_rank([Svd(e[:, :0], torch.ones(0), e[:0])]) == (0, 0)


def test_interference_of_turned_updates_has_uniform_p() -> None:
    spectra, shape = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])], (24, 18)
    null = interference_null(spectra, shape, draws=2000, seed=3)
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(500):
        svds = []
        for S in spectra:
            U, V = (torch.linalg.qr(torch.randn(d, 2, generator=rng, dtype=torch.float64)).Q for d in shape)
            svds.append(Svd(U, S.double(), V.mT))
        found.append((1 + int((null >= singular_task_interference(svds)).sum())) / 2001)
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_averaging_factors_is_not_averaging_updates() -> None:
    e = torch.eye(2)
    pair = [LowRankUpdate(e[:, i : i + 1], e[i : i + 1], scale=1.0) for i in (0, 1)]
    assert averaging_error(pair) == pytest.approx(math.sqrt(0.5))
    assert averaging_error([pair[0], pair[0]]) == pytest.approx(0, abs=1e-12)
    made = updates()
    B, A = (torch.stack(t).double().mean(0) for t in ([u.up for u in made], [u.down for u in made]))
    mean = sum(update.dense() for update in made) / 3
    assert averaging_error(made) == pytest.approx(float((0.5 * B @ A - mean).norm() / mean.norm()), rel=1e-9)  # type: ignore[union-attr, operator]
    assert math.isnan(averaging_error([made[0], updates(r=2)[0]]))


def test_what_is_out_of_range_is_refused() -> None:
    svds = [update.svd() for update in updates()]
    with pytest.raises(ValueError, match="method: expected one of sum, tsv, iso-c, knots, got 'ties'"):
        merged_svd(svds, method="ties")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights: expected one of each of 3 updates, got 2"):
        merged_svd(svds, weights=[1, 2])
    with pytest.raises(ValueError, match=r"density: expected in \(0, 1\], got 0"):
        merged_svd(svds, method="knots", density=0.0)
    with pytest.raises(ValueError, match="expected at least one update and all of one shape"):
        merged_svd([svds[0], updates(d_out=4)[0].svd()])
    with pytest.raises(ValueError, match=r"norm_share: expected in \(0, 1\], got 2"):
        subspace_alignment_ratio(torch.ones(1, 2, 2), norm_share=2)
