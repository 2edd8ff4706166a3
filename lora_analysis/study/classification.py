"""Setting (b): a sentence encoder that classifies texts by a fixed classifier, MiniLM on docstrings by default.

The classifier compares the embedding of a text with one unit vector for each class, the mean of the *frozen* model's
embeddings of its training texts. It is the same for every run, so what is learned is in the adapter.

Values
------
``Classification``, ``open_classification``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.study import minilm
from lora_analysis.study.docstrings import docstring_task
from lora_analysis.study.encoder import encoder_weights, load_encoder
from lora_analysis.study.labelled_texts import read_task
from lora_analysis.study.minilm import SentenceModel
from lora_analysis.study.setting import Outcomes
from lora_analysis.study.task import TextTask

TEMPERATURE = 0.05
"""Of the cosine classifier."""


@dataclass(frozen=True, slots=True)
class Classification:
    """A sentence encoder with tasks.

    Parameters
    ----------
    source : str
        ``"minilm"``, or the directory or hub id of a transformers encoder.
    tasks : mapping of str to TextTask
    means : mapping of str to Tensor, each (classes, d)
        The fixed classifiers.
    max_length : int
        Tokens kept of a text.
    """

    source: str
    tasks: Mapping[str, TextTask]
    means: Mapping[str, Tensor]
    max_length: int

    @property
    def base(self) -> Path:
        """The file of the pretrained weights."""
        return minilm.minilm_path() if self.source == "minilm" else encoder_weights(self.source)

    def model(self) -> nn.Module:
        """A fresh copy of the encoder, frozen."""
        return load(self.source).model

    def trainable_head(self, model: nn.Module, task: str) -> nn.Module:
        """The model with a classifier that trains, begun at the fixed one."""
        return _WithHead(model, self.means[task])

    def batches(
        self, task: str, *, batch_size: int, seed: int, size: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Token ids, their mask and labels, in shuffled passes without end; of a size, the first so many."""
        texts, labels = self.tasks[task].train_texts[:size], torch.tensor(self.tasks[task].train_labels[:size])
        tokenizer = load(self.source).tokenizer
        generator = torch.Generator().manual_seed(seed)
        width = min(batch_size, len(texts))
        while True:
            for index in torch.split(torch.randperm(len(texts), generator=generator), width):
                if len(index) == width:
                    found = minilm.tokenize(tokenizer, [texts[i] for i in index.tolist()], max_length=self.max_length)
                    yield *found, labels[index]

    def loss(self, task: str, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the cosine classifier."""
        ids, mask, labels = batch
        return F.cross_entropy(self._logits(task, model, ids, mask), labels)

    def outcomes(self, task: str, model: nn.Module) -> Outcomes:
        """Cross-entropy and whether the largest logit is the label's, of every held-out text."""
        held_out, tokenizer = self.tasks[task], load(self.source).tokenizer
        labels = torch.tensor(held_out.held_out_labels)
        order = sorted(range(len(labels)), key=lambda i: len(held_out.held_out_texts[i]))
        logits = torch.empty(len(labels), len(held_out.classes))
        model.eval()
        with torch.no_grad():
            for start in range(0, len(order), 64):
                index = order[start : start + 64]
                texts = [held_out.held_out_texts[i] for i in index]
                ids, mask = minilm.tokenize(tokenizer, texts, max_length=self.max_length)
                logits[index] = self._logits(task, model, ids, mask).float()
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
        return Outcomes(losses, logits.argmax(1) == labels)

    def _logits(self, task: str, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        means = F.normalize(model.means, dim=1) if isinstance(model, _WithHead) else self.means[task]
        encoder = model.encoder if isinstance(model, _WithHead) else model
        return minilm.cosine_logits(minilm.embed(encoder, ids, mask), means, temperature=TEMPERATURE)

    def held_back(self) -> Classification:
        """The same with a sixth of the training texts in the place of the held-out ones; the classifiers stay."""
        return replace(self, tasks={name: task.held_back() for name, task in self.tasks.items()})

    def record(self) -> Mapping[str, Any]:
        """Digest, classes, sizes and groups of each task."""
        return {
            name: {
                "sha256": task.digest,
                "classes": list(task.classes),
                "train_items": len(task.train_texts),
                "groups": list(task.held_out_groups or (str(i) for i in range(len(task.held_out_texts)))),
                "chance": 1 / len(task.classes),
                "metric": "accuracy",
            }
            for name, task in self.tasks.items()
        }


class _WithHead(nn.Module):
    """An encoder with class vectors that train."""

    def __init__(self, encoder: nn.Module, means: Tensor) -> None:
        super().__init__()
        self.encoder, self.means = encoder, nn.Parameter(means.clone())


def open_classification(
    *,
    folder: Path,
    tasks: Mapping[str, Mapping[str, Any]],
    model: str = "minilm",
    max_length: int = 48,
) -> Classification:
    """The encoder and its tasks, with a classifier for each, kept in the study's folder.

    Parameters
    ----------
    folder : Path
    tasks : mapping of str to mapping
        Name to options of ``docstring_task``, or to ``{"file": path, …}`` with options of ``read_task``.
    model : str
    max_length : int
    """
    opened = {
        name: read_task(**options) if "file" in options else docstring_task(**options)
        for name, options in tasks.items()
    }
    means = {}
    sentence_model = load(model)
    for name, task in opened.items():
        # Of another model than MiniLM the name says which: two may be of one width.
        of_model = "" if model == "minilm" else f"-{hashlib.sha256(model.encode()).hexdigest()[:12]}"
        kept = folder / f"classifier-{name}-{task.digest[:12]}-{max_length}{of_model}.safetensors"
        if not kept.exists():
            known = minilm.embeddings(sentence_model, task.train_texts, max_length=max_length)
            made = minilm.class_means(known, task.train_labels, len(task.classes))
            folder.mkdir(parents=True, exist_ok=True)
            scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
            save_file({"means": made}, scratch)
            scratch.replace(kept)
        means[name] = load_file(kept)["means"]
    return Classification(model, opened, means, max_length)


def load(source: str) -> SentenceModel:
    """A fresh copy of an encoder with its tokenizer: ``"minilm"``, or a transformers model."""
    return minilm.load_minilm() if source == "minilm" else load_encoder(source)
