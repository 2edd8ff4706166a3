"""How many bytes were read, counted by several threads at once."""

from __future__ import annotations

import threading


class ByteCount:
    """A number that only grows."""

    def __init__(self) -> None:
        self._value = 0
        self._lock = threading.Lock()

    @property
    def value(self) -> int:
        """Bytes so far."""
        return self._value

    def add(self, count: int) -> None:
        """Count some more."""
        with self._lock:
            self._value += count
