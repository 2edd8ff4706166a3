"""What a run says while it goes: a bar on stderr, and a log of JSON lines.

Values
------
``tokens_in``, ``progress_bar``, ``TrainingLog``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


def tokens_in(batch: Any) -> int:
    """Tokens of a batch: those of its attention mask, else all of ``input_ids`` or of its first matrix of integers.

    Where there is none of these, its rows; 0 if it has no tensor.

    Examples
    --------
    >>> import torch
    >>> tokens_in({"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)})
    4
    >>> tokens_in((torch.ones(2, 5).long(), torch.zeros(2).long())), tokens_in(torch.ones(3, 7))
    (10, 3)
    """
    if isinstance(batch, Mapping):
        for name, count in (("attention_mask", lambda t: int(t.sum())), ("input_ids", lambda t: t.numel())):
            if isinstance(batch.get(name), Tensor):
                return count(batch[name])
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
    texts = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return texts[0].numel() if texts else len(tensors[0]) if tensors else 0


@contextmanager
def progress_bar(total: int | None, done: int = 0) -> Iterator[Callable[[int, float, int], None]]:
    """A bar with loss, speed and time left; ``advance(step, loss, tokens)`` moves it, tokens being all so far."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total, completed=done, loss="-", speed="-")
        began = time.perf_counter()

        def advance(step: int, loss: float, tokens: int) -> None:
            speed = tokens / (time.perf_counter() - began)
            bar.update(task, completed=step, loss=f"{loss:.4g}", speed=f"{speed:,.0f}")

        yield advance


class TrainingLog:
    """A file with one JSON object a step: step, loss, lr, grad_norm, tokens and seconds so far.

    Parameters
    ----------
    path : Path
        Lines of later steps than ``done`` are cut off: a run that is taken up writes them again.
    done : int
        Steps that are in it already; 0 for a new file.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept, self._before = [], 0.0
        if done and path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the process was killed while it wrote this one
                    continue
                if record["step"] <= done:
                    kept.append(line + "\n")
                    self._before = record["seconds"]
        path.write_text("".join(kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._began = time.perf_counter()

    def write(self, **values: float) -> None:
        """Add a line, and see that it is on disk should the process be killed."""
        seconds = self._before + time.perf_counter() - self._began
        self._file.write(json.dumps({**values, "seconds": round(seconds, 4)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
