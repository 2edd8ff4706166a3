"""Lengths and directions of rows and columns, against the matrices formed in higher precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_analysis.errors import BaseWeightsError, UndefinedUpdateError
from lora_analysis.measures.magnitude import MagnitudeDirection, magnitude_direction_change
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Update, with_scale

# Of lengths and cosines, in float64, after sums of some dozens of terms.
CLOSE = 1e-12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_update(d_out: int, d_in: int, r: int, scale: float = 0.3, seed: int = 1) -> LowRankUpdate:
    return LowRankUpdate(normal(d_out, r, seed=seed), normal(r, d_in, seed=seed + 1), scale)


def oracle(weight: Tensor, delta_w: Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """``m' - m`` and ``1 - cos``, vector by vector, with fifty digits."""
    pairs = zip(*(m.double() if axis == 1 else m.double().mT for m in (weight, delta_w)), strict=True)
    rows = []
    with localcontext(prec=50):
        for w, d in pairs:
            before = [Decimal(x) for x in w.tolist()]
            after = [x + Decimal(y) for x, y in zip(before, d.tolist(), strict=True)]
            m, n = (sum(x * x for x in vector).sqrt() for vector in (before, after))
            inner = sum(x * y for x, y in zip(before, after, strict=True))
            rows.append((float(n - m), float(1 - inner / (m * n)) if m and n else math.nan))
    magnitude, direction = np.array(rows).T
    return magnitude, direction


def assert_agrees(found: MagnitudeDirection, weight: Tensor, delta_w: Tensor, axis: int, rel: float = CLOSE) -> None:
    magnitude, direction = oracle(weight, delta_w, axis)
    size = np.abs(magnitude).max()
    np.testing.assert_allclose(found.magnitude_changes.numpy(), magnitude, rtol=rel, atol=rel * size)
    np.testing.assert_allclose(found.direction_changes.numpy(), direction, rtol=1e-9, atol=rel * np.nanmax(direction))
    np.testing.assert_allclose(found.magnitudes.numpy(), weight.double().norm(dim=axis).numpy(), rtol=CLOSE)
    assert found.magnitude_change == pytest.approx(np.abs(magnitude).mean(), rel=1e-9)
    assert found.direction_change == pytest.approx(np.nanmean(direction), rel=1e-9)


def test_the_worked_example_of_one_entry() -> None:
    weight = torch.eye(2)
    update = LowRankUpdate(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0]]), 1.0)
    columns, rows = (magnitude_direction_change(weight, update, axis=axis) for axis in (0, 1))
    root, share = math.sqrt(2) - 1, 1 - 1 / math.sqrt(2)
    assert columns.magnitude_changes.tolist() == pytest.approx([root, 0.0], abs=1e-15)
    assert columns.direction_changes.tolist() == pytest.approx([share, 0.0], abs=1e-15)
    assert rows.magnitude_changes.tolist() == pytest.approx([0.0, root], abs=1e-15)
    assert rows.direction_changes.tolist() == pytest.approx([0.0, share], abs=1e-15)
    for found in (columns, rows):
        assert found.magnitude_change == pytest.approx(root / 2, rel=1e-14)
        assert found.direction_change == pytest.approx(share / 2, rel=1e-14)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_any_dtype_and_layout_of_the_base_agrees_with_the_dense_matrices(
    axis: int, dtype: torch.dtype, layout: str
) -> None:
    weight = normal(300, 20).to(dtype)
    if layout == "columns":
        weight = normal(20, 300).to(dtype).mT
    elif layout == "strided":
        weight = normal(600, 40).to(dtype)[::2, ::2]
    update = random_update(300, 20, 3)
    found = magnitude_direction_change(weight, update, axis=axis)
    assert_agrees(found, weight, update.dense(), axis)
    assert found.magnitudes.shape == (weight.shape[1 - axis],)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_the_low_rank_route_agrees_with_the_dense_one(d_out: int, d_in: int, r: int, seed: int, axis: int) -> None:
    weight, update = normal(d_out, d_in, seed=seed), random_update(d_out, d_in, r, seed=seed + 1)
    low_rank = magnitude_direction_change(weight, update, axis=axis)
    dense = magnitude_direction_change(weight, DenseUpdate(update.dense()), axis=axis)
    for a, b in zip(low_rank[2:], dense[2:], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-8, atol=1e-10)
    turned = magnitude_direction_change(
        weight.mT, LowRankUpdate(update.down.mT, update.up.mT, update.scale), axis=1 - axis
    )
    for a, b in zip(low_rank[2:], turned[2:], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["low rank", "dense"])
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9, 1e-12])
def test_tiny_updates_are_accurate(scale: float, kind: str, axis: int) -> None:
    weight, update = normal(12, 9), random_update(12, 9, 2, scale)
    used: Update = update if kind == "low rank" else DenseUpdate(update.dense())
    found = magnitude_direction_change(weight, used, axis=axis)
    assert_agrees(found, weight, update.dense(), axis)
    # The naive 1 - cos is 0 or rounding here.
    assert 0 < found.direction_change < scale**2 * 100


@pytest.mark.parametrize("left", [1e-3, 1e-5, 1e-9])
def test_updates_that_nearly_undo_the_weight_are_accurate(left: float) -> None:
    weight = normal(6, 4)
    delta_w = -weight + left * normal(6, 4, seed=5)
    factored = LowRankUpdate(delta_w, torch.eye(4, dtype=torch.float64), 1.0)
    for update in (DenseUpdate(delta_w), factored):
        found = magnitude_direction_change(weight, update)
        magnitude, direction = oracle(weight, delta_w, 1)
        np.testing.assert_allclose(found.magnitude_changes.numpy(), magnitude, rtol=1e-12)
        np.testing.assert_allclose(found.direction_changes.numpy(), direction, rtol=0, atol=1e-14 / left)


def test_scaling_the_weight_changes_no_direction_and_every_length() -> None:
    weight = normal(7, 5)
    for factor in (-1 / 2, 1e-8, 3.0):
        found = magnitude_direction_change(weight, DenseUpdate(factor * weight))
        np.testing.assert_allclose(found.magnitude_changes.numpy(), (factor * found.magnitudes).numpy(), rtol=1e-12)
        np.testing.assert_allclose(found.direction_changes.numpy(), 0, atol=1e-15)
    flipped = magnitude_direction_change(weight, DenseUpdate(-2 * weight))
    np.testing.assert_allclose(flipped.magnitude_changes.numpy(), 0, atol=1e-14)
    np.testing.assert_allclose(flipped.direction_changes.numpy(), 2, rtol=1e-14)


def test_gauges_with_huge_cancelling_columns_change_nothing() -> None:
    weight, update = normal(9, 8), random_update(9, 8, 2, 1.0)
    big = 1e6 * normal(9, 1, seed=7)
    row = normal(1, 8, seed=8)
    gauge = LowRankUpdate(torch.hstack([update.up, big, big]), torch.vstack([update.down, row, -row]), 1.0)
    plain, wild = (magnitude_direction_change(weight, used) for used in (update, gauge))
    np.testing.assert_allclose(wild.magnitude_changes.numpy(), plain.magnitude_changes.numpy(), atol=1e-8)
    np.testing.assert_allclose(wild.direction_changes.numpy(), plain.direction_changes.numpy(), atol=1e-8)


def test_zero_vectors_have_length_and_no_direction() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, 2.0]])
    delta_w = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]])
    for update in (DenseUpdate(delta_w), LowRankUpdate(delta_w, torch.eye(2), 1.0)):
        found = magnitude_direction_change(weight, update)
        assert found.magnitude_changes.tolist() == pytest.approx([0.0, 5.0, -5.0, 0.0], abs=1e-14)
        assert found.direction_changes[:3].isnan().all()
        assert found.direction_changes[3] == 0
        assert (found.magnitude_change, found.direction_change) == (pytest.approx(2.5), 0.0)
    nothing = magnitude_direction_change(torch.zeros(2, 2), DenseUpdate(torch.ones(2, 2)))
    assert math.isnan(nothing.direction_change)
    assert nothing.magnitude_change == pytest.approx(math.sqrt(2))


def test_a_zero_update_changes_nothing() -> None:
    found = magnitude_direction_change(normal(5, 4), LowRankUpdate(torch.zeros(5, 2), torch.ones(2, 4), 1.0))
    assert (found.magnitude_change, found.direction_change) == (0.0, 0.0)


def test_kronecker_updates_are_measured_as_their_matrix() -> None:
    update = KroneckerUpdate(normal(3, 2), normal(4, 5, seed=1), 0.1)
    weight = normal(12, 10, seed=2)
    assert_agrees(magnitude_direction_change(weight, update), weight, update.dense(), 1)


def test_dora_scales_lengths_alone() -> None:
    from lora_analysis.formats.products import true_update

    weight, nothing = normal(8, 6), LowRankUpdate(torch.zeros(8, 1), torch.zeros(1, 6), 1.0)
    magnitude = normal(8, seed=4).abs()
    found = magnitude_direction_change(weight, true_update(nothing, weight, magnitude))
    np.testing.assert_allclose(
        (found.magnitudes + found.magnitude_changes).numpy(), magnitude.numpy(), rtol=0, atol=CLOSE
    )
    assert found.direction_change < 1e-14


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda w, u: magnitude_direction_change(w, u, axis=2), ValueError, "axis: expected 0 or 1, got 2"),
        (lambda w, u: magnitude_direction_change(w[0], u), ValueError, "weight: expected a matrix"),
        (lambda w, u: magnitude_direction_change(w.int(), u), TypeError, "weight: expected floating-point"),
        (lambda w, u: magnitude_direction_change(w.mT, u), BaseWeightsError, r"update's shape \(5, 4\), got \(4, 5\)"),
        (lambda w, u: magnitude_direction_change(w / 0, u), BaseWeightsError, "base weight holds NaN or infinities"),
        (
            lambda w, u: magnitude_direction_change(w, with_scale(u, math.nan)),
            UndefinedUpdateError,
            "scale of this update is unknown",
        ),
        (
            lambda w, u: magnitude_direction_change(w, DenseUpdate(u.dense() / 0)),
            UndefinedUpdateError,
            "NaN or infinities",
        ),
    ],
    ids=["axis", "vector", "integers", "shape", "nonfinite base", "unknown scale", "nonfinite update"],
)
def test_what_has_no_lengths_is_refused(
    make: Callable[[Tensor, LowRankUpdate], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make(torch.ones(5, 4), random_update(5, 4, 2))
