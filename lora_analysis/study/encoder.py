"""Any transformers encoder as a sentence model, from a directory or a hub.

Values
------
``load_encoder``, ``without_dropout``, ``encoder_weights``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lora_analysis.errors import BaseWeightsError
from lora_analysis.study.minilm import SentenceModel


def load_encoder(source: str) -> SentenceModel:
    """A pretrained encoder with its fast tokenizer, frozen and without dropout.

    Parameters
    ----------
    source : str
        A directory that ``save_pretrained`` wrote, or a hub id; only then is a network used.

    Returns
    -------
    SentenceModel

    Raises
    ------
    ImportError
        If transformers is not installed.
    BaseWeightsError
        If there is no such model, or its tokenizer is not a fast one.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{source}: expected transformers, found none. Install it with pip install 'lora-analysis[study]'."
        ) from error
    try:
        config = without_dropout(AutoConfig.from_pretrained(source))
        model: nn.Module = AutoModel.from_pretrained(source, config=config)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BaseWeightsError(f"{source}: expected a transformers model with its tokenizer, got: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BaseWeightsError(f"{source}: expected a fast tokenizer, got {type(tokenizer).__name__}.")
    backend.no_truncation()
    backend.no_padding()
    return SentenceModel(model.requires_grad_(False).eval(), backend)


def without_dropout(config: Any) -> Any:
    """A transformers configuration with no dropout of any name, in place: it would draw from the global random state.

    Models call it ``hidden_dropout_prob``, ``resid_pdrop``, ``dropout``, ``dropout_rate``, ``layerdrop`` and more.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def encoder_weights(source: str) -> Path:
    """Where the weights of a model are on this machine: the directory itself, or the hub's copy of it.

    Raises
    ------
    BaseWeightsError
        If it is not here.
    """
    directory = Path(source)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise BaseWeightsError(f"{source}: expected a directory, or a model that was loaded from the hub.") from error
