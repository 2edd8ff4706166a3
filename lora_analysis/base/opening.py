"""``load_base``: from whatever a base may lie in to ``BaseWeights``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.base.architecture import Architecture, of_config, of_gguf
from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.base.names import plain_name
from lora_analysis.base.sources import weights_at
from lora_analysis.base.weights import BaseWeights
from lora_analysis.checkpoint import StateDict
from lora_analysis.checkpoint.folders import Folder
from lora_analysis.checkpoint.hub import located
from lora_analysis.checkpoint.remote import shown
from lora_analysis.errors import BaseWeightsError, CheckpointError

_CONFIG = "config.json"


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
        with a model's weights under the names that transformers and diffusers have for them, or with one
        ``.safetensors`` or ``.gguf`` file; a diffusers pipeline, whose names begin with the component's (``unet.…``);
        the same at a URL (``https://``, ``s3://``, ``gs://``, …) or in a repository of the Hugging Face hub
        (``org/name``), of which only safetensors are read, by byte range; a live model, also one that carries LoRA
        layers; or a state dict. Weights that bitsandbytes or GGUF quantised are dequantised one by one.
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
    TypeError, ValueError
        If ``source`` is none of these, or there is a revision of what has none.

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
        return _of_a_mapping(source, place, revision)
    return _of_a_place(source if isinstance(source, str) else Path(source), place, revision, None)


def _of_a_place(source: str | Path, device: torch.device, revision: str | None, shown_as: str | None) -> BaseWeights:
    """The weights at a path, a hub id or a URL, called so in messages and tables."""
    try:
        found = located(source, revision)
        checkpoint, beside = weights_at(found)
    except CheckpointError as error:
        raise BaseWeightsError(str(error)) from error
    stored = None
    architecture = partial(_configured, beside)
    if isinstance(checkpoint, GGUFWeights):
        # The converter to GGUF turns what a model stores as (d_in, d_out); embeddings remain (tokens, dim).
        stored = {name: False for name in checkpoint if name.startswith("blk.")}
        architecture = partial(of_gguf, checkpoint.fields)
    name = shown_as or (shown(found) if isinstance(found, str) else str(found))
    # A process that opens it again may be in another folder.
    again = found.absolute() if isinstance(found, Path) else source
    return BaseWeights(
        checkpoint,
        source=name,
        reopen=lambda: (_of_a_place, (again, device, revision, name)),
        device=device,
        stored=stored,
        architecture=architecture,
    )


def _of_a_mapping(source: Mapping[str, Tensor], device: torch.device, revision: str | None) -> BaseWeights:
    _require_none(revision)
    return BaseWeights(
        StateDict(_tensors(source)),
        source="state dict",
        reopen=lambda: (_of_a_mapping, (source, device, None)),
        device=device,
    )


def _require_none(revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"revision: expected None for what is no repository of the hub, got {revision!r}.")


def _tensors(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, in which modules may keep what they please under one name."""
    tensors = {}
    for name, tensor in source.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            tensors[name] = tensor
        elif not str(name).endswith("_extra_state"):
            raise TypeError(
                f"source: expected a mapping of names to tensors, got {type(tensor).__name__} under {str(name)[:60]!r}."
            )
    return tensors


def _configured(beside: Folder) -> Architecture:
    """What the configuration in a folder says, if there is one."""
    return of_config(beside.json(_CONFIG)) if beside.has(_CONFIG) else Architecture()


def _of_a_module(model: nn.Module, device: torch.device, revision: str | None) -> BaseWeights:
    _require_none(revision)
    if merged := [name for name, module in model.named_modules() if _is_merged(module)]:
        raise BaseWeightsError(
            f"{type(model).__name__}: expected the base's weights, got a model with merged updates (first: "
            f"{merged[0]!r}). Unmerge it; loralib merges in eval(), so call train() first."
        )
    return BaseWeights(
        StateDict(_tensors(model.state_dict())),
        source=type(model).__name__,
        reopen=lambda: (_of_a_module, (model, device, None)),
        device=device,
        stored=_stored_transposed(model),
        architecture=partial(_of_a_live_model, model),
    )


def _of_a_live_model(model: nn.Module) -> Architecture:
    """What the configuration says that models of transformers carry."""
    config = getattr(model, "config", None)
    described = getattr(config, "to_dict", lambda: config)()
    return of_config(described) if isinstance(described, Mapping) else Architecture()


def _is_merged(module: nn.Module) -> bool:
    """Whether a LoRA layer, ours or loralib's or PEFT's, has folded its update into its weight."""
    holds = hasattr(module, "lora_A") or isinstance(getattr(module, "adapters", None), nn.ModuleDict)
    return holds and bool(getattr(module, "merged", False))


def _stored_transposed(model: nn.Module) -> dict[str, bool]:
    """How a live model stores its weights, by the types of its modules."""
    return {
        # transformers' Conv1D is recognised by name, so that transformers need not be imported; a LoRA
        # layer that holds its weight itself says so by loralib's flag.
        plain_name(f"{name}.weight"): type(module).__name__ == "Conv1D" or getattr(module, "fan_in_fan_out", False)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        # A wrapper only passes on the weight of the layer in it, which says for itself.
        and not (isinstance(module, nn.Embedding) or isinstance(getattr(module, "base_layer", None), nn.Module))
    }
