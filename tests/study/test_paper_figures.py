"""The paper's figures of a study: what they draw is what dense matrices give, with chance beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from random_study import LAYERS, RECIPE, SHAPES, module, without, write_study
from safetensors.torch import load_file

import lora_analysis as la
from lora_analysis.plots.top_directions import figure_top_directions
from lora_analysis.study.evidence import Study, open_study
from lora_analysis.study.paper_directions import top_directions
from lora_analysis.study.paper_figures import figure_3, figure_4, figure_6, figure_7, figure_8
from lora_analysis.study.paper_runs import Unavailable, layers_of, middle, spread
from lora_analysis.study.plan import Plan, Run
from lora_analysis.update import factors

SIDES = ("in", "out")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    torch.manual_seed(0)
    return open_study(write_study(tmp_path_factory.mktemp("study") / "whole"))


def run(r: int, seed: int) -> str:
    return Run("near", "lora", ("q", "v"), r, seed, seed).name


def dense_basis(study: Study, name: str, letter: str, layer: int, side: str) -> torch.Tensor:
    """Singular vectors of an update by the SVD of its dense matrix."""
    adapter = study.adapter(name)
    dense = adapter[module(letter, layer)].dense().double()
    U, _, Vh = torch.linalg.svd(dense, full_matrices=False)
    return (Vh.mT if side == "in" else U)[:, : adapter.modules[module(letter, layer)].r]


def drawn(ax: Axes) -> np.ndarray:
    (image,) = ax.images
    return np.asarray(image.get_array())


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def segments(ax: Axes) -> int:
    """Sides of cells that the outline consists of; it is drawn twice, in black and in white."""
    lines = [item for item in ax.collections if isinstance(item, LineCollection)]
    assert len(lines) == 2
    return len(lines[0].get_segments())


@pytest.mark.parametrize("side", SIDES)
def test_figure_3_is_phi_of_two_ranks_by_dense_svd(study: Study, side: str) -> None:
    figure = figure_3(study, side=side)
    for column, letter in enumerate("qv"):
        a, b = (dense_basis(study, run(r, 0), letter, 1, side) for r in (2, 8))
        phi = la.subspace_similarity(a, b).numpy()
        np.testing.assert_allclose(drawn(figure.axes[column]), phi, atol=1e-6)
        # Rows of the figure have a column for each size of the null too.
        zoomed = [ax for ax in figure.axes if ax.images and drawn(ax).shape == phi[:8, :8].shape]
        assert any(np.allclose(drawn(ax), phi[:8, :8], atol=1e-6) for ax in zoomed)
    assert "$r$ = 2, seed 0" in title(figure)
    assert "$r$ = 8, seed 0" in title(figure)
    assert f"{side}put side" in title(figure)
    assert "GPT-3 175B" in title(figure)


def test_figure_3_of_a_is_phi_of_the_rows_of_a(study: Study) -> None:
    figure = figure_3(study, target="A")
    bases = []
    for r in (2, 8):
        _, down = factors(study.adapter(run(r, 0))[module("q", 1)])
        bases.append(torch.linalg.svd(down.double(), full_matrices=False).Vh.mT)
    np.testing.assert_allclose(drawn(figure.axes[0]), la.subspace_similarity(*bases).numpy(), atol=1e-6)
    with pytest.raises(Unavailable, match="A has no output side"):
        figure_3(study, target="A", side="out")


@pytest.mark.parametrize("side", SIDES)
def test_figure_4_is_phi_of_the_first_and_the_last_seed_beside_gaussians(study: Study, side: str) -> None:
    figure = figure_4(study, side=side)
    for ax, letter in zip(figure.axes, "qv", strict=False):
        a, b = (dense_basis(study, run(8, seed), letter, 1, side) for seed in (0, 2))
        np.testing.assert_allclose(drawn(ax), la.subspace_similarity(a, b).numpy(), atol=1e-6)
    controls = [ax for ax in figure.axes if "Gaussian" in ax.get_title()]
    assert [drawn(ax).shape for ax in controls] == [(8, 8)] * (1 if side == "in" else 2)


def test_figure_6_has_a_row_for_each_layer_and_one_of_chance(study: Study) -> None:
    figure = figure_6(study, side="out")
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == (LAYERS + 1) * 4
    for layer in range(LAYERS):
        for column, letter in enumerate("qv"):
            a, b = (dense_basis(study, run(r, 0), letter, layer, "out") for r in (2, 8))
            phi = la.subspace_similarity(a, b).numpy()
            np.testing.assert_allclose(drawn(panels[4 * layer + column]), phi, atol=1e-6)
    i, j = np.indices((2, 8)) + 1
    for column, letter in enumerate("qv"):
        chance = np.maximum(i, j) / SHAPES[letter][0]
        np.testing.assert_allclose(drawn(panels[4 * LAYERS + column]), chance, rtol=1e-12)


def test_figure_7_has_a_column_for_each_layer_and_one_of_gaussians(study: Study) -> None:
    figure = figure_7(study)
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 2 * (LAYERS + 1)
    for row, letter in enumerate("qv"):
        for layer in range(LAYERS):
            a, b = (dense_basis(study, run(8, seed), letter, layer, "in") for seed in (0, 2))
            phi = la.subspace_similarity(a, b).numpy()
            np.testing.assert_allclose(drawn(panels[row * (LAYERS + 1) + layer]), phi, atol=1e-6)
        assert panels[row * (LAYERS + 1) + LAYERS].get_title() == f"Gaussian, seed {row}"


def test_what_is_beyond_chance_is_outlined_and_chance_is_not(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    study = open_study(folder)
    # Two seeds that found the same: every cell short of the whole space is beyond chance.
    one, other = (study.adapter(run(8, seed)) for seed in (0, 2))
    same = {name: one[name] for name in other}
    la.save_adapter(la.Adapter(same, source="same"), folder / "runs" / run(8, 2))
    figure = figure_4(study)
    assert [segments(ax) for ax in figure.axes[:2]] == [2 * (8 + 8)] * 2
    assert "beyond chance (p < 0.05/2) in 2 of 2" in title(figure)
    controls = [ax for ax in figure_7(study).axes if "Gaussian" in ax.get_title()]
    assert [segments(ax) for ax in controls] == [0, 0]


@pytest.mark.parametrize("side", SIDES)
def test_top_directions_are_phi_of_w_and_its_update_by_dense_svd(study: Study, side: str) -> None:
    cells, parts = top_directions(study, side=side)
    assert cells["series"].unique().tolist() == ["r = 2", "r = 8", "Gaussian, seed 0"]
    W = load_file(study.base_path)[f"{module('q', 1)}.weight"].double()
    U, _, Vh = torch.linalg.svd(W)
    basis = Vh.mT if side == "in" else U
    d = len(basis)
    most = round(0.1 * d)
    for r in (2, 8):
        other = dense_basis(study, run(r, 0), "q", 1, side)
        rows = cells[cells["series"] == f"r = {r}"]
        phi = np.zeros((most, r))
        phi[rows["i"] - 1, rows["j"] - 1] = rows["phi"]
        np.testing.assert_allclose(phi, la.subspace_similarity(basis[:, :most], other).numpy(), atol=1e-6)
        np.testing.assert_allclose(rows["null_mean"], np.maximum(rows["i"], rows["j"]) / d, rtol=1e-12)
        shares = parts[parts["series"] == f"r = {r}"]
        tenths = np.array_split(np.arange(d), 10)
        dense = [float((basis[:, part].mT @ other[:, :2]).square().sum()) / 2 for part in tenths]
        np.testing.assert_allclose(shares["share"], dense, atol=1e-6)
        assert shares["share"].sum() == pytest.approx(1, abs=1e-9)
    assert (parts["null_low"] < parts["null_mean"]).all()
    assert (parts["null_high"] > parts["null_mean"]).all()
    assert set(parts["j"]) == {2}


def test_where_w_is_zero_is_a_part_of_its_own(tmp_path: Path) -> None:
    plan = Plan({"kind": "classification"}, "near", RECIPE, (("v",),), (2,), (0,), controls=())
    wide = open_study(write_study(tmp_path / "study", plan))
    parts = top_directions(wide, side="in").parts
    d_out, d_in = SHAPES["v"]
    assert parts["part"].tolist()[10] == "null"
    # A part of fewer directions than are placed can hold no more than its own share of them.
    assert (parts["directions"] < parts["j"]).any()
    assert (parts["null_high"] <= parts["directions"] / parts["j"]).all()
    rows = parts[parts["part"] == "null"]
    assert set(rows["directions"]) == {d_in - d_out}
    V = load_file(wide.base_path)[f"{module('v', 1)}.weight"].double()
    kernel = torch.linalg.svd(V).Vh.mT[:, d_out:]
    name = Run("near", "lora", ("v",), 2, 0, 0).name
    expected = float((kernel.mT @ dense_basis(wide, name, "v", 1, "in")).square().sum()) / 2
    assert rows["share"].iloc[0] == pytest.approx(expected, abs=1e-6)
    assert "null" not in set(top_directions(wide, side="out").parts["part"])


def test_the_interval_of_chance_holds_what_random_directions_do(study: Study) -> None:
    row = top_directions(study).parts.iloc[0]
    generator = torch.Generator().manual_seed(0)
    random = torch.linalg.qr(
        torch.randn(4000, int(row["d"]), int(row["j"]), dtype=torch.float64, generator=generator)
    ).Q
    shares = random[:, : row["directions"]].square().sum((1, 2)).numpy() / row["j"]
    assert shares.mean() == pytest.approx(row["null_mean"], rel=0.03)
    # Standard errors of 0.25 % from 4000 draws here and 0.35 % from 2000 there; 3.5 of both together are 1.5 %.
    for outside in (shares < row["null_low"], shares > row["null_high"]):
        assert outside.mean() == pytest.approx(0.025, abs=0.015)


def test_figure_8_draws_its_tables(study: Study) -> None:
    cells, parts = top_directions(study)
    figure = figure_8(study)
    rows = cells[cells["series"] == "r = 8"]
    phi = drawn(figure.axes[1])
    assert phi.shape == (8, rows["i"].max())
    np.testing.assert_array_equal(phi[rows["j"] - 1, rows["i"] - 1], rows["phi"])
    limits = {image.get_clim() for ax in figure.axes[:3] for image in ax.images}
    assert limits == {(0.0, math.ceil(10 * cells["phi"].max()) / 10)}
    whole = figure.axes[-1]
    (line,) = (item for item in whole.lines if item.get_label() == "r = 8")
    np.testing.assert_array_equal(line.get_ydata(), parts.loc[parts["series"] == "r = 8", "share"])
    assert "4, 8, 64" in title(figure)
    assert "x chance" in figure.axes[0].get_title()
    figure.draw_without_rendering()


def test_the_whole_spectrum_is_optional(study: Study) -> None:
    cells = top_directions(study).cells
    assert len([ax for ax in figure_top_directions(cells).axes if ax.images]) == 3
    with pytest.raises(ValueError, match="got none called 'phi'"):
        figure_top_directions(cells.drop(columns="phi"))


def test_a_seed_without_both_ranks_is_passed_over(study: Study, tmp_path: Path) -> None:
    short = without(study, tmp_path / "short", run(2, 0))
    assert "$r$ = 2, seed 1; $j$: $r$ = 8, seed 1" in title(figure_3(short))


def test_one_rank_gives_no_figure_3_and_one_seed_no_figure_4(study: Study, tmp_path: Path) -> None:
    small = [run(r, seed) for r in (1, 2) for seed in (0, 1, 2)]
    few = without(study, tmp_path / "ranks", *small)
    with pytest.raises(Unavailable, match=r"runs of two ranks are wanted; q\+v has only r = 8"):
        figure_3(few)
    alone = without(study, tmp_path / "seeds", run(8, 1), run(8, 2))
    with pytest.raises(Unavailable, match="runs of two seeds at r = 8 are wanted; 1 has finished"):
        figure_7(alone)


def test_without_the_weights_there_is_no_figure_8(study: Study, tmp_path: Path) -> None:
    elsewhere = Study(study.directory, study.plan, study.tasks, tmp_path / "none.safetensors")
    with pytest.raises(Unavailable, match="pretrained weights are not at"):
        figure_8(elsewhere)


def test_layers_stand_for_those_of_the_paper(study: Study) -> None:
    assert middle(range(96)) == 48
    assert spread(range(12)) == [0, 4, 7, 11]
    assert layers_of(study.adapter(run(8, 0))) == [0, 1, 2]
