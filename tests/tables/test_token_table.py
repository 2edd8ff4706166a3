"""Tokens of directions in a base with its own names, tied or not."""

from __future__ import annotations

import math

import pytest
import torch

import lora_analysis as la
from lora_analysis.tables.tokens import COLUMNS

E = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q[:, :16]
HEAD = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


def direction(rows: torch.Tensor, token: int) -> torch.Tensor:
    centred = (rows - rows.mean(0))[token]
    return centred / centred.norm()


def base(*, tied: bool) -> la.BaseWeights:
    weights = {"model.embed_tokens.weight": E, "model.layers.0.q.weight": torch.eye(16)}
    return la.load_base(weights | ({} if tied else {"lm_head.weight": HEAD}))


@pytest.mark.parametrize("tied", [True, False])
def test_either_side_speaks_through_its_own_embedding(tied: bool) -> None:
    rows = E if tied else HEAD
    update = la.LowRankUpdate(direction(rows, 7)[:, None], direction(E, 3)[None], 2.0)
    adapter = la.Adapter({"model.layers.0.q": update})
    table = la.token_table(adapter, base(tied=tied), lambda i: f"<{i}>", top=2, draws=99)
    assert tuple(table.columns) == COLUMNS
    assert [row[0] for row in table["tokens"]] == ["<3>", "<7>"]
    assert table["side"].tolist() == ["in", "out"]
    assert table["p"].tolist() == [0.01, 0.01]
    assert table["share"].tolist() == pytest.approx([1, 1])
    assert (table["k"] == 1).all()  # of two asked for: ΔW has one direction


def test_sides_of_another_width_are_left_out_and_none_at_all_is_an_error() -> None:
    wide = la.LowRankUpdate(torch.ones(9, 1), direction(E, 3)[None], 1.0)
    table = la.token_table(la.Adapter({"up": wide}), base(tied=True), str, draws=9)
    assert table["side"].unique().tolist() == ["in"]
    odd = la.Adapter({"odd": la.LowRankUpdate(torch.ones(9, 1), torch.ones(1, 8), 1.0)})
    with pytest.raises(la.BaseWeightsError, match="expected updates with a side of the width of"):
        la.token_table(odd, base(tied=True), str, draws=9)


def test_updates_without_directions_have_flagged_rows() -> None:
    adapter = la.Adapter(
        {
            "zero": la.LowRankUpdate(torch.zeros(16, 1), torch.ones(1, 16), 1.0),
            "nan": la.LowRankUpdate(torch.full((16, 1), math.nan), torch.ones(1, 16), 1.0),
            "unknown": la.LowRankUpdate(torch.ones(16, 1), torch.ones(1, 16), math.nan),
        }
    )
    table = la.token_table(adapter, base(tied=True), str, draws=9)
    assert table.groupby("module", sort=False)["flags"].first().to_dict() == {
        "zero": "zero",
        "nan": "nonfinite",
        "unknown": "",
    }


def test_a_base_without_an_embedding_is_an_error() -> None:
    adapter = la.Adapter({"q": la.LowRankUpdate(torch.ones(16, 1), torch.ones(1, 16), 1.0)})
    with pytest.raises(la.BaseWeightsError, match=r"expected an embedding of tokens.*Pass embedding="):
        la.token_table(adapter, la.load_base({"q.weight": torch.eye(16)}), str)
