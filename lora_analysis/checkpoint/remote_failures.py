"""Why a remote request failed, read off the exceptions of whichever library made it.

Conventions
-----------
Each library (aiohttp, huggingface_hub, botocore, …) raises its own exceptions; what they share is an HTTP status
somewhere along the chain of causes, or an ``OSError`` at its root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_analysis.checkpoint.diagnosis import one_line
from lora_analysis.errors import CheckpointError

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_CLIENTS = {"aiohttp", "botocore", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}


class NotThere(CheckpointError):
    """There is no such remote file, or none that may be read; servers do not always tell these apart."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _root(error: Exception) -> Exception:
    """What it began with, but for the cancelling of a request that took too long."""
    return [cause for cause in _causes(error) if isinstance(cause, Exception)][-1]


def _took_too_long(error: Exception) -> bool:
    return any(isinstance(cause, TimeoutError) for cause in _causes(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of any of the libraries."""
    for cause in _causes(error):
        for holder in (cause, getattr(cause, "response", None)):
            if isinstance(holder, dict):  # botocore's
                holder = holder.get("ResponseMetadata", {})
                status = holder.get("HTTPStatusCode") if isinstance(holder, dict) else None
            else:
                status = getattr(holder, "status", None) or getattr(holder, "status_code", None)
            if isinstance(status, int) and status:
                return status
    return None


def _is(error: BaseException, *names: str) -> bool:
    return any(kind.__name__ in names for cause in _causes(error) for kind in type(cause).__mro__)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    if _is(error, "OfflineModeIsEnabled", "LocalEntryNotFoundError", "InvalidURL", "TooManyRedirects"):
        return False
    if _took_too_long(error):
        return True
    root = _root(error)
    if isinstance(root, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(root, OSError) or type(root).__module__.partition(".")[0] in _CLIENTS


def pause(error: Exception, attempt: int) -> float:
    """Seconds to wait: what the server asks for, within reason, else twice as long each time."""
    seconds = _FIRST_PAUSE * 2.0 ** (attempt - 1)
    for cause in _causes(error):
        headers: Any = getattr(cause, "headers", None) or getattr(getattr(cause, "response", None), "headers", None)
        asked = headers.get("Retry-After") if hasattr(headers, "get") else None
        if isinstance(asked, str) and asked.isdecimal() and len(asked) < 6:
            seconds = max(seconds, float(asked))
    return min(seconds, _LONGEST_PAUSE)


def offline(where: str) -> CheckpointError:
    """What to say of a source that is not in the hub's cache when the network is not to be used."""
    return CheckpointError(
        f"{where}: expected it in the local cache, as huggingface_hub is offline (HF_HUB_OFFLINE), found none."
    )


def explained(where: str, error: Exception) -> CheckpointError:
    """What went wrong for good, in one line without credentials."""
    status = _status(error)
    if _is(error, "OfflineModeIsEnabled"):
        return offline(where)
    if status in (401, 403) or _is(error, "PermissionError", "GatedRepoError"):
        code = f" (status {status})" if status else ""
        return NotThere(
            f"{where}: no such file, or access refused{code}. On the Hugging Face hub, log in ('hf auth login', or a "
            "token in HF_TOKEN) and accept the licence of a gated repository; elsewhere give a URL that may be read."
        )
    if status == 404 or (status is None and isinstance(_root(error), FileNotFoundError)):
        return NotThere(f"{where}: no such file or folder there.")
    if status is not None:
        still = ", still after several attempts. Try later" if status in _PASSING else ""
        return CheckpointError(f"{where}: expected its bytes, got status {status}{still}.")
    return CheckpointError(f"{where}: could not be read: {reason(error)}.")


def reason(error: Exception) -> str:
    """The kind and the message of the exception at the root, without URLs: libraries write theirs out, with queries."""
    if _took_too_long(error):
        return "TimeoutError: no answer in time"
    root = _root(error)
    kind = type(root).__name__
    message = re.sub(r"\S*://\S*", "…", one_line(root)).rstrip(".")
    return kind if message == kind else f"{kind}: {message}"


def unreachable(where: str, error: Exception) -> CheckpointError | None:
    """What to say of a source that is no path where the hub cannot be asked; None where the hub did answer."""
    if _status(error) is not None or _is(error, "OfflineModeIsEnabled"):
        return None
    return CheckpointError(
        f"{where}: no such path here, and the Hugging Face hub could not be asked whether it has such a repository "
        f"({reason(error)})."
    )
