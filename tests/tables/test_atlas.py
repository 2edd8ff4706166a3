"""An atlas of adapters, against whole matrices, and against what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lora_analysis as la


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(seed: int, *, d_out: int = 50, d_in: int = 40, r: int = 3, scale: float = 0.5) -> la.LowRankUpdate:
    return la.LowRankUpdate(random(d_out, r, seed=seed), random(r, d_in, seed=1000 + seed), scale)


def shelf(count: int = 5) -> list[la.Adapter]:
    return [la.Adapter({"q": update(s), "v": update(100 + s, d_out=20)}, source=f"a{s}") for s in range(count)]


def test_cosines_and_norms_are_those_of_whole_updates() -> None:
    adapters = shelf()
    del_v = la.Adapter({"q": update(7)}, source="without v")
    adapters.append(del_v)
    found = la.atlas(adapters)
    whole = [
        torch.cat([a["q"].dense().flatten(), a["v"].dense().flatten() if "v" in a else torch.zeros(800)]).double()
        for a in adapters
    ]
    expected = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in whole]) for a in whole])
    np.testing.assert_allclose(found.cosine, expected.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.norm, [float(w.norm()) for w in whole], rtol=1e-9)
    total = torch.stack(whole).sum(0)
    assert found.mean_share == pytest.approx(float(total @ total / 6 / sum(w @ w for w in whole)))
    assert found.sources == tuple(a.source for a in adapters)


def test_unrelated_adapters_are_within_chance() -> None:
    squares = []
    for first in range(0, 4000, 100):  # other updates on every shelf
        shelf_of_six = la.atlas(
            [la.Adapter({"q": update(first + s), "v": update(50 + first + s)}) for s in range(6)], draws=0
        )
        above = np.triu_indices(6, 1)
        squares.append(np.square(shelf_of_six.cosine[above] / shelf_of_six.cosine_null_sd[above]))
    assert float(np.mean(squares)) == pytest.approx(1, abs=0.15)  # 600 pairs
    found = la.atlas(shelf(16))
    growth = found.growth.set_index(["side", "count"])
    for side in ("in", "out"):
        row = growth.loc[(side, 16)]
        assert row["k90"] == pytest.approx(row["k90_chance"], rel=0.1)
    assert found.growth["adapters"].unique().tolist() == ["all"]
    assert len(set(found.start)) == 16


def test_planted_families_and_an_outlier_are_found() -> None:
    families = [[update(seed) for seed in (1, 2)], [update(3), update(4)]]
    adapters = []
    for number, family in enumerate(families):
        for member in range(4):
            noise = [0.2 * random(50, 3, seed=10 * number + member + 50 + i) for i in (0, 20)]
            made = [la.LowRankUpdate(u.up + n, u.down, u.scale) for u, n in zip(family, noise, strict=True)]
            adapters.append(la.Adapter({"q": made[0], "v": made[1]}, source=f"{number}{member}"))
    adapters.append(la.Adapter({"q": update(9, scale=50.0), "v": update(10, scale=50.0)}, source="loud"))
    found = la.atlas(adapters)
    clusters = found.clusters(0.5)
    assert len(set(clusters[:4])) == len(set(clusters[4:8])) == 1
    assert len(set(clusters)) == 3
    order = [found.sources[number] for number in found.order()]
    first = [source[0] for source in order if source != "loud"]
    assert first in (["0"] * 4 + ["1"] * 4, ["1"] * 4 + ["0"] * 4)
    table = found.adapters().set_index("adapter")
    assert table.index[table["outlier"]].tolist() == ["loud"]
    # Members of a family have one A.
    assert len(set(found.start[:4])) == len(set(found.start[4:8])) == 1
    assert len(set(found.start)) == 3
    assert set(found.growth["adapters"]) == {"all", "one of each start"}
    growth = found.growth.set_index(["adapters", "side", "count"])
    assert growth.loc[("all", "in", 8), "k90"] < growth.loc[("all", "in", 8), "k90_chance"]
    pairs = found.pairs()
    assert pairs["cosine"].is_monotonic_decreasing
    assert pairs.head(12)["same_start"].all()


def test_of_a_few_none_stands_apart_and_to_be_like_all_others_is_not_to() -> None:
    common = update(1)

    def near(seed: int, like: float) -> la.Adapter:
        own = update(100 + seed)
        up, down = own.up + like * common.up, own.down + like * common.down
        size = la.LowRankUpdate(up, down, 1.0).norm()
        return la.Adapter({"q": la.LowRankUpdate(up, down, 1 / size)})  # of one norm, so that cosines alone tell

    three = la.atlas([la.Adapter({"q": update(seed, scale=scale)}) for seed, scale in ((1, 1.0), (2, 1.1), (3, 90.0))])
    few = three.adapters()
    assert few["norm_score"].abs().max() > 3.5
    assert not few["outlier"].any()
    many = la.atlas([near(seed, 0.6 if seed else 9.0) for seed in range(12)]).adapters()
    assert many["cosine_score"].idxmax() == 0
    assert many.loc[0, "cosine_score"] > 3.5
    assert not many.loc[0, "outlier"]


def test_one_adapter_and_one_of_zeros() -> None:
    alone = la.atlas(shelf(1))
    assert alone.order() == [0]
    assert alone.clusters(0.5).tolist() == [1]
    assert alone.pairs().empty
    assert math.isnan(alone.adapters()["mean_cosine"].item())
    zero = la.Adapter({"q": la.LowRankUpdate(torch.zeros(50, 3), random(3, 40, seed=1), 1.0)}, source="zero")
    found = la.atlas([*shelf(3), zero])
    assert np.isnan(found.cosine[3, :3]).all()
    assert len(found.order()) == 4
    assert math.isnan(found.adapters()["mean_cosine"].iloc[3])
    assert found.adapters()["nearest"].iloc[3] == ""


def test_what_cannot_be_charted_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one adapter"):
        la.atlas([])
    with pytest.raises(la.LoraAnalysisError, match="expected modules, got none"):
        la.atlas([la.Adapter({})])
    with pytest.raises(la.LoraAnalysisError, match="'q': expected one shape in all adapters"):
        la.atlas([la.Adapter({"q": update(1)}), la.Adapter({"q": update(2, d_out=9)})])
    with pytest.raises(la.UndefinedUpdateError, match=r"expected a known scale, got none\. Pass alpha="):
        la.atlas([la.Adapter({"q": update(1, scale=math.nan)})])
    with pytest.raises(la.UndefinedUpdateError, match="expected finite numbers"):
        la.atlas([la.Adapter({"q": la.LowRankUpdate(torch.full((5, 1), math.nan), torch.ones(1, 4), 1.0)})])
