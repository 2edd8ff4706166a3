from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from lora_analysis import training
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.presets import decoder_plan, minilm_plan
from lora_analysis.study.projections import layer_of, placement, projection_of


@pytest.mark.parametrize("plan", [minilm_plan(), minilm_plan(quick=True), decoder_plan(), decoder_plan(quick=True)])
def test_a_plan_comes_back_from_its_file(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_every_run_is_there_once_and_has_its_own_directory() -> None:
    plan = minilm_plan(other_tasks={"banking": {"file": "x.csv"}})
    runs = plan.runs()
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    grid = [run for run in runs if run.method == "lora" and run.task == "docstrings" and run.size is None]
    # 3 target sets x 5 ranks x 3 seeds, the budget's four that are not in the grid, two crossed seeds.
    assert len(grid) == 3 * 5 * 3 + 5 * 3 + 2 - 3 * 1
    assert {run.method for run in runs} == {"lora", "full", "bitfit", "head", "frozen"}
    crossed = [run for run in grid if run.init_seed != run.data_seed]
    assert {(run.init_seed, run.data_seed) for run in crossed} == {(0, 2), (2, 0)}
    assert [run.name for run in runs if run.method == "frozen"] == ["docstrings-frozen", "banking-frozen"]


def test_seeds_can_be_crossed_and_tasks_and_scales_have_grids_of_their_own() -> None:
    base = replace(minilm_plan(), ranks=(2, 8), target_sets=(("q", "v"),), budget=(), controls=(), sizes=())
    for crossing, pairs in (("paired", 3), ("corners", 3), ("product", 9)):
        runs = [run for run in replace(base, crossing=crossing).runs() if run.method == "lora"]  # type: ignore[arg-type]
        assert len(runs) == 2 * pairs + (2 if crossing == "corners" else 0)
    plan = replace(base, crossing="paired", grid_tasks=("other",), scalings=("lora",))
    runs = [run for run in plan.runs() if run.method == "lora"]
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 2 * 2
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(ValueError, match="crossing: expected one of"):
        replace(base, crossing="all")  # type: ignore[arg-type]


def test_the_budget_spends_one_number_of_parameters() -> None:
    plan = minilm_plan()
    sizes = {len(targets) * r for targets, r in (*plan.budget, (("q",), 8))}
    assert sizes == {8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "expected targets and r of LoRA runs"),
        ({"method": "full", "r": 4}, "expected targets and r of LoRA runs and of no others"),
        ({"method": "adapter"}, "method: expected one of .*got 'adapter'"),
    ],
)
def test_runs_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run("task", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one target set"):
        replace(minilm_plan(), ranks=())
    with pytest.raises(ValueError, match="scaling: expected one of"):
        Recipe(1, 1, {}, 1.0, scaling="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step"):
        Recipe(0, 1, {}, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (1, 8, 8)}, "ranks: expected each once"),
        ({"seeds": (0, 0)}, "seeds: expected each once"),
        ({"target_sets": (("q",), ("q",))}, "target_sets: expected each once"),
        ({"other_tasks": ("docstrings",)}, "other_tasks: expected each once and other tasks than 'docstrings'"),
        ({"scalings": ("rslora",)}, "scalings: expected each once, beside 'rslora'"),
    ],
)
def test_what_would_be_counted_twice_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(minilm_plan(), **changes)


def test_projections_are_found_in_models_of_other_names() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    deberta = DebertaV2Model(DebertaV2Config(vocab_size=30, **small))
    llama = LlamaModel(LlamaConfig(vocab_size=30, **small))
    assert placement(deberta, ("q", "v"))["targets"] == ["query_proj", "value_proj"]
    names = training.inject(llama, r=2, **placement(llama, ("q", "o")))
    assert [projection_of(name) for name in names] == ["q", "o", "q", "o"]
    assert [layer_of(name) for name in names] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="expected a projection 'q' in Sequential, called query, q_proj"):
        placement(nn.Sequential(nn.Linear(2, 2)), ("q",))
    assert placement(nn.Sequential(nn.Linear(2, 2)), ("0",))["targets"] == ["0"]


def test_q_and_v_of_a_fused_weight_are_its_slots() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    training.inject(model, r=2, **placement(model, ("q", "v", "o")))
    adapter = training.extract(model)
    assert [projection_of(name) for name in adapter] == ["q", "v", "o", "q", "v", "o"]
    assert adapter["h.0.attn.c_attn.q"].shape == (16, 16)
