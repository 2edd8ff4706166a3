import math

import numpy as np
import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.spectrum import COLUMNS


def random_update(d_out, d_in, r, *, scale=0.5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in ((d_out, r), (r, d_in)))
    return la.LowRankUpdate(up, down, scale)


def dense_values(update):
    """Singular values of the product formed by numpy, an oracle that shares no code."""
    delta_w = update.scale * update.up.double().numpy() @ update.down.double().numpy()
    return np.linalg.svd(delta_w, compute_uv=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_column_equals_a_dense_oracle(dtype):
    update = random_update(30, 20, 4, dtype=dtype)
    row = la.spectrum_table(la.Adapter({"m": update})).iloc[0]
    s = dense_values(update)[:4]
    p, q = s / s.sum(), s**2 / (s**2).sum()
    energy = np.cumsum(q)
    expected = {
        "norm": np.sqrt((s**2).sum()),
        "sigma_max": s[0],
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "effective_rank_energy": np.exp(-(q * np.log(q)).sum()),
        "nuclear_ratio": s.sum() ** 2 / (s**2).sum(),
        "numerical_rank": 4,
        "k90": 1 + int((energy < 0.90).sum()),
        "k95": 1 + int((energy < 0.95).sum()),
        "k99": 1 + int((energy < 0.99).sum()),
    }
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-9), column
    np.testing.assert_allclose(row["singular_values"], s, rtol=1e-9)
    assert (row["d_out"], row["d_in"], row["r"], row["scale"], row["scale_source"]) == (30, 20, 4, 0.5, "caller")
    assert row["flags"] == ""


def test_columns_are_the_contract_and_an_empty_adapter_has_them_too():
    assert tuple(la.spectrum_table(la.Adapter({"m": random_update(4, 4, 2)})).columns) == COLUMNS
    empty = la.spectrum_table(la.Adapter({}))
    assert tuple(empty.columns) == COLUMNS
    assert len(empty) == 0


def test_a_zero_update_has_no_shape_and_says_so():
    row = la.spectrum_table(la.Adapter({"m": la.LowRankUpdate(torch.zeros(6, 2), torch.ones(2, 5), 1.0)})).iloc[0]
    assert row["flags"] == "zero"
    assert (row["norm"], row["numerical_rank"], row["k90"], row["k99"], row["resolved_rank"]) == (0.0, 0, 0, 0, 0)
    assert math.isnan(row["stable_rank"])
    assert math.isnan(row["effective_rank"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinities_are_flagged_and_give_no_value(bad):
    up = torch.ones(6, 2)
    up[3, 1] = bad
    row = la.spectrum_table(la.Adapter({"m": la.LowRankUpdate(up, torch.ones(2, 5), 1.0)})).iloc[0]
    assert row["flags"] == "nonfinite"
    assert math.isnan(row["norm"])
    assert row["singular_values"] is None


def test_an_unknown_scale_hides_what_depends_on_it_and_nothing_else():
    known = random_update(12, 9, 3, scale=1.0)
    table = la.spectrum_table(la.Adapter({"known": known, "unknown": la.with_scale(known, math.nan)}))
    first, second = table.iloc[0], table.iloc[1]
    assert second["flags"] == "unknown-scale"
    assert second["scale_source"] == "unknown"
    for column in ("scale", "norm", "sigma_max"):
        assert math.isnan(second[column]), column
    assert second["singular_values"] is None
    for column in ("stable_rank", "effective_rank", "nuclear_ratio", "numerical_rank", "k90", "resolved_rank"):
        assert first[column] == second[column], column


def test_r_above_d_is_flagged_and_right():
    update = random_update(5, 30, 9)
    row = la.spectrum_table(la.Adapter({"m": update})).iloc[0]
    assert row["flags"] == "r>d"
    np.testing.assert_allclose(row["singular_values"], dense_values(update), rtol=1e-9)
    assert row["numerical_rank"] == 5


def test_singular_values_below_the_rounding_of_bfloat16_are_not_resolved():
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -5, 8, dtype=torch.float64)
    update = la.LowRankUpdate((u * sigma @ mixing).bfloat16(), (mixing.mT @ v.mT).bfloat16(), 1.0)
    row = la.spectrum_table(la.Adapter({"m": update})).iloc[0]
    assert row["flags"] == "storage-noise"
    assert row["numerical_rank"] == 8
    # σ_5 = 7e-4 and below lie within three floors of about 6e-4.
    assert 3 <= row["resolved_rank"] <= 5


def test_the_number_of_workers_changes_nothing_but_time():
    adapter = la.Adapter({f"m{i}": random_update(20, 16, 4, seed=i) for i in range(7)})
    threads = torch.get_num_threads()
    one, three = (la.spectrum_table(adapter, workers=workers) for workers in (1, 3))
    assert one.equals(three)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        la.spectrum_table(adapter, workers=0)


def test_several_adapters_make_one_table_in_their_order():
    a, b = (la.Adapter({"m": random_update(4, 4, 2, seed=s)}, source=f"run{s}") for s in (1, 2))
    assert la.spectrum_table([b, a])["adapter"].tolist() == ["run2", "run1"]
    with pytest.raises(TypeError, match="expected an Adapter"):
        la.spectrum_table(["not an adapter"])


def test_overlapping_tables_leave_the_number_of_threads_as_it_was():
    import threading

    adapter = la.Adapter({f"m{i}": random_update(200, 200, 16, seed=i) for i in range(40)})
    before = torch.get_num_threads()
    callers = [threading.Thread(target=la.spectrum_table, args=(adapter,)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert torch.get_num_threads() == before
