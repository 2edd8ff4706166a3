import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import lora_analysis as la
from lora_analysis.adapter import Contents, Origin, Target
from lora_analysis.measures.magnitude import magnitude_direction_change
from lora_analysis.tables.magnitude import COLUMNS


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_update(d_out, d_in, *, scale=0.5, seed=0):
    return la.LowRankUpdate(normal(d_out, 2, seed=seed), normal(2, d_in, seed=seed + 1), scale)


def adapter_and_base():
    updates = {f"layer.{i}.query": random_update(8, 6, seed=10 * i) for i in range(3)}
    return la.Adapter(updates), la.load_base({f"{name}.weight": normal(8, 6, seed=5) for name in updates})


def with_axis(adapter, axis):
    """The adapter as a file with magnitudes along an axis would describe it."""
    modules = {name: replace(module, magnitude_axis=axis) for name, module in adapter.modules.items()}
    return la.Adapter.from_contents(Contents(modules), source="dora", format="memory", origin=Origin(la.Adapter, ({},)))


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_the_measure_along_the_axis_of_the_module(axis):
    adapter, base = adapter_and_base()
    table = la.magnitude_table(with_axis(adapter, axis), base)
    assert tuple(table.columns) == COLUMNS
    assert table["module"].tolist() == list(adapter)
    assert (table["axis"] == axis).all()
    for row in table.itertuples():
        weight, delta_w = base.matrix(Target(f"{row.module}.weight")), adapter[row.module].dense()
        before, after = (m.norm(dim=axis) for m in (weight, weight + delta_w))
        cosines = (weight * (weight + delta_w)).sum(dim=axis) / before / after
        assert row.magnitude_change == pytest.approx(float((after - before).abs().mean()), rel=1e-10)
        assert row.magnitude_change_relative == pytest.approx(row.magnitude_change / float(before.mean()), rel=1e-12)
        assert row.direction_change == pytest.approx(float((1 - cosines).mean()), rel=1e-10)
        assert (row.d_out, row.d_in, row.flags) == (8, 6, "")


def test_several_adapters_and_any_number_of_workers_give_the_same_rows():
    adapter, base = adapter_and_base()
    one, two = (la.magnitude_table([adapter, with_axis(adapter, 0)], base, workers=workers) for workers in (1, 3))
    pd.testing.assert_frame_equal(one, two)
    assert one["adapter"].tolist() == ["memory"] * 3 + ["dora"] * 3
    assert len(la.magnitude_table(la.Adapter({}), base)) == 0


def test_states_without_numbers_are_flagged():
    update, d = random_update(6, 4), 6
    nan = la.LowRankUpdate(torch.full((d, 1), math.nan), torch.ones(1, 4), 1.0)
    updates = {
        "unknown": la.with_scale(update, math.nan),
        "nonfinite": nan,
        "zero": la.LowRankUpdate(torch.zeros(d, 1), torch.ones(1, 4), 1.0),
        "nothing": update,
        "wide": la.LowRankUpdate(normal(d, 5), normal(5, 4), 1.0),
    }
    weights = {f"{name}.weight": normal(d, 4) for name in updates} | {"nothing.weight": torch.zeros(d, 4)}
    table = la.magnitude_table(la.Adapter(updates), la.load_base(weights)).set_index("module")
    assert table["flags"].to_dict() == {
        "unknown": "unknown-scale",
        "nonfinite": "nonfinite",
        "zero": "zero",
        "nothing": "zero-base",
        "wide": "r>d",
    }
    values = ["magnitude_change", "magnitude_change_relative", "direction_change"]
    assert table.loc[["unknown", "nonfinite"], values].isna().all(axis=None)
    assert table.loc["zero", values].tolist() == [0, 0, 0]
    assert table.loc["nothing"].isna()[values].tolist() == [False, True, True]
    assert table.loc["wide", values].notna().all()


def test_other_kinds_of_update_are_measured():
    kronecker = la.KroneckerUpdate(normal(2, 3), normal(4, 2, seed=1), 0.1)
    adapter = la.Adapter({"kronecker": kronecker, "dense": la.DenseUpdate(kronecker.dense())})
    base = la.load_base({f"{name}.weight": normal(8, 6) for name in adapter})
    table = la.magnitude_table(adapter, base)
    assert table["direction_change"][0] == pytest.approx(table["direction_change"][1], rel=1e-12)
    expected = magnitude_direction_change(normal(8, 6), kronecker)
    assert table["magnitude_change"][0] == pytest.approx(expected.magnitude_change, rel=1e-12)


def test_a_full_difference_is_measured_against_its_base():
    before, after = ({"lin.weight": normal(5, 4, seed=seed)} for seed in (0, 1))
    row = la.magnitude_table(la.diff(after, before), la.load_base(before)).iloc[0]
    lengths = after["lin.weight"].norm(dim=1) - before["lin.weight"].norm(dim=1)
    assert row["magnitude_change"] == pytest.approx(float(lengths.abs().mean()), rel=1e-12)


def test_a_base_that_does_not_fit_is_named():
    adapter, base = adapter_and_base()
    with pytest.raises(la.BaseWeightsError, match=r"expected the tensor 'other\.weight'"):
        la.magnitude_table(la.Adapter({"other": random_update(8, 6)}), base)
    broken = la.load_base({f"{name}.weight": torch.full((8, 6), math.nan) for name in adapter})
    with pytest.raises(la.BaseWeightsError, match=r"state dict: 'layer\.0\.query\.weight': the base weight holds NaN"):
        la.magnitude_table(adapter, broken)
