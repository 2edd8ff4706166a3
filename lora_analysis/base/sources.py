"""Where the weights of a base are: one file, a folder's, a pipeline's components', in the hub's cache or remote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_analysis.base.composite import Components
from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.checkpoint import Checkpoint, GGUFFile, open_checkpoint
from lora_analysis.checkpoint.diagnosis import exists, is_file
from lora_analysis.checkpoint.folders import Folder, LocalFolder, RemoteFolder, confined, open_remote
from lora_analysis.checkpoint.hub import HubPlace, is_file_name, not_found, online
from lora_analysis.checkpoint.remote import RemotePlace
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
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.|adapters\.|[0-9]+_adapters\.")
"""What adapters' files are called, in PEFT and MLX."""
_NO_WEIGHTS = re.compile(r"_|scheduler|tokenizer|feature_extractor|processor")


def weights_at(place: Path | HubPlace | str) -> tuple[Checkpoint, Folder]:
    """The weights at a place, and the folder that may hold their configuration."""
    if isinstance(place, HubPlace):
        return _of_the_hub(place)
    if isinstance(place, str):
        return _remote(place)
    return _local(place)


def _of_the_hub(place: HubPlace) -> tuple[Checkpoint, Folder]:
    """What the local cache holds of a repository, or the repository itself."""
    cached = place.snapshot()
    if cached is not None and (not online() or is_file(cached) or _weights_of_a_model(LocalFolder(cached))):
        try:
            return _local(cached)
        except CheckpointError:
            # The cache may hold an index without its shards: those are read from the hub.
            if not online():
                raise
    if not online():
        raise offline(str(place))
    try:
        return _remote(place.listed().url)
    except NotThere as error:
        raise not_found(str(place)) from error


def _remote(url: str) -> tuple[Checkpoint, Folder]:
    if not is_file_name(url):
        folder = RemoteFolder(url)
        return _of_a_folder(folder), folder
    place = RemotePlace(url)
    return open_remote(place), RemoteFolder(place.parent())


def _local(path: Path) -> tuple[Checkpoint, Folder]:
    if is_file(path):
        checkpoint = open_checkpoint(path)
        return _of_gguf(checkpoint) if isinstance(checkpoint, GGUFFile) else checkpoint, LocalFolder(path.parent)
    if not exists(path) or not path.is_dir():
        raise BaseWeightsError(f"{path}: no such file or directory.")
    folder = LocalFolder(path)
    return _of_a_folder(folder), folder


def _of_gguf(file: GGUFFile) -> GGUFWeights:
    parts = file.fields.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise BaseWeightsError(
            f"{file.path}: expected a whole model, got one of its {parts} parts. Put them together with llama.cpp's "
            "llama-gguf-split --merge."
        )
    return GGUFWeights(file)


def _of_a_folder(folder: Folder) -> Checkpoint:
    """The weights of a folder: those of a model, or of a pipeline's components."""
    if folder.has(_PIPELINE):
        index = folder.json(_PIPELINE)
        names = [name for name, value in index.items() if isinstance(value, list) and not _NO_WEIGHTS.match(name)]
        if components := _components(folder, names):
            return components
    if name := _weights(folder):
        return _open(folder, name)
    listed = folder.names()
    alone = listed is not None and not any(name.endswith(".safetensors") for name in listed)
    if alone and (components := _components(folder, _COMPONENTS)):
        return components
    others = [name for name in _not_of_adapters(listed) if name.endswith((".safetensors", ".gguf"))]
    found = f"{len(others)} ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})" if others else "none"
    adapter = ", but an adapter" if any(map(_ADAPTER.match, listed or ())) else ""
    raise BaseWeightsError(
        f"{folder}: expected model weights ({', '.join(FILES[:4])}, or a single .safetensors or .gguf file), found "
        f"{found}{adapter}."
    )


def _not_of_adapters(names: tuple[str, ...] | None) -> list[str]:
    return [name for name in names or () if not _ADAPTER.match(name)]


def _weights(folder: Folder) -> str | None:
    """The file of a folder that holds its weights, or their index; the only one, if it has another name."""
    if found := _weights_of_a_model(folder):
        return found
    listed = _not_of_adapters(folder.names())
    for kind in (r"\.safetensors\.index(\.[\w-]+)?\.json", r"\.safetensors", r"\.gguf"):
        candidates = [name for name in listed if re.search(rf"{kind}\Z", name)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            return None
    return None


def _weights_of_a_model(folder: Folder) -> str | None:
    """The file of a folder that has one of the names of a model's weights."""
    listed = folder.names()
    return next((name for name in FILES if (folder.has(name) if listed is None else name in listed)), None)


def _open(folder: Folder, name: str) -> Checkpoint:
    checkpoint = folder.open(name)
    return _of_gguf(checkpoint) if isinstance(checkpoint, GGUFFile) else checkpoint


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
            found[name] = _open(inner, weights)
    return Components(found) if found else None
