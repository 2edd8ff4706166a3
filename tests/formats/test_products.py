"""Factors of files as updates, against einsum, torch.kron, and LyCORIS' and PEFT's own products."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora_analysis as la
from lora_analysis.errors import UndefinedUpdateError
from lora_analysis.formats.products import hadamard, kronecker, low_rank, true_update
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Update, rounding_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lycoris.functional import general, loha, lokr

EXACT = 1e-14


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed + math.prod(shape)).standard_normal(shape))


def assert_equals(update: Update, oracle: Tensor) -> None:
    """The matrix and its singular values are those of a dense tensor, its kernel unfolded."""
    matrix = oracle.flatten(1).double()
    assert update.shape == tuple(matrix.shape)
    size = float(matrix.norm())
    np.testing.assert_allclose(update.dense().numpy(), matrix.numpy(), rtol=0, atol=EXACT * size)
    S = update.singular_values()
    expected = torch.linalg.svdvals(matrix)
    np.testing.assert_allclose(S.numpy(), expected[: len(S)].numpy(), rtol=0, atol=1e-10 * size)
    np.testing.assert_allclose(expected[len(S) :].numpy(), 0, atol=1e-10 * size)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (2, 1, 3)], ids=str)
def test_a_convolution_is_unfolded_to_a_product(kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    up, down = normal(5, 2, *ones), normal(2, 4, *kernel)
    update = low_rank(up, down, 0.5)
    assert_equals(update, 0.5 * torch.einsum("pi,iq...->pq...", up.flatten(1), down))
    assert update.up.data_ptr() == up.data_ptr()  # not a copy
    assert low_rank(up.half(), down.half(), 0.5).eps == rounding_error(torch.float16)


def test_a_tucker_core_is_lycoris_rebuilt_weight() -> None:
    up, down, middle = normal(6, 3), normal(2, 5), normal(3, 2, 3, 3)
    oracle = general.rebuild_tucker(middle, up.mT, down)
    for thin in (lambda f: f, lambda f: f[:, :, None, None]):
        update = low_rank(thin(up), thin(down), 2.0, middle=middle)
        assert_equals(update, 2.0 * oracle)
        assert (update.r, update.up.shape) == (3, (6, 3))
    assert math.isnan(update.eps)


@pytest.mark.parametrize("shape", [(70, 80), (9, 7)], ids=["Khatri-Rao", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loha_is_the_elementwise_product_as_lycoris_makes_it(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w1, w2 = (
        (normal(shape[0], 4, seed=seed).to(dtype), normal(4, shape[1], seed=seed + 1).to(dtype)) for seed in (0, 2)
    )
    update = hadamard(w1, w2, 0.25)
    assert isinstance(update, LowRankUpdate if shape[0] > 64 else DenseUpdate)
    wide = [factor.double() for factor in (w1[1], w1[0], w2[1], w2[0])]
    assert_equals(update, loha.make_weight(*wide, torch.tensor(0.25).double()))
    assert math.isnan(update.eps)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_loha_is_the_same_matrix_by_either_route(d_out: int, d_in: int, r1: int, r2: int, seed: int) -> None:
    w1, w2 = (
        (normal(d_out, r, seed=seed + number), normal(r, d_in, seed=seed + 7 + number))
        for number, r in enumerate((r1, r2))
    )
    update = hadamard(w1, w2, -3.0)
    assert isinstance(update, LowRankUpdate) == (r1 * r2 < min(d_out, d_in) / 4)
    oracle = -3.0 * (w1[0] @ w1[1]) * (w2[0] @ w2[1])
    np.testing.assert_allclose(update.dense().numpy(), oracle.numpy(), rtol=0, atol=1e-13 * float(oracle.norm()))
    assert update.norm() == pytest.approx(float(oracle.norm()), rel=1e-9, abs=1e-300)


def test_loha_of_a_convolution_with_and_without_cores() -> None:
    w1, w2 = ((normal(6, 2, seed=seed), normal(2, 5 * 9, seed=seed + 1)) for seed in (0, 2))
    assert_equals(hadamard(w1, w2, 1.0), (w1[0] @ w1[1]) * (w2[0] @ w2[1]))
    folded = hadamard((w1[0], w1[1].reshape(2, 5, 3, 3)), w2, 1.0)
    assert torch.equal(folded.dense(), hadamard(w1, w2, 1.0).dense())
    t1, t2 = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=5)
    a1, b1, a2, b2 = normal(2, 64, seed=1), normal(2, 60, seed=2), normal(2, 64, seed=3), normal(2, 60, seed=4)
    oracle = loha.make_weight_tucker(t1, b1, a1, t2, b2, a2, torch.tensor(0.5).double())
    update = hadamard((a1, b1), (a2, b2), 0.5, cores=(t1, t2))
    assert isinstance(update, LowRankUpdate)
    assert_equals(update, oracle)
    small = hadamard((a1[:, :7], b1[:, :5]), (a2[:, :7], b2[:, :5]), 0.5, cores=(t1, t2), declared_r=9)
    assert isinstance(small, DenseUpdate)
    assert small.r == 9
    assert_equals(small, oracle[:7, :5])


def test_a_dense_loha_declares_the_r_of_its_file() -> None:
    w1, w2 = (normal(8, 3), normal(3, 8)), (normal(8, 3, seed=1), normal(3, 8, seed=1))
    assert hadamard(w1, w2, 1.0).r == 3
    assert hadamard(w1, w2, 1.0, declared_r=5).r == 5


def test_products_of_loha_claim_no_storage_noise_floor() -> None:
    bf16 = [normal(*shape, seed=seed).bfloat16() for seed, shape in enumerate(((70, 4), (4, 80)) * 2)]
    row = la.spectrum_table(la.Adapter({"m": hadamard(tuple(bf16[:2]), tuple(bf16[2:]), 1.0)})).iloc[0]
    assert row["noise_floors"] is None
    assert row["resolved_rank"] is pd.NA
    assert (row["numerical_rank"], row["flags"]) == (16, "")


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
@pytest.mark.parametrize("w1_split", [False, True], ids=["w1", "w1_a w1_b"])
@pytest.mark.parametrize("w2_split", [False, True], ids=["w2", "w2_a w2_b"])
def test_lokr_is_the_kronecker_product_as_lycoris_makes_it(
    kernel: tuple[int, ...], w1_split: bool, w2_split: bool
) -> None:
    w1 = (normal(3, 2), normal(2, 4)) if w1_split else normal(3, 4)
    w2 = (normal(5, 2), normal(2, 6 * math.prod(kernel))) if w2_split else normal(5, 6, *kernel)
    whole1 = w1[0] @ w1[1] if isinstance(w1, tuple) else w1
    whole2 = (w2[0] @ w2[1]).reshape(5, 6, *kernel) if isinstance(w2, tuple) else w2
    update = kronecker(w1, w2, -0.5, declared_r=2)
    assert (update.scale, update.r) == (-0.5, 2)
    assert_equals(update, lokr.make_kron(whole1, whole2, -0.5))


def test_lokr_with_a_core_is_lycoris_rebuilt_weight() -> None:
    w1, a, b, core = normal(3, 4), normal(2, 5), normal(2, 6), normal(2, 2, 3, 3)
    update = kronecker(w1, (a, b), 2.0, core=core)
    assert_equals(update, lokr.make_kron(w1, general.rebuild_tucker(core, a, b), 2.0))
    assert math.isnan(update.eps)
    assert kronecker(w1.half(), (a.half().mT, b.half()), 2.0).eps == rounding_error(torch.float16)


def test_lokr_keeps_the_stored_numbers() -> None:
    w1 = normal(3, 4).bfloat16()
    update = kronecker(w1, (normal(5, 2).half(), normal(2, 6).half()), math.nan)
    assert isinstance(update, KroneckerUpdate)
    assert isinstance(update.left, DenseUpdate)
    assert isinstance(update.right, LowRankUpdate)
    assert (update.left.matrix.dtype, update.right.up.dtype) == (torch.bfloat16, torch.float16)
    with pytest.raises(UndefinedUpdateError, match="scale of this update is unknown"):
        update.norm()


def hand_made_dora(delta: Tensor, weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    merged = weight.clone()
    merged += delta
    for index in range(merged.shape[1 - axis]):
        piece = (index, slice(None)) if axis == 1 else (slice(None), index)
        merged[piece] *= magnitude[index] / math.sqrt(float((merged[piece] ** 2).sum()))
    return merged - weight


@pytest.mark.parametrize("axis", [0, 1])
def test_the_true_update_of_dora_is_its_merged_weight_minus_the_base(axis: int) -> None:
    product, weight = LowRankUpdate(normal(6, 2), normal(2, 5), 0.5), normal(6, 5, seed=3)
    magnitude = normal(weight.shape[1 - axis], seed=9).abs()
    oracle = hand_made_dora(product.dense(), weight, magnitude, axis)
    for shape in ((-1,), (1, -1), (1, -1, 1, 1)):
        update = true_update(product, weight, magnitude.reshape(shape), axis=axis)
        assert_equals(update, oracle)
        assert (update.r, update.scale) == (2, 1.0)
        assert math.isnan(update.eps)


def test_the_true_update_is_what_peft_merges() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9, bias=False)).double()
    weight = model[0].weight.detach().clone()
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True))
    layer = tuned.base_model.model[0]
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    for parameter in (up, down, magnitude):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    update = true_update(low_rank(up.detach(), down.detach(), 3.0), weight, magnitude.detach())
    merged = tuned.merge_and_unload()[0].weight.detach()
    np.testing.assert_allclose(update.dense().numpy(), (merged - weight).numpy(), rtol=0, atol=1e-6)


def test_the_norms_of_a_convolution_per_input_channel_run_over_its_kernel() -> None:
    weight = normal(4, 3, 2, 2)
    magnitude = normal(3, seed=2).abs()
    norms = weight.transpose(0, 1).flatten(1).norm(dim=1)  # as LyCORIS does for a dora_scale of (1, in, 1, 1)
    oracle = weight * (magnitude / norms)[None, :, None, None] - weight
    nothing = LowRankUpdate(torch.zeros(4, 1), torch.zeros(1, 12), 1.0)
    update = true_update(nothing, weight.flatten(1), magnitude[None, :, None, None], axis=0, kernel=(2, 2))
    np.testing.assert_allclose(update.dense().numpy(), oracle.flatten(1).numpy(), atol=1e-14)


def test_magnitudes_of_the_base_itself_change_nothing() -> None:
    weight = normal(6, 5)
    nothing = LowRankUpdate(torch.zeros(6, 1), torch.zeros(1, 5), 1.0)
    for axis in (0, 1):
        update = true_update(nothing, weight, weight.norm(dim=axis), axis=axis)
        assert update.norm() < 1e-15 * float(weight.norm())


def test_a_row_without_direction_is_minus_the_base_or_undefined() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    cancels = LowRankUpdate(torch.tensor([[-1.0], [0.0]]), torch.tensor([[1.0, 2.0]]), 1.0)
    gone = true_update(cancels, weight, torch.tensor([0.0, 5.0]))
    assert gone.dense().tolist() == [[-1.0, -2.0], [0.0, 0.0]]
    undefined = true_update(cancels, weight, torch.tensor([1.0, 5.0]))
    assert not undefined.finite
    with pytest.raises(UndefinedUpdateError, match="NaN or infinities"):
        undefined.norm()


ONES = torch.ones
PAIR = (ONES(4, 2), ONES(2, 5))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: low_rank(ONES(4, 2, 3, 3), ONES(2, 5), 1.0), ValueError, r"up: .*got \(4, 2, 3, 3\)"),
        (lambda: low_rank(ONES(4, 2), ONES(3, 5), 1.0), ValueError, r"share r, got \(4, 2\) and \(3, 5\)"),
        (lambda: low_rank(ONES(4), ONES(3, 5), 1.0), ValueError, r"up: expected shape \(m, n\).*got \(4,\)"),
        (lambda: low_rank(ONES(4, 2), ONES(2), 1.0), ValueError, r"down: expected shape \(m, n\).*got \(2,\)"),
        (lambda: low_rank(ONES(4, 2), ONES(2, 3).int(), 1.0), TypeError, "down: expected floating-point"),
        (lambda: low_rank(*PAIR, 1.0, middle=ONES(2, 3, 1)), ValueError, r"core: .*\(2, in\), got \(2, 3, 1\)"),
        (lambda: low_rank(*PAIR, 1.0, middle=ONES(3, 2, 1)), ValueError, r"share r, got \(4, 2\) and \(3, 5\)"),
        (lambda: low_rank(*PAIR, 1.0, middle=ONES(2)), ValueError, r"core: .*got \(2,\)"),
        (lambda: low_rank(*PAIR, 1.0, middle=ONES(2, 2).int()), TypeError, "core: expected floating-point"),
        (lambda: hadamard(PAIR, (ONES(4, 2), ONES(2, 6)), 1.0), ValueError, "of one shape, got 4x5 and 4x6"),
        (lambda: hadamard(PAIR, (ONES(4, 2), ONES(3, 5)), 1.0), ValueError, r"w2: .*got \(4, 2\) and \(3, 5\)"),
        (lambda: hadamard((ONES(4, 2).int(), ONES(2, 5)), PAIR, 1.0), TypeError, "w1_a: expected floating-point"),
        (lambda: kronecker(ONES(2), ONES(2, 2), 1.0), ValueError, r"w1: expected shape .*got \(2,\)"),
        (lambda: kronecker(PAIR, (ONES(4, 2), ONES(3, 5)), 1.0), ValueError, r"w2: .*got \(4, 2\) and \(3, 5\)"),
        (lambda: kronecker(ONES(2, 2), ONES(2, 2), 1.0, core=ONES(2, 2, 1)), ValueError, "w2: expected two factors"),
    ],
)
def test_factors_that_do_not_fit_are_refused(make, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_magnitudes_that_do_not_fit_are_refused() -> None:
    product, weight = low_rank(*PAIR, 1.0), ONES(4, 5)
    with pytest.raises(
        ValueError, match=r"magnitude: expected 4 numbers for the norms over axis 1 of 4x5, got .*\(5,\)"
    ):
        true_update(product, weight, ONES(5))
    with pytest.raises(ValueError, match=r"magnitude: expected 5 numbers for the norms over axis 0"):
        true_update(product, weight, ONES(1, 4), axis=0)
    with pytest.raises(ValueError, match="magnitude: expected 1 numbers"):
        true_update(product, weight, ONES(1), axis=0, kernel=(2, 2))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 5\) like the update, got \(5, 4\)"):
        true_update(product, weight.mT, ONES(4))
    with pytest.raises(ValueError, match="axis: expected 0 or 1, got 2"):
        true_update(product, weight, ONES(4), axis=2)
    with pytest.raises(UndefinedUpdateError, match="scale of this update is unknown"):
        true_update(low_rank(*PAIR, math.nan), weight, ONES(4))
