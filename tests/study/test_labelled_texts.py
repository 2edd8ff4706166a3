from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_analysis.errors import LoraAnalysisError
from lora_analysis.study.labelled_texts import read_task

BANKING = Path(__file__).parents[3] / "shared" / "data" / "text" / "banking77"


def csv_of(path: Path, rows: list[tuple[str, str]], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(f'"{text}",{label}' for text, label in rows)]) + "\n")
    return str(path)


def test_a_split_depends_on_the_texts_alone(tmp_path: Path) -> None:
    rows = [(f"text number {i}", "ab"[i % 2]) for i in range(200)]
    first = read_task(csv_of(tmp_path / "a.csv", rows))
    second = read_task(csv_of(tmp_path / "b.csv", rows[::-1], "sentence,intent"))
    assert first.digest == second.digest
    assert set(first.train_texts).isdisjoint(first.held_out_texts)
    assert len(first.train_texts) + len(first.held_out_texts) == 200
    assert 20 <= len(first.held_out_texts) <= 60
    fewer = read_task(str(tmp_path / "a.csv"), train_items=30, held_out_items=10)
    assert fewer.train_texts == first.train_texts[:30]
    assert fewer.held_out_texts == first.held_out_texts[:10]


def test_json_lines_are_read_and_white_space_is_folded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"t": f"  word  {i}\n", "n": i % 3}) + "\n" for i in range(60)) + "\n")
    task = read_task(str(path), text="t", label="n")
    assert task.classes == ("0", "1", "2")
    assert "word 7" in task.train_texts + task.held_out_texts


def test_duplicates_are_kept_once_and_contradictions_dropped(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(60)]
    path = csv_of(tmp_path / "a.csv", [*rows, ("text 0", "a"), ("text 1", "a")])
    task = read_task(path)
    texts = task.train_texts + task.held_out_texts
    assert len(texts) == 59
    assert "text 1" not in texts


def test_held_out_texts_of_another_file_are_never_trained_on(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(60)]
    train, test = csv_of(tmp_path / "train.csv", rows), csv_of(tmp_path / "test.csv", rows[:20])
    task = read_task(train, held_out_file=test)
    assert sorted(task.held_out_texts) == sorted(text for text, _ in rows[:20])
    assert len(task.train_texts) == 40


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("text,label\nhello,\n", "a.csv", r"a.csv, line 2: expected a text and a label, got .*hello"),
        ("words,label\nhello,a\n", "a.csv", r"a.csv: expected a column text or sentence.*got words, label. Name it"),
        ('{"text": "a", "label": 1}\nnot json\n', "a.jsonl", r"a.jsonl, line 2: expected JSON, got 'not json"),
        ("[1]\n", "a.jsonl", r"a.jsonl, line 1: expected an object"),
        ("", "a.tsv", r"a.tsv: expected a file .csv or .jsonl, got .tsv"),
    ],
)
def test_what_cannot_be_read_is_said_with_file_and_line(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraAnalysisError, match=message):
        read_task(str(tmp_path / name))


def test_tasks_that_cannot_be_learned_are_refused(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "a.csv", [(f"text {i}", "a") for i in range(20)])
    with pytest.raises(ValueError, match=r"texts of at least two classes, got \['a'\]"):
        read_task(path)
    with pytest.raises(ValueError, match=r"held_out: expected a share in \(0, 1\), got 1.0"):
        read_task(path, held_out=1.0)
    other = csv_of(tmp_path / "b.csv", [("text x", "b"), ("text y", "a")])
    with pytest.raises(ValueError, match="training texts of every class, got none of 'b'"):
        read_task(path, held_out_file=other)


@pytest.mark.skipif(not BANKING.is_dir(), reason="needs ../shared, which a user's checkout has not")
def test_banking77_is_read_whole() -> None:
    task = read_task(str(BANKING / "train.csv"), held_out_file=str(BANKING / "test.csv"))
    assert len(task.classes) == 77
    assert len(task.held_out_texts) > 3000
    assert len(task.train_texts) > 9900
