"""The small decoder: its losses by a second formula, its cache, and that it learns what it can."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_analysis as la
from lora_analysis.adapter import Target
from lora_analysis.study import corpora, decoder
from lora_analysis.study.corpora import Corpus, File
from lora_analysis.study.decoder import Decoder, cache_directory, initial_decoder, pretrained_decoder
from lora_analysis.study.language_losses import block_losses, language_loss, ngram_bits
from lora_analysis.study.windows import held_out_blocks, windows

STEPS = 3

NATS = 1e-5
"""Two ways to sum float32 log-probabilities of a few hundred tokens."""


def lines(name: str, numbers: range) -> File:
    return File(name, b"\n".join(b"x[%d] = f(x[%d])" % (number, number) for number in numbers))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(
        "lines", (lines("a.py", range(99)),), (lines("b.py", range(100, 140)),), skipped=0, origin="Python 3.13.0"
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache: Path, corpus: Corpus) -> Decoder:
    return pretrained_decoder(cache=cache, corpus=corpus, steps=STEPS)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return initial_decoder(seed=1)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(decoder, "train", refuse)


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def naive_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """One block, one position, one softmax at a time."""
    blocks = []
    for block in ids:
        losses = []
        for t in range(1, len(block)):
            logits = model(input_ids=block[None, :t]).logits[0, -1].double()
            losses.append(-(logits[block[t]] - logits.logsumexp(0)))
        blocks.append(torch.stack(losses).mean())
    return torch.stack(blocks)


def test_block_losses_are_those_of_one_token_at_a_time(model: nn.Module) -> None:
    ids = torch.randint(256, (5, 9))
    with torch.no_grad():
        expected = naive_losses(model, ids)
    found = block_losses(model, ids, batch_size=2)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, atol=NATS, rtol=0)
    assert language_loss(model, ids).item() == pytest.approx(expected.mean().item(), abs=NATS)


def test_block_losses_leave_the_model_as_it_was(model: nn.Module) -> None:
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    assert not block_losses(model, torch.zeros(1, 3, dtype=torch.long)).requires_grad
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    model.train()


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)])
def test_a_loss_needs_a_token_with_one_before_it(model: nn.Module, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"ids: expected shape \(n, length\)"):
        language_loss(model, ids)


def test_block_losses_need_blocks_and_a_batch_size(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"n ≥ 1.*got \(0, 4\)"):
        block_losses(model, torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        block_losses(model, torch.zeros(1, 4, dtype=torch.long), batch_size=0)


def test_the_initial_model_hangs_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = bytes_of(initial_decoder(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert bytes_of(initial_decoder(3)) == first
    assert bytes_of(initial_decoder(4)) != first


def test_the_initial_model_knows_nothing(model: nn.Module) -> None:
    loss = block_losses(model, torch.randint(256, (8, 128))).mean().item()
    assert loss == pytest.approx(math.log(256), abs=0.1)  # logits of initial weights have a sd of some 0.3


def test_the_model_is_causal(model: nn.Module) -> None:
    ids = torch.randint(256, (1, 12))
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 256
    with torch.no_grad():
        a, b = model(input_ids=ids).logits, model(input_ids=other).logits
    assert torch.allclose(a[:, :6], b[:, :6], atol=NATS, rtol=0)
    assert not torch.allclose(a[:, 6], b[:, 6])


def test_ngram_bits_are_counts_written_out() -> None:
    train, ids = b"abab" + bytes(range(9)), torch.tensor([list(b"abc"), list(b"bab")])
    predicted = [(97, 98), (98, 99), (98, 97), (97, 98)]
    p = {b: (train.count(bytes([b])) + 1) / (len(train) + 256) for b in range(256)}
    unigram = -sum(math.log2(p[b]) for _, b in predicted) / 4
    pairs = [*pairwise(train)]
    bigram = 0.0
    for a, b in predicted:
        bigram -= math.log2((pairs.count((a, b)) + p[b]) / (sum(first == a for first, _ in pairs) + 1)) / 4
    assert ngram_bits(train, ids, n=1) == pytest.approx(unigram)
    assert ngram_bits(train, ids, n=2) == pytest.approx(bigram)
    with pytest.raises(ValueError, match=r"n: expected 1 \(unigram\) or 2 \(bigram\), got 3"):
        ngram_bits(train, ids, n=3)


def test_byte_statistics_do_not_hang_on_the_names_of_bytes(corpus: Corpus) -> None:
    control = corpora.permuted(corpus, seed=0)
    for n in (1, 2):
        bits = [ngram_bits(c.train, held_out_blocks(c, 32)[0], n=n) for c in (corpus, control)]
        assert bits[0] == pytest.approx(bits[1])


def test_the_record_says_what_was_done(trained: Decoder, corpus: Corpus) -> None:
    record = trained.pretraining
    assert len(record.losses) == record.steps == STEPS
    assert record.tokens == STEPS * 8 * 128
    first = next(windows(corpus, length=128, batch_size=8, seed=0))
    assert record.losses[0] == pytest.approx(language_loss(initial_decoder(0), first).item(), abs=NATS)
    assert record.corpus_sha256 == corpus.digest
    ids, _ = held_out_blocks(corpus, 128)
    assert record.bits_per_byte == pytest.approx(block_losses(trained.model, ids).mean().item() / math.log(2))
    assert record.bigram_bits < record.unigram_bits < 8


def test_the_model_is_frozen_and_in_eval_mode(trained: Decoder) -> None:
    assert not trained.model.training
    assert not any(p.requires_grad for p in trained.model.parameters())


@pytest.mark.usefixtures("no_training")
def test_a_cached_model_is_bit_identical_and_not_trained_again(trained: Decoder, cache: Path, corpus: Corpus) -> None:
    again = pretrained_decoder(cache=cache, corpus=corpus, steps=STEPS)
    assert bytes_of(again.model) == bytes_of(trained.model)
    assert again.pretraining == trained.pretraining
    assert again.model is not trained.model


def test_training_twice_gives_the_same_weights(trained: Decoder, tmp_path: Path, corpus: Corpus) -> None:
    again = pretrained_decoder(cache=tmp_path, corpus=corpus, steps=STEPS)
    assert bytes_of(again.model) == bytes_of(trained.model)
    assert again.path.parent.name == trained.path.parent.name
    assert {path.name for path in tmp_path.iterdir()} == {again.path.parent.name}  # nothing half-written beside it


def test_what_the_weights_hang_on_is_in_the_name(trained: Decoder, tmp_path: Path, corpus: Corpus) -> None:
    control = corpora.permuted(corpus, seed=0)
    others = [
        pretrained_decoder(cache=tmp_path, corpus=corpus, steps=1),
        pretrained_decoder(cache=tmp_path, corpus=corpus, steps=1, seed=1),
        pretrained_decoder(cache=tmp_path, corpus=control, steps=1),
    ]
    assert len({decoder.path.parent.name for decoder in [trained, *others]}) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "missing"])
def test_a_damaged_cache_is_made_again(damage: str, trained: Decoder, tmp_path: Path, corpus: Corpus) -> None:
    first = pretrained_decoder(cache=tmp_path, corpus=corpus, steps=1)
    expected, data = bytes_of(first.model), first.path.read_bytes()
    if damage == "flip":
        first.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        first.path.write_bytes(data[:1000])
    elif damage == "record":
        (first.path.parent / "pretraining.json").write_text("{", encoding="utf-8")
    else:
        (first.path.parent / "config.json").unlink()
    again = pretrained_decoder(cache=tmp_path, corpus=corpus, steps=1)
    assert bytes_of(again.model) == expected
    assert again.path.read_bytes() == data
    assert json.loads((again.path.parent / "pretraining.json").read_text("utf-8"))["steps"] == 1


def test_the_cached_file_is_a_base_with_the_names_of_the_live_model(trained: Decoder) -> None:
    live, base = la.load_base(trained.model), la.load_base(trained.path)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        target = Target(f"model.layers.2.self_attn.{name}.weight")
        assert torch.equal(base.matrix(target), live.matrix(target))
        assert base.matrix(target).shape == (256, 256)


def test_transformers_reads_the_folder_as_the_same_model(trained: Decoder) -> None:
    transformers = pytest.importorskip("transformers")
    read = transformers.LlamaForCausalLM.from_pretrained(trained.path.parent)
    assert bytes_of(read) == bytes_of(trained.model)
    ids = torch.randint(256, (2, 20))
    assert torch.allclose(block_losses(read, ids), block_losses(trained.model, ids), atol=NATS, rtol=0)


def test_a_short_pretraining_beats_the_frequencies_of_bytes(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "CONTEXT", 32)
    record = pretrained_decoder(cache=tmp_path, corpus=corpus, steps=40).pretraining
    assert record.bits_per_byte < record.unigram_bits


def test_the_global_random_state_is_not_touched(tmp_path: Path, corpus: Corpus) -> None:
    state = torch.get_rng_state()
    pretrained_decoder(cache=tmp_path, corpus=corpus, steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_ANALYSIS_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LORA_ANALYSIS_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "lora_analysis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "lora_analysis"


def test_there_is_no_pretraining_without_steps(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        pretrained_decoder(cache=tmp_path, corpus=corpus, steps=0)
