import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.measures.interference import (
    sign_conflict,
    singular_task_interference,
    update_cosine,
    update_cosine_null_sd,
    update_inner,
)
from lora_analysis.update import DenseUpdate, LowRankUpdate, Svd, Update, with_scale

E1, E2 = torch.eye(4, dtype=torch.float64)[:, :1], torch.eye(4, dtype=torch.float64)[:, 1:2]
FIRST, SECOND = LowRankUpdate(E1, E1.mT, 1.0), LowRankUpdate(E2, E2.mT, 1.0)

sizes = st.integers(1, 12)
seeds = st.integers(0, 1000)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(d_out: int, d_in: int, r: int, seed: int, scale: float = 0.5) -> LowRankUpdate:
    return LowRankUpdate(gaussian(d_out, r, seed=seed), gaussian(r, d_in, seed=seed + 10_000), scale)


def svds(*updates: Update) -> list[Svd]:
    return [update.svd() for update in updates]


# -- cosine ---------------------------------------------------------------------------------------------


def test_cosines_of_equal_opposite_and_disjoint_updates() -> None:
    assert update_cosine(FIRST, FIRST) == 1
    assert update_cosine(FIRST, with_scale(FIRST, -1.0)) == -1
    assert update_cosine(FIRST, SECOND) == 0


@settings(max_examples=50, deadline=None)
@given(sizes, sizes, st.integers(1, 5), st.integers(1, 5), seeds)
def test_inner_product_and_cosine_are_those_of_the_dense_matrices(m: int, n: int, r: int, s: int, seed: int) -> None:
    a, b = random_update(m, n, r, seed), random_update(m, n, s, seed + 1, scale=-2.0)
    A, B = a.dense(), b.dense()
    norms = float(A.norm() * B.norm())
    # 1e-10 of the norms: the Gram formula may have lost five digits to its gauge before it is left.
    assert update_inner(a, b) == pytest.approx(float((A * B).sum()), abs=1e-10 * norms)
    assert update_cosine(a, b) == pytest.approx(float((A * B).sum()) / norms, abs=1e-10)
    assert update_inner(a, DenseUpdate(B)) == pytest.approx(update_inner(a, b), abs=1e-10 * norms)
    assert update_cosine(a, b) == pytest.approx(update_cosine(b, a), abs=1e-14)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_cosine_does_not_depend_on_the_gauge(condition: float) -> None:
    a, b = random_update(30, 20, 6, seed=1), random_update(30, 20, 6, seed=1)
    b = LowRankUpdate(b.up + 0.1 * gaussian(30, 6, seed=5), b.down, b.scale)
    left, right = (torch.linalg.qr(gaussian(6, 6, seed=seed)).Q for seed in (2, 3))
    stretch = torch.logspace(0, math.log10(condition), 6, dtype=torch.float64)
    R, inverse = left * stretch @ right, right.mT / stretch @ left.mT
    skewed = LowRankUpdate(a.up @ R, inverse @ a.down, a.scale)
    # Forming the skewed factors rounds at `condition` times the unit; nothing is lost beyond that.
    assert update_cosine(skewed, b) == pytest.approx(update_cosine(a, b), abs=1e-14 * max(condition, 100))


def test_the_cosine_of_an_update_with_itself_is_one_however_its_terms_cancel() -> None:
    # Two terms a million times what they leave: a sum over factors would be off by 1e12 roundings.
    x, y, z = gaussian(30, 1, seed=1), gaussian(30, 1, seed=2), gaussian(1, 20, seed=3)
    update = LowRankUpdate(torch.hstack([1e6 * x, y - 1e6 * x]), torch.vstack([z, z]), 1.0)
    # The inner product too: the cosine is clipped to 1.
    assert update_inner(update, update) == pytest.approx(float(y.norm() * z.norm()) ** 2, rel=1e-9)
    assert update_cosine(update, update) == pytest.approx(1, abs=1e-9)
    assert update_cosine(update, LowRankUpdate(y, z, 1.0)) == pytest.approx(1, abs=1e-9)


def test_the_cosine_with_a_zero_update_is_undefined() -> None:
    zero = LowRankUpdate(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)
    assert math.isnan(update_cosine(zero, FIRST))
    assert update_inner(zero, FIRST) == 0


def test_the_norm_of_a_sum_follows_from_inner_products() -> None:
    a, b = random_update(9, 7, 3, seed=1), random_update(9, 7, 2, seed=2)
    total = LowRankUpdate(torch.hstack([a.up, b.up]), torch.vstack([a.down, b.down]), 0.5)
    expected = a.norm() ** 2 + b.norm() ** 2 + 2 * update_inner(a, b)
    assert total.norm() ** 2 == pytest.approx(expected, rel=1e-12)


def test_the_cosine_of_randomly_rotated_updates_has_the_exact_null_sd() -> None:
    m, n, draws = 12, 9, 4000
    a, b = random_update(m, n, 2, seed=1), random_update(m, n, 3, seed=2)
    P, Q = torch.linalg.qr(gaussian(draws, m, m, seed=3)).Q, torch.linalg.qr(gaussian(draws, n, n, seed=4)).Q
    # QR leaves the signs of the columns to LAPACK; random ones make the frames uniform.
    P = P * gaussian(draws, 1, m, seed=5).sign()
    Q = Q * gaussian(draws, 1, n, seed=6).sign()
    cosines = torch.tensor(
        [update_cosine(a, LowRankUpdate(p @ b.up, b.down @ q.mT, b.scale)) for p, q in zip(P, Q, strict=True)]
    )
    squares = cosines.square()
    standard_error = squares.std() / math.sqrt(draws)
    assert abs(squares.mean() - update_cosine_null_sd((m, n)) ** 2) < 4 * standard_error
    assert abs(cosines.mean()) < 4 * cosines.std() / math.sqrt(draws)


# -- singular task interference -------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "value"), [("entrywise", 2.0), ("nuclear", 2.0), ("induced-1", 1.0)])
def test_interference_of_equal_opposite_and_disjoint_updates(norm: str, value: float) -> None:
    assert singular_task_interference(svds(FIRST, FIRST), norm=norm) == value  # type: ignore[arg-type]
    # Opposite: the sign sits in U, and cancels nothing in an absolute value.
    opposite = svds(FIRST, with_scale(FIRST, -1.0))
    assert singular_task_interference(opposite, norm=norm) == value  # type: ignore[arg-type]
    assert singular_task_interference(svds(FIRST, SECOND), norm=norm) == 0  # type: ignore[arg-type]


def test_interference_needs_both_sides() -> None:
    same_output = LowRankUpdate(E1, E2.mT, 1.0)
    assert singular_task_interference(svds(FIRST, same_output)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(1, 3), st.integers(1, 3), seeds)
def test_interference_is_the_sum_over_pairs_of_directions(m: int, n: int, r: int, s: int, seed: int) -> None:
    parts = svds(random_update(m, n, r, seed), random_update(m, n, s, seed + 1))
    # Naive: ΔU Σ ΔV entry by entry, both Δ zero inside a task.
    task = [0] * len(parts[0].S) + [1] * len(parts[1].S)
    U = [u for svd in parts for u in svd.U.mT]
    V = [v for svd in parts for v in svd.V.mT]
    S = [float(value) for svd in parts for value in svd.S]
    expected = 0.0
    for i in range(len(S)):
        for j in range(len(S)):
            entry = 0.0
            for k in range(len(S)):
                if task[i] != task[k] and task[k] != task[j]:
                    entry += float(U[i] @ U[k]) * S[k] * float(V[k] @ V[j])
            expected += abs(entry)
    assert singular_task_interference(parts) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_interference_does_not_depend_on_order_or_rotation_and_scales() -> None:
    a, b, c = (random_update(9, 7, 2, seed=seed) for seed in (1, 2, 3))
    value = singular_task_interference(svds(a, b, c))
    assert singular_task_interference(svds(c, a, b)) == pytest.approx(value, rel=1e-12)
    P, Q = torch.linalg.qr(gaussian(9, 9, seed=4)).Q, torch.linalg.qr(gaussian(7, 7, seed=5)).Q
    rotated = [LowRankUpdate(P @ u.up, u.down @ Q.mT, 3 * u.scale) for u in (a, b, c)]
    assert singular_task_interference(svds(*rotated)) == pytest.approx(3 * value, rel=1e-12)
    assert singular_task_interference(svds(a)) == pytest.approx(0, abs=1e-12)


def test_induced_norm_is_the_largest_column_sum() -> None:
    # b overlaps with half of a's directions only, so rows and columns differ.
    a = LowRankUpdate(torch.eye(4, 2), torch.eye(2, 4) * torch.tensor([[5.0], [1.0]]), 1.0)
    parts = svds(a, LowRankUpdate(torch.full((4, 1), 0.5), torch.eye(1, 4), 1.0))
    U = torch.hstack([svd.U for svd in parts])
    V = torch.hstack([svd.V for svd in parts])
    S = torch.cat([svd.S for svd in parts])
    eye = torch.eye(3, dtype=torch.float64)
    matrix = (U.mT @ U - eye) @ torch.diag(S) @ (V.mT @ V - eye)
    for norm, expected in (
        ("induced-1", torch.linalg.matrix_norm(matrix, ord=1)),
        ("nuclear", torch.linalg.matrix_norm(matrix, ord="nuc")),
        ("entrywise", matrix.abs().sum()),
    ):
        value = singular_task_interference(parts, norm=norm)  # type: ignore[arg-type]
        assert value == pytest.approx(float(expected), rel=1e-12)


# -- sign conflict --------------------------------------------------------------------------------------


def test_opposite_updates_conflict_everywhere_and_equal_or_disjoint_ones_nowhere() -> None:
    assert sign_conflict([FIRST, with_scale(FIRST, -1.0)]) == 1
    assert sign_conflict([FIRST, FIRST]) == 0
    assert sign_conflict([FIRST, SECOND]) == 0


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(1, 20), seeds)
def test_sign_conflict_is_that_of_the_dense_matrices_for_any_block(
    m: int, n: int, count: int, block_rows: int, seed: int
) -> None:
    updates: list[Update] = [random_update(m, n, 2, seed + t, scale=(-1.0) ** t) for t in range(count)]
    updates.append(DenseUpdate(gaussian(m, n, seed=seed + 50), scale=-1.0))
    signs = torch.stack([update.dense().sign() for update in updates])
    expected = float(((signs.amax(0) == 1) & (signs.amin(0) == -1)).double().mean())
    assert sign_conflict(updates, block_rows=block_rows) == expected


def test_entries_where_no_update_acts_are_not_counted() -> None:
    a = DenseUpdate(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    b = DenseUpdate(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    assert sign_conflict([a, b]) == 0.5
    assert math.isnan(sign_conflict([with_scale(a, 0.0), with_scale(b, 0.0)]))


@pytest.mark.parametrize("count", [2, 3])
def test_unrelated_updates_conflict_on_the_share_of_fair_coins(count: int) -> None:
    # Entries of one update are dependent through its factors; over 64 updates the mean is known to 0.01.
    shares = [
        sign_conflict([random_update(40, 30, 4, seed=100 * trial + t) for t in range(count)]) for trial in range(64)
    ]
    assert sum(shares) / 64 == pytest.approx(1 - 2.0 ** (1 - count), abs=0.03)


# -- averaging factors ----------------------------------------------------------------------------------


def test_averaging_factors_is_not_averaging_updates() -> None:
    mean_of_factors = LowRankUpdate((E1 + E2) / 2, ((E1 + E2) / 2).mT, 1.0)
    mean_of_updates = LowRankUpdate(torch.hstack([E1, E2]) / 2, torch.hstack([E1, E2]).mT, 1.0)
    error = mean_of_factors.norm() ** 2 + mean_of_updates.norm() ** 2
    error -= 2 * update_inner(mean_of_factors, mean_of_updates)
    assert math.sqrt(error) == pytest.approx(0.5, rel=1e-12)


# -- refusals -------------------------------------------------------------------------------------------


def test_updates_of_different_shapes_are_refused() -> None:
    other = random_update(4, 5, 1, seed=1)
    for measure in (update_inner, update_cosine):
        with pytest.raises(ValueError, match=r"all of one shape .* got \[\(4, 4\), \(4, 5\)\]"):
            measure(FIRST, other)
    with pytest.raises(ValueError, match=r"all of one shape .* got \[\(4, 4\), \(4, 5\)\]"):
        sign_conflict([FIRST, other])
    with pytest.raises(ValueError, match=r"svds: expected .* got \[\(4, 4\), \(4, 5\)\]"):
        singular_task_interference(svds(FIRST, other))


def test_no_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one update"):
        sign_conflict([])
    with pytest.raises(ValueError, match="at least one update"):
        singular_task_interference([])


def test_an_unknown_scale_is_refused_until_it_is_set() -> None:
    unknown = with_scale(FIRST, math.nan)
    for measure in (update_inner, update_cosine):
        with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
            measure(unknown, FIRST)
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        sign_conflict([FIRST, unknown])
    assert update_cosine(with_scale(unknown, 1.0), FIRST) == 1


def test_an_update_with_nan_is_refused() -> None:
    bad = LowRankUpdate(torch.full((4, 1), math.nan), torch.ones(1, 4), 1.0)
    for measure in (update_inner, update_cosine):
        with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
            measure(bad, FIRST)
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        sign_conflict([FIRST, bad])


def test_an_unknown_norm_and_an_empty_block_are_refused() -> None:
    with pytest.raises(ValueError, match="norm: expected 'entrywise', 'nuclear' or 'induced-1', got '1'"):
        singular_task_interference(svds(FIRST), norm="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_rows: expected at least 1, got 0"):
        sign_conflict([FIRST], block_rows=0)
