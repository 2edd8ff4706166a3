"""Text from a meaning representation, as in E2E NLG: training batches, decoding, BLEU.

Conventions
-----------
Everything is by meaning representation (MR): the texts that are generated, and the BLEU, which compares one
text with all references of its MR. A model reads
``<MR> ||`` and goes on with `` <text>`` and an end token; only text and end token count in the loss. Prompt and
target are tokenised apart, so that where the target begins does not depend on the target.

Values
------
``Codec`` with ``ByteCodec`` and ``TokenizerCodec``;
``TargetBatch``, ``target_batch``, ``target_loss``; ``generated_texts``; ``bleu``.

References
----------
Novikova et al. 2017, arXiv:1706.09254 (E2E); Hu et al. 2021, arXiv:2106.09685, section 5.4 and table 3;
Post 2018, arXiv:1804.08771 (sacrebleu).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

IGNORED = -100
"""Label of a position that is not in the loss: that of PyTorch's cross-entropy."""


class Codec(Protocol):
    """What turns text into token ids and back; ``end`` closes a text, ``pad`` is masked wherever it stands."""

    @property
    def end(self) -> int: ...  # noqa: D102

    @property
    def pad(self) -> int: ...  # noqa: D102

    def encode(self, text: str) -> list[int]: ...  # noqa: D102

    def decode(self, ids: Sequence[int]) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class ByteCodec:
    r"""UTF-8 bytes as token ids, for a byte-level model. A line feed ends a text.

    Examples
    --------
    >>> ByteCodec().decode(ByteCodec().encode("café"))
    'café'
    """

    end: int = 10
    pad: int = 0

    def encode(self, text: str) -> list[int]:
        """Ids 0 to 255."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerCodec:
    """A transformers tokenizer; its end-of-sequence token ends a text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        If the tokenizer has no end-of-sequence token.
    """

    tokenizer: Any

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__}: expected an end-of-sequence token, got none. Set its eos_token."
            )

    @property
    def end(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """The tokenizer's padding token, or its end-of-sequence token: which one is never seen."""
        return self.end if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt(mr: str) -> str:
    """What a model is given of an MR."""
    return f"{mr} ||"


class TargetBatch(NamedTuple):
    """Token ids, 1 where they are no padding, and labels, ``IGNORED`` outside the targets; all (n, length)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def target_batch(codec: Codec, pairs: Sequence[tuple[str, str]], *, max_length: int) -> TargetBatch:
    """A training batch of MRs with one text each, padded on the right.

    Parameters
    ----------
    codec : Codec
    pairs : sequence of (mr, text), length n
    max_length : int
        Of prompt, text and end token together: the context the model has.

    Returns
    -------
    TargetBatch, shape (n, length), int64

    Raises
    ------
    ValueError
        If there are no pairs, or one is longer than ``max_length``: nothing is cut.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one, got none.")
    rows, labels = [], []
    for mr, text in pairs:
        start = codec.encode(prompt(mr))
        target = [*codec.encode(f" {text}"), codec.end]
        if len(start) + len(target) > max_length:
            raise ValueError(
                f"{mr!r}: expected at most {max_length} tokens with its text, got {len(start) + len(target)}. "
                "Leave it out, or raise max_length= if the model's context allows."
            )
        rows.append(torch.tensor(start + target))
        labels.append(torch.tensor([IGNORED] * len(start) + target))
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=codec.pad)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return TargetBatch(input_ids, mask, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED))


def target_loss(model: nn.Module, batch: TargetBatch) -> Tensor:
    """Mean cross-entropy of the target tokens of a batch, each given its prompt and the target before it.

    Parameters
    ----------
    model : nn.Module
        A causal model of transformers; used in the mode it is in.
    batch : TargetBatch

    Returns
    -------
    Tensor, shape ()
        Nats per target token, end tokens among them.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch.labels[:, 1:], ignore_index=IGNORED)


def generated_texts(
    model: nn.Module,
    codec: Codec,
    mrs: Sequence[str],
    *,
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 16,
) -> list[str]:
    """What a model says to each MR, by greedy decoding or beam search, in eval mode.

    Parameters
    ----------
    model : nn.Module
        A causal model of transformers, with ``generate``.
    codec : Codec
    mrs : sequence of str, length n
    max_new_tokens : int
        Where a text without end token is cut.
    beams : int
        1 is greedy; the paper's E2E runs take 10, with a length penalty of 0.9 (and forbid repeated 4-grams).
    length_penalty : float
        Exponent of the length that beam scores are divided by.
    batch_size : int
        MRs decoded at once, padded on the left.

    Returns
    -------
    list of str, length n
        Without surrounding white space.

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("beams", beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    from transformers import GenerationConfig

    options: dict[str, Any] = {"length_penalty": length_penalty} if beams > 1 else {}
    configuration: Any = GenerationConfig  # untyped in transformers
    config = configuration(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=codec.end,
        pad_token_id=codec.pad,
        use_cache=True,
        **options,
    )
    generator: Any = model
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    texts = []
    try:
        with torch.no_grad():
            for start in range(0, len(mrs), batch_size):
                input_ids, mask = _left_padded(codec, [prompt(mr) for mr in mrs[start : start + batch_size]])
                found = generator.generate(
                    input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
                texts += [_text(codec, row) for row in found[:, input_ids.shape[1] :].tolist()]
    finally:
        for module, training in modes:
            module.training = training
    return texts


def _left_padded(codec: Codec, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = [codec.encode(text) for text in prompts]
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([[codec.pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


def _text(codec: Codec, ids: list[int]) -> str:
    return codec.decode(ids[: ids.index(codec.end)] if codec.end in ids else ids).strip()


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of texts with any number of references each, by sacrebleu's defaults.

    Up to 4-grams, brevity penalty against the closest reference, tokenisation ``13a``, upper and lower case
    told apart. The E2E challenge's own script tokenises otherwise, so that figures differ a little from
    published ones.

    Parameters
    ----------
    texts : sequence of str, length n
    references : sequence of sequence of str, length n
        At least one reference each.

    Returns
    -------
    float
        In [0, 100].

    Raises
    ------
    ImportError
        If sacrebleu is not installed.
    ValueError
        If the numbers differ, there are no texts, or a text has no reference.
    TypeError
        If ``references`` is a flat list of texts.

    Examples
    --------
    >>> round(bleu(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]]))
    100
    """
    if not texts or len(texts) != len(references):
        raise ValueError(f"references: expected one list for each text, got {len(references)} for {len(texts)} texts.")
    if isinstance(references[0], str):
        raise TypeError("references: expected a sequence of texts for each text, got one str. Pass [[text], ...].")
    if any(not of_text for of_text in references):
        raise ValueError("references: expected at least one for each text, got an empty list.")
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(f'{error}. Install it with pip install "lora-analysis[study]".') from error
    # sacrebleu wants one stream per reference number, with None where a text has no more of them.
    most = max(len(of_text) for of_text in references)
    streams: list[Any] = [
        [of_text[number] if number < len(of_text) else None for of_text in references] for number in range(most)
    ]
    return float(sacrebleu.corpus_bleu(list(texts), streams).score)
