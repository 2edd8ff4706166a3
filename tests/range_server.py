"""A real HTTP server over a folder that answers byte ranges, counts what it sends, and misbehaves on request.

``change`` may alter each answer to a range: it gets the status, the headers and the body of one, and gives others.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


@dataclass
class Behaviour:
    """What the server does, and what it has done."""

    root: Path
    failures: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    heads: bool = True
    silence: float = 0.0
    redirect: str | None = None
    change: Callable[[Answer], Answer] | None = None
    truncated: int = 0
    forbidden: str | None = None
    sent: int = 0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def gets(self, name: str) -> list[str | None]:
        """The ranges that were asked for of one file, in order."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(name)]


@contextmanager
def serving(root: Path) -> Iterator[Behaviour]:
    """A server over the files below a folder, at ``behaviour.url``."""
    behaviour = Behaviour(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are written one after the other

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            parts = urlsplit(self.path)
            wanted = self.headers.get("Range")
            with behaviour.lock:
                behaviour.requests.append((self.command, parts.path, wanted))
                failing = behaviour.failures > 0
                behaviour.failures -= failing
            file = behaviour.root / unquote(parts.path).lstrip("/")
            if failing:
                return self.refuse(behaviour.status)
            if self.command == "HEAD" and not behaviour.heads:
                return self.refuse(405)
            if behaviour.forbidden is not None and behaviour.forbidden not in parts.query:
                return self.refuse(403)
            if behaviour.redirect is not None:
                return self.refuse(302, {"Location": f"{behaviour.redirect}{parts.path}"})
            if not file.is_file():
                return self.refuse(404)
            size = file.stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") if behaviour.ranges else None
            start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            if start >= stop and found:
                return self.refuse(416, {"Content-Range": f"bytes */{size}"})
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if found else {}
            headers |= {"Content-Length": str(stop - start), **behaviour.headers}
            if behaviour.silence:
                time.sleep(behaviour.silence)
            if behaviour.change is not None and found:
                with file.open("rb") as stream:
                    stream.seek(start)
                    status, headers, data = behaviour.change((206, headers, stream.read(stop - start)))
                return self.send(status, headers, io.BytesIO(data), len(data) if body else 0)
            with behaviour.lock:
                short = behaviour.truncated > 0 and body
                behaviour.truncated -= short
            if short:
                self.close_connection = True
            with file.open("rb") as stream:
                stream.seek(start)
                count = (stop - start) // 2 if short else stop - start
                return self.send(206 if found else 200, headers, stream, count if body else 0)

        def send(self, status: int, headers: dict[str, str], stream: IO[bytes], count: int) -> None:
            """An answer with so many bytes of a stream; without a length, until the connection ends."""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Connection", "close")
                self.close_connection = True
            with suppress(BrokenPipeError, ConnectionResetError):  # where the client has enough
                self.end_headers()
                while count:
                    piece = stream.read(min(count, 2**20))
                    # Counted first: whoever has got the bytes may look at the count before this thread runs again.
                    with behaviour.lock:
                        behaviour.sent += len(piece)
                    self.wfile.write(piece)
                    count -= len(piece)

        def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send(status, {**behaviour.headers, **(headers or {}), "Content-Length": "0"}, io.BytesIO(), 0)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        behaviour.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield behaviour
        finally:
            server.shutdown()
            thread.join()
