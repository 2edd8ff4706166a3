"""Figures: what they draw is what the tables say, with chance on every one, and no global state is touched."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor

import lora_analysis as la
from lora_analysis import plots
from lora_analysis.measures.projection_null import projection_null, projection_null_draws
from lora_analysis.measures.spectrum_null import spectrum_null
from lora_analysis.measures.subspace import subspace_similarity
from lora_analysis.measures.weight import weight_spectrum
from lora_analysis.plots.appearance import ONE_COLUMN
from lora_analysis.plots.modules import kind_labels, module_label, place
from lora_analysis.update import factors

D = 48
NAMES = [f"encoder.layer.{layer}.attention.self.{kind}" for layer in range(3) for kind in ("query", "value")]
Q, V = NAMES[2], NAMES[3]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_adapter(
    r: int, seed: int, source: str, *, dtype: torch.dtype = torch.float32, tail: float = 1.0
) -> la.Adapter:
    """Updates with one direction that all seeds share, and noise."""
    updates = {}
    for number, name in enumerate(NAMES):
        up, down = gaussian(D, r, seed=100 * seed + number), gaussian(r, D, seed=100 * seed + number + 50)
        up[:, 0] += 20 * gaussian(D, seed=number)
        down[0] += 20 * gaussian(D, seed=number + 20)
        down[-1] *= tail
        updates[name] = la.LowRankUpdate(up.to(dtype), down.to(dtype), scale=2.0)
    return la.Adapter(updates, source=source)


@pytest.fixture(scope="module")
def small() -> la.Adapter:
    return make_adapter(4, 1, "runs/r4")


@pytest.fixture(scope="module")
def large() -> la.Adapter:
    return make_adapter(12, 2, "runs/r12")


@pytest.fixture(scope="module")
def ranks(small: la.Adapter, large: la.Adapter) -> pd.DataFrame:
    return la.similarity_table(small, large, cells="all", draws=20)


@pytest.fixture(scope="module")
def seeds(large: la.Adapter) -> pd.DataFrame:
    return la.similarity_table(large, make_adapter(12, 3, "runs/r12-b"), cells="all", draws=20)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {f"{name}.weight": gaussian(D, D, seed=900 + number) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def amplification(large: la.Adapter, weights: dict[str, Tensor]) -> pd.DataFrame:
    return la.amplification_table(large, la.load_base(weights), draws=0)


@pytest.fixture
def runs() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"targets": targets, "r": r, "seed": seed, "accuracy": start + 0.01 * r + 0.002 * seed, "loss": 1 / r}
            for targets, start in (("query+value", 0.7), ("query", 0.6))
            for r in (1, 2, 8)
            for seed in (0, 1)
        ]
    )


def drawn(figure: Figure) -> Figure:
    """After a real drawing, which settles the layout."""
    figure.draw_without_rendering()
    return figure


def figure_of(ax: Axes) -> Figure:
    assert isinstance(ax.figure, Figure)
    return drawn(ax.figure)


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = (item for item in ax.lines if item.get_label() == label)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def legend_texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def image(ax: Axes) -> np.ma.MaskedArray:
    (found,) = ax.images
    values = found.get_array()
    assert isinstance(values, np.ma.MaskedArray)
    return values


def band_vertices(ax: Axes) -> np.ndarray:
    """Corners (x, y) of the one band of the axes."""
    (band,) = ax.collections
    return np.asarray(band.get_paths()[0].vertices)


def grid_of(table: pd.DataFrame, module: str, side: str, column: str) -> np.ndarray:
    rows = table[(table["module_a"] == module) & (table["side"] == side)]
    return rows.pivot(index="i", columns="j", values=column).to_numpy()


def colour_bar_of(figure: Figure) -> Axes:
    (bar,) = (ax for ax in figure.axes if ax.get_label() == "<colorbar>")
    return bar


def panels_of(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def marks(bar: Axes) -> list[float]:
    """Heights of the lines across a colour bar."""
    return sorted({float(np.asarray(item.get_ydata())[0]) for item in bar.lines})


# -- similarity --


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_grid_shows_phi_of_the_table(ranks: pd.DataFrame, side: str) -> None:
    ax = plots.similarity_grid(ranks, module=Q, side=side)
    np.testing.assert_array_equal(image(ax), grid_of(ranks, Q, side, "phi"))
    assert ax.images[0].get_clim() == (0.0, 1.0)
    # i downwards and j to the right, in data coordinates.
    assert tuple(ax.images[0].get_extent()) == (0.5, 12.5, 4.5, 0.5)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("$j$", "$i$", r"$\Delta W_q$, layer 1")


def test_a_grid_agrees_with_the_measure(ranks: pd.DataFrame, small: la.Adapter, large: la.Adapter) -> None:
    phi = subspace_similarity(small[V].svd().V, large[V].svd().V)
    np.testing.assert_allclose(image(plots.similarity_grid(ranks, module=V)), phi.numpy(), atol=1e-12)


def test_the_colour_bar_marks_chance_at_the_last_cell(ranks: pd.DataFrame) -> None:
    bar = colour_bar_of(figure_of(plots.similarity_grid(ranks, module=Q)))
    assert marks(bar) == pytest.approx([12 / D])
    labels = {text.get_text() for text in bar.get_yticklabels()}
    assert "0.25\nchance" in labels
    assert "0.2" not in labels  # it would be written over the mark's label
    zoomed = colour_bar_of(figure_of(plots.similarity_grid(ranks, module=Q, upto=(2, 3))))
    assert marks(zoomed) == pytest.approx([3 / D])


def test_excess_is_zero_at_chance_and_one_at_containment(ranks: pd.DataFrame) -> None:
    ax = plots.similarity_grid(ranks, module=Q, excess=True)
    phi, mean = grid_of(ranks, Q, "in", "phi"), grid_of(ranks, Q, "in", "null_mean")
    np.testing.assert_allclose(image(ax), (phi - mean) / (1 - mean), atol=1e-12)
    assert marks(colour_bar_of(figure_of(ax))) == [0.0]


def test_cells_beyond_the_rank_are_masked_and_grey(large: la.Adapter) -> None:
    up, down = factors(large[Q])
    deficient = la.LowRankUpdate(up[:, [0, 1, 1]], down[[0, 1, 1]], scale=1.0)
    a = la.Adapter({Q: deficient}, source="deficient")
    ax = plots.similarity_grid(la.similarity_table(a, a, cells="all", draws=5))
    np.testing.assert_array_equal(np.ma.getmaskarray(image(ax))[2], True)
    np.testing.assert_array_equal(np.ma.getmaskarray(image(ax))[:2, :2], False)
    assert tuple(ax.images[0].get_cmap().get_bad()) == to_rgba("0.8")


def test_a_grid_can_be_drawn_into_given_axes_without_a_bar(ranks: pd.DataFrame) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.similarity_grid(ranks, module=Q, colour_bar=False, ax=ax) is ax
    assert figure.axes == [ax]


def test_modules_of_two_names_are_both_in_the_title(large: la.Adapter) -> None:
    table = la.similarity_table(large, pairs=[(Q, V)], cells="all", draws=5)
    ax = plots.similarity_grid(table, module=(Q, V))
    assert ax.get_title() == "$\\Delta W_q$, layer 1\nand $\\Delta W_v$, layer 1"


def test_figure_of_ranks_has_whole_grids_zooms_and_chance(ranks: pd.DataFrame) -> None:
    figure = drawn(plots.figure_ranks(ranks, [Q, V], zoom=3))
    panels = panels_of(figure)
    assert len(panels) == 6
    assert [ax.get_title() for ax in panels[:3]] == [
        r"$\Delta W_q$, layer 1",
        r"$\Delta W_v$, layer 1",
        f"chance, $d$ = {D}",
    ]
    for column, module in enumerate((Q, V)):
        phi = grid_of(ranks, module, "in", "phi")
        np.testing.assert_array_equal(image(panels[column]), phi)
        np.testing.assert_array_equal(image(panels[3 + column]), phi[:3, :3])
    i, j = np.ogrid[1:5, 1:13]
    np.testing.assert_allclose(image(panels[2]), np.maximum(i, j) / D, rtol=1e-12)
    np.testing.assert_allclose(image(panels[5]), (np.maximum(i, j) / D)[:3, :3], rtol=1e-12)
    assert marks(colour_bar_of(figure)) == pytest.approx([3 / D, 12 / D])
    # One scale for all, or the panels would not compare.
    assert {ax.images[0].get_clim() for ax in panels} == {(0.0, 1.0)}


def test_figure_of_ranks_leaves_chance_out_where_it_is_zero(ranks: pd.DataFrame) -> None:
    assert len(panels_of(plots.figure_ranks(ranks, [Q], zoom=3, excess=True))) == 2


def test_figure_of_seeds_ends_with_a_random_control_that_names_its_seed(seeds: pd.DataFrame) -> None:
    figure = drawn(plots.figure_seeds(seeds, [Q, V], seed=5))
    panels = panels_of(figure)
    assert [ax.get_title() for ax in panels] == [
        r"$\Delta W_q$, layer 1",
        r"$\Delta W_v$, layer 1",
        "Gaussian, seed 5",
    ]
    np.testing.assert_array_equal(image(panels[0]), grid_of(seeds, Q, "in", "phi"))
    control, other = image(panels[2]), image(panels_of(plots.figure_seeds(seeds, [Q], seed=6))[-1])
    assert control.shape == (12, 12)
    assert not np.array_equal(control, other)
    # A draw of the null: within five of its standard deviations at the last cell, and not its mean.
    null = la.similarity_null(D, 12, 12)
    assert abs(control[-1, -1] - 12 / D) < 5 * float(null.sd[-1, -1])
    assert control[-1, -1] != 12 / D


def test_many_modules_wrap_into_rows(seeds: pd.DataFrame) -> None:
    figure = drawn(plots.figure_seeds(seeds, NAMES, columns=4))
    panels = panels_of(figure)
    assert len(panels) == len(NAMES) + 1
    assert len({round(ax.get_position().y0, 3) for ax in panels}) == 2


def test_a_table_of_landmarks_is_refused(small: la.Adapter, large: la.Adapter) -> None:
    table = la.similarity_table(small, large, draws=5)
    with pytest.raises(ValueError, match=r"expected every cell up to \(4, 12\) once.*cells='all'"):
        plots.similarity_grid(table, module=Q)


def test_several_pairs_are_refused_unless_one_is_chosen(ranks: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="similarity_grid: expected rows of one module_a, got 6"):
        plots.similarity_grid(ranks)


def test_unknown_modules_sides_and_empty_choices_are_named(ranks: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="no rows for module 'absent' on side 'in'"):
        plots.similarity_grid(ranks, module="absent")
    with pytest.raises(ValueError, match="on side 'left'"):
        plots.similarity_grid(ranks, module=Q, side="left")
    with pytest.raises(ValueError, match="upto: expected i and j of at least 1"):
        plots.similarity_grid(ranks, module=Q, upto=(0, 3))
    with pytest.raises(ValueError, match="figure_ranks: modules: expected a list"):
        plots.figure_ranks(ranks, [])
    with pytest.raises(ValueError, match=r"figure_seeds: modules: expected a list.*got 'encoder"):
        plots.figure_seeds(ranks, Q)
    with pytest.raises(ValueError, match="zoom: expected at least 1"):
        plots.figure_ranks(ranks, [Q], zoom=0)
    with pytest.raises(ValueError, match="columns: expected at least 1"):
        plots.figure_seeds(ranks, [Q], columns=0)


# -- amplification --


def test_points_are_the_table_7_of_a_module(amplification: pd.DataFrame) -> None:
    ax = plots.amplification_points(amplification, module=Q)
    rows = amplification[amplification["module"] == Q]
    for label, column in (
        (r"top $k$ of $\Delta W$", "projected"),
        ("top $k$ of $W$: ceiling", "projected_top"),
        ("random (rms)", "projected_null_rms"),
    ):
        k, values = line(ax, label)
        np.testing.assert_array_equal(k, rows["k"])
        np.testing.assert_array_equal(values, rows[column])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "chance, 95 %" in legend_texts(ax)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "4", "8", "12"]


def test_the_chance_band_holds_95_percent_of_random_projections(
    amplification: pd.DataFrame, weights: dict[str, Tensor]
) -> None:
    ax = plots.amplification_points(amplification, module=Q)
    vertices = band_vertices(ax)
    spectrum = weight_spectrum(weights[f"{Q}.weight"], 12)
    draws = projection_null_draws(spectrum, (D, D), 12, draws=2000).sqrt()
    for k in (2, 4, 8, 12):
        low, high = np.sort(np.unique(vertices[np.isclose(vertices[:, 0], k), 1]))[[0, -1]]
        inside = float(((draws[:, k - 1] > low) & (draws[:, k - 1] < high)).double().mean())
        # Moments are exact and the shape is matched; binomial error is 0.005.
        assert inside == pytest.approx(0.95, abs=0.02), k


def test_gain_by_layer_shows_every_module_with_its_own_chance(
    amplification: pd.DataFrame, weights: dict[str, Tensor]
) -> None:
    ax = plots.gain_by_layer(amplification)
    rows = amplification[amplification["k"] == 12]
    for kind, label in (("query", "$W_q$"), ("value", "$W_v$")):
        x, y = line(ax, label)
        np.testing.assert_array_equal(y, rows[rows["module"].str.endswith(kind)]["gain"])
        np.testing.assert_array_equal(np.round(x), [0, 1, 2])
    assert ax.get_ylabel() == "gain over chance, $k$ = 12"
    assert ax.get_xlabel() == "layer"
    assert len(ax.patches) == len(NAMES)
    for bar, module in zip(ax.patches, rows["module"], strict=True):
        spectrum = weight_spectrum(weights[f"{module}.weight"], 12)
        mean, variance = projection_null((D, D), 12, 12, spectrum.norm**2, spectrum.fourth_moment)
        low, high = bar.get_y(), bar.get_y() + bar.get_height()  # type: ignore[attr-defined]
        assert low < 1 < high
        # The width of a narrow interval is that of the normal law: 2 x 1.96 sd of the square, half of it in the root.
        assert high - low == pytest.approx(1.96 * math.sqrt(variance) / mean, rel=0.02)
    low_edge = min(bar.get_y() for bar in ax.patches)  # type: ignore[attr-defined]
    assert ax.get_ylim()[0] < low_edge


def test_gains_compare_at_the_largest_common_k(
    amplification: pd.DataFrame, small: la.Adapter, weights: dict[str, Tensor]
) -> None:
    both = pd.concat([amplification, la.amplification_table(small, la.load_base(weights), draws=0)])
    ax = plots.gain_by_layer(both)
    assert ax.get_ylabel().endswith("= 4")
    assert [text for text in legend_texts(ax) if "W_q" in text] == ["runs/r12: $W_q$", "runs/r4: $W_q$"]
    x_a, _ = line(ax, "runs/r12: $W_q$")
    x_b, _ = line(ax, "runs/r4: $W_q$")
    assert (x_a != x_b).all()  # side by side, none covered
    assert plots.gain_by_layer(both, k=2).get_ylabel().endswith("= 2")


def test_k_1_has_no_chance_interval(amplification: pd.DataFrame) -> None:
    assert not plots.gain_by_layer(amplification, k=1).patches


def test_modules_without_layers_stand_side_by_side(large: la.Adapter, weights: dict[str, Tensor]) -> None:
    adapter = la.Adapter({"lm_head": large[Q], "embed_$x$": large[V]}, source="a")
    base = la.load_base({"lm_head.weight": weights[f"{Q}.weight"], "embed_$x$.weight": weights[f"{V}.weight"]})
    ax = plots.gain_by_layer(la.amplification_table(adapter, base, draws=0))
    figure_of(ax)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["lm_head", r"embed_\$x\$"]


def test_amplification_without_values_is_refused(amplification: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="no module 'absent'"):
        plots.amplification_points(amplification, module="absent")
    with pytest.raises(ValueError, match="expected rows of one module"):
        plots.amplification_points(amplification)
    with pytest.raises(ValueError, match="expected a k with a gain, got k=5"):
        plots.gain_by_layer(amplification, k=5)
    with pytest.raises(ValueError, match="expected a k with a projection"):
        plots.amplification_points(amplification.assign(projected=math.nan), module=Q)
    with pytest.raises(ValueError, match="a k at which every module has a gain"):
        plots.gain_by_layer(amplification.assign(gain=math.nan))
    with pytest.raises(ValueError, match="got none called 'gain'"):
        plots.gain_by_layer(amplification.drop(columns="gain"))
    with pytest.raises(ValueError, match="got an empty table"):
        plots.gain_by_layer(amplification.iloc[:0])


# -- spectra --


def test_spectra_are_divided_by_the_norm_and_stand_against_chance(large: la.Adapter) -> None:
    ax = plots.spectra(la.spectrum_table(large), draws=200, seed=3)
    S = large[NAMES[0]].singular_values()
    k, shares = line(ax, r"$\Delta W_q$")
    np.testing.assert_array_equal(k, np.arange(1, 13))
    np.testing.assert_allclose(shares, (S / S.norm()).numpy(), rtol=1e-9)
    assert len(ax.lines) == len(NAMES) + 1
    null = spectrum_null((D, D), 12, draws=200, seed=3)
    _, middle = line(ax, "chance (90 % band)")
    np.testing.assert_allclose(middle, np.median((null / null.norm(dim=1, keepdim=True)).numpy(), axis=0), rtol=0.01)
    assert ax.get_yscale() == "log"
    low, high = (np.quantile((null / null.norm(dim=1, keepdim=True)).numpy()[:, 0], q) for q in (0.05, 0.95))
    at_first = band_vertices(ax)
    np.testing.assert_allclose(np.ptp(at_first[at_first[:, 0] == 1, 1]), high - low, rtol=1e-9)


def test_noise_floors_are_drawn_only_where_they_come_near() -> None:
    tables = {
        dtype: la.spectrum_table(make_adapter(4, 1, "a", dtype=dtype, tail=1e-3))
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert "3 x noise floor" not in legend_texts(plots.spectra(tables[torch.float32], draws=20))
    table = tables[torch.bfloat16]
    ax = plots.spectra(table, draws=20)
    _, floors = line(ax, "3 x noise floor")
    first = table.iloc[0]
    np.testing.assert_allclose(floors, 3 * np.array(first["noise_floors"]) / first["norm"], rtol=1e-9)


def test_colours_tell_layers_apart_where_there_is_one_projection(large: la.Adapter) -> None:
    ax = plots.spectra(la.spectrum_table(large), modules=NAMES[::2], draws=20)
    assert colour_bar_of(figure_of(ax)).get_ylabel() == r"layer of $\Delta W_q$"
    assert len({tuple(np.ravel(item.get_color())) for item in ax.lines if item.get_marker() == "o"}) == 3


def test_modules_without_a_spectrum_are_counted_in_the_figure(large: la.Adapter) -> None:
    zero = la.LowRankUpdate(torch.zeros(D, 2), torch.ones(2, D), scale=1.0)
    unknown = la.LowRankUpdate(torch.ones(D, 2), torch.ones(2, D), scale=math.nan)
    adapter = la.Adapter({Q: large[Q], V: zero, NAMES[0]: unknown}, source="a")
    ax = plots.spectra(la.spectrum_table(adapter), draws=20)
    assert ax.get_legend().get_title().get_text() == "no spectrum: 2 of 3 modules"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"expected a module with singular values.*alpha="):
        plots.spectra(la.spectrum_table(la.Adapter({Q: unknown}, source="b")))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_saved_table_draws_the_same_spectra(large: la.Adapter, tmp_path: Path, suffix: str) -> None:
    table = la.spectrum_table(large)
    path = la.write_table(table, tmp_path / f"spectra{suffix}")
    again = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    ours, theirs = plots.spectra(table, draws=20), plots.spectra(again, draws=20)
    for a, b in zip(ours.lines, theirs.lines, strict=True):
        np.testing.assert_allclose(np.asarray(a.get_ydata()), np.asarray(b.get_ydata()), rtol=1e-12)


def test_several_shapes_have_a_band_each(large: la.Adapter) -> None:
    wide = la.LowRankUpdate(gaussian(20, 3, seed=1), gaussian(3, D, seed=2), scale=1.0)
    ax = plots.spectra(la.spectrum_table(la.Adapter({Q: large[Q], V: wide}, source="a")), draws=20)
    assert len(ax.collections) == 2
    assert "chance 20x48, $r$ = 3 (90 % band)" in legend_texts(ax)


def test_spectra_of_several_adapters_are_refused(small: la.Adapter, large: la.Adapter) -> None:
    table = la.spectrum_table([small, large])
    with pytest.raises(ValueError, match="spectra: expected rows of one adapter, got 2"):
        plots.spectra(table)
    with pytest.raises(ValueError, match="no module 'absent'"):
        plots.spectra(la.spectrum_table(small), modules=["absent"])
    with pytest.raises(ValueError, match="modules: expected a list"):
        plots.spectra(la.spectrum_table(small), modules=Q)


# -- ablation --


def test_every_run_is_a_point_and_lines_join_means(runs: pd.DataFrame) -> None:
    ax = plots.rank_ablation(runs)
    for targets in ("query+value", "query"):
        x, y = line(ax, f"{targets} (2 seeds)")
        group = runs[runs["targets"] == targets]
        np.testing.assert_array_equal(y, group["accuracy"])
        np.testing.assert_allclose(x, group["r"], rtol=0.05)
        means = group.groupby("r")["accuracy"].mean().to_numpy()
        assert any(len(item.get_xdata()) == 3 and np.allclose(item.get_ydata(), means) for item in ax.lines)  # type: ignore[arg-type]
    assert not ax.collections  # no error bars
    figure_of(ax)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "8"]
    assert ax.get_ylabel() == "accuracy (%)"
    assert "70" in [text.get_text() for text in ax.get_yticklabels()]


def test_series_differ_in_colour_and_in_marker(runs: pd.DataFrame) -> None:
    points = [item for item in plots.rank_ablation(runs).lines if item.get_linestyle() == "None"]
    assert len({item.get_color() for item in points}) == len({item.get_marker() for item in points}) == 2


def test_the_frozen_model_is_a_line_with_its_interval(runs: pd.DataFrame) -> None:
    ax = plots.rank_ablation(runs, baseline=0.5, baseline_interval=(0.45, 0.55))
    _, y = line(ax, "frozen model, interval")
    np.testing.assert_array_equal(y, 0.5)
    (band,) = ax.patches
    extent = band.get_extents().transformed(ax.transData.inverted())
    assert (extent.y0, extent.y1) == pytest.approx((0.45, 0.55))
    assert "frozen model" in legend_texts(plots.rank_ablation(runs, baseline=0.5))


def test_the_legend_counts_uneven_seeds(runs: pd.DataFrame) -> None:
    ax = plots.rank_ablation(runs.drop(index=0))
    assert legend_texts(ax)[0] == "query+value (1 to 2 seeds)"


def test_other_metrics_are_drawn_as_they_are(runs: pd.DataFrame) -> None:
    ax = plots.rank_ablation(runs, metric="loss")
    assert ax.get_ylabel() == "loss"
    np.testing.assert_array_equal(line(ax, "query (2 seeds)")[1], runs[runs["targets"] == "query"]["loss"])


def test_unusable_runs_are_refused(runs: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="got two for targets='query\\+value', r=1, seed=0"):
        plots.rank_ablation(pd.concat([runs, runs.iloc[:1]]))
    with pytest.raises(ValueError, match="got none called 'bleu'"):
        plots.rank_ablation(runs, metric="bleu")
    with pytest.raises(ValueError, match="expected ranks r of at least 1, got 0"):
        plots.rank_ablation(runs.assign(r=0))
    runs.loc[3, "accuracy"] = math.nan
    with pytest.raises(ValueError, match="got none for targets='query\\+value', r=2, seed=1"):
        plots.rank_ablation(runs)


# -- names --


def test_names_are_said_as_in_the_paper() -> None:
    assert module_label(Q, update=True) == r"$\Delta W_q$, layer 1"
    assert module_label("model.layers.31.self_attn.o_proj") == "$W_o$, layer 31"
    assert module_label("lm_head") == "lm_head"
    assert place("h.4.experts.2.w1") == (4, "h.experts.2.w1")


def test_kinds_of_like_endings_get_longer_labels() -> None:
    labels = kind_labels(["a.output.dense", "a.intermediate.dense", "a.query", "b.query"])
    assert list(labels.values()) == ["output.dense", "intermediate.dense", "a.query", "b.query"]
    assert len(set(kind_labels(["x.c", "c"]).values())) == 2


# -- files and global state --


def test_public_names_are_complete_and_sorted() -> None:
    assert list(plots.__all__) == sorted(plots.__all__)
    assert all(callable(getattr(plots, name)) for name in plots.__all__)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_figure_is_the_same_file(ranks: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    files = [
        plots.save_figure(plots.figure_ranks(ranks, [Q], zoom=3), tmp_path / "made" / f"{number}{suffix}")
        for number in range(2)
    ]
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert first == second
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [f"0{suffix}", f"1{suffix}"]


def test_png_files_have_200_dots_per_inch(runs: pd.DataFrame, tmp_path: Path) -> None:
    path = plots.save_figure(plots.rank_ablation(runs), tmp_path / "a.png")
    header = path.read_bytes()
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == round(200 * ONE_COLUMN)


def test_axes_inside_a_subfigure_save_the_whole_figure(runs: pd.DataFrame, tmp_path: Path) -> None:
    figure = Figure(figsize=(5, 2), layout="constrained")
    left = figure.subfigures(1, 2).flat[0]  # type: ignore[union-attr]
    ax = plots.rank_ablation(runs, ax=left.subplots())
    header = plots.save_figure(ax, tmp_path / "a.png").read_bytes()
    assert int.from_bytes(header[16:20], "big") == 1000


def test_other_suffixes_and_loose_artists_are_refused(runs: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg: expected a name ending in \.pdf, \.png, \.svg"):
        plots.save_figure(plots.rank_ablation(runs), tmp_path / "a.jpg")
    with pytest.raises(TypeError, match="expected a Figure or Axes of one"):
        plots.save_figure(mpl.lines.Line2D([], []), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_label_is_cut_off_or_covers_another(
    ranks: pd.DataFrame, seeds: pd.DataFrame, amplification: pd.DataFrame, runs: pd.DataFrame, large: la.Adapter
) -> None:
    figures = [
        plots.figure_ranks(ranks, [Q, V], zoom=3),
        plots.figure_ranks(ranks, [Q], zoom=3, width=ONE_COLUMN),
        plots.figure_seeds(seeds, [Q, V]),
        plots.figure_seeds(seeds, [Q, V], columns=2, width=ONE_COLUMN),
        figure_of(plots.similarity_grid(ranks, module=Q)),
        figure_of(plots.similarity_grid(ranks, module=Q, excess=True)),
        figure_of(plots.amplification_points(amplification, module=Q)),
        figure_of(plots.gain_by_layer(amplification)),
        figure_of(plots.spectra(la.spectrum_table(large), draws=20)),
        figure_of(plots.rank_ablation(runs, baseline=0.5, baseline_interval=(0.4, 0.6))),
    ]
    for number, figure in enumerate(figures):
        drawn(figure)
        page = figure.bbox.padded(1.0)
        for ax in figure.axes:
            axis_labels = [[text for text in axis.get_ticklabels() if text.get_text()] for axis in (ax.xaxis, ax.yaxis)]
            for labels in axis_labels:
                boxes = [text.get_window_extent() for text in labels]
                inside = [box for box in boxes if box.width and page.fully_overlaps(box)]
                assert len(inside) >= 2 or not labels, (number, ax.get_title())
                assert not any(a.overlaps(b) for index, a in enumerate(inside) for b in inside[:index]), (
                    number,
                    ax.get_title(),
                    [text.get_text() for text in labels],
                )
            for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
                box = text.get_window_extent()
                assert not text.get_text() or (box.x0 >= -1 and box.x1 <= page.x1 and box.y1 <= page.y1), (number, text)
            if legend := ax.get_legend():
                assert legend.get_window_extent().x1 <= page.x1, number
        titles = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
        assert not any(a.overlaps(b) for index, a in enumerate(titles) for b in titles[:index]), number


def test_plots_leave_pyplot_and_rc_params_alone() -> None:
    script = f"""
import sys
import lora_analysis as la
assert not any(name.partition('.')[0] == 'matplotlib' for name in sys.modules), 'imported with the package'
import matplotlib, numpy, pandas, torch
before = matplotlib.rcParams.copy()  # not dict(), which would choose a backend
from lora_analysis import plots
a = la.Adapter({{{Q!r}: la.LowRankUpdate(torch.eye(9, 3), torch.eye(3, 9), 1.0)}}, source='a')
base = la.load_base({{{Q + ".weight"!r}: torch.rand(9, 9)}})
table = la.similarity_table(a, a, cells='all', draws=5)
plots.similarity_grid(table)
plots.spectra(la.spectrum_table(a), draws=5)
plots.amplification_points(la.amplification_table(a, base, draws=0))
plots.gain_by_layer(la.amplification_table(a, base, draws=0))
runs = pandas.DataFrame([dict(targets='q', r=1, seed=0, accuracy=0.5)])
plots.rank_ablation(runs, baseline=0.4)
plots.figure_seeds(table, [{Q!r}])
import tempfile, pathlib
with tempfile.TemporaryDirectory() as folder:
    for suffix in ('png', 'pdf', 'svg'):
        plots.save_figure(plots.figure_ranks(table, [{Q!r}]), pathlib.Path(folder) / f'a.{{suffix}}')
assert 'matplotlib.pyplot' not in sys.modules
assert dict.__eq__(matplotlib.rcParams, before)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
