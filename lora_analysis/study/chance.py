"""The nulls of a study's tables, each made once for a shape.

Values
------
``Nulls``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lora_analysis.measures.null import SimilarityNull, largest_cosine_null, similarity_null


@dataclass(frozen=True, slots=True, eq=False)
class Nulls:
    """What chance gives, by shape; one object may serve several studies.

    Parameters
    ----------
    draws, seed : int
        Of what has no closed form.
    """

    draws: int = 2000
    seed: int = 0
    _grids: dict[tuple[int, int, int], SimilarityNull] = field(default_factory=dict, init=False, repr=False)
    _largest: dict[tuple[int, int, int], npt.NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)
    _edges: dict[tuple[int, int, int], float] = field(default_factory=dict, init=False, repr=False)

    def similarity(self, d: int, m: int, n: int) -> SimilarityNull:
        """That of a grid of phi."""
        if (d, m, n) not in self._grids:
            self._grids[d, m, n] = similarity_null(d, m, n, draws=self.draws, seed=self.seed)
        return self._grids[d, m, n]

    def p(self, d: int, m: int, n: int, phi: npt.ArrayLike, cell: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Upper-tail p of one cell of many grids of one shape."""
        values = torch.tensor(np.asarray(phi, dtype=float))
        found: npt.NDArray[np.float64] = self.similarity(d, m, n).p(values, cells=[cell] * len(values)).numpy()
        return found

    def z(self, d: int, m: int, n: int, phi: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Standard scores of the last cell of many grids of one shape."""
        values = torch.tensor(np.asarray(phi, dtype=float))
        found: npt.NDArray[np.float64] = self.similarity(d, m, n).z(values, cells=[(m, n)] * len(values)).numpy()
        return found

    def largest_cosine(self, d: int, m: int, n: int) -> npt.NDArray[np.float64]:
        """A sample of the largest principal cosine, ascending."""
        key = (d, min(m, n), max(m, n))
        if key not in self._largest:
            self._largest[key] = largest_cosine_null(*key, draws=self.draws, seed=self.seed).numpy()
        return self._largest[key]

    def shared_from(self, d: int, m: int, n: int) -> float:
        """The 99 % quantile of the largest principal cosine."""
        key = (d, min(m, n), max(m, n))
        if key not in self._edges:
            self._edges[key] = float(np.quantile(self.largest_cosine(*key), 0.99))
        return self._edges[key]
