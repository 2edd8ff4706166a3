"""Where a base keeps a matrix: under its name, by a layout's rule, or under GGUF's name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lora_analysis.base.gguf import GGUFWeights
from lora_analysis.base.layouts import FUSED, Part, Recipe, is_stack, recipes

_UNKNOWN_LAYOUT = (
    "It may be part of the fused {name!r}, whose layout differs between models and is not told by names and shapes. "
    "Give a base that stores it apart."
)


class Stores:
    """The ways in which one base stores matrices.

    Parameters
    ----------
    names : collection of str
        The base's own tensors.
    gguf : GGUFWeights, optional
        The file, if that is what it lies in.
    """

    def __init__(self, names: Collection[str], gguf: GGUFWeights | None) -> None:
        self._names = names
        self._gguf = gguf

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor, stored in whichever way."""
        return self.recipe(tensor, 0 if is_stack(tensor) else None) is not None

    def recipe(self, tensor: str, expert: int | None) -> Recipe | None:
        """The base's own tensors, or blocks of them, that give a matrix; None if it lacks it."""
        own = self._place(Part(tensor, expert=expert))
        if own is not None:
            return Recipe((own,))
        for recipe in recipes(tensor, expert):
            places = [self._place(part) for part in recipe.parts]
            beside = recipe.beside is None or self._place(Part(recipe.beside)) is not None
            without = recipe.without is None or self._place(Part(recipe.without)) is None
            if beside and without and all(place is not None for place in places):
                return Recipe(tuple(place for place in places if place is not None))
        return None

    def hint(self, missing: str) -> str:
        """What to make of a tensor that is not there."""
        owner = missing.removesuffix(".weight").rpartition(".")[0].split(".")[-1]
        for name in self._names if owner else ():
            components = name.removesuffix(".weight").split(".")
            if components[-1] in FUSED and components[-2:-1] == [owner]:
                return _UNKNOWN_LAYOUT.format(name=name)
        return "Is this the model the adapter was trained on?"

    def _place(self, part: Part) -> Part | None:
        if part.tensor in self._names:
            return part
        place = self._gguf.place(part.tensor) if self._gguf is not None else None
        if place is None or (place.expert is not None and part.expert is not None):
            return None
        return replace(part, tensor=place.tensor, expert=part.expert if place.expert is None else place.expert)


def stored_as(tensor: str) -> list[str]:
    """The names, besides its own, of tensors that a base may hold instead of one."""
    return [recipe.parts[0].tensor for recipe in recipes(tensor, 0 if is_stack(tensor) else None)]
