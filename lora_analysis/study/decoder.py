"""A small decoder-only language model of our own: bytes in, bytes out, pretrained once on code.

Conventions
-----------
A token is a byte, so that a loss in nats divided by log 2 is in bits per byte. The model is transformers'
Llama with everything small: 3 layers, d = 256, 4 heads with keys and values of their own, a gated MLP of 688
(three matrices of 688 have the parameters of the usual two of 1,024), a context of 128, float32. ``q_proj``,
``k_proj``, ``v_proj`` and ``o_proj`` are the paper's Wq, Wk, Wv and Wo. Embedding and output matrix are not
tied, so every matrix has one name. d = 256 is the least at which an r of 64 says anything: φ(1, 64) of random
subspaces is 0.25 already.

What is pretrained is kept in a cache, named after everything it depends on, checked by sha256 when read, and
made again where it is damaged. Its ``model.safetensors`` is a base that ``load_base`` reads, its folder a model
that transformers' ``from_pretrained`` reads.

Values
------
``Decoder`` with its ``Pretraining`` record; ``pretrained_decoder``, ``decoder_of``, ``initial_decoder``,
``cache_directory``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_analysis.study import corpora, windows
from lora_analysis.study.language_losses import block_losses, language_loss, ngram_bits
from lora_analysis.training.loop import train

CONTEXT = 128
"""Bytes of a training window."""

STEPS = 1_000
"""Of pretraining by default: 1,000 steps of 8 windows of 128 bytes are a million bytes."""

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    # No byte is special, and none is ever padding.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""The configuration of transformers' ``LlamaConfig``."""

RECIPE: dict[str, Any] = {"batch_size": 8, "lr": 2e-3, "warmup": 100, "weight_decay": 0.1, "max_grad_norm": 1.0}
"""Of pretraining: AdamW, on a cosine after warmup."""


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What was done to the weights and what came of it; bits per byte are those of the held-out blocks.

    Parameters
    ----------
    bits_per_byte, unigram_bits, bigram_bits : float
        Of the model and of byte statistics of the train side, on the same bytes.
    losses : tuple of float
        At each step, in nats per byte.
    seconds, threads : float, int
        Wall time of the training steps, and on how many threads.
    tokens : int
        Bytes trained on, repeated ones counted again.
    corpus, corpus_sha256, python : str
        Name and digest of the corpus, and the Python whose library it is.
    sha256 : str
        Of ``model.safetensors``.
    """

    steps: int
    seed: int
    tokens: int
    seconds: float
    threads: int
    losses: tuple[float, ...]
    bits_per_byte: float
    unigram_bits: float
    bigram_bits: float
    corpus: str
    corpus_sha256: str
    python: str
    torch: str
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """A pretrained model, where its weights are, and how they came about.

    Parameters
    ----------
    model : nn.Module
        A transformers ``LlamaForCausalLM``, frozen, in eval mode, float32.
    path : Path
        Its ``model.safetensors``.
    pretraining : Pretraining
    """

    model: nn.Module
    path: Path
    pretraining: Pretraining


def pretrained_decoder(
    *,
    cache: Path | None = None,
    corpus: corpora.Corpus | None = None,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Decoder:
    """The small decoder, pretrained on code, from the cache if it is there.

    Parameters
    ----------
    cache : Path, optional
        Folder of the cache; ``cache_directory()`` by default.
    corpus : Corpus, optional
        What to pretrain on; ``corpora.code()`` by default.
    steps : int
        The default takes some three minutes on two cores.
    seed : int
        Of the initial weights and of the order of the training windows.
    progress : bool
        Show a bar on stderr while training.

    Returns
    -------
    Decoder
        A model of its own at each call: the caller may adapt it.

    Raises
    ------
    ImportError
        If transformers is not installed.
    ValueError
        If ``steps`` is below 1, or Python's library is without its source files.
    """
    _transformers()  # before minutes of work
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    corpus = corpora.code() if corpus is None else corpus
    parts = {"shape": SHAPE, "recipe": RECIPE, "corpus": corpus.digest, "steps": steps, "seed": seed}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = (cache_directory() if cache is None else cache) / f"decoder-{key}"
    if (cached := _cached(folder)) is not None:
        return cached
    model, record = _pretrain(corpus, steps, seed, progress)
    _store(model, record, folder)
    made = _cached(folder)
    if made is None:
        raise OSError(f"{folder}: expected to read the model just written there, got something else.")
    return made


def decoder_of(steps: int | None, train_bytes: int | None) -> Decoder:
    """The pretrained decoder, or a weaker one of fewer steps on less code, to try things with."""
    corpus = None if train_bytes is None else corpora.code(train_bytes=train_bytes, held_out_bytes=_FEW_BYTES)
    return pretrained_decoder(corpus=corpus, steps=STEPS if steps is None else steps)


_FEW_BYTES = 16_384


def initial_decoder(seed: int = 0) -> nn.Module:
    """The small decoder with random weights, in train mode; the global random state is not touched.

    Raises
    ------
    ImportError
        If transformers is not installed.
    """
    transformers = _transformers()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # sdpa and eager train equally fast on a CPU at this size; sdpa needs less memory.
        config = transformers.LlamaConfig(**SHAPE, attn_implementation="sdpa")
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.float().train()


def cache_directory() -> Path:
    """Where pretrained models are kept: ``$LORA_ANALYSIS_CACHE``, or the platform's place for caches."""
    if chosen := os.environ.get("LORA_ANALYSIS_CACHE"):
        return Path(chosen)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "lora_analysis" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lora_analysis"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_analysis"


def _pretrain(corpus: corpora.Corpus, steps: int, seed: int, progress: bool) -> tuple[nn.Module, dict[str, Any]]:
    model = initial_decoder(seed)
    batches: Iterable[Tensor] = windows.windows(corpus, length=CONTEXT, batch_size=RECIPE["batch_size"], seed=seed)
    started = time.perf_counter()
    losses = train(
        model,
        batches,
        language_loss,
        steps=steps,
        lr=RECIPE["lr"],
        weight_decay=RECIPE["weight_decay"],
        max_grad_norm=RECIPE["max_grad_norm"],
        schedule="cosine",
        warmup=min(RECIPE["warmup"], steps // 5),
        progress=progress,
    )
    seconds = time.perf_counter() - started
    held_out, _ = windows.held_out_blocks(corpus, CONTEXT)
    return model, {
        "steps": steps,
        "seed": seed,
        "tokens": steps * RECIPE["batch_size"] * CONTEXT,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "losses": losses,
        "bits_per_byte": block_losses(model, held_out).mean().item() / math.log(2),
        "unigram_bits": ngram_bits(corpus.train, held_out, n=1),
        "bigram_bits": ngram_bits(corpus.train, held_out, n=2),
        "corpus": corpus.name,
        "corpus_sha256": corpus.digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _store(model: Any, record: dict[str, Any], folder: Path) -> None:
    """Write a whole folder beside its place, then move it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (new / "model.safetensors").write_bytes(data)
        model.config.to_json_file(new / "config.json")
        record = asdict(Pretraining(**record, sha256=hashlib.sha256(data).hexdigest()))
        (new / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # damaged, or another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        try:
            new.replace(folder)
        except OSError:
            if _cached(folder) is None:
                raise


def _cached(folder: Path) -> Decoder | None:
    """The model of a folder, or None where there is none, or not all of it as it was written."""
    path = folder / "model.safetensors"
    try:
        record = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
        pretraining = Pretraining(**{**record, "losses": tuple(record["losses"])})
        data = path.read_bytes()
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if hashlib.sha256(data).hexdigest() != pretraining.sha256:
        return None
    model = initial_decoder()
    model.load_state_dict(safetensors.torch.load(data))
    return Decoder(model.requires_grad_(False).eval(), path, pretraining)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'{error}. Install it with pip install "lora-analysis[study]".') from error
    return transformers
