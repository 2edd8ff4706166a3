"""Text classification tasks: labelled texts with a fixed split.

Conventions
-----------
A label is an index into ``classes``. The split is part of the task: what is held out is never trained on,
and nothing is drawn anew.

Values
------
``TextTask`` and ``Source``, where the texts of one class come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Source:
    """Where the texts of one class come from: version, files read, paragraphs in the task."""

    version: str
    files: int
    paragraphs: int


@dataclass(frozen=True, slots=True)
class TextTask:
    """A text classification task with its split: any labelled texts.

    Parameters
    ----------
    train_texts, train_labels : tuple of str, tuple of int
        Labels are indices into ``classes``.
    held_out_texts, held_out_labels : tuple of str, tuple of int
        What is never trained on.
    classes : tuple of str
        Names of the classes.
    held_out_groups : tuple of str, optional
        The unit of the split that each held-out text belongs to. Texts of one unit are not independent;
        an interval that allows for it resamples units.
    sources : mapping of str to Source, optional
        Class name to where its texts come from.

    Raises
    ------
    ValueError
        If texts and labels (or groups) differ in number, a label is no class, or a side is empty.

    Examples
    --------
    >>> task = TextTask(("good", "bad"), (1, 0), ("fine",), (1,), classes=("negative", "positive"))
    >>> len(task.digest)
    64
    """

    train_texts: tuple[str, ...]
    train_labels: tuple[int, ...]
    held_out_texts: tuple[str, ...]
    held_out_labels: tuple[int, ...]
    classes: tuple[str, ...]
    held_out_groups: tuple[str, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side, texts, labels in (
            ("train", self.train_texts, self.train_labels),
            ("held_out", self.held_out_texts, self.held_out_labels),
        ):
            if len(texts) != len(labels):
                raise ValueError(
                    f"{side}_labels: expected one label per text, got {len(labels)} for {len(texts)} texts."
                )
            if not texts:
                raise ValueError(f"{side}_texts: expected at least one text, got none.")
            if stray := [label for label in labels if not 0 <= label < len(self.classes)]:
                raise ValueError(f"{side}_labels: expected indices into {len(self.classes)} classes, got {stray[0]}.")
        if self.held_out_groups and len(self.held_out_groups) != len(self.held_out_texts):
            raise ValueError(
                f"held_out_groups: expected one group per held-out text, got {len(self.held_out_groups)} "
                f"for {len(self.held_out_texts)} texts."
            )

    def held_back(self) -> TextTask:
        """The task with the last sixth of its training texts in the place of the held-out ones."""
        count = len(self.train_texts) - max(1, len(self.train_texts) // 6)
        return TextTask(
            self.train_texts[:count],
            self.train_labels[:count],
            self.train_texts[count:],
            self.train_labels[count:],
            classes=self.classes,
        )

    @property
    def digest(self) -> str:
        """The sha256 of classes, texts and labels, in order: equal for equal tasks only."""
        digest = hashlib.sha256()
        for rows in (
            enumerate(self.classes),
            zip(self.train_labels, self.train_texts, strict=True),
            zip(self.held_out_labels, self.held_out_texts, strict=True),
        ):
            for label, text in rows:
                data = text.encode("utf-8", "surrogatepass")
                digest.update(f"{label} {len(data)} ".encode() + data)
            digest.update(b"end of part")
        return digest.hexdigest()
