"""A real HTTP server over a folder that answers byte ranges, counts what it sends, and misbehaves on request."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Behaviour:
    """What the server does, and what it has done."""

    root: Path
    failures: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    sizes: bool = True
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
            if behaviour.forbidden is not None and behaviour.forbidden not in parts.query:
                return self.refuse(403)
            if not file.is_file():
                return self.refuse(404)
            size = file.stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") if behaviour.ranges else None
            start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            if behaviour.sizes:
                self.send_header("Content-Length", str(stop - start))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if not body:
                return None
            with behaviour.lock:
                short = behaviour.truncated > 0
                behaviour.truncated -= short
            with file.open("rb") as stream:
                stream.seek(start)
                left = (stop - start) // 2 if short else stop - start
                while left:
                    piece = stream.read(min(left, 2**20))
                    try:
                        self.wfile.write(piece)
                    except (BrokenPipeError, ConnectionResetError):
                        return None  # the client has enough
                    with behaviour.lock:
                        behaviour.sent += len(piece)
                    left -= len(piece)
            if short:
                self.close_connection = True
            return None

        def refuse(self, status: int) -> None:
            self.send_response(status)
            for name, value in behaviour.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

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
