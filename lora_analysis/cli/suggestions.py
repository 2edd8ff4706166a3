"""What to type next: a line after each command, for people at a terminal."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

NEXT: Mapping[str, str] = {
    "inspect": "lint {adapters}",
    "lint": "spectrum {adapters}",
    "convert": "lint {destination}",
    "spectrum": "used-rank {adapters}",
    "used_rank": "resize {first} resized --energy 0.9",
    "resize": "spectrum {destination}",
    "compare": "figure ranks {adapters} --out ranks.pdf",
    "layers": "same {adapters}",
    "reproducible": "same {two}",
    "same": "interference {two}",
    "interference": "merge {adapters} --method tsv --out merged",
    "merge": "spectrum {destination}",
    "atlas": "figure atlas {adapters} --out atlas.pdf",
    "strength": "amplify {adapters}",
    "amplify": "overlap {adapters}",
    "overlap": "intruders {adapters}",
    "intruders": "figure map {first} --metric intruder-share --out intruders.pdf",
    "magnitude": "strength {adapters}",
    "train": "inspect {destination}",
    "ablate": "figure ablation {destination} --out ablation.pdf",
}
"""The line after each command; none where what it names was not given."""

_READING = ("base", "format", "alpha", "split", "name", "initial", "heads", "pattern", "revision", "base_revision")
"""Options by which adapters are read, and which the next command needs as well."""
_WRITING = ("convert", "resize", "merge", "train", "ablate", "demo")
"""Commands that leave something of their own, which is read without any."""


def with_next(command: Callable[..., None]) -> Callable[..., None]:
    """The command, followed at a terminal by what to type next."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**arguments)
        if sys.stdout.isatty() and not (arguments.get("as_json") or arguments.get("plan_only")):
            line = next_line(command.__name__, arguments)
            if line:
                print(f"\nNext: {line}")

    return run


def next_line(command: str, arguments: Mapping[str, Any]) -> str | None:
    """What to type after a command that was called with these arguments; None if there is nothing to say.

    Examples
    --------
    >>> next_line("spectrum", {"adapters": ["runs/r8", "my runs/r64"], "alpha": 16.0, "format": None})
    "lora-analysis used-rank runs/r8 'my runs/r64' --alpha 16.0"
    """
    writes = command in _WRITING
    if command not in NEXT or (arguments.get("out") is not None and not writes):
        return None
    adapters = [*arguments.get("adapters", ()), *(arguments.get(key) for key in ("adapter", "adapter_a", "adapter_b"))]
    named = [str(adapter) for adapter in adapters if adapter is not None]
    # What a command writes to is its last path.
    destination = next((arguments[key] for key in ("out", "destination", "directory") if arguments.get(key)), None)
    known = {
        "adapters": shlex.join(named),
        "first": shlex.join(named[:1]),
        "two": shlex.join(named[:2]) if len(named) > 1 else "",
        "destination": "" if destination is None else shlex.quote(str(destination)),
    }
    template = NEXT[command]
    if any(not value and f"{{{key}}}" in template for key, value in known.items()):
        return None
    words = ["lora-analysis", template.format_map(known)]
    for key in () if writes else _READING:
        if arguments.get(key) is not None:
            words += [f"--{key.replace('_', '-')}", shlex.quote(str(arguments[key]))]
    return " ".join(words)
