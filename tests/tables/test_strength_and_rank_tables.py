"""Tables of used rank, of what seeds share, and of strength: their columns, flags and edge cases."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_analysis as la
from lora_analysis.activations import collect_activations
from lora_analysis.measures.learned import kaiming_sd
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.tables.reproducible import COLUMNS as REPRODUCIBLE
from lora_analysis.tables.strength import COLUMNS as STRENGTH
from lora_analysis.tables.used_rank import COLUMNS as USED_RANK
from lora_analysis.tables.used_rank import MEASURES


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(r: int, d_in: int, seed: int) -> torch.Tensor:
    return (
        kaiming_sd(d_in) * math.sqrt(3) * (2 * torch.rand(r, d_in, generator=torch.Generator().manual_seed(seed)) - 1)
    )


def trained(seed: int, *, r: int = 12, d: int = 96, learned: float = 0.0) -> la.LowRankUpdate:
    A = uniform(r, d, seed)
    A = A + learned * torch.outer(torch.ones(r), torch.ones(d)) / math.sqrt(r * d)
    return la.LowRankUpdate(random(d, r, seed=100 + seed), A, 1.0)


def test_quantiles_are_those_of_the_null_and_errors_those_of_the_cut() -> None:
    update = trained(0)
    row = la.used_rank_table(la.Adapter({"q": update}), draws=200, seed=3).iloc[0]
    assert tuple(row.index) == USED_RANK
    null = spectrum_null((96, 96), 12, draws=200, seed=3)
    for name, measure in MEASURES.items():
        values = torch.tensor([measure(S) for S in null], dtype=torch.float64)
        assert row[f"{name}_low"] == pytest.approx(float(values.quantile(0.01)))
        assert row[f"{name}_high"] == pytest.approx(float(values.quantile(0.99)))
        assert row[name] == measure(update.singular_values())
    dense, svd = update.dense(), update.svd()
    errors = [float((dense - svd.U[:, :k] * svd.S[:k] @ svd.Vh[:k]).norm() / dense.norm()) for k in range(1, 13)]
    assert row["truncation_errors"] == pytest.approx(errors, abs=1e-12)


def test_starts_are_told_apart_and_what_was_learned_is_counted() -> None:
    normal = la.LowRankUpdate(random(96, 12, seed=1), random(12, 96, seed=2) / 12 * 0.995, 1.0)
    strange = la.LowRankUpdate(random(96, 12, seed=1), 5 * uniform(12, 96, 3), 1.0)
    adapter = la.Adapter({"plain": trained(0), "learned": trained(1, learned=2.0), "normal": normal, "odd": strange})
    table = la.used_rank_table(adapter).set_index("module")
    assert table["start"].tolist()[:2] == ["uniform", "uniform"]
    assert table.loc["plain", "learned_directions"] == 0
    assert table.loc["learned", "learned_directions"] == 1
    assert table.loc["learned", "learned_p"] < 0.01
    assert table.loc["normal", "start"] == "normal"
    assert table.loc["odd", "start"] == "unknown"
    assert "start-unknown" in table.loc["odd", "flags"]
    assert math.isnan(table.loc["odd", "learned_p"])


def test_what_the_start_cannot_tell_is_not_counted() -> None:
    def table(A: torch.Tensor) -> pd.Series:  # type: ignore[type-arg]
        update = la.LowRankUpdate(random(96, len(A), seed=1), A, scale=1.0)
        return la.used_rank_table(la.Adapter({"q": update}), draws=999).iloc[0]

    # Untrained, of a variance a tenth larger than any known start's: nothing learned, and it says why.
    off = table(0.02 * random(16, 1024, seed=2))
    assert off["flags"] == "start-rescaled"
    assert (off["start"], off["learned_directions"]) == ("uniform", 0)
    assert off["bulk_p"] < 0.01
    assert off["learned_p"] > 0.01
    # Most of few directions learned, and one of one: not "none".
    basis = torch.linalg.qr(random(1024, 8, seed=4)).Q.mT
    for A in (uniform(8, 1024, 3) + 2 * basis, uniform(1, 1024, 3) + 2 * basis[:1]):
        most = table(A)
        assert most["flags"] == "start-unknown"
        assert most["start"] == "unknown"
        assert pd.isna(most["learned_directions"])
        assert math.isnan(most["learned_p"])


def test_factors_that_are_products_themselves_have_no_chance(tmp_path: Path) -> None:
    # LoHa is held as a product of r² columns while that is small.
    shapes = {"hada_w1_a": (256, 4), "hada_w1_b": (4, 256), "hada_w2_a": (256, 4), "hada_w2_b": (4, 256)}
    tensors = {f"lora_unet_q.{name}": random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    save_file({**tensors, "lora_unet_q.alpha": torch.tensor(4.0)}, tmp_path / "loha.safetensors")
    row = la.used_rank_table(la.load_adapter(tmp_path / "loha.safetensors")).iloc[0]
    assert row["flags"] == "no-chance"
    assert (row["r"], row["numerical_rank"]) == (4, 16)
    assert math.isnan(row["effective_rank_low"])


def test_updates_without_rank_scale_or_factors_have_rows_too() -> None:
    adapter = la.Adapter(
        {
            "zero": la.LowRankUpdate(torch.zeros(8, 2), random(2, 8, seed=0), 1.0),
            "nan": la.LowRankUpdate(torch.full((8, 2), math.nan), random(2, 8, seed=0), 1.0),
            "unknown": la.LowRankUpdate(random(8, 2, seed=1), random(2, 8, seed=0), math.nan),
            "dense": la.DenseUpdate(random(8, 8, seed=2)),
            "empty": la.LowRankUpdate(torch.zeros(8, 0), torch.zeros(0, 8), 1.0),
            "wide": la.LowRankUpdate(random(3, 5, seed=3), random(5, 4, seed=4), 1.0),
        }
    )
    table = la.used_rank_table(adapter, draws=50).set_index("module")
    assert table.loc["zero", "numerical_rank"] == 0
    assert "zero" in table.loc["zero", "flags"]
    assert table.loc["nan", "flags"] == "nonfinite"
    assert table.loc["unknown", "stable_rank"] > 0
    assert table.loc["dense", "flags"] == "no-chance"
    assert math.isnan(table.loc["dense", "stable_rank_low"])
    assert table.loc["empty", "numerical_rank"] == 0
    assert table.loc["wide", "stable_rank_low"] > 0
    assert table["plateau_p"].isna().all()  # too few values


def test_tables_are_the_same_on_any_number_of_threads() -> None:
    adapter = la.Adapter({name: trained(seed) for seed, name in enumerate("abc")})
    one, two = (la.used_rank_table(adapter, draws=60, workers=workers) for workers in (1, 2))
    pd.testing.assert_frame_equal(one, two)


def test_seeds_share_what_was_planted_on_its_side_alone() -> None:
    d, r = 200, 4
    common = torch.linalg.qr(random(d, 2, seed=0)).Q
    adapters = []
    for seed in (1, 2, 3):
        up = torch.cat([common * 3, random(d, 2, seed=10 + seed) / d**0.5], 1)
        adapters.append(la.Adapter({"q": la.LowRankUpdate(up, random(r, d, seed=20 + seed), 1.0)}))
    table = la.reproducible_table(adapters, draws=300)
    assert tuple(table.columns) == REPRODUCIBLE
    assert len(table) == 6  # three pairs, two sides
    sides = table.groupby("side")
    assert sides["reproduced"].get_group("out").tolist() == [2, 2, 2]
    assert sides["reproduced"].get_group("in").max() == 0
    assert (sides["p"].get_group("out") < 0.01).all()
    assert (table["rows_shared"] == 0).all()
    assert not table["flags"].str.contains("same-start").any()


def test_a_shared_start_is_flagged() -> None:
    A = random(4, 200, seed=0)
    adapters = [
        la.Adapter({"q": la.LowRankUpdate(random(200, 4, seed=s), A + 0.05 * random(4, 200, seed=s), 1.0)})
        for s in (1, 2)
    ]
    table = la.reproducible_table(adapters, draws=99)
    assert table["flags"].str.contains("same-start").all()
    assert table.loc[table["side"] == "in", "reproduced"].item() == 4


def test_what_cannot_be_compared_is_refused_or_flagged() -> None:
    one = la.Adapter({"q": trained(0), "only": trained(1)})
    other = la.Adapter({"q": la.LowRankUpdate(torch.zeros(96, 2), random(2, 96, seed=0), 1.0)})
    with pytest.warns(UserWarning, match="1 modules are not in every adapter"):
        table = la.reproducible_table([one, other], draws=20)
    assert table["flags"].tolist() == ["zero", "zero"]
    assert table["reproduced"].isna().all()
    with pytest.raises(ValueError, match="adapters: expected two or more, got 1"):
        la.reproducible_table([one])
    with pytest.raises(la.LoraAnalysisError, match="expected modules that all adapters have, got none"):
        la.reproducible_table([one, la.Adapter({"v": trained(0)})])


def test_strength_is_that_of_dense_matrices() -> None:
    adapter = la.Adapter({"q": trained(0), "v": trained(1)})
    weights = {f"{name}.weight": random(96, 96, seed=i) for i, name in enumerate("qv")}
    table = la.strength_table(adapter, la.load_base(weights))
    assert tuple(table.columns) == STRENGTH
    for row in table.itertuples():
        W, delta = weights[f"{row.module}.weight"].double(), adapter[row.module].dense()
        assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-9)
        expected = torch.linalg.matrix_norm(delta, 2) / torch.linalg.matrix_norm(W, 2)
        assert row.sigma_ratio == pytest.approx(float(expected), rel=1e-6)
        merged = (W.float() + delta.float()).bfloat16().double() - W.bfloat16().double()
        assert row.merge_kept == pytest.approx(float((merged * delta).sum() / delta.square().sum()), abs=1e-9)
    assert table["inputs"].isna().all()
    assert table["relative_output"].isna().all()


def test_strength_on_inputs_and_without_a_base() -> None:
    model = nn.Sequential(nn.Linear(96, 96)).double()
    adapter = la.Adapter({"0": trained(0), "gone": trained(1)})
    X = random(300, 96, seed=5).double()
    table = la.strength_table(adapter, activations=collect_activations(model, [X], adapter)).set_index("module")
    delta, W = adapter["0"].dense(), model[0].weight.detach()
    expected = (X @ delta.mT).norm() / (X @ W.mT).norm()
    assert table.loc["0", "relative_output"] == pytest.approx(float(expected), rel=1e-9)
    assert table.loc["0", "inputs"] == 300
    assert table.loc["0", "input_gain_low"] < 1 < table.loc["0", "input_gain_high"]
    assert table.loc["gone", "flags"] == "inputs-unseen"
    assert math.isnan(table.loc["0", "norm_base"])


def test_strength_of_an_unknown_scale_hides_what_hangs_on_it() -> None:
    update = la.LowRankUpdate(random(8, 2, seed=1), random(2, 8, seed=0), math.nan)
    adapter = la.Adapter({"0": update})
    model = nn.Sequential(nn.Linear(8, 8)).double()
    found = collect_activations(model, [random(30, 8, seed=2).double()], adapter)
    row = la.strength_table(adapter, la.load_base({"0.weight": torch.eye(8)}), activations=found).iloc[0]
    assert row["flags"] == "unknown-scale"
    assert math.isnan(row["norm_update"])
    assert math.isnan(row["relative_output"])
    assert math.isnan(row["merge_kept"])
    assert row["norm_base"] == pytest.approx(math.sqrt(8))
    assert row["input_gain"] > 0
