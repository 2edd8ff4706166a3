"""What chance alone gives: similarity and principal angles of independent random subspaces.

Conventions
-----------
The null is a pair of independent, uniformly distributed (Haar) flags in dimension d, of lengths m and n:
what two trained updates would show if their singular vectors had nothing to do with each other. Rejecting
it means "not independent random", nothing more: a shared initialisation does it, and so do inputs that
hardly vary. ``N = ||A_i.T @ B_j||_F²`` is the unnormalised overlap, ``phi = N / min(i, j)``; i and j count
from 1.

Moments are exact everywhere. The distribution is exact where one subspace, or the complement of one, is a
line or nothing::

    i = d or j = d           N = min(i, j)
    min(i, j) = 1            N ~ Beta(max(i, j)/2, (d - max(i, j))/2)
    max(i, j) = d - 1        N - (i + j - d) ~ Beta((d - min(i, j))/2, min(i, j)/2)

and elsewhere it is sampled, exactly and at a cost that does not depend on d.

Measures
--------
``similarity_null`` (a ``SimilarityNull``), ``largest_cosine_null``.

References
----------
Hu et al. 2021, arXiv:2106.09685, figure 4 (right), shows one draw of this null.
Muirhead, *Aspects of Multivariate Statistical Theory*, sections 3.2 (Bartlett) and 3.3 (matrix Beta).
Absil, Edelman and Koev, *On the largest principal angle between random subspaces*, Linear Algebra Appl.
414, 2006. The mean is E[P] = (i/d) I for the projection P on a random i-dimensional subspace; the variance
follows from the second moments of P in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from scipy import special
from torch import Tensor

_KEPT = 2**23
"""Numbers (64 MB of float64) of sorted draws a null keeps; requests beyond are redrawn block by block."""

_CHUNK = 2**21
"""Numbers (16 MB of float64) drawn at a time."""


def similarity_null(d: int, m: int, n: int, *, draws: int = 2000, seed: int = 0) -> SimilarityNull:
    """Distribution of the whole phi grid for two independent random subspaces.

    Parameters
    ----------
    d : int
        Dimension of the space: d_in for right singular vectors, d_out for left ones.
    m, n : int
        Numbers of columns of the two bases.
    draws : int
        Monte Carlo draws, where the distribution has no closed form; p is at least 1 / (draws + 1) there.
    seed : int
        Of the null's own generator.

    Returns
    -------
    SimilarityNull
        Made at once; it samples only when a cell that needs it is asked for.

    Raises
    ------
    ValueError
        If d, draws < 1, or m or n is negative or above d.

    Examples
    --------
    >>> null = similarity_null(384, 8, 64)
    >>> round(float(null.mean[7, 63]), 4), round(float(null.sd[7, 63]), 4)
    (0.1667, 0.0094)
    >>> null.p(torch.tensor([0.02, 0.02]), cells=[(1, 1), (1, 8)]).round(decimals=3).tolist()
    [0.005, 0.468]
    """
    return SimilarityNull(d, m, n, draws, seed)


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityNull:
    """The null of one phi grid: moments, tail probabilities and quantiles, by cell.

    Methods take a whole grid, shape (m, n), or, with ``cells=[(i, j), ...]``, one value per listed cell. What
    a cell gives does not depend on which others are asked for. Draws are kept, sorted, for the cells that were
    asked for (at most 64 MB), so that one null serves every pair of modules of its shape.

    Parameters
    ----------
    d, m, n, draws, seed : int
        See ``similarity_null``.
    """

    d: int
    m: int
    n: int
    draws: int
    seed: int
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)
    """At most one pair: flat indices of cells, ascending, and their sorted draws of N, (cells, draws)."""

    def __post_init__(self) -> None:
        _require_dimensions(self.d, self.m, self.n, self.draws)

    @property
    def mean(self) -> Tensor:
        """Expected phi, max(i, j) / d, shape (m, n)."""
        i, j = self._grid()
        return torch.maximum(i, j) / self.d

    @property
    def sd(self) -> Tensor:
        """Standard deviation of phi, shape (m, n).

        ``sqrt(2 i j (d - i) (d - j) / (d² (d - 1) (d + 2))) / min(i, j)``.
        """
        i, j = self._grid()
        d = self.d
        # In one dimension every cell has i = d, and the variance is 0 whatever it is divided by.
        variance = 2 * i * j * (d - i) * (d - j) / (d**2 * max(d - 1, 1) * (d + 2))
        return variance.sqrt() / torch.minimum(i, j)

    @property
    def exact(self) -> Tensor:
        """Where p and quantiles are closed forms and not Monte Carlo, bool, shape (m, n)."""
        i, j = self._grid()
        return (torch.minimum(i, j) == 1) | (torch.maximum(i, j) >= self.d - 1)

    def z(self, phi: Tensor, *, cells: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Standard scores, ``(phi - mean) / sd``.

        Parameters
        ----------
        phi : Tensor, shape (m, n), or (len(cells),)
            Observed similarities.
        cells : sequence of (int, int), optional
            Pairs (i, j), from 1.

        Returns
        -------
        Tensor, shape of ``phi``
            Dimensionless; NaN where i or j is 1, since the null is strongly skewed there, and where its sd
            is 0.

        Raises
        ------
        ValueError
            If the shape or a cell does not fit, or a similarity is outside [0, 1].
        """
        index = self._index(cells)
        observed = self._observed(phi, cells)
        i, j = self._sizes(index)
        mean, sd = self.mean.flatten()[index], self.sd.flatten()[index]
        scores = torch.where((torch.minimum(i, j) > 1) & (sd > 0), (observed - mean) / sd, math.nan)
        return scores.reshape(phi.shape)

    def p(self, phi: Tensor, *, cells: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Upper tail probabilities: how often chance gives a similarity at least as high.

        Exact where ``exact``; elsewhere ``(1 + #{draws >= phi}) / (draws + 1)``, which is a valid p-value
        for any number of draws.

        Parameters
        ----------
        phi : Tensor, shape (m, n), or (len(cells),)
            Observed similarities.
        cells : sequence of (int, int), optional
            Pairs (i, j), from 1.

        Returns
        -------
        Tensor, shape of ``phi``
            Dimensionless, in [0, 1]; 1 where i or j is d; NaN where phi is NaN.

        Raises
        ------
        ValueError
            If the shape or a cell does not fit, or a similarity is outside [0, 1].

        References
        ----------
        Phipson and Smyth, *Permutation p-values should never be zero*, arXiv:1603.05766.
        """
        index = self._index(cells)
        observed = self._observed(phi, cells)
        i, j = self._sizes(index)
        overlap = observed * torch.minimum(i, j)
        offset, alpha, beta = self._closed_form(index)
        exceeding = special.betaincc(alpha.numpy(), beta.numpy(), (overlap - offset).clamp(0.0, 1.0).numpy())
        result = torch.from_numpy(exceeding).reshape(overlap.shape)
        result = torch.where(torch.maximum(i, j) == self.d, 1.0, result)
        sampled = (~self.exact.flatten()[index]).nonzero().flatten()
        if sampled.numel():
            counts = self._counts(index[sampled], overlap[sampled])
            result[sampled] = (1.0 + counts.double()) / (self.draws + 1.0)
        return torch.where(observed.isnan(), math.nan, result).reshape(phi.shape)

    def quantile(self, q: float, *, cells: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """The similarity that chance stays below with probability q.

        Exact where ``exact``; elsewhere the sample quantile, linear between draws.

        Parameters
        ----------
        q : float
            Probability, in [0, 1].
        cells : sequence of (int, int), optional
            Pairs (i, j), from 1.

        Returns
        -------
        Tensor, shape (m, n), or (len(cells),)
            Dimensionless, in [0, 1].

        Raises
        ------
        ValueError
            If q is outside [0, 1] or a cell does not fit.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q: expected a probability in [0, 1], got {q}.")
        index = self._index(cells)
        i, j = self._sizes(index)
        smaller = torch.minimum(i, j)
        offset, alpha, beta = self._closed_form(index)
        overlap = offset + torch.from_numpy(special.betaincinv(alpha.numpy(), beta.numpy(), q)).reshape(i.shape)
        overlap = torch.where(torch.maximum(i, j) == self.d, smaller, overlap)
        sampled = (~self.exact.flatten()[index]).nonzero().flatten()
        for block in torch.split(sampled, max(1, _KEPT // self.draws)):
            overlap[block] = self._sample_quantile(index[block], q)
        return (overlap / smaller).reshape(self._shape(cells))

    def _grid(self) -> tuple[Tensor, Tensor]:
        i = torch.arange(1, self.m + 1, dtype=torch.float64)
        j = torch.arange(1, self.n + 1, dtype=torch.float64)
        grid_i, grid_j = torch.meshgrid(i, j, indexing="ij")
        return grid_i, grid_j

    def _index(self, cells: Sequence[tuple[int, int]] | None) -> Tensor:
        """Flat indices of the cells asked for."""
        if cells is None:
            return torch.arange(self.m * self.n)
        for i, j in cells:
            if not (1 <= i <= self.m and 1 <= j <= self.n):
                raise ValueError(f"cells: expected 1 <= i <= {self.m} and 1 <= j <= {self.n}, got ({i}, {j}).")
        return torch.tensor([(i - 1) * self.n + j - 1 for i, j in cells], dtype=torch.int64)

    def _sizes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        i, j = self._grid()
        return i.flatten()[index], j.flatten()[index]

    def _shape(self, cells: Sequence[tuple[int, int]] | None) -> tuple[int, ...]:
        return (self.m, self.n) if cells is None else (len(cells),)

    def _observed(self, phi: Tensor, cells: Sequence[tuple[int, int]] | None) -> Tensor:
        """The observed similarities, flat, float64, on the CPU."""
        if tuple(phi.shape) != self._shape(cells):
            raise ValueError(
                f"phi: expected shape {self._shape(cells)}, got {tuple(phi.shape)}. Pass the whole grid, or "
                "one similarity per cell of cells=."
            )
        observed = phi.detach().double().cpu().flatten()
        outside = (observed < 0.0) | (observed > 1.0 + 1e-9)
        if bool(outside.any()):
            raise ValueError(f"phi: expected similarities in [0, 1], got {float(observed[outside][0])}.")
        return observed

    def _closed_form(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``N = offset + Beta(alpha, beta)`` for each cell; without meaning where there is none."""
        i, j = self._sizes(index)
        smaller, larger = torch.minimum(i, j), torch.maximum(i, j)
        line = smaller == 1
        offset = torch.where(line, 0.0, i + j - self.d)
        alpha = torch.where(line, larger, self.d - smaller) / 2
        beta = torch.where(line, self.d - larger, smaller) / 2
        # A parameter of 0 only occurs where a subspace is the whole space and N is no random number.
        return offset, alpha.clamp(min=0.5), beta.clamp(min=0.5)

    def _counts(self, index: Tensor, overlap: Tensor) -> Tensor:
        """How many draws of each cell reach the observed overlap."""
        if index.numel() * self.draws <= _KEPT:
            below = torch.searchsorted(self._sorted_draws(index), overlap[:, None].contiguous())
            return self.draws - below.flatten()
        counts = torch.zeros(index.numel(), dtype=torch.int64)
        for overlaps in self._sample():
            counts += (overlaps[:, index] >= overlap).sum(0)
        return counts

    def _sample_quantile(self, index: Tensor, q: float) -> Tensor:
        """The q-quantile of the draws of each cell."""
        draws = self._sorted_draws(index)
        position = q * (self.draws - 1)
        below, above = math.floor(position), math.ceil(position)
        return torch.lerp(draws[:, below], draws[:, above], position - below)

    def _sorted_draws(self, index: Tensor) -> Tensor:
        """Sorted draws of N for each of the cells, shape (len(index), draws)."""
        wanted, place = torch.unique(index, return_inverse=True)
        kept = self._kept[:1]
        if kept:
            cells, draws = kept[0]
            row = torch.searchsorted(cells, wanted).clamp(max=cells.numel() - 1)
            if torch.equal(cells[row], wanted):
                # Usually the same cells again, and then no copy.
                return draws if torch.equal(cells, index) else draws[row[place]]
            union = torch.unique(torch.cat([cells, wanted]))
            if union.numel() * self.draws <= _KEPT:
                wanted, place = union, torch.searchsorted(union, index)
            # Two sets of draws at a time would be twice the memory.
            self._kept.clear()
            del kept, draws
        draws = torch.empty(wanted.numel(), self.draws, dtype=torch.float64)
        start = 0
        for overlaps in self._sample():
            draws[:, start : start + overlaps.shape[0]] = overlaps[:, wanted].mT
            start += overlaps.shape[0]
        draws.numpy().sort(axis=1)  # in place, where torch's sort would also make as many indices
        self._kept[:] = [(wanted, draws)]
        return draws if torch.equal(wanted, index) else draws[place]

    def _sample(self) -> Iterator[Tensor]:
        """Draws of the whole grid of N, chunk by chunk, shape (chunk, m * n)."""
        for products in _haar_products(self.d, self.m, self.n, self.draws, self.seed):
            yield products.square_().cumsum(1).cumsum(2).flatten(1)


def largest_cosine_null(d: int, m: int, n: int, *, draws: int = 2000, seed: int = 0) -> Tensor:
    """Sample of the largest principal cosine between two independent random subspaces.

    Cosines of two updates above its 99 % quantile, ``largest_cosine_null(d, m, n).quantile(0.99)``, count
    the dimensions they share; conservatively so, as each is held against the largest.

    Parameters
    ----------
    d : int
        Dimension of the space.
    m, n : int
        Dimensions of the subspaces, at least 1.
    draws : int
        Size of the sample.
    seed : int
        Of the function's own generator.

    Returns
    -------
    Tensor, shape (draws,)
        Dimensionless, ascending, in [0, 1]; all 1 where m + n > d, for the subspaces must intersect. Near
        ``sqrt(a (1 - b)) + sqrt(b (1 - a))`` with a = m/d and b = n/d, the edge of the Jacobi ensemble.

    Raises
    ------
    ValueError
        If draws < 1, or m or n is below 1 or above d.

    References
    ----------
    Absil, Edelman and Koev 2006.

    Examples
    --------
    >>> round(float(largest_cosine_null(4096, 8, 64, draws=200).mean()), 2)
    0.16
    """
    _require_dimensions(d, m, n, draws)
    if min(m, n) < 1:
        raise ValueError(f"m, n: expected subspaces of dimension 1 at least, got {m} and {n}.")
    largest = [torch.linalg.svdvals(products)[:, 0] for products in _haar_products(d, m, n, draws, seed)]
    return torch.cat(largest).clamp_(max=1.0).sort().values


def _require_dimensions(d: int, m: int, n: int, draws: int) -> None:
    if d < 1 or not (0 <= m <= d and 0 <= n <= d):
        raise ValueError(
            f"d, m, n: expected bases of at most d columns in dimension d >= 1, got d={d}, m={m}, n={n}. "
            "d is the number of rows of the bases."
        )
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}.")


def _haar_products(d: int, m: int, n: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Draws of ``A.T @ B`` for independent Haar bases A (d, m) and B (d, n), in chunks (chunk, m, n).

    The product is distributed as the top-left block of a Haar matrix, and that as the top q rows of the Q of
    a (d, p) Gaussian, for p <= q the two sizes. The other d - q rows matter only by their own triangular
    factor, whose entries are independent (Bartlett), so that d enters as a parameter and not as a size.
    """
    p, q = min(m, n), max(m, n)
    generator = torch.Generator().manual_seed(seed)
    bartlett = p <= d - q
    rows = q + (p if bartlett else d - q)
    chunk = max(1, _CHUNK // max(1, rows * p, m * n))
    # Chi-squared with d - q, d - q - 1, ... degrees of freedom, by inversion.
    halves = (d - q - torch.arange(p, dtype=torch.float64)) / 2
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        gaussian = torch.randn(size, rows, p, dtype=torch.float64, generator=generator)
        if bartlett:
            uniform = torch.rand(size, p, dtype=torch.float64, generator=generator)
            chi_squared = 2 * torch.from_numpy(special.gammaincinv(halves.numpy(), uniform.numpy()))
            triangle = gaussian[:, q:].triu_(1)
            triangle.diagonal(dim1=1, dim2=2).copy_(chi_squared.sqrt())
        block = torch.linalg.qr(gaussian).Q[:, :q]
        # Column signs of Q are LAPACK's choice; squares and singular values do not see them.
        yield block.mT if m < n else block
