"""Adapters at URLs, read by byte range, and in repositories of the hub, whose files are fetched into its local cache.

Conventions
-----------
A repository is listed before anything is fetched, and only the adapter's own files are: a repository of a whole model
is refused by name. At any other URL safetensors are read as the numbers are asked for, each time anew; for repeated
work download them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lora_analysis.base.sources import FILES
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.checkpoint.diagnosis import is_file
from lora_analysis.checkpoint.folders import RemoteFolder, open_remote
from lora_analysis.checkpoint.hub import HubPlace, is_file_name, not_found, online
from lora_analysis.checkpoint.remote import RemotePlace
from lora_analysis.checkpoint.remote_failures import offline
from lora_analysis.errors import AdapterFormatError


def fetched(place: HubPlace, name: str | None, config: str, weights: Sequence[str], suffixes: Collection[str]) -> Path:
    """The local copy of an adapter on the hub: a file, or a folder with its files.

    Parameters
    ----------
    place : HubPlace
    name : str, optional
        Which adapter, where the repository holds several in folders.
    config, weights : str and sequence of str
        What its files are called.
    suffixes : collection of str
        What other files of tensors end in.

    Raises
    ------
    CheckpointError
        If the hub does not give them.
    AdapterFormatError
        If the repository holds no adapter, or several.
    """
    cached = place.snapshot()
    if not online():
        if cached is None:
            raise offline(str(place))
        return cached
    if is_file_name(place.inner):
        return _file(place, cached, config, weights)
    if cached is not None and any(
        is_file(folder / config) and any(is_file(folder / file) for file in weights)
        for folder in (cached, *([] if name is None else [cached / name]))
    ):
        return cached
    return _downloaded(place, name, config, weights, suffixes)


def _file(place: HubPlace, cached: Path | None, config: str, weights: Sequence[str]) -> Path:
    """The local copy of one file on the hub, with the configuration beside it if it is named as PEFT's."""
    wants_config = PurePosixPath(place.inner).name in weights
    if cached is not None and (not wants_config or is_file(cached.parent / config)):
        return cached
    files = place.listed().files
    if place.inner not in files:
        raise not_found(str(place))
    beside = str(PurePosixPath(place.inner).parent / config)
    if wants_config and beside in files:
        place.downloaded(beside)
    return place.downloaded(place.inner)


def _downloaded(
    place: HubPlace, name: str | None, config: str, weights: Sequence[str], suffixes: Collection[str]
) -> Path:
    files = place.listed().files
    root = PurePosixPath(place.inner)
    by_folder = name is not None and str(root / name / config) in files
    folder = root / name if by_folder and name is not None else root
    here = {path.name: file for file in files if (path := PurePosixPath(file)).parent == folder}
    chosen = next((here[file] for file in weights if file in here), None)
    if chosen is None:
        chosen = _only(place, here, [file for file in here if PurePosixPath(file).suffix in suffixes], files, config)
    local = place.downloaded(chosen)
    if config in here:
        place.downloaded(here[config])
    return local.parent.parent if by_folder else local.parent


def _only(place: HubPlace, here: dict[str, str], found: list[str], files: Collection[str], config: str) -> str:
    """The one file of tensors of a folder on the hub, which is no whole model."""
    if model := next((file for file in FILES if file in here), None):
        raise AdapterFormatError(
            f"{place}: expected an adapter, found a whole model ({model}). It is a base: pass it as one."
        )
    if len(found) == 1:
        return here[found[0]]
    inner = sorted(str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name == config)
    if inner and not found:
        raise AdapterFormatError(
            f"{place}: expected one adapter, found {len(inner)} in folders ({', '.join(inner[:4])}). Pass its name=."
        )
    names = f" ({', '.join(sorted(found)[:3])})" if found else ""
    raise AdapterFormatError(
        f"{place}: expected one file of tensors, found {len(found) or 'none'}{names}. "
        f"Pass one of them, as hf://{place.repository}/FILE."
    )


def opened(url: str, name: str | None, config: str, weights: Sequence[str]) -> tuple[Checkpoint, dict[str, Any], bool]:
    """An adapter at a URL: its tensors, its configuration, and whether ``name`` was that of a folder.

    Raises
    ------
    CheckpointError
        If it cannot be read by range.
    AdapterFormatError
        If there is no adapter.
    """
    if is_file_name(url):
        place = RemotePlace(url)
        folder = RemoteFolder(place.parent())
        file = PurePosixPath(url.partition("?")[0]).name
        beside = folder.json(config) if file in weights and folder.has(config) else {}
        return open_remote(url), beside, False
    folder = RemoteFolder(url)
    by_folder = name is not None and folder.folder(name).has(config)
    if by_folder and name is not None:
        folder = folder.folder(name)
    listed = folder.names()
    found = next((file for file in weights if (folder.has(file) if listed is None else file in listed)), None)
    if found is None:
        candidates = [file for file in listed or () if file.endswith(".safetensors")]
        if len(candidates) != 1:
            raise AdapterFormatError(
                f"{folder}: expected {weights[0]} or one .safetensors file, found {len(candidates) or 'none'}. "
                "Give the URL of the file."
            )
        found = candidates[0]
    return folder.open(found), folder.json(config) if folder.has(config) else {}, by_folder
