"""Byte ranges over HTTP, each answer held against what was asked for.

Conventions
-----------
fsspec's own file takes any answer of status 206, and one of status 200 that is short enough, for the bytes it asked
for. So here its session makes the request and the headers decide: the range and the size of the whole file, no
compression, and the version (``ETag``, ``Last-Modified``) that the first answer named. No body is read beyond the
range, whatever the server sends.

One request of a few bytes tells what a ``HEAD`` would; addresses that are signed for ``GET`` alone refuse that one.

References
----------
RFC 9110, HTTP Semantics, sections 14 (range requests) and 8.8 (validators).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_analysis.errors import CheckpointError

NO_RANGES = (
    "expected a server that answers byte ranges, this one does not, so only the whole file could be read. "
    "Download it and give the path."
)

_CONNECT_SECONDS = 10
_SILENT_SECONDS = 30
"""How long a server may send nothing."""
_SLOWEST = 20_000
"""Bytes per second that a server must send, after the silence it may begin with."""

_CONTENT_RANGE = re.compile(r"bytes (?:(?P<start>\d{1,18})-(?P<last>\d{1,18})|\*)/(?P<size>\d{1,18})\s*")
_VALIDATORS = ("ETag", "Last-Modified")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a range that was asked for.

    Parameters
    ----------
    count : int
        Bytes: fewer than were asked for where the file ends.
    size : int
        Of the whole file.
    version : tuple of str or None
        Its ``ETag`` and ``Last-Modified``, as far as the server names them.
    """

    count: int
    size: int
    version: tuple[str | None, ...]

    def of_another_file(self, first: Answer) -> bool:
        """Whether this is a piece of another version than the one that the first answer was of.

        Servers behind one address may each have their own ``ETag`` for the same file: both must differ.
        """
        named = [(a, b) for a, b in zip(self.version, first.version, strict=True) if a is not None and b is not None]
        return self.size != first.size or (bool(named) and all(a != b for a, b in named))


def session_options() -> dict[str, Any]:
    """Options of aiohttp's sessions."""
    # Proxies are those of the environment, as everywhere else; ranges of a compressed body are of no use.
    return {"trust_env": True, "headers": {"Accept-Encoding": "identity"}}


def read_range(
    system: Any, path: str, start: int, target: memoryview, received: Callable[[int], None], where: str
) -> Answer:
    """Bytes of a file over HTTP, from ``start`` on, as many as the target holds or the file has.

    Parameters
    ----------
    system : fsspec's HTTPFileSystem
    path : str
        The URL.
    start : int
    target : memoryview
        Where they are put; not empty.
    received : callable
        Told of the bytes as they come.
    where : str
        The URL as messages show it.

    Raises
    ------
    CheckpointError
        If the server sends anything else than that range.
    Exception
        aiohttp's, if the request fails.
    """
    from fsspec.asyn import sync

    answer: Answer = sync(system.loop, _read_range, system, path, start, target, received, where)
    return answer


async def _read_range(
    system: Any, path: str, start: int, target: memoryview, received: Callable[[int], None], where: str
) -> Answer:
    from aiohttp import ClientTimeout

    session = await system.set_session()
    limits = ClientTimeout(
        total=_CONNECT_SECONDS + _SILENT_SECONDS + len(target) / _SLOWEST,
        sock_connect=_CONNECT_SECONDS,
        sock_read=_SILENT_SECONDS,
    )
    headers = {"Range": f"bytes={start}-{start + len(target) - 1}"}
    async with session.get(system.encode_url(path), headers=headers, timeout=limits) as response:
        size, wanted = _announced(response.status, response.headers, start, len(target), where)
        if wanted is None:
            response.raise_for_status()
            raise CheckpointError(f"{where}: {NO_RANGES}")
        count = 0
        async for piece in response.content.iter_any():
            received(len(piece))
            if count + len(piece) > wanted:
                raise CheckpointError(f"{where}: expected {wanted:,} bytes from byte {start:,} on, got more.")
            target[count : count + len(piece)] = piece
            count += len(piece)
        if count < wanted:
            raise ConnectionError(f"{count:,} bytes came instead of {wanted:,}")
        return Answer(count, size, tuple(response.headers.get(name) for name in _VALIDATORS))


def _announced(status: int, headers: Mapping[str, str], start: int, length: int, where: str) -> tuple[int, int | None]:
    """The size of the whole file and how many of its bytes come; None where it is no answer to a range."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status == 416 and found is not None and start == int(found["size"]) == 0:
        return 0, 0  # an empty file has no range at all
    if status == 416:
        raise CheckpointError(f"{where}: expected bytes from {start:,} on, it has none there by now. Open it again.")
    if status != 206:
        return 0, None
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", ""):
        raise CheckpointError(
            f"{where}: expected bytes as they are in the file, the server compresses them ({encoding[:20]!r}). "
            "Download it and give the path."
        )
    size = int(found["size"]) if found else 0
    wanted = min(length, size - start)
    if (
        found is None
        or found["start"] is None
        or (int(found["start"]), int(found["last"])) != (start, start + wanted - 1)
    ):
        raise CheckpointError(
            f"{where}: expected bytes {start:,} to {start + length - 1:,} and the size of the file, the server "
            f"announces {headers.get('Content-Range', 'nothing')[:60]!r}. Download it and give the path."
        )
    return size, wanted
