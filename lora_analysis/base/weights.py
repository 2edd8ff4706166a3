"""``BaseWeights``: the matrices of a base, read one at a time, always oriented (d_out, d_in)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.base.architecture import Architecture
from lora_analysis.base.composite import Components, bytes_read, counted, is_remote, size_report
from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.base.layouts import is_stack
from lora_analysis.base.matrices import Matrices
from lora_analysis.base.names import NamesByEnd, one_change_of_prefix, plain_name
from lora_analysis.base.quantised import Dequantised
from lora_analysis.base.stores import Stores, stored_as
from lora_analysis.checkpoint.protocol import Checkpoint
from lora_analysis.errors import BaseWeightsError, CheckpointError

_DEQUANTISED = "dequantised when read: the rounded weights, not the original ones"


class BaseWeights:
    """The matrices of a base model, read one at a time.

    Made by ``load_base``. It pickles as the source to open again, or with its tensors when they were given
    in memory.

    Attributes
    ----------
    source : str
        Path, hub id or URL, or a name for what was given in memory.
    is_remote, is_quantised : bool
        Whether it is read over a network, and whether any of its weights are dequantised when they are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        source: str,
        reopen: Callable[[], tuple[Any, ...]],
        device: str | torch.device = "cpu",
        stored: Mapping[str, bool] | None = None,
        architecture: Callable[[], Architecture] = Architecture,
    ) -> None:
        self.source = source
        self._measured = checkpoint if isinstance(checkpoint, Components) else counted(checkpoint)
        self._checkpoint = Dequantised(self._measured, source)
        self._reopen = reopen
        self._architecture = architecture
        self._names = _plain_names(self._checkpoint, source)
        self._by_end = NamesByEnd(self._names)
        gguf = checkpoint if isinstance(checkpoint, GGUFWeights) else None
        self._stores = Stores(self._names, gguf)
        kinds = self._checkpoint.kinds if gguf is None else gguf.kinds
        self.is_remote = is_remote(checkpoint)
        self.is_quantised = bool(kinds)
        self._notes = {f"{count} tensors are {kind}, {_DEQUANTISED}.": None for kind, count in sorted(kinds.items())}
        self._matrices = Matrices(
            self._checkpoint,
            self._names,
            self._stores,
            source=source,
            stored_transposed=stored or {},
            device=torch.device(device),
            note=self._note,
        )

    def _note(self, note: str) -> None:
        self._notes[note] = None

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen()

    def __repr__(self) -> str:
        return f"BaseWeights({self.source!r}, {len(self)} tensors)"

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._names

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to weights before they were given: dequantised, or rows of a vocabulary matched."""
        return tuple(self._notes)

    @cached_property
    def architecture(self) -> Architecture:
        """Which model it is and how many heads it has, as the configuration beside it or its header says.

        Raises
        ------
        BaseWeightsError
            If there is a configuration that cannot be read.
        """
        try:
            return self._architecture()
        except CheckpointError as error:
            raise BaseWeightsError(str(error)) from error

    @property
    def heads(self) -> tuple[int, int] | None:
        """Numbers of query and of key-value heads, where all layers have the same; None where nothing says."""
        return self.architecture.heads

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: of a remote base all that came over the network, of another the tensors that were read."""
        return bytes_read(self._measured)

    @cached_property
    def bytes_total(self) -> int:
        """Bytes of the whole base."""
        return self._measured.bytes_total

    def report(self) -> str:
        """How much of the base was read so far.

        Examples
        --------
        >>> from lora_analysis.base import load_base
        >>> base = load_base({"a.weight": torch.ones(100, 10), "b.weight": torch.ones(100, 20)})
        >>> base.matrix(Target("a.weight")).shape, base.report()
        (torch.Size([100, 10]), 'read 4.00 of 12.0 kB')
        """
        try:
            total = self.bytes_total
        except CheckpointError:  # a server that does not answer any more is no reason to lose what was read
            return size_report(self.bytes_read, None)
        return size_report(self.bytes_read, total)

    def find(self, tensor: str) -> str:
        """The name under which the base has one tensor; see ``find_all``."""
        return self.find_all([tensor])[tensor]

    def find_all(self, tensors: Iterable[str]) -> dict[str, str]:
        """The names under which the base has the tensors that an adapter updates, whose common prefix may differ.

        Exact names win. Otherwise one change of prefix must serve all of them: up to two leading components
        that they share are dropped (``transformer.h.0…`` against a file saved from the bare model), or one
        prefix is put before all. So no two tensors of an adapter end up on one of the base. A tensor is there, too,
        where the base stores it fused, in a stack of experts, or under GGUF's name for it; ``matrix`` takes it out.

        Parameters
        ----------
        tensors : iterable of str
            All the tensors of one adapter.

        Returns
        -------
        dict of str to str
            Adapter's name to base's name.

        Raises
        ------
        BaseWeightsError
            If no change of prefix fits, or several do.
        """
        wanted = list(dict.fromkeys(tensors))
        fitting = self._fitting(wanted)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            first, second = (found[wanted[0]] for found in fitting[:2])
            raise BaseWeightsError(
                f"{self.source}: {wanted[0]!r} could be any of {len(fitting)} tensors ({first!r}, {second!r}, …). "
                "Give the component's own weights as the base."
            )
        missing = next(tensor for tensor in wanted if not self._stores.has(tensor))
        raise BaseWeightsError(
            f"{self.source}: expected the tensor {missing!r} that the adapter updates, found none of that name among "
            f"{len(self)} (first: {next(iter(self._names), 'nothing')!r}), nor all of the adapter's under another "
            f"prefix. {self._stores.hint(missing)}"
        )

    def has_all(self, tensors: Iterable[str]) -> bool:
        """Whether ``find_all`` finds them.

        Examples
        --------
        >>> from lora_analysis.base import load_base
        >>> base = load_base({"model.layers.0.q.weight": torch.ones(2, 3)})
        >>> base.has_all(["layers.0.q.weight"]), base.has_all(["layers.0.q.weight", "layers.1.q.weight"])
        (True, False)
        """
        return len(self._fitting(list(dict.fromkeys(tensors)))) == 1

    def _fitting(self, wanted: list[str]) -> list[dict[str, str]]:
        return one_change_of_prefix(wanted, self._stores.has, self._by_end, stored_as)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor as stored, without reading it; of a stack of experts stored one by one, as a stack.

        Raises
        ------
        BaseWeightsError
            If the base lacks it, or has it as a block whose size only the update's shape tells.
        """
        name = self.find(tensor)
        if name in self._names:
            return self._checkpoint.shape(self._names[name])
        recipe = self._stores.recipe(name, 0 if is_stack(name) else None)
        parts = recipe.parts if recipe else ()
        stored = [self._checkpoint.shape(self._names[part.tensor]) for part in parts]
        inner = [shape if part.expert is None else shape[1:] for part, shape in zip(parts, stored, strict=True)]
        if any(part.block for part in parts) or len({shape[1:] for shape in inner}) != 1:
            raise BaseWeightsError(
                f"{self.source}: {name!r}: expected a tensor of its own, it is a block of {parts[0].tensor!r}, and the "
                "shape of an update tells which."
            )
        shape = (sum(shape[0] for shape in inner), *inner[0][1:])
        if not is_stack(name):
            return shape
        if parts[0].expert is not None:
            return (stored[0][0], *shape)
        return (next(n for n in itertools.count(1) if self._stores.recipe(name, n) is None), *shape)

    def dtype(self, tensor: str) -> torch.dtype:
        """Dtype in which ``matrix`` gives a tensor, without reading it."""
        name = self.find(tensor)
        recipe = self._stores.recipe(name, 0 if is_stack(name) else None)
        own = recipe.parts[0].tensor if recipe else name
        return self._checkpoint.dtype(self._names[own])

    def transposed(self, target: Target, shape: tuple[int, int] | None = None) -> bool:
        """Whether ``matrix`` turns what the base has stored as (d_in, d_out), without reading it."""
        return self._matrices.transposed(self._found(target), shape)

    def require_fit(self, target: Target, shape: tuple[int, int]) -> None:
        """Refuse an update that ``matrix`` would have no matrix of this shape for, without reading one.

        Raises
        ------
        BaseWeightsError
            If the base lacks it, or its shape does not fit.
        """
        self._matrices.require_fit(self._found(target), shape)

    def matrix(self, target: Target, shape: tuple[int, int] | None = None) -> Tensor:
        """The base matrix an update acts on.

        Parameters
        ----------
        target : Target
            From ``adapter.targets[module]``.
        shape : (int, int), optional
            Shape of the update, which the matrix must have. An embedding or head whose vocabulary has another size
            in the base comes with the update's: the first rows, or rows of zeros for tokens that the base lacks,
            and a note.

        Returns
        -------
        Tensor, shape (d_out, d_in)
            In the stored dtype, or that of dequantisation; convolution kernels unfolded to (out, in·k·k).

        Raises
        ------
        BaseWeightsError
            If the base lacks it, its shape does not fit, or it is stored in a quantisation that is not read.
        CheckpointError
            If its file cannot be read any more.
        """
        return self._matrices.matrix(self._found(target), shape)

    def _found(self, target: Target) -> Target:
        return replace(target, tensor=self.find(target.tensor))


def _plain_names(checkpoint: Dequantised, source: str) -> dict[str, str]:
    """Names without what wrappers add, to the checkpoint's."""
    names: dict[str, str] = {}
    for name in checkpoint:
        plain = plain_name(name)
        if plain in names:
            raise BaseWeightsError(
                f"{source}: {names[plain]!r} and {name!r}: expected one tensor {plain!r}, these are two but for what "
                "wrappers add to names. Give the weights of one of them."
            )
        names[plain] = name
    return names
