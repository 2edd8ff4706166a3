"""Kronecker products: every number against the dense matrix that torch.kron or numpy forms."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Svd, rounding_error, with_scale

# Errors of the dense oracle's own SVD, relative to sigma_1.
DENSE = 1e-13
ORTHONORMAL = 1e-12


def random_matrix(m: int, n: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)))


def dense_oracle(update: KroneckerUpdate) -> np.ndarray:
    sides = []
    for side in (update.left, update.right):
        factors = (side.up, side.down) if isinstance(side, LowRankUpdate) else (side.matrix,)
        sides.append(np.linalg.multi_dot([f.double().numpy() for f in (*factors, torch.eye(side.shape[1]))]))
    return update.scale * np.kron(*sides)


def assert_is_the_svd_of(update: KroneckerUpdate, matrix: np.ndarray) -> None:
    oracle = np.linalg.svd(matrix, compute_uv=False)
    size = DENSE * oracle[0]
    U, S, Vh = update.svd()
    count = len(S)
    assert (U.shape, Vh.shape) == ((matrix.shape[0], count), (count, matrix.shape[1]))
    np.testing.assert_allclose((U * S @ Vh).numpy(), matrix, rtol=0, atol=10 * size)
    for values in (S, update.singular_values()):
        assert bool((values[:-1] >= values[1:]).all())
        np.testing.assert_allclose(values.numpy(), oracle[:count], rtol=0, atol=size)
    np.testing.assert_allclose(oracle[count:], 0, atol=size)
    for basis in (U, Vh.mT):
        np.testing.assert_allclose((basis.mT @ basis).numpy(), np.eye(count), atol=ORTHONORMAL)
    np.testing.assert_allclose(update.dense().numpy(), matrix, rtol=1e-14, atol=size)
    assert update.norm() == pytest.approx(float(np.linalg.norm(matrix)), rel=1e-12)
    assert all(part.dtype == torch.float64 for part in (U, S, Vh, update.dense()))


seeds = st.integers(0, 2**32 - 1)
sides = st.tuples(st.integers(1, 5), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 6)))


def random_side(size: tuple[int, int, int | None], seed: int) -> LowRankUpdate | Tensor:
    m, n, r = size
    if r is None:
        return random_matrix(m, n, seed)
    return LowRankUpdate(random_matrix(m, r, seed), random_matrix(r, n, seed + 1), 1.0)


@given(sides, sides, seeds, st.one_of(st.floats(1e-3, 4), st.floats(-4, -1e-3)))
def test_any_two_sides_agree_with_their_dense_product(
    left: tuple[int, int, int | None], right: tuple[int, int, int | None], seed: int, scale: float
) -> None:
    update = KroneckerUpdate(random_side(left, seed), random_side(right, seed + 2), scale)
    assert update.shape == (left[0] * right[0], left[1] * right[1])
    assert_is_the_svd_of(update, dense_oracle(update))


@given(sides, sides, seeds, st.integers(0, 12))
def test_the_first_triples_are_those_of_the_whole(
    left: tuple[int, int, int | None], right: tuple[int, int, int | None], seed: int, k: int
) -> None:
    update = KroneckerUpdate(random_side(left, seed), random_side(right, seed + 2), -2.0)
    for some, whole in zip(update.svd(k), update.svd().top(k), strict=True):
        np.testing.assert_allclose(some.numpy(), whole.numpy(), rtol=0, atol=1e-15 * update.norm())


@given(sides, sides, seeds)
def test_transposing_both_sides_swaps_the_bases(
    left: tuple[int, int, int | None], right: tuple[int, int, int | None], seed: int
) -> None:
    a, b = random_matrix(*left[:2], seed), random_matrix(*right[:2], seed + 2)
    update, turned = KroneckerUpdate(a, b, 3.0), KroneckerUpdate(a.mT, b.mT, 3.0)
    np.testing.assert_allclose(turned.dense().numpy(), update.dense().mT.numpy(), rtol=0, atol=0)
    np.testing.assert_allclose(
        turned.singular_values().numpy(), update.singular_values().numpy(), rtol=0, atol=DENSE * update.norm()
    )


def test_the_worked_example_of_two_diagonals() -> None:
    update = KroneckerUpdate(torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 5.0])), -2.0)
    assert update.singular_values().tolist() == [30.0, 12.0, 10.0, 4.0]
    assert update.dense().diagonal().tolist() == [-4.0, -10.0, -12.0, -30.0]
    U, S, Vh = update.svd(2)
    assert S.tolist() == [30.0, 12.0]
    assert (U * S @ Vh).diagonal().tolist() == [0.0, 0.0, -12.0, -30.0]


def test_equal_products_keep_bases_orthonormal_and_their_order_for_every_k() -> None:
    update = KroneckerUpdate(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0])))
    assert update.singular_values().tolist() == [4.0, 2.0, 2.0, 1.0]
    whole = update.svd()
    np.testing.assert_allclose((whole.U.mT @ whole.U).numpy(), np.eye(4), atol=ORTHONORMAL)
    for k in range(5):
        assert torch.equal(update.svd(k).U, whole.U[:, :k])


def test_zero_and_empty_sides_have_zero_or_no_values() -> None:
    zero = KroneckerUpdate(torch.zeros(2, 3), torch.ones(3, 2))
    assert zero.norm() == 0.0
    assert zero.singular_values().tolist() == [0.0] * 4
    empty = KroneckerUpdate(LowRankUpdate(torch.ones(3, 0), torch.ones(0, 2), 1.0), torch.ones(3, 2))
    assert (empty.r, empty.norm(), len(empty.singular_values())) == (0, 0.0, 0)
    assert [tuple(part.shape) for part in empty.svd()] == [(9, 0), (0,), (0, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_dtypes_are_kept_and_computed_in_double(dtype: torch.dtype) -> None:
    up, down = random_matrix(4, 2, 1).to(dtype), random_matrix(2, 5, 2).to(dtype)
    update = KroneckerUpdate(random_matrix(3, 2, 0).to(dtype), LowRankUpdate(up, down, 1.0), 0.5)
    assert_is_the_svd_of(update, dense_oracle(update))
    assert update.eps == rounding_error(dtype)


def test_eps_is_of_the_coarser_side_and_unknown_if_either_is() -> None:
    fine, coarse = torch.ones(2, 2), torch.ones(2, 2).half()
    assert KroneckerUpdate(fine, coarse).eps == KroneckerUpdate(coarse, fine).eps == rounding_error(torch.float16)
    unknown = DenseUpdate(fine, stored_eps=math.nan)
    assert math.isnan(KroneckerUpdate(unknown, coarse).eps)
    assert math.isnan(KroneckerUpdate(coarse, unknown).eps)


def test_r_is_declared_or_the_product_of_those_of_the_sides() -> None:
    low_rank = LowRankUpdate(torch.ones(6, 2), torch.ones(2, 5), 1.0)
    assert KroneckerUpdate(torch.ones(3, 4), low_rank).r == 6
    assert KroneckerUpdate(torch.ones(3, 4), low_rank, declared_r=2).r == 2


ASKED: dict[str, Callable[[KroneckerUpdate], object]] = {
    "norm": lambda update: update.norm(),
    "singular_values": lambda update: update.singular_values(),
    "svd": lambda update: update.svd(),
    "svd of the first": lambda update: update.svd(1),
}


@pytest.mark.parametrize("ask", [*ASKED.values(), lambda update: update.dense()], ids=[*ASKED, "dense"])
def test_an_unknown_scale_defines_no_number(ask: Callable[[KroneckerUpdate], object]) -> None:
    update = KroneckerUpdate(torch.eye(2), torch.ones(2, 3), math.nan, declared_r=7)
    with pytest.raises(UndefinedUpdateError, match=r"scale of this update is unknown.*Pass alpha="):
        ask(update)
    known = with_scale(update, 1.0)
    assert ask(known) is not None
    assert (known.left, known.right, known.r) == (update.left, update.right, 7)


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["left", "right"])
def test_nan_and_infinities_have_no_spectrum(
    ask: Callable[[KroneckerUpdate], object], value: float, where: str
) -> None:
    given = {"left": torch.ones(2, 3), "right": torch.ones(3, 2)}
    given[where][0, 0] = value
    update = KroneckerUpdate(**given)
    assert not update.finite
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        ask(update)


@pytest.mark.parametrize(
    ("left", "error", "match"),
    [
        (torch.ones(2, 2, 1), ValueError, r"left: expected a matrix, got shape \(2, 2, 1\)"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, r"left: expected floating-point numbers, got torch.int32"),
        (DenseUpdate(torch.ones(2, 2), scale=2.0), ValueError, r"left: expected a scale of 1, got 2"),
        (DenseUpdate(torch.ones(2, 2), scale=math.nan), ValueError, r"left: expected a scale of 1, got nan"),
        (KroneckerUpdate(torch.eye(2), torch.eye(2)), TypeError, "left: expected a LowRankUpdate.*KroneckerUpdate"),
        ([[1.0]], TypeError, "left: expected a LowRankUpdate, a DenseUpdate or a tensor, got list"),
    ],
    ids=["three axes", "integers", "a scale", "no scale", "a product", "a list"],
)
def test_what_is_no_side_is_refused(left: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KroneckerUpdate(left, torch.eye(2))  # type: ignore[arg-type]


def test_kronecker_updates_are_immutable_and_pickle() -> None:
    update = KroneckerUpdate(random_matrix(2, 3, 0), random_matrix(4, 5, 1), 0.5, declared_r=3)
    with pytest.raises(FrozenInstanceError, match="scale"):
        update.scale = 1.0  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(update))
    assert torch.equal(again.dense(), update.dense())
    assert (again.scale, again.shape, again.r) == (0.5, (8, 15), 3)
    assert repr(update) == "KroneckerUpdate(8x15 = 2x3 by 4x5, scale=0.5)"


def test_sides_that_ask_for_gradients_are_fine() -> None:
    update = KroneckerUpdate(torch.ones(2, 2, requires_grad=True), torch.eye(3, requires_grad=True))
    svd: Svd = update.svd()
    assert not any(part.requires_grad for part in (*svd, update.singular_values(), update.dense()))


def test_a_few_vectors_of_a_large_product_take_milliseconds() -> None:
    # 2048 x 2048: the dense SVD takes seconds, the two of 32 x 32 and 64 x 64 about a millisecond.
    update = KroneckerUpdate(random_matrix(32, 32, 0), random_matrix(64, 64, 1))
    update.svd(8)
    start = time.perf_counter()
    S, svd = update.singular_values(), update.svd(8)
    assert time.perf_counter() - start < 1
    assert (len(S), tuple(svd.U.shape)) == (2048, (2048, 8))
    np.testing.assert_allclose(S[:8].numpy(), svd.S.numpy(), rtol=1e-13)
