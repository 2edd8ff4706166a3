"""Embeddings and heads of a vocabulary that was resized after or before the adapter was trained.

Conventions
-----------
Such weights are stored as (vocabulary, dim), one row per token, and a vocabulary grows and shrinks at its end (new
special tokens, padding to a multiple of 64). So row i of the base is token i of the adapter: of a longer base the
first rows are taken; tokens that the base lacks get rows of zeros, for the base has no weights of theirs. Both are
noted in ``BaseWeights.notes``.
"""

from __future__ import annotations

from torch import Tensor

NAMES = {"embed_tokens", "embed_in", "embed_out", "lm_head", "output", "shared", "tok_embeddings", "token_embd"}
NAMES |= {"word_embeddings", "wte", "decoder"}
"""The last names of embeddings and of the heads over them."""


def is_vocabulary(tensor: str) -> bool:
    """Whether a tensor is an embedding or a head, by its name.

    Examples
    --------
    >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("encoder.layer.0.output.dense.weight")
    (True, False)
    """
    return tensor.removesuffix(".weight").split(".")[-1] in NAMES


def vocabulary_axis(stored: tuple[int, ...], shape: tuple[int, int], transposed: bool) -> int | None:
    """The axis of an update that runs over tokens, where its other axis has the size that the base has.

    Parameters
    ----------
    stored : tuple of int
        (vocabulary, dim) of the base.
    shape : (int, int)
        Of the update: (dim, vocabulary) of an embedding, (vocabulary, dim) of a head.
    transposed : bool
        Whether the adapter takes the weight for one stored as (d_in, d_out), which decides where both fit.

    Returns
    -------
    int or None
        None where neither fits.
    """
    fitting = [axis for axis in (0, 1) if len(stored) == 2 and shape[1 - axis] == stored[1]]
    return fitting[0] if len(fitting) == 1 else int(transposed) if fitting else None


def matched_rows(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of (vocabulary, dim), with rows of zeros for tokens that are not there."""
    if count <= rows.shape[0]:
        return rows[:count]
    filled = rows.new_zeros((count, rows.shape[1]))
    filled[: rows.shape[0]] = rows
    return filled
