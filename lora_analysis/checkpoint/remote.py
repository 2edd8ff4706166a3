"""One remote file, read by byte range: what is asked for and nothing else.

Conventions
-----------
A URL is anything with ``://``; ``fsspec`` knows the protocols (``http``, ``https``, ``s3``, ``gs``, ``hf``,
``memory``, …). Nothing is cached or read ahead, so ``bytes_read`` is what came over the network. What may pass
(429, 5xx, timeouts, short answers) is tried again a few times; anything else is one ``CheckpointError`` in one line.
Messages show a URL without its query and password, which may be credentials. A pickle holds the URL as it was given:
without them nobody could open it again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lora_analysis.checkpoint.byte_count import ByteCount
from lora_analysis.checkpoint.diagnosis import one_line
from lora_analysis.checkpoint.json_files import MAX_JSON, json_object
from lora_analysis.checkpoint.remote_failures import explained, may_pass, pause
from lora_analysis.checkpoint.remote_http import NO_RANGES, Answer, read_range, session_options
from lora_analysis.errors import CheckpointError

CHUNK = 16 * 2**20
"""Bytes of one request; longer ranges are read as several at once."""

_HEAD = 8
"""Bytes of an HTTP file that are read to learn its size: those that hold the length of a safetensors header."""

_CONNECTIONS = 8
_ATTEMPTS = 4
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

Result = TypeVar("Result")


def is_url(source: object) -> bool:
    """Whether a source is a URL rather than a path.

    Examples
    --------
    >>> is_url("s3://bucket/model.safetensors"), is_url("C:/model.safetensors")
    (True, False)
    """
    return isinstance(source, str) and _URL.match(source) is not None


def shown(url: str) -> str:
    """A URL for messages, without what may be credentials.

    Examples
    --------
    >>> shown("https://me:secret@host/a/model.safetensors?X-Amz-Signature=1f")
    'https://host/a/model.safetensors'
    """
    if url.startswith("hf://"):
        return url
    return re.sub(r"(?<=://)[^/?#]*@(?=[^/?#]*)", "", re.split(r"[?#]", url, maxsplit=1)[0])


class RemotePlace:
    """A URL with the file system that reads it.

    Attributes
    ----------
    count : ByteCount
        Bytes that came over the network of this and all other places that were reached from it.

    Raises
    ------
    CheckpointError
        If no installed library reads the protocol.
    """

    def __init__(self, url: str, beside: RemotePlace | None = None) -> None:
        self.url = url
        self.protocol = url.partition("://")[0].lower()
        self.system: Any = _file_system(url, self.protocol) if beside is None else beside.system
        self.count: ByteCount = ByteCount() if beside is None else beside.count
        self.path = str(self.system._strip_protocol(url))

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def is_http(self) -> bool:
        """Whether it is on a web server, which lists no folders."""
        return self.protocol in ("http", "https")

    def joined(self, name: str) -> RemotePlace:
        """A file or folder inside this folder, read by the same file system."""
        return RemotePlace(_joined(self.url, name, quote=self.is_http), self)

    def parent(self) -> RemotePlace:
        """The folder that a file lies in."""
        folder, mark, query = self.url.partition("?")
        return RemotePlace(folder.rpartition("/")[0] + mark + query, self)

    def tried(self, operation: Callable[[], Result]) -> Result:
        """The result of a request, tried again while its failure may pass.

        Raises
        ------
        CheckpointError
            With the reason in one line.
        """
        # huggingface_hub tries again by itself, for up to half a minute.
        attempts = 2 if self.protocol == "hf" else _ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return operation()
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:
                # Each protocol's library raises its own exceptions; what they have in common is read off them.
                if attempt == attempts or not may_pass(error):
                    # Their messages hold the URL: a traceback would show what it has of credentials.
                    raise explained(str(self), error) from (error if str(self) == self.url else None)
                time.sleep(pause(error, attempt))
        raise AssertionError("unreachable")


class RemoteFile:
    """One file at a URL.

    Parameters
    ----------
    source : str or RemotePlace

    Attributes
    ----------
    size : int
        Bytes of the file.

    Raises
    ------
    CheckpointError
        If it is not there, may not be read, or its server does not say how long it is.
    """

    def __init__(self, source: str | RemotePlace) -> None:
        self.place = RemotePlace(source) if isinstance(source, str) else source
        self._head = b""
        self._first: Answer | None = None
        if self.place.is_http:
            head = bytearray(_HEAD)
            self._first = self.place.tried(lambda: self._answer(0, memoryview(head)))
            self._head = bytes(head[: self._first.count])
            self.size = self._first.size
            return
        info: dict[str, Any] = self.place.tried(lambda: self.place.system.info(self.place.path))
        if info.get("type", "file") != "file":
            raise CheckpointError(f"{self}: expected a file, got a {info['type']}.")
        size = info.get("size")
        if not isinstance(size, int):
            raise CheckpointError(f"{self}: {NO_RANGES}")
        self.size = size

    def __str__(self) -> str:
        return str(self.place)

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from ``start`` up to ``stop``; long ranges are read in parallel.

        Raises
        ------
        CheckpointError
            If the file is shorter or another one by now, the server ignores ranges, or the request fails for good.
        """
        if not 0 <= start <= stop <= self.size:
            raise CheckpointError(f"{self}: expected bytes {start:,} to {stop:,}, it has {self.size:,}.")
        data = bytearray(stop - start)
        known = self._head[start:stop]
        data[: len(known)] = known
        pieces = [(begin, min(begin + CHUNK, stop)) for begin in range(start + len(known), stop, CHUNK)]
        whole = memoryview(data)
        self._fill([(begin, whole[begin - start : end - start]) for begin, end in pieces])
        return data

    def json(self) -> dict[str, Any]:
        """The object in a JSON file.

        Raises
        ------
        CheckpointError
            If it is too long to be one, damaged, or no object.
        """
        if self.size > MAX_JSON:
            raise CheckpointError(f"{self}: expected at most {MAX_JSON:,} bytes of JSON, got {self.size:,}.")
        return json_object(bytes(self.read(0, self.size)), str(self))

    def _fill(self, pieces: list[tuple[int, memoryview]]) -> None:
        if len(pieces) < 2:
            for begin, target in pieces:
                self._fill_one(begin, target)
            return
        pool = ThreadPoolExecutor(min(_CONNECTIONS, len(pieces)))
        try:
            for _ in pool.map(lambda piece: self._fill_one(*piece), pieces):
                pass
        finally:
            # Where one piece failed, the others that have not begun are not read.
            pool.shutdown(wait=False, cancel_futures=True)

    def _fill_one(self, start: int, target: memoryview) -> None:
        def request() -> None:
            if self._first is not None:
                answer = self._answer(start, target)
                if answer.of_another_file(self._first):
                    raise CheckpointError(f"{self}: it changed while it was read. Open it again.")
                count = answer.count
            else:
                data = self._bytes(start, start + len(target))
                self.place.count.add(len(data))
                count = len(data)
                if count > len(target):
                    raise CheckpointError(f"{self}: {NO_RANGES}")
                target[:count] = data
            if count < len(target):
                raise ConnectionError(f"{count:,} bytes came instead of {len(target):,}")

        self.place.tried(request)

    def _answer(self, start: int, target: memoryview) -> Answer:
        return read_range(self.place.system, self.place.path, start, target, self.place.count.add, str(self))

    def _bytes(self, start: int, stop: int) -> bytes:
        system, path = self.place.system, self.place.path
        if self.place.protocol != "hf":
            return bytes(system.cat_file(path, start=start, end=stop))
        # cat_file reads ahead on the hub.
        with system.open(path, "rb", cache_type="none", size=self.size) as file:
            file.seek(start)
            return bytes(file.read(stop - start))


def _file_system(url: str, protocol: str) -> Any:
    if "::" in re.sub(r"\[[^]]*\]", "", url):  # the address of a host may have them, in brackets
        raise CheckpointError(f"{shown(url)}: expected one URL, got a chain of them ('::').")
    import fsspec

    # Listings of an earlier call may be out of date.
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if protocol not in ("http", "https"):
            return fsspec.core.url_to_fs(url, **options)[0]
        return fsspec.filesystem(protocol, client_kwargs=session_options(), **options)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{shown(url)}: protocol {protocol!r}: {one_line(error)}.") from error
    except Exception as error:
        # Some connect at once, and raise what their libraries raise.
        raise explained(shown(url), error) from None


def _joined(url: str, name: str, *, quote: bool) -> str:
    """The URL of a name inside a folder; a query, such as a token of a whole container, stays."""
    if not quote:
        return f"{url.rstrip('/')}/{name}"
    from urllib.parse import quote as quoted

    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/')}/{quoted(name)}{mark}{query}"
