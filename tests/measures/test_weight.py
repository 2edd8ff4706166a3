import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import ArpackNoConvergence
from torch import Tensor

from lora_analysis.errors import BaseWeightsError
from lora_analysis.measures.projection_null import projection_null_draws
from lora_analysis.measures.weight import (
    projected_weight,
    require_shape,
    weight_norm,
    weight_product,
    weight_spectrum,
)
from lora_analysis.update import LowRankUpdate, Svd

EXACT = 1e-12
"""Float64 rounding over a few dozen operations."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_update(d_out: int, d_in: int, r: int, seed: int) -> LowRankUpdate:
    return LowRankUpdate(gaussian(d_out, r, seed=seed), gaussian(r, d_in, seed=seed + 1), 0.5)


# -- the pass over W ------------------------------------------------------------------------------------


def test_the_projection_on_the_weights_own_pair_is_its_singular_value() -> None:
    weight = gaussian(8, 6)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    for k in range(6):
        pair = Svd(U[:, k : k + 1], torch.ones(1, dtype=torch.float64), Vh[k : k + 1])
        assert projected_weight(weight, pair).item() == pytest.approx(S[k].item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
def test_projection_equals_the_dense_float64_product(dtype: torch.dtype, layout: str) -> None:
    # 300 rows: not a multiple of the block.
    weight = gaussian(300, 170).to(dtype)
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    svd = random_update(300, 170, 5, seed=3).svd()
    G = projected_weight(weight, svd)
    assert G.dtype == torch.float64
    torch.testing.assert_close(G, svd.U.mT @ weight.double() @ svd.V, rtol=0, atol=1e-12)


def test_the_pass_converts_no_whole_weight_and_leaves_it_alone() -> None:
    weight = torch.nn.Parameter(gaussian(64, 32).bfloat16())
    before = weight.detach().clone()
    G = projected_weight(weight, random_update(64, 32, 2, seed=1).svd())
    assert not G.requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_is_that_of_the_float64_copy_on_either_side(transposed: bool) -> None:
    weight = gaussian(300, 170).bfloat16()
    weight = weight.mT if transposed else weight
    X = gaussian(weight.shape[1], 3, seed=1)
    torch.testing.assert_close(weight_product(weight, X), weight.double() @ X, rtol=0, atol=1e-12)


def test_the_norm_is_that_of_the_float64_copy() -> None:
    weight = gaussian(300, 50).bfloat16()
    assert weight_norm(weight) == pytest.approx(float(np.linalg.norm(weight.double().numpy())), rel=EXACT)


# -- the spectrum of W ----------------------------------------------------------------------------------


def heavy_tailed(d_out: int, d_in: int, power: float) -> tuple[Tensor, Tensor]:
    """A float32 weight with singular values about l**-power, and its true ones."""
    p = min(d_out, d_in)
    left, right = torch.linalg.qr(gaussian(d_out, p)).Q, torch.linalg.qr(gaussian(d_in, p, seed=1)).Q
    weight = (left * torch.arange(1, p + 1, dtype=torch.float64) ** -power @ right.mT).float()
    return weight, torch.linalg.svdvals(weight.double())


def test_a_small_weight_has_its_whole_spectrum() -> None:
    weight = gaussian(40, 30).bfloat16()
    spectrum = weight_spectrum(weight, 3)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.S.numpy(), expected, rtol=1e-12)
    assert spectrum.complete
    assert spectrum.norm**2 == pytest.approx(float((expected**2).sum()), rel=EXACT)
    assert spectrum.fourth_moment == pytest.approx(float((expected**4).sum()), rel=EXACT)
    assert spectrum.bound < 1e-12 * spectrum.S[0].item()


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_top_of_a_large_weight_is_that_of_the_dense_decomposition(power: float) -> None:
    weight, true = heavy_tailed(1100, 1040, power)
    for matrix in (weight, weight.mT):
        spectrum = weight_spectrum(matrix, 24)
        assert not spectrum.complete
        assert len(spectrum.S) == 24
        # The promise is 1e-5; after the Rayleigh-Ritz step the error is of second order.
        torch.testing.assert_close(spectrum.S, true[:24], rtol=1e-8, atol=0)
        assert bool(((spectrum.S - true[:24]).abs() <= spectrum.bound).all())
        assert spectrum.bound <= 1e-5 * spectrum.S[0].item()
        assert spectrum.norm == pytest.approx(float(true.norm()), rel=1e-10)
        # Eight probes know the rest's fourth moment to about 1/sqrt(8 · its participation ratio / 2).
        rest = float((true[24:] ** 4).sum())
        assert spectrum.fourth_moment - float((true[:24] ** 4).sum()) == pytest.approx(rest, rel=0.5)


def test_the_residual_bound_holds_where_the_spectrum_has_no_gaps() -> None:
    # A spectrum without gaps: Lanczos is cut off by float32, so that the bound is not mere rounding.
    weight = gaussian(1200, 1100).float()
    spectrum = weight_spectrum(weight, 4)
    true = torch.linalg.svdvals(weight.double())
    assert 0 < spectrum.bound < 1e-5 * spectrum.S[-1].item()
    distance = (spectrum.S[:, None] - true).abs().amin(dim=1)
    assert bool((distance <= spectrum.bound).all())


def test_a_large_weight_of_low_rank_has_zeros_after_its_rank() -> None:
    weight = gaussian(1200, 3) @ gaussian(3, 1100, seed=1)
    spectrum = weight_spectrum(weight, 8)
    true = torch.linalg.svdvals(weight)[:8]
    torch.testing.assert_close(spectrum.S, true, rtol=1e-10, atol=1e-7 * true[0].item())
    draws = projection_null_draws(spectrum, (1200, 1100), 8, draws=200)
    assert bool(draws.isfinite().all())


def test_the_same_seed_gives_the_same_spectrum() -> None:
    weight = heavy_tailed(1100, 1040, 0.5)[0]
    first, second = weight_spectrum(weight, 8), weight_spectrum(weight, 8)
    assert torch.equal(first.S, second.S)
    assert first.fourth_moment == second.fourth_moment


def test_many_values_of_a_large_weight_are_computed_densely() -> None:
    weight = gaussian(1040, 1030).float()
    assert weight_spectrum(weight, 400).complete


def test_a_weight_on_which_lanczos_does_not_converge_is_decomposed_densely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stalled(*args: object, **kwargs: object) -> None:
        raise ArpackNoConvergence("stalled", np.empty((0, 0)), np.empty((0, 0)))

    monkeypatch.setattr("scipy.sparse.linalg.svds", stalled)
    weight = gaussian(1040, 1030).float()
    spectrum = weight_spectrum(weight, 4)
    assert spectrum.complete
    torch.testing.assert_close(spectrum.S, torch.linalg.svdvals(weight.double()), rtol=1e-12, atol=0)


def test_a_large_zero_weight_is_no_trouble() -> None:
    spectrum = weight_spectrum(torch.zeros(1100, 1040), 8)
    assert (spectrum.norm, spectrum.fourth_moment, spectrum.complete) == (0, 0, True)
    assert spectrum.S.tolist() == [0] * 1040


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.integers(0, 1000))
def test_the_spectrum_obeys_weyl_and_interlacing(m: int, n: int, r: int, seed: int) -> None:
    weight, update = gaussian(m, n, seed=seed), random_update(m, n, r, seed + 1)
    old = weight_spectrum(weight, 1).S
    new = weight_spectrum(weight + update.dense(), 1).S
    slack = 1e-12 * float(old[0] + new[0])
    assert bool(((new - old).abs() <= update.singular_values()[0] + slack).all())
    assert bool((new[r:] <= old[: len(old) - r] + slack).all())


# -- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_weight_that_is_not_finite_is_refused(bad: float, layout: str) -> None:
    weight = gaussian(6, 5).bfloat16()
    weight[3, 2] = bad
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    svd = random_update(6, 5, 2, seed=1).svd()
    for measure in (
        lambda: weight_norm(weight),
        lambda: weight_spectrum(weight, 2),
        lambda: projected_weight(weight, svd),
    ):
        with pytest.raises(BaseWeightsError, match="the base weight holds NaN or infinities"):
            measure()


def test_a_weight_of_another_shape_is_refused() -> None:
    svd = random_update(6, 5, 2, seed=1).svd()
    for measure in (projected_weight, require_shape):
        with pytest.raises(BaseWeightsError, match=r"update's shape \(6, 5\), got \(5, 6\)"):
            measure(gaussian(5, 6), svd)


def test_a_weight_that_is_no_floating_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight: expected a matrix, got shape \(3,\)"):
        weight_spectrum(torch.ones(3), 1)
    with pytest.raises(TypeError, match=r"got torch\.int8\. Dequantise"):
        weight_spectrum(torch.ones(3, 3, dtype=torch.int8), 1)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        weight_spectrum(torch.ones(3, 3), 0)
