import math

import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.truncation import COLUMNS


def test_what_was_kept_and_lost_are_the_two_sides_of_the_whole():
    before, after = ({f"{i}.weight": torch.randn(9, 7) for i in range(3)} for _ in range(2))
    whole, table = la.diff(after, before), la.truncation_table(la.diff(after, before, r=2))
    assert tuple(table.columns) == COLUMNS
    for row in table.itertuples():
        S = whole[row.module].singular_values()
        assert row.norm == pytest.approx(float(S[:2].norm()), rel=1e-6)
        assert row.truncation_error == pytest.approx(float(S[2:].norm()), rel=1e-6)
        assert row.truncation_error_relative == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-6)
        assert (row.r, row.flags) == (2, "")


def test_what_was_not_truncated_has_no_error():
    updates = {
        "plain": la.LowRankUpdate(torch.ones(3, 1), torch.ones(1, 2), 1.0),
        "unknown": la.LowRankUpdate(torch.ones(3, 1), torch.ones(1, 2), math.nan),
        "nonfinite": la.DenseUpdate(torch.full((2, 2), math.nan)),
        "zero": la.DenseUpdate(torch.zeros(2, 2)),
    }
    table = la.truncation_table([la.Adapter(updates)]).set_index("module")
    assert (table["truncation_error_relative"] == 0).all()
    assert table["norm"].isna().tolist() == [False, True, True, False]
    assert table["flags"].tolist() == ["", "unknown-scale", "nonfinite", "zero"]
    assert tuple(la.truncation_table(la.Adapter({})).columns) == COLUMNS
