"""Setting (a): a small decoder of our own that adapts to text it was not pretrained on.

Values
------
``Language``, ``open_language``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_analysis.study import corpora
from lora_analysis.study.corpora import Corpus
from lora_analysis.study.decoder import CONTEXT, decoder_of, initial_decoder
from lora_analysis.study.language_losses import block_losses, language_loss, ngram_bits
from lora_analysis.study.setting import Outcomes
from lora_analysis.study.windows import held_out_blocks, windows

PERMUTATION_SEED = 0
"""Of the byte permutation of the control."""


@dataclass(frozen=True, slots=True)
class Language:
    """The pretrained decoder with corpora to adapt to.

    Parameters
    ----------
    weights : Path
        Its ``model.safetensors``.
    pretraining : mapping
        How it came about.
    tasks : mapping of str to Corpus
    held_out_blocks : int
        Blocks of ``CONTEXT`` bytes that are measured on, evenly spread over the held-out files.
    """

    weights: Path
    pretraining: Mapping[str, Any]
    tasks: Mapping[str, Corpus]
    held_out_blocks: int

    @property
    def base(self) -> Path:
        """The file of the pretrained weights."""
        return self.weights

    def model(self) -> nn.Module:
        """A fresh copy of the decoder, frozen."""
        model = initial_decoder()
        model.load_state_dict(load_file(self.weights))
        return model.requires_grad_(False).eval()

    def trainable_head(self, model: nn.Module, task: str) -> nn.Module:
        """The model, whose output embedding trains."""
        model.get_submodule("lm_head").requires_grad_(True)
        return model

    def batches(self, task: str, *, batch_size: int, seed: int, size: int | None) -> Iterator[Tensor]:
        """Windows of bytes at random places, without end; of a size, out of the first so many blocks."""
        corpus = self.tasks[task]
        if size is not None:
            first = corpora.File(corpus.train_files[0].path, corpus.train[: size * CONTEXT])
            corpus = Corpus(corpus.name, (first,), corpus.held_out_files, corpus.skipped, corpus.origin)
        return windows(corpus, length=CONTEXT, batch_size=batch_size, seed=seed)

    def loss(self, task: str, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next byte."""
        return language_loss(model, batch)

    def outcomes(self, task: str, model: nn.Module) -> Outcomes:
        """Mean cross-entropy of the next byte in each block, in nats."""
        blocks, _ = self._held_out(task)
        return Outcomes(block_losses(model.eval(), blocks))

    def held_back(self) -> Language:
        """The same with a sixth of the training files in the place of the held-out ones."""
        return replace(self, tasks={name: _held_back(corpus) for name, corpus in self.tasks.items()})

    def record(self) -> Mapping[str, Any]:
        """Digest, groups and n-gram baselines of each task."""
        return {name: self._record(name, corpus) for name, corpus in self.tasks.items()}

    def _record(self, name: str, corpus: Corpus) -> dict[str, Any]:
        blocks, groups = self._held_out(name)
        return {
            "sha256": corpus.digest,
            "train_items": len(corpus.train) // CONTEXT,
            "groups": list(groups),
            "metric": "loss",
            "unigram_bits": ngram_bits(corpus.train, blocks, n=1),
            "bigram_bits": ngram_bits(corpus.train, blocks, n=2),
        }

    def _held_out(self, task: str) -> tuple[Tensor, tuple[str, ...]]:
        blocks, groups = held_out_blocks(self.tasks[task], CONTEXT)
        index = torch.linspace(0, len(blocks) - 1, min(self.held_out_blocks, len(blocks))).round().long()
        return blocks[index], tuple(groups[i] for i in index.tolist())


def _held_back(corpus: Corpus) -> Corpus:
    count = len(corpus.train_files) - max(1, len(corpus.train_files) // 6)
    return replace(corpus, train_files=corpus.train_files[:count], held_out_files=corpus.train_files[count:])


def open_language(
    *,
    folder: Path,
    tasks: Mapping[str, Mapping[str, Any]],
    pretraining_steps: int | None = None,
    pretraining_bytes: int | None = None,
    held_out_blocks: int = 400,
) -> Language:
    """The decoder, pretrained or from the cache, with its corpora.

    Parameters
    ----------
    folder : Path
        Not used: the pretrained model is cached for all studies.
    tasks : mapping of str to mapping
        Name to ``{"corpus": "near" | "far" | "headers" | "code", "permuted": bool}``, with the options of that corpus.
    pretraining_steps, pretraining_bytes : int, optional
        Fewer steps, on less code: a weaker model, to try things with.
    held_out_blocks : int
    """
    made: dict[str, Callable[..., Corpus]] = {
        "near": corpora.near,
        "far": corpora.far,
        "headers": corpora.headers,
        "code": corpora.code,
    }
    opened = {}
    for name, given in tasks.items():
        options = dict(given)
        kind, permuted = options.pop("corpus", name), options.pop("permuted", False)
        if kind not in made:
            raise ValueError(f"tasks: {name!r}: expected a corpus of {', '.join(made)}, got {kind!r}.")
        corpus = made[kind](**options)
        opened[name] = corpora.permuted(corpus, seed=PERMUTATION_SEED) if permuted else corpus
    decoder = decoder_of(pretraining_steps, pretraining_bytes)
    return Language(decoder.path, asdict(decoder.pretraining), opened, held_out_blocks)
