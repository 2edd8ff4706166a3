"""Tables of updates that are not one product of two factors: Kronecker products and full matrices."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import lora_analysis as la
from lora_analysis.measures.interference import sign_conflict, update_cosine

SCALE = -0.5


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def updates(seed=0):
    """A Kronecker product and a dense matrix of one shape, 12 x 10."""
    thin = la.LowRankUpdate(normal(4, 2, seed=seed), normal(2, 5, seed=seed + 1), 1.0)
    return {
        "kronecker": la.KroneckerUpdate(normal(3, 2, seed=seed + 2), thin, SCALE),
        "dense": la.DenseUpdate(normal(12, 10, seed=seed + 3), scale=SCALE),
    }


def as_low_rank(update):
    """The same matrix as a product of its rows with the identity, which shares no code with the other kinds."""
    return la.LowRankUpdate(update.dense(), torch.eye(update.shape[1], dtype=torch.float64), 1.0)


@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_the_spectrum_is_that_of_the_matrix(kind):
    update = updates()[kind]
    row = la.spectrum_table(la.Adapter({"m": update})).iloc[0]
    S = np.linalg.svd(update.dense().numpy(), compute_uv=False)
    rank = {"kronecker": 4, "dense": 10}[kind]
    assert (row["numerical_rank"], row["r"], row["scale"], row["flags"]) == (rank, rank, SCALE, "")
    np.testing.assert_allclose(row["singular_values"], S[:rank], rtol=1e-10)
    assert row["norm"] == pytest.approx(np.linalg.norm(S), rel=1e-12)
    assert row["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-10)
    # How storage noise spreads over such a spectrum is not known, so no floor is claimed.
    assert row["noise_floors"] is None
    assert row["resolved_rank"] is pd.NA


@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_similarity_is_that_of_the_matrices_as_low_rank_products(kind):
    a, b = updates()[kind], updates(10)[kind]
    found = la.similarity_table(la.Adapter({"m": a}), la.Adapter({"m": b}), cells="all", draws=10)
    plain = la.similarity_table(
        la.Adapter({"m": as_low_rank(a)}), la.Adapter({"m": as_low_rank(b)}), cells="all", draws=10
    )
    merged = found.merge(plain, on=["side", "i", "j"], how="left", suffixes=("", "_plain"))
    np.testing.assert_allclose(merged["phi"], merged["phi_plain"], atol=1e-10)
    assert set(found["side"]) == {"in", "out"}
    assert found["phi"].notna().all()


@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_amplification_is_that_of_the_matrix_as_a_low_rank_product(kind):
    update, base = updates()[kind], la.load_base({"m.weight": normal(12, 10, seed=9)})
    ks = [1, 2, 4]
    found, plain = (
        la.amplification_table(la.Adapter({"m": kind}), base, ks, draws=20) for kind in (update, as_low_rank(update))
    )
    numbers = [name for name in found if found[name].dtype == float]
    np.testing.assert_allclose(found[numbers], plain[numbers], rtol=1e-8, equal_nan=True)
    assert found["amplification"].notna().all()


def test_cosines_and_sign_conflicts_are_those_of_the_matrices():
    everything = [*updates().values(), as_low_rank(updates(20)["dense"])]
    for a in everything:
        for b in everything:
            x, y = (update.dense().numpy().ravel() for update in (a, b))
            assert update_cosine(a, b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
            assert sign_conflict([a, b], block_rows=5) == pytest.approx(float((x * y < 0).mean()), abs=1e-12)


@pytest.mark.parametrize("kind", ["kronecker", "dense"])
def test_an_unknown_scale_leaves_what_does_not_depend_on_it(kind):
    update = updates()[kind]
    unknown = la.Adapter({"m": la.with_scale(update, math.nan)})
    row = la.spectrum_table(unknown).iloc[0]
    known = la.spectrum_table(la.Adapter({"m": update})).iloc[0]
    assert row["flags"] == "unknown-scale"
    assert row["stable_rank"] == pytest.approx(known["stable_rank"], rel=1e-12)
    assert row["singular_values"] is None
    amplified = la.amplification_table(unknown, la.load_base({"m.weight": normal(12, 10, seed=9)}), [1], draws=0)
    assert amplified["amplification"].isna().all()
    assert amplified["gain"].notna().all()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_and_nonfinite_updates_are_flagged(value):
    word = "zero" if value == 0 else "nonfinite"
    adapter = la.Adapter(
        {
            "kronecker": la.KroneckerUpdate(torch.full((2, 2), value), torch.ones(3, 2)),
            "dense": la.DenseUpdate(torch.full((6, 4), value)),
        }
    )
    base = la.load_base({f"{name}.weight": normal(6, 4) for name in adapter})
    assert la.spectrum_table(adapter)["flags"].tolist() == [word, word]
    assert la.amplification_table(adapter, base, [1], draws=0)["flags"].str.startswith(word).all()
    assert la.similarity_table(adapter, adapter, draws=10)["flags"].str.startswith(word).all()


def test_the_factors_of_what_has_none_are_refused_by_name():
    adapter = la.Adapter(updates())
    with pytest.raises(la.UnsupportedAdapterError, match=r"KroneckerUpdate\(12x10.*Analyse it with target='update'"):
        la.similarity_table(adapter, target="A", pairs=[("kronecker", "dense")])
