"""Each setting gives what a study asks of it: a frozen model, batches, a loss, and outcomes item by item."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from lora_analysis import training
from lora_analysis.study.classification import Classification
from lora_analysis.study.encoder import without_dropout
from lora_analysis.study.execution import prepared, trained
from lora_analysis.study.plan import Recipe, Run
from lora_analysis.study.setting import Setting, open_setting
from lora_analysis.study.systems import cost_table, measured_costs

E2E = Path(__file__).parents[3] / "shared" / "data" / "text" / "e2e_nlg" / "valid.txt"
RECIPE = Recipe(steps=3, batch_size=4, lr={"lora": 1e-2, "full": 1e-3, "bitfit": 1e-2, "head": 1e-2}, alpha=6.0)


@pytest.fixture(scope="module")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("study")
    rows = [f"how do I {verb} my {noun},{noun}" for verb in ["open", "close", "lose", "find", "hide"] for noun in NOUNS]
    (folder / "task.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    task = {"file": str(folder / "task.csv"), "held_out": 0.3}
    return open_setting({"kind": "classification", "tasks": {"nouns": task}, "max_length": 12}, folder=folder)


NOUNS = ("card", "door", "book", "phone")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, small_decoder_cache: None) -> Setting:
    tasks = {"near": {"train_bytes": 20_000, "held_out_bytes": 4_000}}
    content = {"kind": "language", "tasks": tasks, "held_out_blocks": 9, "pretraining_steps": 4}
    return open_setting(content, folder=tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory, small_decoder_cache: None) -> Setting:
    folder = tmp_path_factory.mktemp("study")
    lines = [f"name : {name} | food : {food}||{name} serves {food} ." for name in NOUNS for food in ("tea", "fish")]
    lines += [line.replace(" .", " every day .") for line in lines]
    (folder / "e2e.txt").write_text("\n".join(lines) + "\n")
    content = {"kind": "generation", "tasks": {"e2e": {"file": str(folder / "e2e.txt")}}, "max_length": 80}
    return open_setting(content | {"max_new_tokens": 8, "pretraining_steps": 4}, folder=folder)


@pytest.mark.parametrize("name", ["classification", "language", "generation"])
def test_every_method_trains_what_it_says_and_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    setting: Setting = request.getfixturevalue(name)
    (task,) = setting.record()
    base = setting.model()
    assert not any(p.requires_grad for p in base.parameters())
    runs = [Run(task, "lora", ("q", "v"), 2), Run(task, "full"), Run(task, "head")]
    for run in runs + ([Run(task, "bitfit")] if name == "classification" else []):
        inner = setting.model()
        model = prepared(run, RECIPE, setting, inner)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        losses = trained(run, RECIPE, setting, model)
        assert len(losses) == RECIPE.steps
        moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved
        if run.method == "lora":
            assert all(".lora_" in key for key in moved)
        elif run.method == "bitfit":
            assert all(key.endswith("bias") for key in moved)
        elif run.method == "head":
            assert len(moved) == 1


@pytest.mark.parametrize("name", ["classification", "language", "generation"])
def test_batches_depend_on_their_seed_alone(name: str, request: pytest.FixtureRequest) -> None:
    setting: Setting = request.getfixturevalue(name)
    (task,) = setting.record()

    def first(seed: int, size: int | None = None) -> torch.Tensor:
        stream = setting.batches(task, batch_size=4, seed=seed, size=size)
        batches = [next(stream) for _ in range(3)]
        return torch.cat([(b if isinstance(b, torch.Tensor) else b[0]).flatten() for b in batches])

    assert torch.equal(first(1), first(1))
    assert first(1).shape != first(2).shape or not torch.equal(first(1), first(2))
    assert len(first(1, size=4)) > 0


@pytest.mark.parametrize("name", ["classification", "language", "generation"])
def test_there_is_one_outcome_and_one_group_for_each_item(name: str, request: pytest.FixtureRequest) -> None:
    setting: Setting = request.getfixturevalue(name)
    ((task, about),) = setting.record().items()
    outcomes = setting.outcomes(task, setting.model())
    assert len(outcomes.losses) == len(about["groups"])
    assert bool((outcomes.losses > 0).all())
    assert len(about["sha256"]) == 64
    assert (outcomes.correct is None) == (name != "classification")
    assert set(outcomes.metrics) == ({"bleu"} if name == "generation" else set())


def test_the_loss_of_a_held_out_text_is_its_cross_entropy(classification: Setting) -> None:
    from lora_analysis.study import minilm
    from lora_analysis.study.classification import TEMPERATURE

    assert isinstance(classification, Classification)
    task = classification.tasks["nouns"]
    outcomes = classification.outcomes("nouns", classification.model())
    loaded = minilm.load_minilm()
    found = minilm.embeddings(loaded, task.held_out_texts, max_length=12)
    logits = (found @ classification.means["nouns"].T / TEMPERATURE).double()
    labels = torch.tensor(task.held_out_labels)
    # float32 embeddings of other batches.
    torch.testing.assert_close(outcomes.losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-3, atol=1e-4)
    assert outcomes.correct is not None
    assert torch.equal(outcomes.correct, logits.argmax(1) == labels)


@pytest.mark.skipif(not E2E.is_file(), reason="needs ../shared, which a user's checkout has not")
def test_the_papers_own_generation_task_runs(tmp_path: Path, small_decoder_cache: None) -> None:
    content = {"kind": "generation", "tasks": {"e2e": {"file": str(E2E)}}, "held_out_mrs": 2, "pretraining_steps": 4}
    setting = open_setting(content | {"max_new_tokens": 4}, folder=tmp_path)
    about = setting.record()["e2e"]
    assert about["train_items"] > 2000
    assert len(set(about["groups"])) == 2
    model = prepared(Run("e2e", "lora", ("q", "v"), 2), RECIPE, setting, setting.model())
    assert len(trained(Run("e2e", "lora", ("q", "v"), 2), RECIPE, setting, model)) == 3
    assert 0 <= setting.outcomes("e2e", model).metrics["bleu"] <= 100


def test_costs_are_those_of_the_parameters_that_train(classification: Setting) -> None:
    table = cost_table(measured_costs(classification, "nouns", RECIPE, rounds=2)).set_index(["method", "targets"])
    full, lora = table.loc[("full", "")], table.loc[("lora", "q+v")]
    model = classification.model()
    assert full["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert lora["trainable_parameters"] == 12 * 2 * 384 * 8
    assert table.loc[("bitfit", "")]["trainable_parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if name.endswith("bias")
    )
    names = training.inject(classification.model(), "all-linear", r=8)
    assert table.loc[("lora", "all-linear")]["trainable_parameters"] > lora["trainable_parameters"]
    assert len(names) == 36
    for row in (full, lora):
        # AdamW's two moments and the step it counts for every tensor.
        assert row["optimizer_bytes"] >= 2 * 4 * row["trainable_parameters"]
        assert row["gradients_bytes"] == 4 * row["trainable_parameters"]
    assert full["peak_bytes"] > lora["peak_bytes"] > 0
    assert full["memory_ratio"] == 1
    assert lora["parameters_ratio"] > 100


def test_a_classifier_is_that_of_its_model(tmp_path: Path) -> None:
    from lora_analysis.study.minilm import minilm_path

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(minilm_path().parent / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for name in ("one", "two"):  # random weights of one seed after the other
        BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(40))]) + "\n")
    content = {"kind": "classification", "tasks": {"t": {"file": str(tmp_path / "t.csv")}}, "max_length": 8}
    means = []
    for name in ("one", "two", "one"):
        setting = open_setting({**content, "model": str(tmp_path / name)}, folder=tmp_path / "study")
        assert isinstance(setting, Classification)
        means.append(setting.means["t"])
    assert torch.equal(means[0], means[2])
    assert not torch.allclose(means[0], means[1])
    assert not list((tmp_path / "study").glob(".*"))


@pytest.mark.parametrize("config", [OPTConfig(), GPT2Config(), BertConfig(), T5Config()])
def test_no_model_keeps_a_dropout_whatever_it_is_called(config: PretrainedConfig) -> None:
    assert any("drop" in name and value for name, value in config.to_dict().items())
    assert not any("drop" in name and value for name, value in without_dropout(config).to_dict().items())


def test_settings_that_are_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="setting: expected 'classification', 'language' or 'generation', got 'x'"):
        open_setting({"kind": "x"}, folder=tmp_path)
    with pytest.raises(ValueError, match="'prose': expected a corpus of near, far, headers, code, got 'prose'"):
        open_setting({"kind": "language", "tasks": {"prose": {}}}, folder=tmp_path)
