import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.similarity import COLUMNS


def random_update(d_out, d_in, r, *, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in ((d_out, r), (r, d_in)))
    return la.LowRankUpdate(up, down, scale)


def dense_bases(update, target):
    up, down = update.up.double().numpy(), update.down.double().numpy()
    matrix = {"update": up @ down, "A": down, "B": up}[target]
    u, _, vh = np.linalg.svd(matrix)
    r = update.r
    return {"in": vh[:r].T, "out": u[:, :r]}


@pytest.mark.parametrize(("target", "sides"), [("update", {"in", "out"}), ("A", {"in"}), ("B", {"out"})])
def test_every_cell_equals_the_papers_formula_on_dense_matrices(target, sides):
    a, b = random_update(30, 20, 3, seed=1), random_update(30, 20, 5, seed=2)
    table = la.similarity_table(la.Adapter({"m": a}), la.Adapter({"m": b}), target=target, cells="all")
    assert tuple(table.columns) == COLUMNS
    assert set(table["side"]) == sides
    assert len(table) == len(sides) * 15
    bases_a, bases_b = dense_bases(a, target), dense_bases(b, target)
    d = {"in": 20, "out": 30}
    for row in table.itertuples():
        overlap = np.linalg.norm(bases_a[row.side][:, : row.i].T @ bases_b[row.side][:, : row.j]) ** 2
        assert row.phi == pytest.approx(overlap / min(row.i, row.j), rel=1e-9)
        assert row.null_mean == pytest.approx(max(row.i, row.j) / d[row.side])
        assert math.isnan(row.z) == (min(row.i, row.j) == 1)
        assert 0 < row.p <= 1


def test_landmarks_are_corners_and_powers_of_two():
    a, b = la.Adapter({"m": random_update(40, 30, 6)}), la.Adapter({"m": random_update(40, 30, 9, seed=1)})
    table = la.similarity_table(a, b, target="A")
    assert list(zip(table["i"], table["j"], strict=True)) == [(1, 1), (1, 9), (2, 2), (4, 4), (6, 1), (6, 9)]
    whole = la.similarity_table(a, b, target="A", cells="all").set_index(["i", "j"])
    for row in table.itertuples():
        assert whole.loc[(row.i, row.j), "phi"] == row.phi
        assert whole.loc[(row.i, row.j), "p"] == row.p


def test_an_adapter_against_itself_is_contained_everywhere():
    a = la.Adapter({"m": random_update(30, 20, 4)})
    np.testing.assert_allclose(la.similarity_table(a, a, cells="all")["phi"], 1.0, rtol=1e-12)


def test_planted_overlap_is_found_and_independent_updates_are_not():
    shared = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(5))).Q
    adapters = []
    for seed in (1, 2):
        update = random_update(64, 64, 4, seed=seed)
        down = update.down.clone()
        down[:2] = 100 * shared.mT  # strong, so that it leads ΔW
        adapters.append(la.Adapter({"planted": la.LowRankUpdate(update.up, down, 1.0), "random": update}))
    table = la.similarity_table(*adapters).set_index(["module_a", "side", "i", "j"])
    assert table.loc[("planted", "in", 2, 2), "phi"] > 0.9
    assert table.loc[("planted", "in", 2, 2), "p"] < 0.001
    assert table.loc[("planted", "out", 2, 2), "p"] > 0.001
    assert table.loc[("random", "in", 4, 4), "p"] > 0.001


def test_the_gauge_changes_A_but_not_the_update():
    a = random_update(30, 20, 3, seed=1)
    R = torch.diag(torch.tensor([1.0, 4.0, 0.25]))
    mixed = la.LowRankUpdate(a.up @ R, torch.linalg.inv(R) @ a.down, 1.0)
    b = la.Adapter({"m": random_update(30, 20, 3, seed=2)})
    plain, turned = (la.similarity_table(la.Adapter({"m": u}), b, cells="all") for u in (a, mixed))
    np.testing.assert_allclose(plain["phi"], turned["phi"], atol=1e-6)
    plain, turned = (la.similarity_table(la.Adapter({"m": u}), b, cells="all", target="A") for u in (a, mixed))
    assert np.abs(plain["phi"] - turned["phi"]).max() > 1e-3
    assert plain["phi"].iloc[-1] == pytest.approx(turned["phi"].iloc[-1], abs=1e-6)  # the row space is invariant


def test_layers_of_one_adapter_are_each_compared_once():
    adapter = la.Adapter({"x": random_update(30, 20, 2), "y": random_update(30, 20, 3), "z": random_update(20, 30, 2)})
    with pytest.warns(UserWarning, match="2 of 3 pairs share no dimension"):
        table = la.similarity_table(adapter)
    pairs = table[["module_a", "module_b", "side"]].drop_duplicates()
    # x and y share both dimensions, z shares none with them: its d_in is their d_out, another space.
    assert sorted(map(tuple, pairs.to_numpy())) == [("x", "y", "in"), ("x", "y", "out")]
    with pytest.raises(ValueError, match="a module is always like itself"):
        la.similarity_table(adapter, pairs="same")
    with pytest.raises(la.LoraAnalysisError, match="they share neither"):
        la.similarity_table(adapter, pairs=[("x", "z")])


def test_all_pairs_and_listed_pairs_agree_with_pair_by_pair():
    a = la.Adapter({f"a{i}": random_update(20, 20, 2, seed=i) for i in range(3)})
    b = la.Adapter({f"b{i}": random_update(20, 20, 3, seed=9 + i) for i in range(2)})
    everything = la.similarity_table(a, b, pairs="all")
    listed = la.similarity_table(a, b, pairs=list(itertools.product(a, b)))
    assert everything.equals(listed)
    one = la.similarity_table(a, b, pairs=[("a1", "b0")]).reset_index(drop=True)
    mask = (everything["module_a"] == "a1") & (everything["module_b"] == "b0")
    # But for q, which counts the pairs.
    assert one.drop(columns="q").equals(everything[mask].reset_index(drop=True).drop(columns="q"))


def test_modules_that_only_one_adapter_has_are_reported():
    a = la.Adapter({"m": random_update(8, 8, 2), "extra": random_update(8, 8, 2)})
    b = la.Adapter({"m": random_update(8, 8, 2, seed=1)})
    with pytest.warns(UserWarning, match="1 modules stay out of the comparison"):
        la.similarity_table(a, b)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"q": (8, 8)}, "expected modules of like name, found none"),
        ({"m": (8, 9)}, r"expected one shape, got \(8, 8\) in memory and \(8, 9\)"),
    ],
)
def test_adapters_that_do_not_fit_are_named(other, message):
    a = la.Adapter({"m": random_update(8, 8, 2)})
    b = la.Adapter({name: random_update(*shape, 2) for name, shape in other.items()})
    with pytest.raises(la.LoraAnalysisError, match=message):
        la.similarity_table(a, b)


def test_cells_beyond_the_rank_are_missing_and_flagged():
    full = random_update(20, 20, 4)
    down = full.down.clone()
    down[3] = down[2]  # rank 3 of 4
    table = la.similarity_table(la.Adapter({"m": la.LowRankUpdate(full.up, down, 1.0)}), la.Adapter({"m": full}))
    beyond = table["i"] > 3
    assert beyond.any()
    assert table.loc[beyond, "phi"].isna().all()
    assert table.loc[beyond, "p"].isna().all()
    assert table.loc[beyond, "flags"].str.contains("beyond-rank").all()
    assert table.loc[~beyond, "phi"].notna().all()


def test_zero_and_nonfinite_updates_give_flagged_rows():
    good = la.Adapter({"m": random_update(8, 8, 2)})
    zero = la.Adapter({"m": la.LowRankUpdate(torch.zeros(8, 2), torch.ones(2, 8), 1.0)})
    nan = la.Adapter({"m": la.LowRankUpdate(torch.full((8, 2), math.nan), torch.ones(2, 8), 1.0)})
    for adapter, flag in ((zero, "zero"), (nan, "nonfinite")):
        for target in ("update", "B"):
            table = la.similarity_table(adapter, good, target=target)
            assert table["phi"].isna().all()
            assert table["flags"].str.contains(flag).all()


def test_equal_singular_values_leave_the_order_undetermined():
    basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    tied = la.LowRankUpdate(basis * torch.tensor([2.0, 1.0, 1.0]).double(), basis.mT, 1.0)
    table = la.similarity_table(la.Adapter({"m": tied}), la.Adapter({"m": random_update(16, 16, 3)}), cells="all")
    undetermined = table["flags"].str.contains("order-undetermined")
    assert undetermined[table["i"] == 2].all()
    assert not undetermined[table["i"] == 1].any()
    assert not undetermined[table["i"] == 3].any()


def test_wrong_arguments_are_named():
    a = la.Adapter({"m": random_update(8, 8, 2)})
    for arguments, message in (
        ({"target": "C"}, "target: expected"),
        ({"cells": "some"}, "cells: expected"),
        ({"pairs": "none"}, "pairs: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            la.similarity_table(a, a, **arguments)
    with pytest.raises(la.LoraAnalysisError, match="no module 'x'"):
        la.similarity_table(a, a, pairs=[("x", "m")])
    with pytest.raises(la.UnsupportedAdapterError, match="target='update'"):
        la.similarity_table(la.Adapter({"m": la.DenseUpdate(torch.eye(8))}), a, target="A")


def test_dense_updates_compare_with_low_rank_ones():
    update = random_update(12, 10, 3)
    dense = la.Adapter({"m": la.DenseUpdate(update.dense())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = la.similarity_table(dense, la.Adapter({"m": update}))
    same = table[(table["i"] == table["j"]) & (table["i"] <= 2)]
    np.testing.assert_allclose(same["phi"], 1.0, rtol=1e-9)


def test_a_module_without_rank_keeps_its_rows():
    empty = la.LowRankUpdate(torch.zeros(8, 0), torch.zeros(0, 8), 1.0)
    table = la.similarity_table(la.Adapter({"m": empty}), la.Adapter({"m": random_update(8, 8, 2)}))
    assert set(table["side"]) == {"in", "out"}
    assert table["phi"].isna().all()
    assert table["flags"].str.contains("zero beyond-rank").all()


def test_nothing_to_compare_is_an_error():
    one = la.Adapter({"m": random_update(8, 8, 2)})
    with pytest.raises(la.LoraAnalysisError, match="two modules or more"):
        la.similarity_table(one)
    with pytest.raises(la.LoraAnalysisError, match="no two modules share a dimension"):
        la.similarity_table(one, la.Adapter({"x": random_update(5, 5, 2)}), pairs="all")
    with pytest.raises(la.LoraAnalysisError, match="expected modules in both"):
        la.similarity_table(one, la.Adapter({}), pairs="all")
