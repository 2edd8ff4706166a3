"""Adjusted p-values: scipy's, family by family, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from lora_analysis.cli.output import findings
from lora_analysis.tables.discoveries import RATE, with_discoveries


@pytest.mark.parametrize("seed", range(5))
def test_they_are_scipys_in_every_family(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.integers(1, 40, 200) / 40  # with ties, as Monte Carlo has them
    p[rng.random(200) < 0.1] = math.nan
    table = pd.DataFrame({"side": rng.choice(["in", "out"], 200), "k": rng.integers(1, 4, 200), "phi_p_in": p})
    found = with_discoveries(table, {"phi_p_in": ["side", "k"]})
    assert list(found.columns) == [*table.columns, "phi_q_in"]
    for _, rows in found.groupby(["side", "k"]):
        tested = rows.dropna(subset="phi_p_in")
        np.testing.assert_allclose(tested["phi_q_in"], false_discovery_control(tested["phi_p_in"]), rtol=1e-12)
        assert rows.loc[rows["phi_p_in"].isna(), "phi_q_in"].isna().all()


def test_a_column_that_is_there_keeps_its_place_and_no_rows_are_no_trouble() -> None:
    table = pd.DataFrame({"p": [0.5], "q": [math.nan], "flags": [""]})
    assert list(with_discoveries(table, {"p": []}).columns) == ["p", "q", "flags"]
    empty = with_discoveries(pd.DataFrame(columns=["module", "p", "q"]), {"p": ["module"]})
    assert list(empty.columns) == ["module", "p", "q"]
    assert empty.empty


def test_without_effects_findings_are_rare_and_with_them_few_are_false() -> None:
    rng = np.random.default_rng(0)
    none = pd.DataFrame({"study": np.repeat(np.arange(500), 50), "p": rng.random(25_000)})
    any_found = with_discoveries(none, {"p": ["study"]}).groupby("study")["q"].min() <= RATE
    # Five studies in a hundred at most have any finding: 25 of 500 within four standard deviations.
    assert any_found.sum() <= 25 + 4 * math.sqrt(25)
    real = np.tile(np.arange(50) < 25, 500)
    some = none.assign(p=np.where(real, none["p"] * 1e-3, none["p"]))
    found = with_discoveries(some, {"p": ["study"]})
    found = found.assign(real=real, found=found["q"] <= RATE)
    assert found.loc[found["real"], "found"].all()
    share = found[found["found"] & ~found["real"]].groupby("study").size().reindex(range(500), fill_value=0) / 25
    assert share.mean() < RATE


def test_chance_is_an_answer() -> None:
    nan = math.nan
    rate = "(false discovery rate 5%)"
    assert findings(pd.Series([0.2, 0.9, nan]), "STI") == "STI: consistent with chance in all 2."
    assert findings(pd.Series([0.02, 0.9]), "STI") == f"STI: beyond chance in 1 of 2, 1 consistent with chance {rate}."
    assert findings(pd.Series([0.02]), "STI") == f"STI: beyond chance in 1 of 1 {rate}."
    assert findings(pd.Series([nan]), "STI") == "STI: not tested."
