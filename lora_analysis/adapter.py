"""Adapters: mappings from the matrices of a base model to their updates, with a full account of the file.

Conventions
-----------
A *module* is one adapted matrix, named as in the base model's state dict without ``.weight``. A reader
describes every module by a ``Module`` before it reads a number; the factors are read when asked for and
never kept. Every tensor of the file is used by a module or listed as ``Unused`` with a reason, and every
scale says where it came from.

Values
------
``Target``, ``Module``, ``Unused``, ``Contents`` (what a reader returns), ``Adapter``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from lora_analysis.checkpoint import Checkpoint
from lora_analysis.notebook import html_table
from lora_analysis.update import Update

ScaleSource = Literal["tensor", "config", "header", "format default", "caller", "unknown"]
"""Where the scale of a module came from."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which base tensor an update belongs to, how it is stored, and which slice of it.

    Parameters
    ----------
    tensor : str
        Name of the base tensor, ``.weight`` included.
    transposed : bool
        Whether the base stores it as (d_in, d_out), like transformers' ``Conv1D``.
    rows, columns : (int, int), optional
        Half-open range of output rows and input columns of the whole matrix as (d_out, d_in), for
        blocks of a fused weight.
    expert : int, optional
        Index into the first axis of a stacked (experts, ., .) tensor.
    kernel : tuple of int
        Spatial size of a convolution's kernel, whose update is unfolded to (out, in·k·k); () of a linear layer.
    """

    tensor: str
    transposed: bool = False
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    expert: int | None = None
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One adapted matrix as its file describes it, before any number is read.

    Parameters
    ----------
    shape : (int, int)
        (d_out, d_in).
    r : int
        Declared inner dimension.
    scale : float
        NaN if ``scale_source`` is ``"unknown"``.
    scale_source : str
        One of ``ScaleSource``.
    target : Target
        Where it acts on the base.
    tensors : tuple of str
        The file's tensors it is made of.
    read : callable
        Reads the factors and returns the update.
    flags : tuple of str
        What tables say about it in every row: ``dora-low-rank-part`` where a magnitude rescales the merged weight
        and the update is only the product, ``less-initial`` where the product that training began with is taken off,
        ``ambiguous-layout`` where the file allows another reading.
    magnitude : callable, optional
        Reads DoRA's magnitude vector, shape (d_out,) or, where ``magnitude_axis`` is 0, (d_in,).
    magnitude_axis : int
        The axis of (d_out, d_in) that the norms run over: 1 gives one magnitude per output row, as in PEFT.
    truncation_error : float
        Frobenius norm of what was cut off from the matrix this stands for; 0 where nothing was.
    embedding : bool
        Whether it is known to be an embedding table's, (dim, vocab), and not a linear layer's.
    """

    shape: tuple[int, int]
    r: int
    scale: float
    scale_source: ScaleSource
    target: Target
    tensors: tuple[str, ...]
    read: Callable[[], Update]
    flags: tuple[str, ...] = ()
    magnitude: Callable[[], Tensor] | None = None
    magnitude_axis: int = 1
    truncation_error: float = 0.0
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.scale_source not in get_args(ScaleSource):
            raise ValueError(f"scale_source: expected one of {get_args(ScaleSource)}, got {self.scale_source!r}.")
        if math.isnan(self.scale) != (self.scale_source == "unknown"):
            raise ValueError(f"a scale of {self.scale} cannot come from {self.scale_source!r}.")


@dataclass(frozen=True, slots=True)
class Unused:
    """A tensor of the file that is no part of any update, and why."""

    tensor: str
    reason: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a reader found in a file: the whole of it."""

    modules: Mapping[str, Module]
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = ()
    """Where the file disagrees with itself, and which side won."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How to open an adapter again: ``reopen(*arguments)``, all picklable."""

    reopen: Callable[..., Adapter]
    arguments: tuple[Any, ...] = field(default=())


class Adapter(Mapping[str, Update]):
    """A mapping from module names to updates.

    From a file by ``load_adapter``, from a live model by ``training.extract``, or from any mapping:
    ``Adapter({"encoder.layer.0.query": LowRankUpdate(up, down, scale=2.0)})``.

    An adapter of a file is lazy: ``adapter[module]`` reads that module's factors each time and keeps
    none. It pickles as the way to open it again, a few hundred bytes whatever its size. An adapter made
    from a mapping pickles with its tensors; there is nowhere else to find them.

    Parameters
    ----------
    updates : mapping of str to Update
        Module names to updates.
    targets : mapping of str to Target, optional
        Where they act on the base. By default module ``m`` acts on the tensor ``m.weight``.
    source : str
        What to call it in tables.

    Attributes
    ----------
    source : str
        Path, URL or name.
    format : str
        The format it was read as; ``"memory"`` for a plain mapping.
    config, metadata : mapping
        The adapter's own configuration file and header, as found.
    modules : mapping of str to Module
        Shape, r, scale, its source and target of each module, without reading numbers.
    unused : tuple of Unused
        The file's other tensors, each with a reason.
    notes : tuple of str
        Where the file disagreed with itself, and which side won.
    checkpoint : Checkpoint or None
        The file's own tensors by their own names, read when asked for; None where there is no file.

    Raises
    ------
    TypeError
        If ``updates`` maps anything else.
    ValueError
        If ``targets`` names a module that is none.
    """

    def __init__(
        self,
        updates: Mapping[str, Update],
        *,
        targets: Mapping[str, Target] | None = None,
        source: str = "memory",
    ) -> None:
        held = dict(updates)
        placed = dict(targets or {})
        for name, update in held.items():
            if not isinstance(name, str) or not hasattr(update, "singular_values"):
                raise TypeError(
                    f"updates: expected names and updates, such as LowRankUpdate(up, down, scale), got "
                    f"{type(update).__name__} under {name!r}."
                )
        if stray := sorted(placed.keys() - held.keys()):
            raise ValueError(f"targets: expected modules of the adapter, got {stray[0]!r}.")
        self.source = source
        self.format = "memory"
        self.config: Mapping[str, Any] = {}
        self.metadata: Mapping[str, str] = {}
        self.unused: tuple[Unused, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.checkpoint: Checkpoint | None = None
        self.modules: Mapping[str, Module] = {
            name: Module(
                shape=update.shape,
                r=update.r,
                scale=update.scale,
                scale_source="unknown" if math.isnan(update.scale) else "caller",
                target=placed.get(name, Target(f"{name}.weight")),
                tensors=(),
                read=lambda update=update: update,  # type: ignore[misc]
            )
            for name, update in held.items()
        }
        self._origin = Origin(_from_memory, (held, placed, source))

    @classmethod
    def from_contents(
        cls,
        contents: Contents,
        *,
        source: str,
        format: str,
        origin: Origin,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Adapter:
        """An adapter of a file, as a reader describes it, its modules in the order of the base's layers."""
        adapter = cls({}, source=source)
        adapter.format = format
        adapter.config = dict(config or {})
        adapter.metadata = dict(metadata or {})
        # Blocks of one weight stay in the reader's order, q before k.
        adapter.modules = dict(sorted(contents.modules.items(), key=lambda item: _natural(item[1].target.tensor)))
        adapter.unused = contents.unused
        adapter.notes = contents.notes
        adapter.checkpoint = checkpoint
        adapter._origin = origin
        return adapter

    def __getitem__(self, module: str) -> Update:
        if module not in self.modules:
            raise KeyError(f"{self.source}: no module {module!r}; see list(adapter).")
        return self.modules[module].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    # Mapping's would read every factor of both, and compare tensors by identity in the end.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Adapter({self.source!r}, format={self.format!r}, {len(self)} modules)"

    def _repr_html_(self) -> str:
        rows = [
            (name, "{} × {}".format(*module.shape), module.r, f"{module.scale:g}", module.scale_source)
            for name, module in self.modules.items()
        ]
        caption = f"Adapter {self.source}: {self.format}, {len(self)} modules"
        return html_table(caption, ["module", "d_out × d_in", "r", "scale", "scale from"], rows)

    def __reduce__(self) -> tuple[Callable[..., Adapter], tuple[Any, ...]]:
        return self._origin.reopen, self._origin.arguments

    @property
    def ledger(self) -> Mapping[str, str]:
        """What became of every tensor of the file: ``"used by <module>"``, or why it is not used."""
        used: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            for tensor in module.tensors:
                used.setdefault(tensor, []).append(name)
        entries = {tensor: f"used by {', '.join(names)}" for tensor, names in used.items()}
        return entries | {item.tensor: item.reason for item in self.unused}

    @property
    def targets(self) -> Mapping[str, Target]:
        """Where each module acts on the base."""
        return {name: module.target for name, module in self.modules.items()}


def _from_memory(updates: Mapping[str, Update], targets: Mapping[str, Target], source: str) -> Adapter:
    return Adapter(updates, targets=targets, source=source)


def _natural(tensor: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10.

    Numbers are compared by length, then as text: names of a file may hold more digits than ``int`` accepts.
    """
    key = []
    for i, part in enumerate(re.split(r"([0-9]+)", tensor.removesuffix(".weight"))):
        digits = part.lstrip("0")
        key.append((len(digits), digits) if i % 2 else (-1, part))
    return key
