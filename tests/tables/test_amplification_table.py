import math

import numpy as np
import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.amplification import COLUMNS


def random_update(d_out, d_in, r, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator) for shape in ((d_out, r), (r, d_in)))
    return la.LowRankUpdate(up, down, scale)


def oracle(update, weight, k):
    """The columns from dense numpy matrices."""
    w = weight.double().numpy()
    m, n = w.shape
    delta_w = update.scale * update.up.double().numpy() @ update.down.double().numpy()
    u, s, vh = np.linalg.svd(delta_w)
    top = np.linalg.svd(w, compute_uv=False)
    part = (u[:, :k] * s[:k]) @ vh[:k]
    projected = np.linalg.norm(u[:, :k].T @ w @ vh[:k].T)
    random = np.linalg.norm(w) * k / math.sqrt(m * n)
    g = np.array([u[:, i] @ w @ vh[i] for i in range(k)])
    return {
        "norm_update": np.linalg.norm(part),
        "norm_base": np.linalg.norm(w),
        "projected": projected,
        "projected_top": np.linalg.norm(top[:k]),
        "projected_null_rms": random,
        "amplification": np.linalg.norm(part) / projected,
        "amplification_null": np.linalg.norm(part) / random,
        "gain": projected / random,
        "ceiling_fraction": projected / np.linalg.norm(top[:k]),
        "signed_positive": (g > 0).mean(),
        "cosine": (part * w).sum() / np.linalg.norm(part) / np.linalg.norm(w),
    }


def test_every_column_equals_a_dense_oracle():
    update = random_update(30, 20, 5, scale=-0.5)
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    table = la.amplification_table(la.Adapter({"m": update}), la.load_base({"m.weight": weight}))
    assert tuple(table.columns) == COLUMNS
    assert table["k"].tolist() == [1, 2, 4, 5]
    for row in table.to_dict("records"):
        for column, value in oracle(update, weight, row["k"]).items():
            assert row[column] == pytest.approx(value, rel=1e-9, abs=1e-12), column
        assert math.isnan(row["z"]) == (row["k"] == 1)
        assert 0 < row["p"] <= 1


def test_an_update_along_the_base_is_found_and_a_random_one_is_not():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight)
    along = la.LowRankUpdate(U[:, :4] * S[:4], Vh[:4], 1.0)
    adapter = la.Adapter({"along": along, "random": random_update(64, 64, 4)})
    table = la.amplification_table(
        adapter, la.load_base({"along.weight": weight, "random.weight": weight}), ks=[4]
    ).set_index("module")
    assert table.loc["along", "ceiling_fraction"] == pytest.approx(1)
    assert table.loc["along", "signed_positive"] == 1
    assert table.loc["along", "p"] == 0.001
    assert table.loc["random", "p"] > 0.01


def test_transposed_and_sliced_targets_find_their_matrix():
    update = random_update(8, 6, 2)
    fused = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))  # stored (d_in, 3 d_out), as GPT-2 does
    target = la.Target("attn.weight", transposed=True, rows=(8, 16))
    table = la.amplification_table(
        la.Adapter({"attn.k": update}, targets={"attn.k": target}), la.load_base({"attn.weight": fused})
    )
    expected = oracle(update, fused.T[8:16], 2)
    assert table["projected"].iloc[-1] == pytest.approx(expected["projected"], rel=1e-9)


def test_several_adapters_share_one_pass_and_keep_their_order():
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(4))
    base = la.load_base({"m.weight": weight, "n.weight": 2 * weight})
    adapters = [
        la.Adapter({"n": random_update(16, 12, 3, seed=s), "m": random_update(16, 12, 2, seed=s)}, source=f"run{s}")
        for s in (1, 2)
    ]
    together = la.amplification_table(adapters, base)
    assert together[["adapter", "module"]].drop_duplicates().to_numpy().tolist() == [
        ["run1", "n"], ["run1", "m"], ["run2", "n"], ["run2", "m"],
    ]  # fmt: skip
    apart = [la.amplification_table(adapter, base) for adapter in adapters]
    values = [c for c in COLUMNS if c not in ("adapter", "module", "flags", "p")]
    np.testing.assert_allclose(
        together[values].to_numpy(float), np.concatenate([t[values].to_numpy(float) for t in apart]), rtol=1e-12
    )


def test_missing_values_are_flagged():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    good = random_update(8, 8, 3)
    adapter = la.Adapter(
        {
            "zero": la.LowRankUpdate(torch.zeros(8, 2), torch.ones(2, 8), 1.0),
            "nan": la.LowRankUpdate(torch.full((8, 2), math.nan), torch.ones(2, 8), 1.0),
            "unknown": la.with_scale(good, math.nan),
            "good": good,
        }
    )
    base = la.load_base({f"{name}.weight": weight for name in adapter})
    table = la.amplification_table(adapter, base, ks=[2, 5]).set_index(["module", "k"])
    assert table.loc[("zero", 2), "flags"] == "zero beyond-rank"
    assert table.loc[("nan", 2), "flags"] == "nonfinite beyond-rank"
    assert table.loc[("good", 5), "flags"] == "beyond-rank"
    assert math.isnan(table.loc[("zero", 2), "gain"])
    assert math.isnan(table.loc[("good", 5), "gain"])
    assert table.loc[("good", 5), "norm_base"] == pytest.approx(float(weight.norm()))
    unknown, known = table.loc[("unknown", 2)], table.loc[("good", 2)]
    assert unknown["flags"] == "unknown-scale"
    assert math.isnan(unknown["amplification"])
    assert math.isnan(unknown["norm_update"])
    assert unknown["gain"] == pytest.approx(known["gain"])
    assert unknown["p"] == known["p"]


def test_a_base_that_does_not_fit_is_named():
    adapter = la.Adapter({"m": random_update(8, 6, 2)})
    with pytest.raises(la.BaseWeightsError, match=r"expected the tensor 'm\.weight'"):
        la.amplification_table(adapter, la.load_base({"other.weight": torch.ones(8, 6)}))
    with pytest.raises(la.BaseWeightsError, match="expected 8x6, got 8x7"):
        la.amplification_table(adapter, la.load_base({"m.weight": torch.ones(8, 7)}))
    with pytest.raises(la.BaseWeightsError, match=r"'m.weight'.*NaN or infinities"):
        la.amplification_table(adapter, la.load_base({"m.weight": torch.full((8, 6), math.nan)}))
    with pytest.raises(ValueError, match="ks: expected positive integers"):
        la.amplification_table(adapter, la.load_base({"m.weight": torch.ones(8, 6)}), ks=[0])


def test_a_module_without_rank_and_ks_beyond_every_module_have_flagged_rows():
    base = la.load_base({"m.weight": torch.eye(8)})
    empty = la.Adapter({"m": la.LowRankUpdate(torch.zeros(8, 0), torch.zeros(0, 8), 1.0)})
    table = la.amplification_table(empty, base)
    assert table[["k", "flags", "norm_update"]].to_numpy().tolist() == [[1, "zero beyond-rank", 0.0]]
    table = la.amplification_table(la.Adapter({"m": random_update(8, 8, 2)}), base, ks=np.array([100]))
    assert table["flags"].tolist() == ["beyond-rank"]
    assert table["gain"].isna().all()


def test_a_zero_base_and_an_update_outside_it_are_flagged():
    weight = torch.zeros(4, 4)
    update = la.LowRankUpdate(torch.eye(4, 1), torch.eye(1, 4), 2.0)
    row = la.amplification_table(la.Adapter({"m": update}), la.load_base({"m.weight": weight})).iloc[0]
    assert row["flags"] == "zero-base"
    assert row["norm_base"] == 0
    assert math.isnan(row["amplification"])
    weight[3, 3] = 1.0
    row = la.amplification_table(la.Adapter({"m": update}), la.load_base({"m.weight": weight})).iloc[0]
    assert row["flags"] == "outside-base"
    assert row["amplification"] == math.inf
    assert row["gain"] == 0


def test_the_error_of_the_ceiling_is_given_and_holds():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1200, 1100, generator=generator) * torch.arange(1, 1101) ** -0.5
    table = la.amplification_table(
        la.Adapter({"m": random_update(1200, 1100, 4)}), la.load_base({"m.weight": weight}), ks=[4], draws=0
    )
    exact = np.linalg.norm(np.linalg.svd(weight.double().numpy(), compute_uv=False)[:4])
    assert abs(table["projected_top"][0] - exact) <= table["projected_top_error"][0] + 1e-12
    assert table["projected_top_error"][0] < 1e-5 * exact
    assert math.isnan(table["p"][0])
