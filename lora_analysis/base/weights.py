"""``BaseWeights``: the matrices of a base, read one at a time, always oriented (d_out, d_in)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.base.composite import Measured, measured, size_report
from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.base.layouts import Part, Recipe, is_stack
from lora_analysis.base.names import one_change_of_prefix, plain_name
from lora_analysis.base.orientation import ProvenTransposed, Slices, slices
from lora_analysis.base.quantised import Dequantised
from lora_analysis.base.stores import Stores, stored_as
from lora_analysis.base.vocabulary import is_vocabulary, matched_rows, vocabulary_axis
from lora_analysis.checkpoint.protocol import Checkpoint, rows
from lora_analysis.errors import BaseWeightsError

_DEQUANTISED = "dequantised when read: the rounded weights, not the original ones"


class BaseWeights:
    """The matrices of a base model, read one at a time.

    Made by ``load_base``. It pickles as the source to open again, or with its tensors when they were given
    in memory.

    Attributes
    ----------
    source : str
        Path, hub id or URL, or a name for what was given in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        source: str,
        reopen: Callable[[], tuple[Any, ...]],
        device: str | torch.device = "cpu",
        stored: Mapping[str, bool] | None = None,
    ) -> None:
        self.source = source
        self._measured: Measured = measured(checkpoint)
        readable = Dequantised(self._measured, source)
        self._checkpoint = readable
        self._reopen = reopen
        self._device = torch.device(device)
        self._names = {plain_name(name): name for name in readable}
        self._stores = Stores(self._names, checkpoint if isinstance(checkpoint, GGUFWeights) else None)
        self._stored = stored
        self._proven = ProvenTransposed(self._names, lambda name: readable.shape(self._names[name]))
        kinds = checkpoint.kinds if isinstance(checkpoint, GGUFWeights) else readable.kinds
        self._notes = {f"{count} tensors are {kind}, {_DEQUANTISED}.": None for kind, count in sorted(kinds.items())}

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

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: of a remote base all that came over the network, of another the tensors that were read."""
        return self._measured.bytes_read

    @property
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
        return size_report(self.bytes_read, self.bytes_total)

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
        fitting = one_change_of_prefix(wanted, self._stores.has, self._names, stored_as)
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
        recipe = self._stores.recipe(self.find(target.tensor), target.expert)
        if recipe is None:
            return False
        part = recipe.parts[0]
        d_out, *rest = self._checkpoint.shape(self._names[part.tensor])[part.expert is not None :]
        whole = shape if len(recipe.parts) == 1 else None
        placed = self._placed(part, target, (d_out, torch.Size(rest).numel()), whole)
        return placed is not None and placed[0]

    def require_fit(self, target: Target, shape: tuple[int, int]) -> None:
        """Refuse an update that ``matrix`` would have no matrix of this shape for, without reading one.

        Raises
        ------
        BaseWeightsError
            If the base lacks it, or its shape does not fit.
        """
        recipe = self._recipe(target)
        several = len(recipe.parts) > 1
        whole = target.rows is None and target.columns is None
        inner = shape if not several else (shape[0] // len(recipe.parts), shape[1]) if whole else None
        for part in recipe.parts:
            d_out, *rest = self._checkpoint.shape(self._names[part.tensor])[part.expert is not None :]
            stored = (d_out, torch.Size(rest).numel())
            placed = self._placed(part, replace(target, rows=None, columns=None) if several else target, stored, inner)
            resized = (
                whole and is_vocabulary(part.tensor) and vocabulary_axis(stored, shape, target.transposed) is not None
            )
            if placed is None and not resized:
                raise self._does_not_fit(part.tensor, target, stored, inner)

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
        """
        recipe = self._recipe(target)
        if len(recipe.parts) == 1:
            return self._part(recipe.parts[0], target, shape)
        whole = target.rows is None and target.columns is None
        inner = (shape[0] // len(recipe.parts), shape[1]) if shape is not None and whole else None
        parts = [self._part(part, replace(target, rows=None, columns=None), inner) for part in recipe.parts]
        matrix = torch.cat(parts)
        found = slices(target, (matrix.shape[0], matrix.shape[1]), shape, None)
        if found is None:
            raise self._does_not_fit(target.tensor, target, tuple(matrix.shape), shape)
        return matrix[slice(*found[0]), slice(*found[1])]

    def _recipe(self, target: Target) -> Recipe:
        name = self.find(target.tensor)
        recipe = self._stores.recipe(name, target.expert)
        if recipe is None:
            number = "" if target.expert is None else f" with number {target.expert}"
            raise BaseWeightsError(f"{self.source}: {name!r}: expected a stack of experts{number}, found others.")
        return recipe

    def _part(self, part: Part, target: Target, shape: tuple[int, int] | None) -> Tensor:
        raw = self._names[part.tensor]
        self._checkpoint.require_readable(raw)
        stored = self._checkpoint.shape(raw)
        where = f"{self.source}: {part.tensor!r}"
        if part.expert is not None:
            if len(stored) != 3 or not 0 <= part.expert < stored[0]:
                raise BaseWeightsError(f"{where}: expected a stack of experts with number {part.expert}, got {stored}.")
            stored = stored[1:]
        if len(stored) < 2:
            raise BaseWeightsError(f"{where}: expected a matrix, got shape {stored}.")
        flat = (stored[0], torch.Size(stored[1:]).numel())
        placed = self._placed(part, target, flat, shape)
        if placed is None:
            return self._of_a_vocabulary(part, target, flat, shape)
        flip, ((top, bottom), (left, right)) = placed
        if part.expert is None:
            weight = self._checkpoint[raw]
        else:
            weight = rows(self._checkpoint, raw, part.expert, part.expert + 1)[0]
        weight = weight.detach().to(self._device).flatten(1)
        return (weight.mT if flip else weight)[top:bottom, left:right]

    def _placed(
        self, part: Part, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None
    ) -> tuple[bool, Slices] | None:
        """Whether a weight is turned, and the slice of it then; None where no orientation fits."""
        fitting = {
            flip: found
            for flip in (False, True)
            if (found := slices(target, stored[::-1] if flip else stored, shape, part.block)) is not None
        }
        if len(fitting) < 2:
            return next(iter(fitting.items()), None)
        if self._stored is not None and part.tensor in self._stored:
            flip = self._stored[part.tensor]
        else:
            flip = target.transposed or self._proven(part.tensor)
        return flip, fitting[flip]

    def _of_a_vocabulary(
        self, part: Part, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None
    ) -> Tensor:
        whole = target.rows is None and target.columns is None and part.expert is None and part.block is None
        axis = None
        if shape is not None and whole and is_vocabulary(part.tensor):
            axis = vocabulary_axis(stored, shape, target.transposed)
        if shape is None or axis is None:
            raise self._does_not_fit(part.tensor, target, stored, shape)
        count = min(shape[axis], stored[0])
        taken = rows(self._checkpoint, self._names[part.tensor], 0, count).detach().to(self._device)
        other = "the rest of the base's is left out" if stored[0] > shape[axis] else "the others' weights are zeros"
        note = (
            f"{part.tensor!r}: the base has {stored[0]} tokens, the update {shape[axis]}: the first {count} are "
            f"matched row by row, {other}."
        )
        self._notes[note] = None
        matrix = matched_rows(taken, shape[axis])
        return matrix if axis == 0 else matrix.mT

    def _does_not_fit(
        self, name: str, target: Target, stored: tuple[int, ...], shape: tuple[int, int] | None
    ) -> BaseWeightsError:
        wanted = "x".join(map(str, shape)) if shape else "the target's slice"
        part = "" if target.rows is None else f" in rows {target.rows[0]}:{target.rows[1]}"
        return BaseWeightsError(
            f"{self.source}: {name!r}: expected {wanted}{part}, got {stored[0]}x{stored[1]}. "
            "Is this the model the adapter was trained on?"
        )
