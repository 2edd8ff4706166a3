"""Conditional generation: what is read, what counts in the loss, that padding changes nothing, and BLEU."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_analysis.study import generation
from lora_analysis.study.decoder import initial_decoder
from lora_analysis.study.generation import (
    IGNORED,
    ByteCodec,
    TokenizerCodec,
    bleu,
    generated_texts,
    prompt,
    target_batch,
    target_loss,
)
from lora_analysis.study.meaning_representations import Example, read_examples, split_by_mr

E2E = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "e2e_nlg"

NATS = 1e-5
"""Two ways to sum float32 log-probabilities of a few hundred tokens."""

PAIRS = [("name : A", "A is."), ("name : Café B | area : riverside", "B is by the river.")]


@pytest.fixture(scope="module")
def e2e() -> Path:
    if not E2E.is_dir():
        pytest.skip("the E2E files of ../shared/data/text are not here")
    return E2E


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Random weights, larger than usual so that what is likeliest is so clearly."""
    made = initial_decoder(seed=2).requires_grad_(False)
    for p in made.parameters():
        p.mul_(4)
    return made


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_references_are_grouped_by_mr_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "m : 1||One .\nm : 2||Two . \n\nm : 1|| Uno .\r\n")
    assert read_examples(path) == (Example("m : 1", ("One .", "Uno .")), Example("m : 2", ("Two .",)))


def test_csv_gives_what_lines_give(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffid,mr,ref\n1,"name[A], area[b]","A, of b."\n2,name[C],"Two\nlines"\n')
    assert read_examples(path) == (Example("name[A], area[b]", ("A, of b.",)), Example("name[C]", ("Two\nlines",)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "m||t\nno bars\n", r"a\.txt: line 2: expected 'MR\|\|text', got 'no bars'"),
        ("a.txt", "m||t||u\n", r"line 1: expected 'MR\|\|text', got 'm\|\|t\|\|u'"),
        ("a.txt", "m||t\n || \n", r"line 2: expected an MR and a text, got ' ' and ' \\n'"),
        ("a.txt", "\n", r"a\.txt: expected at least one example, got none"),
        ("a.csv", "mr,text\nm,t\n", r"a\.csv: line 1: expected the columns mr and ref, got \['mr', 'text'\]"),
        ("a.csv", "mr,ref\nm,t\nm\n", r"line 3: expected 2 fields, got \['m'\]"),
        ("a.csv", 'mr,ref\nm,"t\n', r"a\.csv: line 2: expected CSV, got unexpected end of data"),
        ("a.csv", "mr,ref\n", r"a\.csv: expected at least one example, got none"),
    ],
)
def test_a_malformed_line_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / name, text))


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"m||\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8, got"):
        read_examples(tmp_path / "a.txt")


def test_the_real_files_are_read_whole(e2e: Path) -> None:
    for name in ("valid.txt", "test.txt"):
        examples = read_examples(e2e / name)
        lines = [line for line in (e2e / name).read_text("utf-8").split("\n") if line.strip()]
        assert sum(len(example.references) for example in examples) == len(lines) > 4000
        assert len({example.mr for example in examples}) == len(examples) > 500


def test_a_split_shares_no_mr_and_does_not_hang_on_the_order() -> None:
    examples = [Example(f"m : {number}", ("a", "b")) for number in range(50)]
    split = split_by_mr(examples)
    assert split == split_by_mr(examples[::-1])
    assert len(split.held_out) == 10
    assert {e.mr for e in split.train} | {e.mr for e in split.held_out} == {e.mr for e in examples}
    assert {e.mr for e in split.train}.isdisjoint(e.mr for e in split.held_out)
    assert [len(side) for side in split_by_mr(examples[:2], held_out=0.01)] == [1, 1]


def test_impossible_splits_are_refused() -> None:
    one = Example("m", ("a",))
    with pytest.raises(ValueError, match=r"held_out: expected a share in \(0, 1\), got 1"):
        split_by_mr([one, Example("n", ("a",))], held_out=1)
    with pytest.raises(ValueError, match="expected at least two, each with an MR of its own"):
        split_by_mr([one, one])


def test_only_text_and_end_are_targets() -> None:
    codec = ByteCodec()
    batch = target_batch(codec, PAIRS, max_length=128)
    for row, mask, labels, (mr, text) in zip(*batch, PAIRS, strict=True):
        assert codec.decode(row[mask == 1].tolist()) == f"{mr} || {text}\n"
        assert codec.decode(labels[labels != IGNORED].tolist()) == f" {text}\n"
        assert torch.equal(labels[labels != IGNORED], row[labels != IGNORED])


def test_the_loss_is_that_of_each_target_by_itself(model: nn.Module) -> None:
    codec = ByteCodec()
    losses = []
    for mr, text in PAIRS:
        start, target = codec.encode(prompt(mr)), [*codec.encode(f" {text}"), codec.end]
        for t, token in enumerate(target):
            logits = model(input_ids=torch.tensor([start + target[:t]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[token]))
    found = target_loss(model, target_batch(codec, PAIRS, max_length=128))
    assert found.item() == pytest.approx(sum(losses) / len(losses), abs=NATS)


def test_nothing_is_cut_silently() -> None:
    with pytest.raises(ValueError, match="'name : A': expected at most 10 tokens with its text, got 18"):
        target_batch(ByteCodec(), PAIRS, max_length=10)
    with pytest.raises(ValueError, match="pairs: expected at least one, got none"):
        target_batch(ByteCodec(), [], max_length=10)


def greedy(model: nn.Module, text: str, count: int) -> str:
    """One token at a time, without padding and without a cache of keys."""
    codec = ByteCodec()
    ids, found = codec.encode(prompt(text)), []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        if token == codec.end:
            break
        found.append(token)
    return codec.decode(found).strip()


def test_texts_are_those_of_one_token_at_a_time_whatever_the_padding(model: nn.Module) -> None:
    mrs = [mr for mr, _ in PAIRS] + ["x"]
    model.train()
    expected = [greedy(model, mr, 8) for mr in mrs]
    assert generated_texts(model, ByteCodec(), mrs, max_new_tokens=8) == expected
    assert generated_texts(model, ByteCodec(), mrs, max_new_tokens=8, batch_size=1) == expected
    assert model.training
    assert len(set(expected)) > 1


def test_a_text_ends_at_the_end_token(model: nn.Module) -> None:
    codec = ByteCodec()
    first = int(model(input_ids=torch.tensor([codec.encode(prompt("x"))])).logits[0, -1].argmax())
    assert generated_texts(model, ByteCodec(end=first), ["x"], max_new_tokens=8) == [""]
    other = ByteCodec(end=(first + 1) % 256)
    assert generated_texts(model, other, ["x"], max_new_tokens=1) == [codec.decode([first]).strip()]


def test_the_widest_beam_finds_the_likeliest_two_tokens(model: nn.Module) -> None:
    start = ByteCodec().encode(prompt("x"))
    first = model(input_ids=torch.tensor([start])).logits[0, -1].log_softmax(0)
    second = model(input_ids=torch.tensor([[*start, token] for token in range(256)])).logits[:, -1].log_softmax(1)
    best = divmod(int((first[:, None] + second).argmax()), 256)
    codec = ByteCodec(end=int(first.argmin()))
    assert codec.end not in best
    found = generated_texts(model, codec, ["x"], max_new_tokens=2, beams=256, length_penalty=0.0)
    assert found == [codec.decode(best).strip()]


def test_no_text_is_generated_for_no_mr(model: nn.Module) -> None:
    assert generated_texts(model, ByteCodec(), [], max_new_tokens=1) == []
    with pytest.raises(ValueError, match="beams: expected at least 1, got 0"):
        generated_texts(model, ByteCodec(), ["x"], max_new_tokens=1, beams=0)


def test_a_transformers_tokenizer_is_a_codec(model: nn.Module) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["name", ":", "A", "||", "is", ".", "<end>"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=".")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    codec = TokenizerCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))
    assert codec.end == codec.pad == words.index("<end>")
    batch = target_batch(codec, [("name : A", "A is .")], max_length=9)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 2, 4, 5, 6]]
    assert batch.labels.tolist() == [[IGNORED] * 4 + [2, 4, 5, 6]]
    assert codec.decode([2, 4, 5, 6]).split() == ["A", "is", "."]
    with pytest.raises(ValueError, match="expected an end-of-sequence token, got none"):
        TokenizerCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=inner))


def test_training_on_targets_is_learning_to_say_them(model: nn.Module) -> None:
    learner = initial_decoder(seed=0)
    batch = target_batch(ByteCodec(), [("a", "one"), ("b : long", "two")], max_length=32)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    for _ in range(30):
        target_loss(learner, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert generated_texts(learner, ByteCodec(), ["a", "b : long"], max_new_tokens=9) == ["one", "two"]
    assert generated_texts(learner, ByteCodec(), ["a", "b : long"], max_new_tokens=9, beams=3) == ["one", "two"]


def test_bleu_of_the_same_text_is_100() -> None:
    pytest.importorskip("sacrebleu")
    texts = ["The cat sat on the mat.", "A place called X."]
    assert bleu(texts, [[text] for text in texts]) == pytest.approx(100)


def test_bleu_is_the_formula_by_hand_with_two_references() -> None:
    pytest.importorskip("sacrebleu")
    # "the cat sat on a mat": unigrams all 6 ("a" and "cat sat" in the second), bigrams 5 of 5 (the cat, cat sat,
    # sat on | on a, a mat), trigrams 3 of 4 (not "sat on a"), 4-grams 1 of 3 (the cat sat on). Lengths: no penalty.
    expected = 100 * (1 * 1 * 3 / 4 * 1 / 3) ** 0.25
    assert bleu(["the cat sat on a mat"], [["the cat sat on", "it lay on a mat there"]]) == pytest.approx(expected)


def test_bleu_punishes_a_short_text_by_its_closest_reference() -> None:
    pytest.importorskip("sacrebleu")
    assert bleu(["a b c d e"], [["a b c d e f g", "x"]]) == pytest.approx(100 * math.exp(1 - 7 / 5))


def test_texts_may_have_different_numbers_of_references() -> None:
    pytest.importorskip("sacrebleu")
    texts = ["a b c d e", "f g h i j"]
    assert bleu(texts, [["a b c d e"], ["x", "f g h i j", "y"]]) == pytest.approx(100)
    assert bleu(texts, [["x", "a b c d e"], ["f g h i j"]]) == pytest.approx(100)


def test_real_references_say_each_other_in_other_words(e2e: Path) -> None:
    pytest.importorskip("sacrebleu")
    several = [example.references for example in read_examples(e2e / "test.txt") if len(example.references) > 1][:200]
    assert bleu([refs[0] for refs in several], several) == pytest.approx(100)
    assert 20 < bleu([refs[0] for refs in several], [refs[1:] for refs in several]) < 80


def test_bleu_needs_references() -> None:
    with pytest.raises(ValueError, match="expected one list for each text, got 1 for 2 texts"):
        bleu(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="expected at least one for each text, got an empty list"):
        bleu(["a"], [[]])
    with pytest.raises(TypeError, match=r"got one str. Pass \[\[text\], \.\.\.\]"):
        bleu(["a"], ["a"])


def test_without_sacrebleu_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r'pip install "lora-analysis\[study\]"'):
        generation.bleu(["a"], [["a"]])
