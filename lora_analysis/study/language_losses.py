"""Losses of causal language models: to train on, to measure with, and of n-grams to compare with.

Values
------
``language_loss``, ``block_losses``, ``ngram_bits``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_analysis.study import windows


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it: a loss to train on.

    ``-mean_{b, t>=2} log p(ids[b, t] | ids[b, :t])``. Differentiable; the model is used in the mode it is in.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(input_ids=ids)``, gives an object with ``logits`` (n, length, vocab).
    ids : Tensor, shape (n, length), int64
        At least two tokens long.

    Returns
    -------
    Tensor, shape ()
        Nats per token.

    Raises
    ------
    ValueError
        If ``ids`` is no matrix of at least two columns.
    """
    return _token_losses(model, ids).mean()


def block_losses(model: nn.Module, blocks: Tensor, *, batch_size: int = 64) -> Tensor:
    """Mean cross-entropy of every block by itself, in eval mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        As for ``language_loss``.
    blocks : Tensor, shape (n, length), int64
    batch_size : int
        Blocks computed at once.

    Returns
    -------
    Tensor, shape (n,), float64
        Nats per token, over the length - 1 tokens of a block that have one before them.

    Raises
    ------
    ValueError
        If there are no blocks, they are shorter than two tokens, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            parts = [_token_losses(model, part.to(device)).double().mean(1) for part in torch.split(blocks, batch_size)]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts)


def _token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every token but the first, shape (n, length - 1)."""
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        raise ValueError(f"ids: expected shape (n, length) with n ≥ 1 and length ≥ 2, got {tuple(ids.shape)}.")
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


def ngram_bits(train: bytes, blocks: Tensor, *, n: int) -> float:
    """Bits per byte of a unigram (n = 1) or bigram (n = 2) model: what a language model must beat.

    ``p1(b) = (count(b) + 1) / (N + 256)`` and ``p2(b | a) = (count(ab) + p1(b)) / (count(a) + 1)``, counted on
    ``train`` and measured on the bytes of ``blocks`` that ``block_losses`` measures: all but a block's first.

    Parameters
    ----------
    train : bytes
    blocks : Tensor, shape (m, length), int64
    n : int
        1 or 2.

    Returns
    -------
    float
        Bits per byte, in [0, ∞).

    Raises
    ------
    ValueError
        If ``n`` is neither 1 nor 2.

    Examples
    --------
    >>> round(ngram_bits(b"", torch.tensor([[1, 2, 3]]), n=1), 6)
    8.0
    """
    if n not in (1, 2):
        raise ValueError(f"n: expected 1 (unigram) or 2 (bigram), got {n}.")
    ids = windows.blocks(train, len(train))[0] if train else torch.empty(0, dtype=torch.long)
    p = (torch.bincount(ids, minlength=256).double() + 1) / (len(ids) + 256)
    if n == 1:
        return float(-p[blocks[:, 1:]].log2().mean())
    pairs = torch.bincount(256 * ids[:-1] + ids[1:], minlength=256**2).reshape(256, 256).double()
    conditional = (pairs + p) / (pairs.sum(1, keepdim=True) + 1)
    return float(-conditional[blocks[:, :-1], blocks[:, 1:]].log2().mean())
