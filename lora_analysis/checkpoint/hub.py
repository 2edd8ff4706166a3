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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from lora_analysis.checkpoint.diagnosis import TORCH_SUFFIXES, exists, is_file
from lora_analysis.checkpoint.remote import is_url
from lora_analysis.checkpoint.remote_failures import NotThere, explained, unreachable
from lora_analysis.errors import CheckpointError

FILE_SUFFIXES = {".safetensors", ".json", ".gguf", ".npz", *TORCH_SUFFIXES}
"""What the names of files of tensors, and of indices of them, end in."""

_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LONGEST_ID = 96
_URL = re.compile(r"hf://(?:models/)?(?P<id>[^/@]+/[^/@]+|[^/@]+(?=@|\Z))(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.*))?")
_NO_MODELS = {"datasets", "spaces", "buckets", "kernels"}
"""What else the hub has under addresses of its own."""
_SECONDS = 10.0


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

    def snapshot(self) -> Path | None:
        """Where the local cache has it, a file or a folder of what was fetched so far; None if nothing was.

        References
        ----------
        The layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
        """
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"
        commit = self.revision or "main"
        if ".." in PurePosixPath(commit).parts:
            return None
        named = cache / "refs" / commit
        if is_file(named):
            commit = named.read_text(encoding="utf-8").strip()
        found = cache / "snapshots" / commit / self.inner
        return found if exists(found) else None

    def listed(self) -> Listing:
        """What the hub says of it, asked once and with a time limit.

        Raises
        ------
        CheckpointError
            If there is no such repository, or the hub cannot be asked.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            info = api.model_info(self.repository, revision=self.revision, timeout=_SECONDS)
        except MemoryError:
            raise
        except Exception as error:
            # huggingface_hub raises its own exceptions and those of whichever client it uses.
            raise unreachable(str(self), error) or _explained(str(self), error) from error
        # "gpt2" is an old name of "openai-community/gpt2", and such names are no longer part of URLs. The commit
        # stays the same for as long as the base is read.
        url = f"hf://{info.id}@{quote(str(info.sha or self.revision or 'main'), safe='')}"
        files = tuple(file.rfilename for file in info.siblings or ())
        return Listing(url + (f"/{self.inner}" if self.inner else ""), files)

    def downloaded(self, file: str) -> Path:
        """One file of its repository in the local cache, fetched if it is not there."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repository, file, revision=self.revision))
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise _explained(str(self), error) from error


class Listing(NamedTuple):
    """What the hub says of a repository.

    Parameters
    ----------
    url : str
        The URL that ``fsspec`` reads, of one commit.
    files : tuple of str
        The paths of its files.
    """

    url: str
    files: tuple[str, ...]


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
    CheckpointError
        If it is empty, or a URL of a kind that names no model.

    Examples
    --------
    >>> located("org/name", "v2")
    HubPlace(repository='org/name', revision='v2', inner='')
    >>> located("hf://org/name@refs%2Fpr%2F3/unet").revision
    'refs/pr/3'
    >>> located("s3://bucket/model.safetensors")
    's3://bucket/model.safetensors'
    """
    if source == "":
        raise CheckpointError("expected a path, a hub id or a URL, got an empty string.")
    place = _place(source, revision)
    if revision is not None and not isinstance(place, HubPlace):
        raise ValueError(f"revision: expected None for what is no repository of the hub, got {revision!r}.")
    return place


def _place(source: str | os.PathLike[str], revision: str | None) -> Path | HubPlace | str:
    if not isinstance(source, str):
        return Path(source)
    if source.startswith("hf://") and (
        not (found := _URL.fullmatch(source)) or found["id"].split("/")[0] in _NO_MODELS
    ):
        raise CheckpointError(f"{source}: expected a model on the hub, hf://org/name[@revision][/path].")
    if found := _URL.fullmatch(source):
        written = unquote(found["revision"]) if found["revision"] else None
        if written and revision and written != revision:
            raise ValueError(f"revision: expected the one in {source!r}, got {revision!r}.")
        return HubPlace(found["id"], written or revision, (found["inner"] or "").strip("/"))
    if source.lower().startswith("file://"):
        return _path_of(source)
    if source.lower().startswith(("http://", "https://")):
        # A browser's mark of a place in a page. No server gets it, nor any name that would be put behind it.
        return source.partition("#")[0]
    if is_url(source):
        return source
    path = Path(source)
    looks_like_a_file = path.suffix in FILE_SUFFIXES or len(source) > _LONGEST_ID
    return path if exists(path) or looks_like_a_file or not _ID.fullmatch(source) else HubPlace(source, revision)


def _path_of(url: str) -> Path:
    """The path that a ``file://`` URL names, also on Windows (``file:///C:/model``)."""
    from urllib.request import url2pathname

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise CheckpointError(f"{url}: expected file:/// and a path on this machine, got the host {parts.netloc!r}.")
    return Path(url2pathname(parts.path))


def _explained(where: str, error: Exception) -> CheckpointError:
    found = explained(where, error)
    return not_found(where) if isinstance(found, NotThere) else found


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
