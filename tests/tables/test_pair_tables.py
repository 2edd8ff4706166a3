"""Tables of sameness and interference, and merged adapters: columns, flags, edge cases, files."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import lora_analysis as la
from lora_analysis.activations import collect_activations
from lora_analysis.adapter import Target
from lora_analysis.tables.interference import COLUMNS as INTERFERENCE
from lora_analysis.tables.sameness import COLUMNS as SAMENESS


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(seed: int, *, d_out: int = 40, d_in: int = 30, r: int = 3, scale: float = 0.5) -> la.LowRankUpdate:
    return la.LowRankUpdate(random(d_out, r, seed=seed), random(r, d_in, seed=1000 + seed), scale)


def test_sameness_of_unrelated_updates_is_chance_and_of_one_update_is_all() -> None:
    a, b = la.Adapter({"q": update(1), "v": update(2)}), la.Adapter({"q": update(3), "v": update(2), "x": update(9)})
    with pytest.warns(UserWarning, match="1 modules stay out"):
        table = la.sameness_table(a, b, draws=300).set_index("module_a")
    assert tuple(table.reset_index()[list(SAMENESS)].columns) == SAMENESS
    assert table.index.tolist() == ["q", "v"]
    q, v = table.loc["q"], table.loc["v"]
    assert v["cosine"] == pytest.approx(1)
    assert v["phi_in"] == v["phi_out"] == pytest.approx(1)
    assert v["chordal_in"] == pytest.approx(0, abs=1e-7)
    assert v["norm_ratio"] == 1
    assert v["rows_shared"] == 1
    assert v["flags"] == "same-start"
    assert abs(q["cosine"]) < 5 * q["cosine_null_sd"]
    assert q["cosine_p"] > 0.001
    assert q["flags"] == "same-start"  # of all their rows half are shared: the two began alike
    dense = (a["q"].dense(), b["q"].dense())
    assert q["cosine"] == pytest.approx(
        float((dense[0] * dense[1]).sum() / dense[0].norm() / dense[1].norm()), rel=1e-9
    )
    assert q["phi_corrected_in"] == pytest.approx((q["phi_in"] - 3 / 30) / (1 - 3 / 30))


def test_the_chordal_distance_of_random_updates_is_what_chance_says() -> None:
    pairs = [
        la.sameness_table(la.Adapter({"q": update(2 * s)}), la.Adapter({"q": update(2 * s + 1, r=5)}), draws=9).iloc[0]
        for s in range(60)
    ]
    squares = pd.DataFrame(pairs)
    ratio = (squares["chordal_out"] ** 2).mean() / (squares["chordal_chance_out"] ** 2).mean()
    assert ratio == pytest.approx(1, abs=0.03)


def test_sameness_has_rows_for_what_cannot_be_compared() -> None:
    zero = la.LowRankUpdate(torch.zeros(40, 3), random(3, 30, seed=1), 1.0)
    broken = la.LowRankUpdate(torch.full((40, 3), math.nan), random(3, 30, seed=1), 1.0)
    a = la.Adapter({"zero": zero, "nan": broken, "unknown": update(1, scale=math.nan)})
    b = la.Adapter({"zero": update(2), "nan": update(2), "unknown": update(2)})
    table = la.sameness_table(a, b, draws=20).set_index("module_a")
    assert sorted(table.index) == ["nan", "unknown", "zero"]
    assert table.loc["zero", "flags"] == "zero"
    assert table.loc["nan", "flags"] == "nonfinite"
    assert table.loc["unknown", "flags"] == "unknown-scale"
    assert math.isnan(table.loc["unknown", "norm_ratio"])
    assert table.loc["unknown", "phi_in"] > 0
    with pytest.raises(la.LoraAnalysisError, match="expected modules of like name, found none"):
        la.sameness_table(a, la.Adapter({"other": update(1)}))
    with pytest.raises(la.LoraAnalysisError, match="expected modules of one shape to compare, got none"):
        la.sameness_table(a, la.Adapter({"other": update(1, d_out=7)}), pairs="all")


def test_layers_of_one_adapter_are_compared_where_they_have_one_shape() -> None:
    one = la.Adapter({"0.q": update(1), "0.v": update(2), "0.up": update(3, d_out=90), "1.q": update(1, scale=2.0)})
    table = la.sameness_table(one, draws=99)
    pairs = list(zip(table["module_a"], table["module_b"], strict=True))
    assert pairs == [("0.q", "0.v"), ("0.q", "1.q"), ("0.v", "1.q")]
    alike = table.set_index(["module_a", "module_b"]).loc[("0.q", "1.q")]
    assert alike["cosine"] == pytest.approx(1)
    assert alike["norm_ratio"] == pytest.approx(0.25)
    assert alike["flags"] == "same-start"
    # Of three tests of which one has the least p there is, that one is a finding at a level three times as high.
    assert alike["cosine_p"] == pytest.approx(0.01)
    assert alike["cosine_q"] == pytest.approx(0.03)
    with pytest.raises(ValueError, match="a module is always like itself"):
        la.sameness_table(one, pairs="same")


def test_agreement_comes_from_activations() -> None:
    model = nn.Sequential(nn.Linear(30, 40)).double()
    a, b = la.Adapter({"0": update(1)}), la.Adapter({"0": update(1, scale=2.0)})
    found = collect_activations(model, [random(50, 30, seed=5).double()], [a, b])
    assert la.sameness_table(a, b, activations=found, draws=9)["agreement"].item() == pytest.approx(1)
    table = la.interference_table([a, b], activations=found, draws=9)
    assert table["cross_activation"].item() == pytest.approx(4)


def test_interference_is_that_of_dense_matrices() -> None:
    adapters = [la.Adapter({"q": update(s), "only" if s == 1 else "v": update(10 + s)}) for s in (1, 2, 3)]
    table = la.interference_table(adapters, draws=50).set_index("module")
    assert tuple(table.reset_index()[list(INTERFERENCE)].columns) == INTERFERENCE
    assert table.index.tolist() == ["q", "v"]
    q = table.loc["q"]
    dense = [adapter["q"].dense() for adapter in adapters]
    cosines = [
        float((dense[i] * dense[j]).sum() / dense[i].norm() / dense[j].norm()) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert q["cosine"] == pytest.approx(sum(cosines) / 3)
    assert (q["cosine_min"], q["cosine_max"]) == pytest.approx((min(cosines), max(cosines)))
    assert q["adapters"] == 3
    assert table.loc["v", "adapters"] == 2
    assert (q["union_rank"], q["union_rank_in"], q["rank_sum"]) == (9, 9, 9)
    stacked = torch.stack(dense)
    conflict = ((stacked > 0).any(0) & (stacked < 0).any(0)).double().mean()
    assert q["sign_conflict"] == pytest.approx(float(conflict))
    assert 0.02 <= q["sti_p"] <= 1
    assert q["sti_relative"] == pytest.approx(q["sti"] / sum(float(a["q"].singular_values().sum()) for a in adapters))


def test_an_update_of_zero_interferes_with_nothing_in_any_order() -> None:
    zero = la.LowRankUpdate(torch.zeros(40, 3), random(3, 30, seed=1), 1.0)
    a, b = la.Adapter({"q": update(1), "v": update(2)}), la.Adapter({"q": zero, "v": update(3)})
    table = la.interference_table([a, b], draws=99).set_index("module")
    assert table.loc["q", ["sti", "sti_p", "sti_q", "cosine", "alignment_ratio"]].isna().all()
    assert table.loc["q", "flags"] == "zero"
    # One test alone is counted.
    assert table.loc["v", "sti_q"] == table.loc["v", "sti_p"]
    c = la.Adapter({"q": update(4)})
    found = [la.interference_table(order, draws=9, signs=False).set_index("module").loc["q"] for order in
             ([a, c, b], [b, a, c])]  # fmt: skip
    for column in ("cosine", "cosine_min", "cosine_max", "alignment_ratio", "sti"):
        assert found[0][column] == pytest.approx(found[1][column])
        assert not math.isnan(found[0][column])


def test_tables_say_where_they_compare_leading_directions_only() -> None:
    dense = [la.DenseUpdate(random(100, 90, seed=seed)) for seed in (1, 2)]
    a, b = (la.Adapter({"q": one}) for one in dense)
    same = la.sameness_table(a, b, draws=9).iloc[0]
    assert same["flags"] == "leading-only"
    assert same["m_in"] == 64
    # Ninety per cent of the whole energy, of which 64 directions of Gaussian matrices hold more.
    for name, one in (("a", a), ("b", b)):
        S = one["q"].singular_values()
        assert same[f"k90_{name}_in"] == la.energy_rank(S, 0.9)
    assert same["cosine"] == pytest.approx(
        float((dense[0].dense() * dense[1].dense()).sum() / dense[0].norm() / dense[1].norm())
    )
    flat = [la.Adapter({"q": la.DenseUpdate(torch.eye(100) + 1e-3 * random(100, 100, seed=s))}) for s in (1, 2)]
    assert pd.isna(la.sameness_table(*flat, draws=9)["k90_a_in"].item())
    assert la.interference_table([a, b], draws=9)["flags"].item() == "leading-only"


def test_interference_of_two_that_cannot_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="adapters: expected two or more, got 1"):
        la.interference_table([la.Adapter({"q": update(1)})])
    with pytest.raises(la.LoraAnalysisError, match="expected modules that two adapters have, got none"):
        la.interference_table([la.Adapter({"q": update(1)}), la.Adapter({"v": update(1)})])
    with pytest.raises(la.LoraAnalysisError, match="'q': expected one shape in all adapters"):
        la.interference_table([la.Adapter({"q": update(1)}), la.Adapter({"q": update(1, d_out=9)})])
    unknown = la.interference_table([la.Adapter({"q": update(1)}), la.Adapter({"q": update(2, scale=math.nan)})])
    assert unknown["flags"].item() == "unknown-scale"
    zero = la.LowRankUpdate(torch.zeros(40, 3), random(3, 30, seed=1), 1.0)
    row = la.interference_table([la.Adapter({"q": zero}), la.Adapter({"q": zero})], draws=9).iloc[0]
    assert row["flags"] == "zero"
    assert math.isnan(row["cosine"])


@pytest.mark.parametrize("method", ["sum", "tsv", "iso-c", "knots"])
def test_merged_adapters_survive_files_and_pickles(tmp_path: Path, method: str) -> None:
    adapters = [la.Adapter({"layers.0.q": update(1), "layers.0.v": update(2)}), la.Adapter({"layers.0.q": update(3)})]
    merged = la.merge(adapters, method=method)  # type: ignore[arg-type]
    assert list(merged) == ["layers.0.q", "layers.0.v"]
    if method == "sum":
        expected = adapters[0]["layers.0.q"].dense() + adapters[1]["layers.0.q"].dense()
        torch.testing.assert_close(merged["layers.0.q"].dense(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged["layers.0.v"].dense(), update(2).dense(), rtol=1e-5, atol=1e-5)
    la.save_adapter(merged, tmp_path / "merged")
    for again in (la.load_adapter(tmp_path / "merged"), pickle.loads(pickle.dumps(merged))):
        for name in merged:
            torch.testing.assert_close(again[name].dense(), merged[name].dense(), rtol=1e-6, atol=1e-6)


def test_what_a_cut_leaves_out_is_stated() -> None:
    adapters = [la.Adapter({"q": update(1)}), la.Adapter({"q": update(3)})]
    whole, cut = la.merge(adapters), la.merge(adapters, r=2)
    assert (whole["q"].r, cut["q"].r) == (6, 2)
    error = float((whole["q"].dense() - cut["q"].dense()).norm())
    assert cut.modules["q"].truncation_error == pytest.approx(error, rel=1e-4)
    assert la.truncation_table(cut)["truncation_error_relative"].item() == pytest.approx(
        error / float(whole["q"].norm()), rel=1e-4
    )
    assert "What was cut off is at most" in cut.notes[0]
    S = whole["q"].singular_values()
    k = la.energy_rank(S, 0.8)
    assert la.merge(adapters, energy=0.8)["q"].r == k


def test_adapters_that_do_not_fit_are_not_merged() -> None:
    one = la.Adapter({"q": update(1)})
    with pytest.raises(ValueError, match="adapters: expected at least one, got none"):
        la.merge([])
    with pytest.raises(ValueError, match="r, energy: expected one of them"):
        la.merge([one], r=2, energy=0.5)
    with pytest.raises(la.LoraAnalysisError, match="expected the shape and place it has in the other adapters"):
        la.merge([one, la.Adapter({"q": update(1, d_out=9)})])
    with pytest.raises(la.LoraAnalysisError, match="expected the shape and place"):
        la.merge([one, la.Adapter({"q": update(2)}, targets={"q": Target("other.weight")})])
    with pytest.raises(la.UndefinedUpdateError, match=r"expected a known scale, got none\. Pass alpha="):
        la.merge([one, la.Adapter({"q": update(2, scale=math.nan)})])
    full = la.Adapter({"q": la.DenseUpdate(random(300, 300, seed=1))})
    with pytest.raises(la.UnsupportedAdapterError, match=r"expected an update of low rank.*Cut it first"):
        la.merge([full])
