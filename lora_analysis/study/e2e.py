"""Conditional generation from a file of the user's, such as E2E NLG: a causal model that says what an MR means.

Held-out items are pairs of an MR and one of its references, in groups by MR; beside their loss there is the BLEU of
what is generated for each MR, against all its references.

Values
------
``Generation``, ``open_generation``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_analysis.errors import BaseWeightsError
from lora_analysis.study.decoder import decoder_of, initial_decoder
from lora_analysis.study.encoder import encoder_weights, without_dropout
from lora_analysis.study.generation import (
    IGNORED,
    ByteCodec,
    Codec,
    TargetBatch,
    TokenizerCodec,
    bleu,
    generated_texts,
    prompt,
    target_batch,
    target_loss,
)
from lora_analysis.study.meaning_representations import Example, Split, read_examples, split_by_mr
from lora_analysis.study.setting import Outcomes


@dataclass(frozen=True, slots=True)
class Generation:
    """A causal model with tasks of meaning representations and texts.

    Parameters
    ----------
    source : str
        ``"decoder"`` for the small one that comes with the package, or a transformers model.
    weights : Path
    tasks : mapping of str to Split
    max_length : int
        Tokens of prompt and text together; longer pairs are left out.
    max_new_tokens : int
    beams : int
    """

    source: str
    weights: Path
    tasks: Mapping[str, Split]
    max_length: int
    max_new_tokens: int
    beams: int

    @property
    def base(self) -> Path:
        """The file or directory of the pretrained weights."""
        return self.weights

    def model(self) -> nn.Module:
        """A fresh copy of the model, frozen."""
        if self.source == "decoder":
            model = initial_decoder()
            model.load_state_dict(load_file(self.weights))
        else:
            model = _causal_model(self.source)
        return model.requires_grad_(False).eval()

    def trainable_head(self, model: nn.Module, task: str) -> nn.Module:
        """The model, whose output embedding trains."""
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        head.requires_grad_(True)
        return model

    def batches(self, task: str, *, batch_size: int, seed: int, size: int | None) -> Iterator[TargetBatch]:
        """Pairs in shuffled passes without end; of a size, the first so many."""
        codec = self._codec()
        pairs = self._fitting(codec, self.tasks[task].train)[:size]
        generator = torch.Generator().manual_seed(seed)
        width = min(batch_size, len(pairs))
        while True:
            for index in torch.split(torch.randperm(len(pairs), generator=generator), width):
                if len(index) == width:
                    yield target_batch(codec, [pairs[i] for i in index.tolist()], max_length=self.max_length)

    def loss(self, task: str, model: nn.Module, batch: TargetBatch) -> Tensor:
        """Mean cross-entropy of the target tokens."""
        return target_loss(model, batch)

    def outcomes(self, task: str, model: nn.Module) -> Outcomes:
        """Mean cross-entropy of the target tokens of each held-out pair, and the BLEU of the texts generated."""
        codec, held_out = self._codec(), self.tasks[task].held_out
        pairs = self._fitting(codec, held_out)
        losses = []
        model.eval()
        with torch.no_grad():
            for start in range(0, len(pairs), 16):
                batch = target_batch(codec, pairs[start : start + 16], max_length=self.max_length)
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
                labels = batch.labels[:, 1:]
                token = nn.functional.cross_entropy(logits.double().mT, labels, ignore_index=IGNORED, reduction="none")
                losses.append(token.sum(1) / (labels != IGNORED).sum(1))
        known = {mr for mr, _ in pairs}
        shown = [example for example in held_out if example.mr in known]
        texts = generated_texts(
            model, codec, [example.mr for example in shown], max_new_tokens=self.max_new_tokens, beams=self.beams
        )
        score = bleu(texts, [example.references for example in shown])
        return Outcomes(torch.cat(losses), metrics={"bleu": score})

    def held_back(self) -> Generation:
        """The same with a sixth of the training MRs in the place of the held-out ones."""
        tasks = {}
        for name, split in self.tasks.items():
            count = len(split.train) - max(1, len(split.train) // 6)
            tasks[name] = Split(split.train[:count], split.train[count:][: len(split.held_out)])
        return replace(self, tasks=tasks)

    def record(self) -> Mapping[str, Any]:
        """Of each task: digest, pairs, those left out for their length, groups."""
        codec = self._codec()
        return {
            name: {
                "sha256": _digest(split),
                "train_items": len(self._fitting(codec, split.train)),
                "left_out": sum(len(e.references) for part in split for e in part)
                - sum(len(self._fitting(codec, part)) for part in split),
                "groups": [mr for mr, _ in self._fitting(codec, split.held_out)],
                "metric": "bleu",
            }
            for name, split in self.tasks.items()
        }

    def _codec(self) -> Codec:
        if self.source == "decoder":
            return ByteCodec()
        from transformers import AutoTokenizer

        return TokenizerCodec(AutoTokenizer.from_pretrained(self.source))

    def _fitting(self, codec: Codec, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """The pairs of examples that the model's context holds."""
        pairs = [(example.mr, text) for example in examples for text in example.references]
        return [
            (mr, text)
            for mr, text in pairs
            if len(codec.encode(prompt(mr))) + len(codec.encode(f" {text}")) + 1 <= self.max_length
        ]


def open_generation(
    *,
    folder: Path,
    tasks: Mapping[str, Mapping[str, Any]],
    model: str = "decoder",
    max_length: int = 384,
    max_new_tokens: int = 160,
    beams: int = 1,
    held_out_mrs: int = 40,
    pretraining_steps: int | None = None,
    pretraining_bytes: int | None = None,
) -> Generation:
    """The model and its tasks.

    Parameters
    ----------
    folder : Path
        Not used: there is nothing to keep.
    tasks : mapping of str to mapping
        Name to ``{"file": path}``, or with ``"held_out_file"``; see ``read_examples``. Without one, MRs are held out.
    model : str
    max_length, max_new_tokens, beams : int
    held_out_mrs : int
        MRs that are measured on, the first in the order of a hash.
    pretraining_steps, pretraining_bytes : int, optional
        Of the decoder: fewer, for a weaker model to try things with.
    """
    opened = {}
    for name, options in tasks.items():
        examples = read_examples(Path(options["file"]))
        if "held_out_file" in options:
            held = split_by_mr(read_examples(Path(options["held_out_file"])), held_out=0.999).held_out
            seen = {example.mr for example in held}
            split = Split(tuple(example for example in examples if example.mr not in seen), held)
        else:
            split = split_by_mr(examples)
        opened[name] = Split(split.train, split.held_out[:held_out_mrs])
    small = model == "decoder"
    weights = decoder_of(pretraining_steps, pretraining_bytes).path if small else encoder_weights(model)
    return Generation(model, weights, opened, max_length, max_new_tokens, beams)


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for part in split:
        for example in part:
            digest.update(repr((example.mr, example.references)).encode())
        digest.update(b"end of part")
    return digest.hexdigest()


def _causal_model(source: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = without_dropout(AutoConfig.from_pretrained(source))
        model: nn.Module = AutoModelForCausalLM.from_pretrained(source, config=config)
    except (OSError, ValueError) as error:
        raise BaseWeightsError(f"{source}: expected a causal transformers model, got: {error}") from error
    return model
