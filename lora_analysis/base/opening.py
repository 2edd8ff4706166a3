"""``load_base``: from whatever a base may lie in to ``BaseWeights``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.base.composite import Components
from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.base.names import plain_name
from lora_analysis.base.weights import BaseWeights
from lora_analysis.checkpoint import Checkpoint, GGUFFile, StateDict, open_checkpoint
from lora_analysis.checkpoint.folders import Folder, LocalFolder, RemoteFolder, confined, open_remote
from lora_analysis.checkpoint.hub import HubPlace, is_file_name, located, not_found, online
from lora_analysis.checkpoint.remote import shown
from lora_analysis.checkpoint.remote_failures import NotThere, offline
from lora_analysis.errors import BaseWeightsError, CheckpointError

FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
"""What the weights of a model are called, in the order in which they are looked for."""

_PIPELINE = "model_index.json"
_COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
)
_NO_WEIGHTS = re.compile(r"_|scheduler|tokenizer|feature_extractor|processor")


def load_base(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> BaseWeights:
    """The weights of a base model, lazily.

    Parameters
    ----------
    source : path, hub id, URL, nn.Module or mapping
        A ``.safetensors``, ``.bin``, ``.pt``, ``.pth`` or ``.gguf`` file; an ``*.index.json`` of shards; a directory
        with one of these, or a diffusers pipeline, whose names begin with the component's (``unet.…``); the same
        at a URL (``https://``, ``s3://``, ``gs://``, …) or in a repository of the Hugging Face hub (``org/name``),
        of which only safetensors are read, by byte range; a live model, also one that carries LoRA layers; or a
        state dict. Weights that bitsandbytes or GGUF quantised are dequantised one by one.
    device : str or torch.device
        Where matrices are put.
    revision : str, optional
        Branch, tag or commit of a repository of the hub.

    Returns
    -------
    BaseWeights

    Raises
    ------
    BaseWeightsError
        If there are no weights at ``source`` or they cannot be read.

    Examples
    --------
    >>> from lora_analysis.adapter import Target
    >>> base = load_base({"lin.weight": torch.ones(2, 3)})
    >>> base.matrix(Target("lin.weight")).shape
    torch.Size([2, 3])
    """
    place = torch.device(device)
    if isinstance(source, nn.Module):
        return _of_a_module(source, place, revision)
    if isinstance(source, Mapping):
        _require_none(revision)
        reopen = partial(_reopened, source, place, None)
        return BaseWeights(StateDict(source), source="state dict", reopen=reopen, device=place)
    named = source if isinstance(source, str) else Path(source)
    found = located(named, revision)
    try:
        checkpoint = _checkpoint(found)
    except CheckpointError as error:
        raise BaseWeightsError(str(error)) from error
    stored = None
    if isinstance(checkpoint, GGUFFile):
        checkpoint = GGUFWeights(checkpoint)
        # The converter to GGUF turns what a model stores as (d_in, d_out); embeddings remain (tokens, dim).
        stored = {name: False for name in checkpoint if name.startswith("blk.")}
    return BaseWeights(
        checkpoint,
        source=shown(found) if isinstance(found, str) else str(found),
        reopen=partial(_reopened, found if isinstance(found, Path) else named, place, revision),
        device=place,
        stored=stored,
    )


def _reopened(source: Any, device: torch.device, revision: str | None) -> tuple[Any, ...]:
    return _load, (source, device, revision)


def _load(source: Any, device: torch.device, revision: str | None) -> BaseWeights:
    return load_base(source, device=device, revision=revision)


def _require_none(revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"revision: expected None for what is no repository of the hub, got {revision!r}.")


def _checkpoint(place: Path | HubPlace | str) -> Checkpoint:
    if isinstance(place, HubPlace):
        cached = place.cached(("",) if is_file_name(place.inner) else FILES if online() else (*FILES, _PIPELINE))
        if cached is not None:
            try:
                return (
                    open_checkpoint(cached) if is_file_name(place.inner) else _of_a_folder(LocalFolder(cached.parent))
                )
            except CheckpointError:
                # The cache may hold an index without its shards: those are read from the hub.
                if not online():
                    raise
        if not online():
            raise offline(str(place))
        try:
            return _remote(place.url)
        except NotThere as error:
            raise not_found(str(place)) from error
    if isinstance(place, str):
        return _remote(place)
    if place.is_file():
        return open_checkpoint(place)
    if not place.is_dir():
        raise BaseWeightsError(f"{place}: no such file or directory.")
    return _of_a_folder(LocalFolder(place))


def _remote(url: str) -> Checkpoint:
    return open_remote(url) if is_file_name(url) else _of_a_folder(RemoteFolder(url))


def _of_a_folder(folder: Folder) -> Checkpoint:
    """The weights of a folder: those of a model, or of a pipeline's components."""
    if folder.has(_PIPELINE):
        index = folder.json(_PIPELINE)
        names = [name for name, value in index.items() if isinstance(value, list) and not _NO_WEIGHTS.match(name)]
        if components := _components(folder, names):
            return components
    if name := _weights(folder):
        return folder.open(name)
    listed = folder.names()
    alone = listed is not None and not any(name.endswith(".safetensors") for name in listed)
    if alone and (components := _components(folder, _COMPONENTS)):
        return components
    found = len([name for name in listed or () if name.endswith((".safetensors", ".gguf"))])
    raise BaseWeightsError(
        f"{folder}: expected model weights ({', '.join(FILES[:4])}, or a single .safetensors file), "
        f"found {found or 'none'}."
    )


def _weights(folder: Folder) -> str | None:
    """The file of a folder that holds its weights, or their index; the only one, if it has another name."""
    listed = folder.names()
    if found := next((name for name in FILES if (folder.has(name) if listed is None else name in listed)), None):
        return found
    for kind in (r"\.safetensors\.index(\.[\w-]+)?\.json", r"\.safetensors", r"\.gguf"):
        candidates = [name for name in listed or () if re.search(rf"{kind}\Z", name)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            return None
    return None


def _components(folder: Folder, names: Iterable[str]) -> Components | None:
    """The components of a pipeline that have weights."""
    found = {}
    for name in confined(names):
        inner = folder.folder(name)
        try:
            weights = _weights(inner)
        except NotThere:
            continue
        if weights is not None:
            found[name] = inner.open(weights)
    return Components(found) if found else None


def _of_a_module(model: nn.Module, device: torch.device, revision: str | None) -> BaseWeights:
    _require_none(revision)
    if merged := [name for name, module in model.named_modules() if _is_merged(module)]:
        raise BaseWeightsError(
            f"{type(model).__name__}: expected the base's weights, got a model with merged updates (first: "
            f"{merged[0]!r}). Unmerge it; loralib merges in eval(), so call train() first."
        )
    return BaseWeights(
        StateDict(model.state_dict()),
        source=type(model).__name__,
        reopen=partial(_reopened, model, device, None),
        device=device,
        stored=_stored_transposed(model),
    )


def _is_merged(module: nn.Module) -> bool:
    """Whether a LoRA layer, ours or loralib's or PEFT's, has folded its update into its weight."""
    return hasattr(module, "lora_A") and bool(getattr(module, "merged", False))


def _stored_transposed(model: nn.Module) -> dict[str, bool]:
    """How a live model stores its weights, by the types of its modules."""
    return {
        # transformers' Conv1D is recognised by name, so that transformers need not be imported; a LoRA
        # layer that holds its weight itself says so by loralib's flag.
        plain_name(f"{name}.weight"): type(module).__name__ == "Conv1D" or getattr(module, "fan_in_fan_out", False)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding)
    }
