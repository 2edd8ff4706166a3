"""From a target to a matrix: the tensors of a base put together, oriented and cut as an update needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.base.layouts import Part, Recipe, is_stack
from lora_analysis.base.orientation import ProvenTransposed, Slices, slices
from lora_analysis.base.quantised import Dequantised
from lora_analysis.base.stores import Stores
from lora_analysis.base.vocabulary import is_vocabulary, matched_rows, vocabulary_axis
from lora_analysis.checkpoint.protocol import rows
from lora_analysis.errors import BaseWeightsError


class Matrices:
    """The matrices of a checkpoint, whose targets name tensors as the base does.

    Parameters
    ----------
    checkpoint : Dequantised
    names : mapping of str to str
        What the base calls its tensors, to the checkpoint's names.
    stores : Stores
        The ways in which it stores matrices.
    source : str
        What to call it in messages.
    stored_transposed : mapping of str to bool
        What is known of how tensors are stored.
    device : torch.device
        Where matrices are put.
    note : callable
        Told of what was done to a matrix.

    Raises
    ------
    BaseWeightsError
        By its methods, if the base lacks a matrix, its shape does not fit, or it is of a quantisation not read.
    """

    def __init__(
        self,
        checkpoint: Dequantised,
        names: Mapping[str, str],
        stores: Stores,
        *,
        source: str,
        stored_transposed: Mapping[str, bool],
        device: torch.device,
        note: Callable[[str], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._stores = stores
        self._source = source
        self._stored_transposed = stored_transposed
        self._proven = ProvenTransposed(names, lambda name: checkpoint.shape(names[name]))
        self._device = device
        self._note = note

    def transposed(self, target: Target, shape: tuple[int, int] | None) -> bool:
        """Whether ``matrix`` turns what is stored as (d_in, d_out)."""
        recipe = self._stores.recipe(target.tensor, target.expert)
        if recipe is None:
            return False
        part = recipe.parts[0]
        placed = self._placed(part, target, self._flat(part), shape if len(recipe.parts) == 1 else None)
        return placed is not None and placed[0]

    def require_fit(self, target: Target, shape: tuple[int, int]) -> None:
        """Refuse an update that ``matrix`` would have no matrix of this shape for."""
        recipe = self._recipe(target)
        inner_target, inner = _of_each_part(recipe, target, shape)
        for part in recipe.parts:
            stored = self._flat(part)
            if self._placed(part, inner_target, stored, inner) is None and _tokens(part, target, stored, shape) is None:
                raise self._does_not_fit(part.tensor, target, stored, inner)

    def matrix(self, target: Target, shape: tuple[int, int] | None) -> Tensor:
        """The matrix (d_out, d_in) that an update of this shape acts on."""
        recipe = self._recipe(target)
        inner_target, inner = _of_each_part(recipe, target, shape)
        parts = [self._part(part, inner_target, inner) for part in recipe.parts]
        if len(parts) == 1:
            return parts[0]
        matrix = torch.cat(parts)
        found = slices(target, (matrix.shape[0], matrix.shape[1]), shape, None)
        if found is None:
            raise self._does_not_fit(target.tensor, target, (matrix.shape[0], matrix.shape[1]), shape)
        return matrix[slice(*found[0]), slice(*found[1])]

    def _recipe(self, target: Target) -> Recipe:
        recipe = self._stores.recipe(target.tensor, target.expert)
        if recipe is None:
            number = "" if target.expert is None else f" with number {target.expert}"
            raise BaseWeightsError(
                f"{self._source}: {target.tensor!r}: expected a stack of experts{number}, found others."
            )
        return recipe

    def _flat(self, part: Part) -> tuple[int, int]:
        """The shape of a part as a matrix: of one expert of a stack, kernels unfolded."""
        raw = self._names[part.tensor]
        self._checkpoint.require_readable(raw)
        stored = self._checkpoint.shape(raw)
        where = f"{self._source}: {part.tensor!r}"
        if part.expert is not None:
            if len(stored) != 3 or not 0 <= part.expert < stored[0]:
                raise BaseWeightsError(f"{where}: expected a stack of experts with number {part.expert}, got {stored}.")
            stored = stored[1:]
        elif len(stored) == 3 and is_stack(part.tensor):
            raise BaseWeightsError(f"{where}: expected the number of an expert, it is a stack of {stored[0]}.")
        if len(stored) < 2:
            raise BaseWeightsError(f"{where}: expected a matrix, got shape {stored}.")
        return stored[0], prod(stored[1:])

    def _part(self, part: Part, target: Target, shape: tuple[int, int] | None) -> Tensor:
        flat = self._flat(part)
        placed = self._placed(part, target, flat, shape)
        if placed is None:
            return self._of_a_vocabulary(part, target, flat, shape)
        flip, ((top, bottom), (left, right)) = placed
        raw = self._names[part.tensor]
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
        if part.tensor in self._stored_transposed:
            flip = self._stored_transposed[part.tensor]
        else:
            flip = target.transposed or self._proven(part.tensor)
        return flip, fitting[flip]

    def _of_a_vocabulary(
        self, part: Part, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None
    ) -> Tensor:
        axis = _tokens(part, target, stored, shape)
        if shape is None or axis is None:
            raise self._does_not_fit(part.tensor, target, stored, shape)
        count = min(shape[axis], stored[0])
        taken = rows(self._checkpoint, self._names[part.tensor], 0, count).detach().to(self._device)
        other = "the rest of the base's is left out" if stored[0] > shape[axis] else "the others' weights are zeros"
        self._note(
            f"{part.tensor!r}: the base has {stored[0]} tokens, the update {shape[axis]}: the first {count} are "
            f"matched row by row, {other}."
        )
        matrix = matched_rows(taken, shape[axis])
        return matrix if axis == 0 else matrix.mT

    def _does_not_fit(
        self, name: str, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None
    ) -> BaseWeightsError:
        wanted = "x".join(map(str, shape)) if shape else "the target's slice"
        part = "" if target.rows is None else f" in rows {target.rows[0]}:{target.rows[1]}"
        return BaseWeightsError(
            f"{self._source}: {name!r}: expected {wanted}{part}, got {stored[0]}x{stored[1]}. "
            "Is this the model the adapter was trained on?"
        )


def _of_each_part(
    recipe: Recipe, target: Target, shape: tuple[int, int] | None
) -> tuple[Target, tuple[int, int] | None]:
    """What is taken of each part: all of it where several give the matrix, which is then cut."""
    if len(recipe.parts) == 1:
        return target, shape
    whole = target.rows is None and target.columns is None
    inner = (shape[0] // len(recipe.parts), shape[1]) if shape is not None and whole else None
    return replace(target, rows=None, columns=None), inner


def _tokens(part: Part, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None) -> int | None:
    """The axis of an update that runs over the tokens of a vocabulary of another size, if it is one's."""
    whole = target.rows is None and target.columns is None and part.expert is None and part.block is None
    if shape is None or not whole or not is_vocabulary(part.tensor):
        return None
    return vocabulary_axis(stored, shape, target.transposed)
