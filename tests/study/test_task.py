"""Text tasks: equal tasks are told by their digest, and what does not fit together is refused."""

from typing import Any

import pytest

from lora_analysis.study.task import TextTask


def test_the_digest_tells_texts_labels_and_sides_apart() -> None:
    tasks = [
        TextTask(("a", "b"), (0, 1), ("c",), (0,), classes=("x", "y")),
        TextTask(("a", "b"), (0, 1), ("c",), (1,), classes=("x", "y")),
        TextTask(("a", "b"), (1, 1), ("c",), (0,), classes=("x", "y")),
        TextTask(("a",), (0,), ("b", "c"), (1, 0), classes=("x", "y")),
        TextTask(("ab",), (0,), ("c",), (0,), classes=("x", "y")),
        TextTask(("a", "b"), (0, 1), ("c",), (0,), classes=("x", "z")),
    ]
    assert len({task.digest for task in tasks}) == len(tasks)
    assert tasks[0].digest == TextTask(("a", "b"), (0, 1), ("c",), (0,), ("x", "y"), ("group",)).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a",), (), ("b",), (0,), ("x",)), "train_labels: expected one label per text, got 0 for 1"),
        ((("a",), (0,), ("b",), (0, 0), ("x",)), "held_out_labels: expected one label per text, got 2 for 1"),
        (((), (), ("b",), (0,), ("x",)), "train_texts: expected at least one"),
        ((("a",), (1,), ("b",), (0,), ("x",)), "train_labels: expected indices into 1 classes, got 1"),
        ((("a",), (0,), ("b",), (-1,), ("x",)), "held_out_labels: expected indices into 1 classes, got -1"),
        ((("a",), (0,), ("b",), (0,), ("x",), ("g", "h")), "held_out_groups: expected one group per"),
    ],
)
def test_texts_that_do_not_fit_their_labels_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTask(*arguments)
