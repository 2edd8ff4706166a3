"""One remote file, read by byte range: what is asked for and nothing else.

Conventions
-----------
A URL is anything with ``://``; ``fsspec`` knows the protocols (``http``, ``https``, ``s3``, ``gs``, ``hf``,
``memory``, …). Nothing is cached or read ahead, so ``bytes_read`` is what came over the network. What may pass
(429, 5xx, timeouts, short answers) is tried again a few times; anything else is one ``CheckpointError`` in one line.
Messages show a URL without its query and password, which may be credentials.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lora_analysis.checkpoint.diagnosis import one_line
from lora_analysis.checkpoint.remote_failures import explained, may_pass, pause
from lora_analysis.errors import CheckpointError

CHUNK = 16 * 2**20
"""Bytes of one request; longer ranges are read as several at once."""

MAX_HEADER = 100_000_000
"""Bytes of a header or an index that are read at most: safetensors' own bound."""

_CONNECTIONS = 8
_ATTEMPTS = 4
_TIMEOUT = 60
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
    return re.sub(r"(?<=://)[^/?#]*@(?=[^/?#]*)", "", url.partition("?")[0]) if not url.startswith("hf://") else url


class RemotePlace:
    """A URL with the file system that reads it.

    Raises
    ------
    CheckpointError
        If no installed library reads the protocol.
    """

    def __init__(self, url: str, system: Any = None) -> None:
        self.url = url
        self.protocol = url.partition("://")[0].lower()
        self.system = _file_system(url, self.protocol) if system is None else system
        self.path = str(self.system._strip_protocol(url))

    def __str__(self) -> str:
        return shown(self.url)

    def joined(self, name: str) -> RemotePlace:
        """A file or folder inside this folder, read by the same file system."""
        return RemotePlace(_joined(self.url, name, quote=self.protocol in ("http", "https")), self.system)

    def parent(self) -> RemotePlace:
        """The folder that a file lies in."""
        folder, mark, query = self.url.partition("?")
        return RemotePlace(folder.rpartition("/")[0] + mark + query, self.system)

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
                    raise explained(str(self), error) from error
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
    bytes_read : int
        Bytes read so far.

    Raises
    ------
    CheckpointError
        If it is not there, may not be read, or its server does not say how long it is.
    """

    def __init__(self, source: str | RemotePlace) -> None:
        self.place = RemotePlace(source) if isinstance(source, str) else source
        self.bytes_read = 0
        self._counting = threading.Lock()
        info: dict[str, Any] = self.place.tried(lambda: self.place.system.info(self.place.path))
        if info.get("type", "file") != "file":
            raise CheckpointError(f"{self}: expected a file, got a {info['type']}.")
        size = info.get("size")
        if not isinstance(size, int) or info.get("partial") is False:
            raise CheckpointError(f"{self}: {_NO_RANGES}")
        self.size = size

    def __str__(self) -> str:
        return str(self.place)

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from ``start`` up to ``stop``; long ranges are read in parallel.

        Raises
        ------
        CheckpointError
            If the file is shorter, the server ignores ranges, or the request fails for good.
        """
        if not 0 <= start <= stop <= self.size:
            raise CheckpointError(f"{self}: expected bytes {start:,} to {stop:,}, it has {self.size:,}.")
        data = bytearray(stop - start)
        pieces = [(begin, min(begin + CHUNK, stop)) for begin in range(start, stop, CHUNK)]
        for (begin, end), piece in zip(pieces, self._pieces(pieces), strict=True):
            data[begin - start : end - start] = piece
        return data

    def json(self) -> dict[str, Any]:
        """The object in a JSON file.

        Raises
        ------
        CheckpointError
            If it is too long to be one, damaged, or no object.
        """
        if self.size > MAX_HEADER:
            raise CheckpointError(f"{self}: expected at most {MAX_HEADER:,} bytes of JSON, got {self.size:,}.")
        return json_object(bytes(self.read(0, self.size)), str(self))

    def _pieces(self, pieces: list[tuple[int, int]]) -> Iterator[bytes]:
        if len(pieces) < 2:
            yield from (self._piece(*piece) for piece in pieces)
            return
        pool = ThreadPoolExecutor(min(_CONNECTIONS, len(pieces)))
        try:
            yield from pool.map(lambda piece: self._piece(*piece), pieces)
        finally:
            # Where one piece failed, the others that have not begun are not read.
            pool.shutdown(wait=False, cancel_futures=True)

    def _piece(self, start: int, stop: int) -> bytes:
        def request() -> bytes:
            data = self._request(start, stop)
            with self._counting:
                self.bytes_read += len(data)
            if len(data) > stop - start:
                raise CheckpointError(f"{self}: {_NO_RANGES}")
            if len(data) < stop - start:
                raise ConnectionError(f"{len(data):,} bytes came instead of {stop - start:,}")
            return data

        return self.place.tried(request)

    def _request(self, start: int, stop: int) -> bytes:
        system, path = self.place.system, self.place.path
        if self.place.protocol not in ("http", "https", "hf"):
            return bytes(system.cat_file(path, start=start, end=stop))
        # cat_file would take the whole body from an HTTP server that ignores ranges, and reads ahead on the hub.
        with system.open(path, "rb", cache_type="none", size=self.size) as file:
            file.seek(start)
            try:
                return bytes(file.read(stop - start))
            except ValueError as error:
                if "range requests" in str(error):
                    raise CheckpointError(f"{self}: {_NO_RANGES}") from error
                raise


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The object that bytes of JSON hold.

    Raises
    ------
    CheckpointError
        If they are damaged, or hold no object.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = "an HTML or XML page" if data.lstrip()[:1] == b"<" else "something else"
        raise CheckpointError(f"{where}: expected JSON, got {what} ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}.")
    return content


_NO_RANGES = (
    "expected a server that answers byte ranges, this one does not, so only the whole file could be read. "
    "Download it and give the path."
)


def _file_system(url: str, protocol: str) -> Any:
    if "::" in url:
        raise CheckpointError(f"{shown(url)}: expected one URL, got a chain of them ('::').")
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}  # listings of an earlier call may be out of date
    try:
        if protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
            options["client_kwargs"] = {"timeout": limits}
            options["headers"] = {"Accept-Encoding": "identity"}  # ranges of a compressed body are of no use
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{shown(url)}: protocol {protocol!r}: {one_line(error)}.") from error


def _joined(url: str, name: str, *, quote: bool) -> str:
    """The URL of a name inside a folder; a query, such as a token of a whole container, stays."""
    if not quote:
        return f"{url.rstrip('/')}/{name}"
    from urllib.parse import quote as quoted

    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/')}/{quoted(name)}{mark}{query}"
