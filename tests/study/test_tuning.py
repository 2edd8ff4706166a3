"""Learning rates are tuned on training items, and on nothing that is measured on later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.classification import Classification
from lora_analysis.study.execution import prepared, trained
from lora_analysis.study.language import Language
from lora_analysis.study.plan import Plan, Recipe, Run
from lora_analysis.study.setting import Setting, open_setting
from lora_analysis.study.tuning import SEED, best_rates, tuned_plan, tuning_losses

FEW = {"lora": (1e-3,), "full": (1e-4,)}
TASKS = {"near": {"train_bytes": 60_000, "held_out_bytes": 4_000}}
CONTENT = {"kind": "language", "tasks": TASKS, "held_out_blocks": 9, "pretraining_steps": 4}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, small_decoder_cache: Path) -> Setting:
    return open_setting(CONTENT, folder=tmp_path_factory.mktemp("study"))


def plan_of(scaling: str) -> Plan:
    recipe = Recipe(4, 2, {"lora": 1.0, "full": 1.0, "head": 7.0}, 6.0, scaling=scaling)  # type: ignore[arg-type]
    return Plan(CONTENT, "near", recipe, target_sets=(("q", "v"),), ranks=(1, 4), seeds=(0, 1), controls=("full",))


def loss_of(setting: Setting, run: Run, recipe: Recipe) -> float:
    model = prepared(run, recipe, setting, setting.model())
    trained(run, recipe, setting, model)
    return float(setting.outcomes(run.task, model).losses.mean())


def test_the_best_of_the_rates_is_taken_and_ends_are_gone_beyond(language: Setting) -> None:
    plan = plan_of("rslora")
    said: list[str] = []
    rates = {"lora": (1e-3, 1e-2), "full": (1e-3, 1e-2, 1.0)}
    recipe = best_rates(plan.recipe, tuning_losses(plan, language, processes=2, candidates=rates, say=said.append))
    assert recipe.lr["head"] == 7.0  # not tried, and left as it was
    tried = {method: [float(t.split()[3].rstrip(":")) for t in said if t.startswith(method)] for method in rates}
    for method, lrs in tried.items():
        run = Run("near", method, *((("q", "v"), 4) if method == "lora" else ()), init_seed=SEED, data_seed=SEED)  # type: ignore[misc, arg-type]
        losses = {lr: loss_of(language.held_back(), replace(run, lr=lr), plan.recipe) for lr in lrs}
        best = min(losses, key=losses.__getitem__)
        assert recipe.lr[method] == pytest.approx(best, rel=0.05)  # printed with two digits
        assert len(lrs) == 7 or best not in (min(lrs), max(lrs))
    assert len(tried["lora"]) > 2


def test_with_loras_own_scale_each_rank_has_a_rate(language: Setting) -> None:
    plan = plan_of("lora")
    recipe = best_rates(plan.recipe, tuning_losses(plan, language, processes=2, candidates=FEW))
    assert {key: rate for key, rate in recipe.lr.items() if key != "head"} == {
        "lora": 1.0,
        "full": 1e-4,
        "lora-r1": 1e-3,
        "lora-r4": 1e-3,
    }
    assert recipe.rate(Run("near", "lora", ("q",), 4)) == 1e-3
    assert recipe.rate(Run("near", "lora", ("q",), 2)) == 1.0
    assert recipe.rate(Run("near", "lora", ("q",), 4, lr=0.5)) == 0.5


def test_with_loras_own_scale_the_ranks_of_a_budget_are_tuned_too(language: Setting) -> None:
    plan = replace(plan_of("lora"), budget=((("v",), 2),))
    recipe = best_rates(plan.recipe, tuning_losses(plan, language, processes=2, candidates=FEW))
    assert all(recipe.rate(run) == 1e-3 for run in plan.runs() if run.method == "lora")


def test_another_scaling_rule_has_rates_of_its_own(language: Setting) -> None:
    plan = replace(plan_of("rslora"), scalings=("lora",))
    losses = tuning_losses(plan, language, processes=2, candidates=FEW)
    assert set(losses) == {"lora", "lora-lora-r1", "lora-lora-r4", "full"}
    # At r = 1 the two rules are one.
    assert losses["lora-lora-r4"][1e-3] != losses["lora"][1e-3]
    lr = {"lora": 1.0, "lora-lora-r4": 2.0}
    runs = [Run("near", "lora", ("q",), r, scaling=rule) for r in (1, 4) for rule in (None, "lora")]  # type: ignore[arg-type]
    assert [replace(plan.recipe, lr=lr).rate(run) for run in runs] == [1.0, 1.0, 1.0, 2.0]


def test_a_tuned_study_is_gone_on_with_by_what_it_measured(tmp_path: Path, small_decoder_cache: Path) -> None:
    (tmp_path / "tuning.json").write_text('{"lora": [[0.1, Infinity], [0.01, 2.0]], "full": [[0.3, 1.0]]}')
    assert tuned_plan(plan_of("rslora"), tmp_path, processes=1).recipe.lr == {"lora": 0.01, "full": 0.3, "head": 7.0}


def test_a_study_begun_without_tuning_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(LoraAnalysisError, match=r"got one begun without\. Go on without --tune"):
        tuned_plan(plan_of("rslora"), tmp_path, processes=1)


def test_items_held_back_are_training_items_that_are_then_not_trained_on(language: Setting, tmp_path: Path) -> None:
    assert isinstance(language, Language)
    before, after = language.tasks["near"], language.held_back().tasks["near"]
    assert set(after.held_out_files) < set(before.train_files)
    assert set(after.held_out_files).isdisjoint(after.train_files)
    rows = [f"the number {i},{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    content = {"kind": "classification", "tasks": {"t": {"file": str(tmp_path / "t.csv")}}, "max_length": 8}
    setting = open_setting(content, folder=tmp_path)
    assert isinstance(setting, Classification)
    task, tuning = setting.tasks["t"], setting.held_back().tasks["t"]
    assert set(tuning.held_out_texts) | set(tuning.train_texts) == set(task.train_texts)
    assert set(tuning.held_out_texts).isdisjoint(tuning.train_texts)
    assert set(tuning.held_out_texts).isdisjoint(task.held_out_texts)
