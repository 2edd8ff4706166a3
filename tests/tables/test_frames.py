import json
import math

import pandas as pd
import pytest
import torch

import lora_analysis as la


@pytest.fixture
def table():
    updates = {
        "good": la.LowRankUpdate(torch.eye(4, 2), torch.eye(2, 3), 2.0),
        "unknown": la.LowRankUpdate(torch.eye(4, 2), torch.eye(2, 3), math.nan),
    }
    return la.spectrum_table(la.Adapter(updates))


def test_parquet_keeps_lists_and_missing_values(table, tmp_path):
    la.write_table(table, tmp_path / "t.parquet")
    read = pd.read_parquet(tmp_path / "t.parquet")
    assert list(read["singular_values"][0]) == [2.0, 2.0]
    assert read["singular_values"][1] is None
    assert read.columns.tolist() == table.columns.tolist()
    assert read["numerical_rank"].tolist() == [2, 2]


def test_csv_holds_lists_as_json(table, tmp_path):
    la.write_table(table, tmp_path / "t.csv")
    read = pd.read_csv(tmp_path / "t.csv")
    assert json.loads(read["singular_values"][0]) == [2.0, 2.0]
    assert math.isnan(read["norm"][1])


def test_json_is_a_list_of_rows_without_nan(table, tmp_path):
    la.write_table(table, tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert rows[0]["singular_values"] == [2.0, 2.0]
    assert rows[1]["norm"] is None
    assert rows[1]["flags"] == "unknown-scale"


def test_other_suffixes_are_refused_and_nothing_is_left_behind(table, tmp_path):
    with pytest.raises(ValueError, match=r"expected a name ending in \.csv"):
        la.write_table(table, tmp_path / "t.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_the_columns_of_a_file_have_one_type_whatever_is_missing(table, tmp_path):
    from pyarrow import parquet

    up = torch.full((4, 2), math.nan)
    missing = la.spectrum_table(la.Adapter({"m": la.LowRankUpdate(up, torch.eye(2, 3), 1.0)}))
    for name, frame in (("full", table), ("missing", missing), ("empty", la.spectrum_table(la.Adapter({})))):
        la.write_table(frame, tmp_path / f"{name}.parquet")
    full, none, empty = (parquet.read_schema(tmp_path / f"{n}.parquet") for n in ("full", "missing", "empty"))
    for column in ("numerical_rank", "k90", "resolved_rank", "singular_values", "noise_floors", "norm"):
        assert full.field(column).type == none.field(column).type, column
    assert empty.names == full.names
