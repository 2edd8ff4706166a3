"""Maps, overlaps and the shelf: what is drawn is what the tables say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import lora_analysis as la
from lora_analysis import plots

NAMES = [f"layers.{layer}.attn.{kind}_proj" for layer in range(4) for kind in "qkv"]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"adapter": "runs/r8", "module": NAMES, **columns})


def test_a_map_has_every_module_in_its_place_and_blanks_where_there_is_none() -> None:
    table = values(gain=[float(i) for i in range(12)])
    table.loc[5, "gain"] = math.nan
    table = table.drop(index=7)
    ax = plots.module_map(table, "gain", chance=1.0)
    drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert drawn.shape == (4, 3)
    expected = np.arange(12.0).reshape(4, 3)
    expected[1, 2] = expected[2, 1] = math.nan
    np.testing.assert_array_equal(drawn, expected)
    assert [text.get_text() for text in ax.get_xticklabels()] == [rf"$\Delta W_{kind}$" for kind in "qkv"]
    bar = ax.images[0].colorbar
    assert bar is not None
    assert bar.ax.get_ylabel() == "gain"
    assert bar.ax.get_xlabel() == "line: chance,\n1"


def test_a_map_marks_what_is_consistent_with_chance_and_keeps_chance_on_its_bar() -> None:
    table = values(gain=[2.0 + i for i in range(12)], q=[0.01] * 10 + [0.2, math.nan])
    ax = plots.module_map(table, "gain", chance=1.0, q="q", log=True)
    dots = [tuple(map(int, line.get_xydata()[0])) for line in ax.lines]  # type: ignore[index]
    assert dots == [(1, 3)]
    assert ax.get_title(loc="left") == "dot: consistent with chance"
    assert ax.images[0].norm.vmin == 1.0


def test_a_map_of_one_value_and_one_without_any() -> None:
    assert plots.module_map(values(gain=[3.0] * 12), "gain").images
    with pytest.raises(ValueError, match="expected values of 'gain', got none"):
        plots.module_map(values(gain=[math.nan] * 12), "gain")
    with pytest.raises(ValueError, match=r"got several of 'layers\.0\.attn\.q_proj'"):
        plots.module_map(pd.concat([values(gain=[1.0] * 12)] * 2), "gain")
    with pytest.raises(ValueError, match="got none called 'gain'"):
        plots.module_map(values(), "gain")


def test_modules_without_a_layer_have_a_row_of_their_own() -> None:
    table = pd.DataFrame({"adapter": "a", "module": ["lm_head", "h.0.q", "h.1.q"], "x": [1.0, 2.0, 3.0]})
    ax = plots.module_map(table, "x")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "-"]
    drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(drawn, [[math.nan, 2], [math.nan, 3], [1, math.nan]])


def test_overlaps_are_those_of_the_table_over_chance() -> None:
    base = la.load_base({f"{name}.weight": gaussian(30, 30, seed=i) for i, name in enumerate(NAMES[:3])})
    updates = {name: la.LowRankUpdate(gaussian(30, 4, seed=i), gaussian(4, 30, seed=9 + i), 1.0) for i, name in
               enumerate(NAMES[:3])}  # fmt: skip
    table = la.spectrum_overlap_table(la.Adapter(updates), base, parts=5, draws=99)
    ax = plots.spectrum_overlap(table, side="in")
    mine = table[(table["side"] == "in") & (table["k"] == 4)]
    for line, (_, rows) in zip(ax.lines[1:], mine.groupby("module", sort=False), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), (rows["overlap"] / rows["null_mean"]).to_numpy())
    assert ax.get_ylabel() == "overlap over chance, $k$ = 4"
    with pytest.raises(ValueError, match="expected overlaps on side 'in' at k=3, got none"):
        plots.spectrum_overlap(table, side="in", k=3)


def test_the_shelf_is_in_the_order_of_its_tree_and_white_within_chance() -> None:
    first = gaussian(40, 3, seed=1), gaussian(3, 40, seed=2)

    def adapter(seed: int, like: float) -> la.Adapter:
        up, down = gaussian(40, 3, seed=seed), gaussian(3, 40, seed=seed + 50)
        update = la.LowRankUpdate(up + like * first[0], down + like * first[1], 1.0)
        return la.Adapter({"q": update}, source=f"shelf/{seed}/r3")

    shelf = la.atlas([adapter(10, 5.0), adapter(11, 0.0), adapter(12, 5.0), adapter(13, 0.0)])
    figure = plots.figure_atlas(shelf)
    assert isinstance(figure, Figure)
    grid = figure.axes[1]
    names = [text.get_text() for text in grid.get_yticklabels()]
    assert names == [f"{(10, 11, 12, 13)[number]}/r3" for number in shelf.order()]
    assert abs(names.index("10/r3") - names.index("12/r3")) == 1
    drawn = np.ma.filled(grid.images[0].get_array(), np.nan)
    assert np.isnan(np.diag(drawn)).all()
    a, b = names.index("10/r3"), names.index("12/r3")
    assert drawn[a, b] == pytest.approx(shelf.cosine[0, 2])
    assert drawn[names.index("11/r3"), names.index("13/r3")] == 0
    with pytest.raises(ValueError, match="expected 4, got 1"):
        plots.figure_atlas(shelf, names=["one"])
    with pytest.raises(ValueError, match="expected two adapters or more"):
        plots.figure_atlas(la.atlas([adapter(10, 5.0)]))
