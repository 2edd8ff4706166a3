"""How the factors begin.

Conventions
-----------
``kaiming`` (LoRA), ``gaussian`` and ``orthogonal`` draw A and set B to zero, so that an adapted model begins as its
base; of an embedding they draw B and set A to zero, as loralib and PEFT do. ``pissa`` takes both from the leading
singular triples of the weight, and the update is less the product it began with.

What is drawn comes from a generator that belongs to (seed, module name, r): the same on every device and dtype,
independent of the other modules and of the order of drawing, and never a prefix of the draw for a larger r. Two
adapters that share a seed share A at the start; comparisons of A between them say so little else that seeds must
differ.

Values
------
``Init``, ``initial_down``, ``initial_factors``, ``principal_factors``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1. The bound of A is loralib's and PEFT's,
``kaiming_uniform_(A, a=sqrt(5))``; ``gaussian`` is PEFT's, of standard deviation 1/r. PiSSA: Meng et al. 2024,
arXiv:2404.02948, eqs. 2-4.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa"]
"""How the factors begin; see ``initial_factors``."""


class _Drawn(TypedDict):
    dtype: torch.dtype
    device: str


_DRAWN: _Drawn = {"dtype": torch.float32, "device": "cpu"}
"""Whatever the defaults are: the generator draws other numbers elsewhere."""


def initial_down(d_in: int, *, r: int, module: str, seed: int) -> Tensor:
    """A at the start: uniform in ``±1/sqrt(d_in)``, a function of (seed, module, r) alone.

    The global random state is neither read nor advanced. torch's CPU generator takes 32 bits of seed,
    here the first of a SHA-256, so two given draws coincide with probability 2⁻³².

    Parameters
    ----------
    d_in, r : int
    module : str
        Name of the adapted module.
    seed : int

    Returns
    -------
    Tensor, shape (r, d_in)
        Float32, on the CPU.

    Examples
    --------
    >>> small, large = (initial_down(16, r=r, module="query", seed=0) for r in (2, 4))
    >>> bool((small == large[:2]).any())
    False
    """
    down = torch.empty(r, d_in, **_DRAWN)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=_generator(seed, module, r))
    return down


def initial_factors(
    d_out: int, d_in: int, *, r: int, module: str, seed: int, init: Init, random: str = "down"
) -> tuple[Tensor, Tensor]:
    """A and B at the start, one of them zero.

    Parameters
    ----------
    d_out, d_in, r : int
    module : str
    seed : int
    init : {"kaiming", "gaussian", "orthogonal"}
        Of A: uniform in ``±1/sqrt(d_in)``; normal of standard deviation 1/r; or orthonormal rows (columns, if r >
        d_in) of the norm that ``kaiming`` has in the mean, ``A Aᵀ = I/3``, so that one learning rate serves both.
        PEFT means something else by "orthogonal", two factors that are both nonzero with a product of zero.
    random : {"down", "up"}
        Which factor is drawn. B of an embedding is standard normal, or as A is.

    Returns
    -------
    A : Tensor, shape (r, d_in)
    B : Tensor, shape (d_out, r)
        Float32, on the CPU.

    Examples
    --------
    >>> A, B = initial_factors(5, 8, r=2, module="query", seed=0, init="orthogonal")
    >>> torch.allclose(3 * A @ A.T, torch.eye(2), atol=1e-6), int(B.count_nonzero())
    (True, 0)
    """
    width = d_in if random == "down" else d_out
    if init == "orthogonal":
        normal = torch.empty(r, width, **_DRAWN).normal_(generator=_generator(seed, module, r))
        tall = normal.mT if r <= width else normal
        Q, R = torch.linalg.qr(tall)
        Q = Q * R.diagonal().sign() / math.sqrt(3)  # which makes it uniform among the orthonormal ones
        drawn = Q.mT if r <= width else Q
    elif init == "gaussian" or random == "up":
        sd = 1.0 if random == "up" else 1 / r
        drawn = torch.empty(r, width, **_DRAWN).normal_(std=sd, generator=_generator(seed, module, r))
    else:
        drawn = initial_down(width, r=r, module=module, seed=seed)
    if random == "up":
        return torch.zeros(r, d_in, **_DRAWN), drawn.mT.contiguous()
    return drawn.contiguous(), torch.zeros(d_out, r, **_DRAWN)


def principal_factors(matrix: Tensor, *, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with ``scale · B @ A`` the best approximation of a matrix of rank r: PiSSA's start.

    Parameters
    ----------
    matrix : Tensor, shape (..., d_out, d_in)
    r : int
        At most the smaller side.
    scale : float
        Positive.

    Returns
    -------
    A : Tensor, shape (..., r, d_in)
    B : Tensor, shape (..., d_out, r)
        In the matrix's dtype, at least float32; each with singular values ``sqrt(σ / scale)``.

    Raises
    ------
    ValueError
        If r is larger than the matrix, or the scale not positive.
    """
    if r > min(matrix.shape[-2:]):
        raise ValueError(f"init='pissa': expected r of at most {min(matrix.shape[-2:])} singular values, got {r}.")
    if not scale > 0:
        raise ValueError(f"init='pissa': expected a positive alpha, got a scale of {scale}.")
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    root = (S[..., :r] / scale).sqrt()
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    A, B = root[..., :, None] * Vh[..., :r, :], U[..., :, :r] * root[..., None, :]
    return A.to(dtype), B.to(dtype)


def _generator(seed: int, module: str, r: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{module}\0{r}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
