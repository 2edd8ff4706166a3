"""Where a source is: a path, a URL, or a repository of the Hugging Face hub.

Conventions
-----------
A path that exists wins. Otherwise a string like ``org/name`` (or a bare ``name``) that does not look like a file is a
hub id; only then, and for URLs, is a network used. What the hub's local cache holds is read from there.
Repositories are written ``hf://org/name@revision/folder/file`` as URLs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import quote, unquote

from lora_analysis.checkpoint.diagnosis import TORCH_SUFFIXES
from lora_analysis.checkpoint.remote import is_url
from lora_analysis.checkpoint.remote_failures import NotThere, explained
from lora_analysis.errors import CheckpointError

FILE_SUFFIXES = {".safetensors", ".json", ".gguf", ".npz", *TORCH_SUFFIXES}
"""What the names of files of tensors, and of indices of them, end in."""

_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LONGEST_ID = 96
_URL = re.compile(r"hf://(?:models/)?(?P<id>[^/@]+/[^/@]+|[^/@]+(?=@|\Z))(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.*))?")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repository, or a folder or file in it.

    Parameters
    ----------
    repository : str
        ``org/name``.
    revision : str, optional
        Branch, tag or commit.
    inner : str
        Path inside; ``""`` for the repository itself.
    """

    repository: str
    revision: str | None = None
    inner: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f"/{self.inner}" if self.inner else "")

    @property
    def url(self) -> str:
        """The URL that ``fsspec`` reads.

        Raises
        ------
        CheckpointError
            If a bare name is none of the hub's.
        """
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self._full_id()}{revision}" + (f"/{self.inner}" if self.inner else "")

    def cached(self, names: Sequence[str]) -> Path | None:
        """The first of these files of its folder that the local cache holds."""
        from huggingface_hub import try_to_load_from_cache

        for name in names:
            file = str(PurePosixPath(self.inner) / name)
            found = asked(str(self), partial(try_to_load_from_cache, self.repository, file, revision=self.revision))
            if isinstance(found, str):
                return Path(found)
        return None

    def files(self) -> list[str]:
        """The files of its repository, asked of the hub."""
        from huggingface_hub import HfApi

        return asked(str(self), lambda: HfApi().list_repo_files(self.repository, revision=self.revision))

    def downloaded(self, file: str) -> Path:
        """One file of its repository in the local cache, fetched if it is not there."""
        from huggingface_hub import hf_hub_download

        return Path(asked(str(self), lambda: hf_hub_download(self.repository, file, revision=self.revision)))

    def _full_id(self) -> str:
        if "/" in self.repository:
            return self.repository
        from huggingface_hub import HfApi

        # "gpt2" is an old name of "openai-community/gpt2", and such names are no longer part of URLs.
        return str(asked(str(self), lambda: HfApi().model_info(self.repository, revision=self.revision)).id)


def located(source: str | os.PathLike[str], revision: str | None = None) -> Path | HubPlace | str:
    """Where a source is: a path, a place on the hub, or another URL.

    Parameters
    ----------
    source : str or path
    revision : str, optional
        Of a repository of the hub.

    Raises
    ------
    ValueError
        If there is a revision and the source is no repository.

    Examples
    --------
    >>> located("org/name", "v2")
    HubPlace(repository='org/name', revision='v2', inner='')
    >>> located("hf://org/name@refs%2Fpr%2F3/unet").revision
    'refs/pr/3'
    >>> located("s3://bucket/model.safetensors")
    's3://bucket/model.safetensors'
    """
    place = _place(source, revision)
    if revision is not None and not isinstance(place, HubPlace):
        raise ValueError(f"revision: expected None for what is no repository of the hub, got {revision!r}.")
    return place


def _place(source: str | os.PathLike[str], revision: str | None) -> Path | HubPlace | str:
    if not isinstance(source, str):
        return Path(source)
    if found := _URL.fullmatch(source):
        written = unquote(found["revision"]) if found["revision"] else None
        if written and revision and written != revision:
            raise ValueError(f"revision: expected the one in {source!r}, got {revision!r}.")
        return HubPlace(found["id"], written or revision, (found["inner"] or "").strip("/"))
    if source.startswith("file://"):
        return Path(unquote(source.removeprefix("file://")))
    if is_url(source):
        return source
    path = Path(source)
    try:
        there = path.exists()
    except OSError:  # a name too long to be one
        there = False
    looks_like_a_file = path.suffix in FILE_SUFFIXES or len(source) > _LONGEST_ID
    return path if there or looks_like_a_file or not _ID.fullmatch(source) else HubPlace(source, revision)


def asked(where: str, request: Callable[[], Result]) -> Result:
    """What the hub's library answers.

    Raises
    ------
    CheckpointError
        With the reason in one line.
    """
    try:
        return request()
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # The library raises its own exceptions, those of whichever client it uses, and ValueError for odd names.
        found = explained(where, error)
        raise (not_found(where) if isinstance(found, NotThere) else found) from error


def not_found(where: str) -> NotThere:
    """What to say of a source that is neither a path nor a repository that may be read."""
    return NotThere(
        f"{where}: no such path here, and no such repository, revision or file on the hub, or one that is private or "
        "gated: log in with 'hf auth login' or a token in HF_TOKEN, and accept its licence."
    )


def is_file_name(source: str) -> bool:
    """Whether a URL or path ends in the name of a file of tensors or an index, rather than of a folder.

    Examples
    --------
    >>> is_file_name("https://host/model.safetensors?token=1"), is_file_name("hf://org/model-7b-v1.5")
    (True, False)
    """
    return PurePosixPath(source.partition("?")[0]).suffix in FILE_SUFFIXES


def online() -> bool:
    """Whether the hub's library may use the network: not with ``HF_HUB_OFFLINE=1``."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE
