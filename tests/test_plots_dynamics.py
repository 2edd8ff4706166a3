"""Figures of training dynamics: what they draw is what the table says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lora_analysis.plots import save_figure
from lora_analysis.plots.dynamics import figure_dynamics, training_dynamics
from lora_analysis.training.dynamics import dynamics_table

NAMES = [f"encoder.layer.{layer}.attention.self.{kind}" for layer in range(3) for kind in ("query", "value")]
STEPS = [0, 10, 20, 25]


def rows(names: list[str], *, adapter: str = "run", **given: Any) -> list[dict[str, Any]]:
    found = []
    for step in STEPS:
        for number, name in enumerate(names):
            row = {
                "adapter": adapter,
                "step": step,
                "module": name,
                "norm": 0.1 * step * (1 + number),
                "sigma_max": 0.05 * step,
                "stable_rank": math.nan if step == 0 else 1 + number / (10 + step),
                "effective_rank": math.nan if step == 0 else 2.0,
                "phi_previous_in": math.nan if step < 20 else 0.9,
                "phi_final_in": math.nan if step == 0 else 1 - (25 - step) / 50,
                "chance_in": math.nan if step == 0 else 8 / (64 if number else 32),
                "moved_A": step / 100,
                "moved_B": math.nan,
                "moved_from": "initial",
                "gain": 1.5 if step == 20 else math.nan,
            }
            found.append(row | given)
    return found


def lines(ax: Axes) -> list[Any]:
    """The modules' lines, without those of legend and chance."""
    return [line for line in ax.lines if len(line.get_xdata()) and line.get_label() != "chance"]


def test_each_module_is_a_line_of_its_known_values() -> None:
    table = dynamics_table(rows(NAMES))
    for value, count in (("norm", 4), ("stable_rank", 3), ("phi_previous_in", 2), ("gain", 1)):
        drawn = lines(training_dynamics(table, value=value))
        assert len(drawn) == 6
        for line, name in zip(drawn, NAMES, strict=True):
            mine = table[(table["module"] == name) & table[value].notna()]
            np.testing.assert_array_equal(line.get_xdata(), mine["step"])
            np.testing.assert_array_equal(line.get_ydata(), mine[value])
            assert len(mine) == count


def test_colour_tells_the_layer_and_dash_and_marker_the_projection() -> None:
    ax = training_dynamics(dynamics_table(rows(NAMES)))
    drawn = dict(zip(NAMES, lines(ax), strict=True))
    for layer in range(3):
        query, value = (drawn[f"encoder.layer.{layer}.attention.self.{kind}"] for kind in ("query", "value"))
        assert to_rgba(query.get_color()) == to_rgba(value.get_color()) == colormaps["viridis"](layer / 2)
        assert (query.get_linestyle(), query.get_marker()) == ("-", "o")
        assert (value.get_linestyle(), value.get_marker()) == ("--", "s")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [r"$\Delta W_q$", r"$\Delta W_v$"]
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_ylabel() == "layer"
    assert bar.get_ylim() == (0, 2)


def test_modules_without_layers_have_a_colour_each_and_no_bar() -> None:
    ax = training_dynamics(dynamics_table(rows(["head", "body.pooler", "tail"])))
    assert len({to_rgba(line.get_color()) for line in lines(ax)}) == 3
    assert sorted(text.get_text() for text in ax.get_legend().get_texts()) == ["head", "pooler", "tail"]
    assert ax.figure.axes == [ax]


def test_chance_is_drawn_where_there_is_one() -> None:
    table = dynamics_table(rows(NAMES))
    for value, level in (("phi_final_in", 8 / 32), ("gain", 1.0), ("norm", None)):
        chance = [line for line in training_dynamics(table, value=value).lines if line.get_label() == "chance"]
        assert len(chance) == (level is not None)
        assert all(set(line.get_ydata()) == {level} for line in chance)


def test_move_is_named_after_the_step_it_is_counted_from() -> None:
    for since, label in (("initial", "A_0"), ("step 0", "A_0"), ("step 500", "A_{500}")):
        ax = training_dynamics(dynamics_table(rows(NAMES, moved_from=since)), value="moved_A")
        assert ax.get_ylabel() == rf"$\|A - {label}\|\,/\,\|{label}\|$"


def test_rows_may_come_in_any_order_and_modules_be_chosen() -> None:
    table = dynamics_table(rows(NAMES)).sample(frac=1, random_state=0)
    (line,) = lines(training_dynamics(table, modules=[NAMES[3]]))
    np.testing.assert_array_equal(line.get_xdata(), STEPS)


def test_figure_has_a_panel_for_each_value_under_one_legend(tmp_path: Any) -> None:
    figure = figure_dynamics(dynamics_table(rows(NAMES)))
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "step"]
    assert [len(lines(ax)) for ax in panels] == [6, 6, 6, 6]
    assert panels[1].get_ylabel() == "stable rank"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [r"$\Delta W_q$", r"$\Delta W_v$", "chance"]
    assert save_figure(figure, tmp_path / "dynamics.png").stat().st_size > 10_000
    three = figure_dynamics(dynamics_table(rows(["head"])), values=["norm", "moved_A", "effective_rank"])
    assert len(three.axes) == 3
    assert isinstance(three, Figure)


def test_given_axes_are_drawn_on() -> None:
    ax = Figure().add_subplot()
    assert training_dynamics(dynamics_table(rows(NAMES)), ax=ax) is ax


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "loss"}, "value: expected one of norm, sigma_max"),
        ({"value": "moved_B"}, "expected a step at which 'moved_B' is known, got none among 24 rows"),
        ({"modules": []}, "modules: expected a list of at least one module"),
        ({"modules": NAMES[0]}, "modules: expected a list of at least one module"),
        ({"modules": ["other"]}, "no module 'other' in the table"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_dynamics(dynamics_table(rows(NAMES)), **options)


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rows of one adapter, got 2"):
        training_dynamics(dynamics_table(rows(NAMES) + rows(NAMES, adapter="other")))
    with pytest.raises(ValueError, match="got none called 'step'"):
        training_dynamics(pd.DataFrame({"adapter": ["a"], "module": ["m"]}))
    with pytest.raises(ValueError, match="expected rows to draw"):
        figure_dynamics(dynamics_table([]))
    with pytest.raises(ValueError, match="values: expected a list of at least one column"):
        figure_dynamics(dynamics_table(rows(NAMES)), values="norm")
