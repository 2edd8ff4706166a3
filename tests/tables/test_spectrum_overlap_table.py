import math

import numpy as np
import pandas as pd
import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.spectrum_overlap import COLUMNS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_update(d_out, d_in, r, *, scale=0.3, seed=1):
    return la.LowRankUpdate(normal(d_out, r, seed=seed), normal(r, d_in, seed=seed + 100), scale)


def test_every_row_equals_a_dense_oracle():
    update, weight = random_update(30, 20, 4), normal(30, 20)
    table = la.spectrum_overlap_table(la.Adapter({"m": update}), la.load_base({"m.weight": weight}), parts=4)
    assert tuple(table.columns) == COLUMNS
    assert table.groupby(["side", "k"], sort=False).size().tolist() == [5, 5, 4, 4]
    W0, _, Wh = np.linalg.svd(weight.double().numpy())
    U, S, Vh = np.linalg.svd(update.dense().numpy())
    for row in table.to_dict("records"):
        basis, vectors = (W0, U) if row["side"] == "out" else (Wh.T, Vh.T)
        squares = (basis[:, row["first"] - 1 : row["last"]].T @ vectors[:, : row["k"]]) ** 2
        assert row["overlap"] == pytest.approx(squares.sum() / row["k"])
        energy = S[: row["k"]] ** 2
        assert row["energy_share"] == pytest.approx(squares.sum(axis=0) @ energy / energy.sum())
        assert row["null_mean"] == pytest.approx((row["last"] - row["first"] + 1) / len(basis))
        assert 0 < row["p"] <= 1
        assert row["flags"] == ("outside-base" if row["part"] == 5 else "")


def test_an_update_along_the_base_is_found_and_transposing_swaps_the_sides():
    weight = normal(40, 30).double()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    along = la.LowRankUpdate(0.1 * U[:, :3] * S[:3], Vh[:3], 1.0)
    table = la.spectrum_overlap_table(
        la.Adapter({"m": along}), la.load_base({"m.weight": weight}), ks=[1, 3]
    ).set_index(["side", "k", "part"])
    assert table.loc[(slice(None), slice(None), 1), "overlap"].tolist() == pytest.approx([1] * 4)
    assert table.loc[("out", 3, 1), "p"] == 0.001
    update = random_update(40, 30, 3)
    there = la.spectrum_overlap_table(la.Adapter({"m": update}), la.load_base({"m.weight": weight}))
    turned = la.LowRankUpdate(update.down.mT, update.up.mT, update.scale)
    back = la.spectrum_overlap_table(la.Adapter({"m": turned}), la.load_base({"m.weight": weight.mT.contiguous()}))
    for side, other in (("out", "in"), ("in", "out")):
        columns = ["k", "part", "overlap", "energy_share", "p", "energy_p"]
        a, b = there[there["side"] == side][columns], back[back["side"] == other][columns]
        np.testing.assert_allclose(a.to_numpy(float), b.to_numpy(float), rtol=1e-9, atol=1e-12)


def test_shares_do_not_depend_on_the_scale_and_missing_values_are_flagged():
    weight, good = normal(8, 8, seed=5), random_update(8, 8, 3)
    adapter = la.Adapter(
        {
            "zero": la.LowRankUpdate(torch.zeros(8, 2), torch.ones(2, 8), 1.0),
            "nan": la.LowRankUpdate(torch.full((8, 2), math.nan), torch.ones(2, 8), 1.0),
            "unknown": la.with_scale(good, math.nan),
            "good": good,
            "nothing": good,
        }
    )
    base = la.load_base({f"{name}.weight": weight * (name != "nothing") for name in adapter})
    table = la.spectrum_overlap_table(adapter, base, ks=[2, 5], draws=50)
    table = table.set_index(["module", "side", "k", "part"]).sort_index()
    assert table.index.get_level_values("part").max() == 8  # no more parts than directions
    assert table.loc[("zero", "out", 2, 1), "flags"] == "zero beyond-rank"
    assert table.loc[("nan", "out", 2, 1), "flags"] == "nonfinite beyond-rank"
    assert table.loc[("good", "out", 5, 1), "flags"] == "beyond-rank"
    assert table.loc[("nothing", "out", 2, 1), "flags"].split()[0] == "zero-base"
    assert table.loc[("unknown", "in", 2, 1), "flags"] == "unknown-scale"
    np.testing.assert_allclose(
        table.loc[("unknown", "in", 2), "overlap"].to_numpy(), table.loc[("good", "in", 2), "overlap"].to_numpy()
    )
    for name, k in (("zero", 2), ("nan", 2), ("good", 5), ("nothing", 2)):
        assert table.loc[(name, "out", k), ["overlap", "p", "energy_share"]].isna().all(axis=None)


@pytest.mark.parametrize("names", [("wide", "square"), ("square", "wide")])
def test_shapes_that_share_a_side_share_its_draws_up_to_the_largest_k(names):
    shapes, ranks = {"wide": (12, 24), "square": (12, 12)}, {"wide": 5, "square": 3}
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    updates = {n: la.LowRankUpdate(random(shapes[n][0], ranks[n]), random(ranks[n], shapes[n][1]), 1.0) for n in names}
    base = la.load_base({f"{n}.weight": random(*shapes[n]) for n in names})
    table = la.spectrum_overlap_table(la.Adapter(updates), base, parts=3, draws=50)
    alone = pd.concat(
        la.spectrum_overlap_table(la.Adapter({n: updates[n]}), base, parts=3, draws=50) for n in names
    ).reset_index(drop=True)
    assert table["p"].notna().all()
    exact = ["module", "side", "k", "part", "overlap", "null_mean", "energy_share"]
    pd.testing.assert_frame_equal(table[exact], alone[exact])


def test_wrong_arguments_are_named():
    adapter, base = la.Adapter({"m": random_update(8, 6, 2)}), la.load_base({"m.weight": torch.ones(8, 6)})
    with pytest.raises(ValueError, match=r"ks: expected positive integers, got \[0\]"):
        la.spectrum_overlap_table(adapter, base, ks=[0])
    with pytest.raises(ValueError, match="parts: expected at least 1, got 0"):
        la.spectrum_overlap_table(adapter, base, parts=0)
    with pytest.raises(ValueError, match="draws: expected 0 or more, got -1"):
        la.spectrum_overlap_table(adapter, base, draws=-1)
