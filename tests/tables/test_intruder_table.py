import math

import numpy as np
import pytest
import torch

import lora_analysis as la
from lora_analysis.measures.intruders import largest_cosine
from lora_analysis.tables.intruders import COLUMNS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_update(d_out, d_in, r, *, scale=0.3, seed=1):
    return la.LowRankUpdate(normal(d_out, r, seed=seed), normal(r, d_in, seed=seed + 100), scale)


def dense_counts(update, weight, k, threshold):
    U0, _, V0 = torch.linalg.svd(weight.double(), full_matrices=False)
    U, S, V = torch.linalg.svd(weight.double() + update.dense(), full_matrices=False)
    counts = {}
    for side, vectors, basis in (("out", U, U0), ("in", V.mT, V0.mT)):
        cosines = largest_cosine(vectors[:, :k], basis)
        new = cosines < threshold
        energy = S[:k].square()
        counts[side] = (int(new.sum()), float(energy[new].sum() / energy.sum()), float(cosines.min()))
    return counts


def test_every_row_equals_the_dense_definition():
    update, weight = random_update(40, 30, 4), normal(40, 30)
    table = la.intruder_table(
        la.Adapter({"m": update}), la.load_base({"m.weight": weight}), ks=[4, 10], thresholds=[0.4, 0.6]
    )
    assert tuple(table.columns) == COLUMNS
    assert table[["side", "k", "threshold"]].to_numpy().tolist() == [
        [side, k, t] for side in ("out", "in") for k in (4, 10) for t in (0.4, 0.6)
    ]
    for row in table.to_dict("records"):
        count, share, cosine = dense_counts(update, weight, row["k"], row["threshold"])[row["side"]]
        assert row["intruders"] == count
        assert row["undecided"] == 0
        assert row["energy_share"] == pytest.approx(share)
        assert row["max_cosine_min"] == pytest.approx(cosine, abs=1e-8)
        assert 0 <= row["control_share"] <= 1
        assert row["control_se"] >= 0
        assert row["flags"] == ""


def test_the_count_is_that_of_pefts_own_detection():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.tall = torch.nn.Linear(48, 32), torch.nn.Linear(32, 48)

        def forward(self, x):
            return self.tall(self.wide(x))

    model = peft.get_peft_model(
        Model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["wide", "tall"], init_lora_weights=False)
    )
    updates, weights = {}, {}
    for name in ("wide", "tall"):
        layer = getattr(model.base_model.model, name)
        with torch.no_grad():
            # Strong enough for some intruders and weak enough for some old directions.
            layer.lora_B["default"].weight.mul_(6)
        updates[name] = la.LowRankUpdate(
            layer.lora_B["default"].weight.detach().clone(), layer.lora_A["default"].weight.detach().clone(), 2.0
        )
        weights[f"{name}.weight"] = layer.base_layer.weight.detach().clone()
    lines = []
    reduce_intruder_dimension(model, logging_sink=lines.append)
    counted = {
        line.split(":")[0].rpartition(".")[2]: 0 if "No intruders" in line else int(line.rpartition(" ")[2])
        for line in lines
        if "ntruders" in line
    }
    table = la.intruder_table(la.Adapter(updates), la.load_base(weights), draws=0)
    ours = table[table["side"] == "out"].set_index("module")["intruders"].to_dict()
    assert ours == counted
    assert 0 < max(ours.values()) < 10


def test_a_random_update_has_the_share_of_its_control():
    weight = normal(96, 96) * torch.arange(1.0, 97) ** -0.3
    adapter = la.Adapter({f"m{seed}": random_update(96, 96, 3, scale=0.08, seed=seed) for seed in range(12)})
    base = la.load_base({f"{name}.weight": weight for name in adapter})
    table = la.intruder_table(adapter, base, draws=12)
    table = table[table["side"] == "out"]
    share, control = table["energy_share"].mean(), table["control_share"].mean()
    # One update has the spread of one draw, whose standard error over 12 draws is control_se.
    spread = math.sqrt(float((table["control_se"] ** 2 * 13).sum())) / len(table)
    assert 0 < control < 1
    assert abs(share - control) < 4 * spread


def test_an_update_along_the_base_has_none_where_its_control_has_some():
    weight = normal(64, 64).double()
    U, _, Vh = torch.linalg.svd(weight)
    along = la.LowRankUpdate(U[:, :4] * 20, Vh[:4], 1.0)
    table = la.intruder_table(la.Adapter({"m": along}), la.load_base({"m.weight": weight}))
    assert table["intruders"].tolist() == [0, 0]
    assert table["energy_share"].tolist() == [0, 0]
    assert (table["control_share"] > 0.5).all()
    assert table["max_cosine_min"].tolist() == pytest.approx([1, 1])


def test_dense_updates_and_slices_of_transposed_matrices_have_the_dense_answer():
    fused = normal(20, 72, seed=6)  # stored (d_in, 3 d_out), as GPT-2 does
    target = la.Target("attn.weight", transposed=True, rows=(24, 48))
    low = random_update(24, 20, 3)
    for update in (low, la.DenseUpdate(low.dense() + 0.05 * normal(24, 20, seed=7))):
        table = la.intruder_table(
            la.Adapter({"attn.k": update}, targets={"attn.k": target}), la.load_base({"attn.weight": fused}), draws=2
        )
        expected = dense_counts(update, fused.T[24:48], 10, 0.5)
        assert table["intruders"].tolist() == [expected["out"][0], expected["in"][0]]
        assert table["energy_share"].tolist() == pytest.approx([expected["out"][1], expected["in"][1]])


def test_several_adapters_share_each_decomposition_and_keep_their_order():
    weight = normal(24, 20, seed=4)
    base = la.load_base({"m.weight": weight, "n.weight": 2 * weight})
    adapters = [
        la.Adapter({"n": random_update(24, 20, 3, seed=s), "m": random_update(24, 20, 2, seed=s)}, source=f"run{s}")
        for s in (1, 2)
    ]
    together = la.intruder_table(adapters, base, draws=3)
    assert together[["adapter", "module"]].drop_duplicates().to_numpy().tolist() == [
        ["run1", "n"], ["run1", "m"], ["run2", "n"], ["run2", "m"],
    ]  # fmt: skip
    apart = [la.intruder_table(adapter, base, draws=3) for adapter in adapters]
    values = ["intruders", "energy_share", "control_share", "control_se", "max_cosine_min"]
    np.testing.assert_allclose(
        together[values].to_numpy(float), np.concatenate([t[values].to_numpy(float) for t in apart]), rtol=1e-9
    )


def test_from_the_top_of_the_base_nothing_is_guessed_and_the_rows_say_so():
    weight = normal(400, 400) * torch.arange(1.0, 401) ** -0.3
    adapter = la.Adapter({"m": random_update(400, 400, 4, scale=0.05)})
    base = la.load_base({"m.weight": weight})
    whole = la.intruder_table(adapter, base, thresholds=[0.3, 0.5, 0.7], draws=4)
    top = la.intruder_table(adapter, base, thresholds=[0.3, 0.5, 0.7], complete=False, draws=4)
    assert set(whole["flags"]) == {""}
    assert set(top["flags"]) == {"base-top-only"}
    assert (top["intruders"] <= whole["intruders"]).all()
    assert (whole["intruders"] <= top["intruders"] + top["undecided"]).all()
    assert (top["energy_share"] <= whole["energy_share"] + 1e-9).all()
    assert (top["max_cosine_min"] >= whole["max_cosine_min"] - 1e-6).all()
    half = top["threshold"] == 0.5
    assert (top[half]["undecided"] == 0).all()
    assert (top[half]["intruders"] > 0).all()


def test_missing_values_are_flagged():
    weight = normal(8, 8, seed=5)
    good = random_update(8, 8, 3)
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
    table = la.intruder_table(adapter, base, ks=[2, 9], draws=2).set_index(["module", "side", "k"])
    assert table.loc[("zero", "out", 2), "flags"] == "zero"
    assert table.loc[("zero", "out", 2), ["intruders", "energy_share", "control_share"]].tolist() == [0, 0, 0]
    assert table.loc[("nan", "out", 2), "flags"] == "nonfinite"
    assert table.loc[("unknown", "in", 2), "flags"] == "unknown-scale"
    assert table.loc[("good", "in", 9), "flags"] == "beyond-rank"
    assert table.loc[("nothing", "in", 2), "flags"] == "zero-base"
    for place in (("nan", "out", 2), ("unknown", "in", 2), ("good", "in", 9), ("nothing", "in", 2)):
        values = table.loc[place, ["intruders", "undecided", "energy_share", "control_share", "max_cosine_min"]]
        assert values.isna().all()
    assert table.loc[("good", "in", 2), "intruders"] >= 0


def test_wrong_arguments_and_bases_are_named():
    adapter, base = la.Adapter({"m": random_update(8, 6, 2)}), la.load_base({"m.weight": torch.ones(8, 6)})
    with pytest.raises(ValueError, match=r"ks: expected positive integers, such as \(10,\), got \[0\]"):
        la.intruder_table(adapter, base, ks=[0])
    with pytest.raises(ValueError, match=r"thresholds: expected cosines above 0 and up to 1.* got \[1\.5\]"):
        la.intruder_table(adapter, base, thresholds=[1.5])
    with pytest.raises(ValueError, match="draws: expected 0 or more, got -1"):
        la.intruder_table(adapter, base, draws=-1)
    with pytest.raises(la.BaseWeightsError, match=r"expected the tensor 'm\.weight'"):
        la.intruder_table(adapter, la.load_base({"other.weight": torch.ones(8, 6)}))
    with pytest.raises(la.BaseWeightsError, match=r"'m.weight'.*NaN or infinities"):
        la.intruder_table(adapter, la.load_base({"m.weight": torch.full((8, 6), math.nan)}))
