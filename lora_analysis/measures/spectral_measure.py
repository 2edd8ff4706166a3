"""How a direction is spread over *all* singular vectors of W, without computing them.

Conventions
-----------
A vector y has a spectral measure under ``W W.T``: the mass ``<y, u_j>**2`` at each ``sigma_j**2``. N steps of
Lanczos from y give N-point quadratures of it, exact to degree 2N - 2: one for each value that the last diagonal
entry of the tridiagonal may be replaced by, the nodes moving along the line with it. By the inequalities of
Chebyshev, Markov and Stieltjes the mass below a node is at least the sum of the weights before it, and the mass up to
and including the node at most that sum and its own weight. Between two neighbouring nodes of *any* of the rules, the
mass is then at most the difference of these bounds, and so is that of any point there: a bound of
``max_j <y, u_j>**2`` that holds for any N, shrinks as N grows, and with enough rules comes close to the best that N
steps can give, the largest value of the Christoffel function. Equal singular values count as one.

With orthogonalisation against all earlier vectors the quadratures are accurate to rounding: a numerical certificate,
not interval arithmetic.

Measures
--------
``largest_cosine_bound``, ``reached_part``.

References
----------
Szegő, *Orthogonal Polynomials*, sections 3.4 and 3.41; Golub and Meurant, *Matrices, Moments and Quadrature*, 2010.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_analysis.measures.weight import weight_product

_RULES = 25
"""Quadratures that bound the masses, an odd number, so that Gauss's is among them; four times as many make the bound
of a random direction's cosine less than a tenth smaller."""

_CONDITION = 1e-3
"""Smallest singular value, relative to the largest, of a W whose range is certain."""

_ROWS = 1024
"""Rows of W turned to float64 at a time."""

_EVERY = 4
"""Steps between two looks at the bound."""

_ROUNDING = 1e-7
"""Added to a bound of a cosine: rounding of the weights (1e-15) under the square root, and some."""


def largest_cosine_bound(weight: Tensor, vectors: Tensor, *, enough: Tensor | float = 0.0, steps: int = 64) -> Tensor:
    """At most how much each vector has in common with any left singular vector of W, ``max_j |<y, u_j>|``.

    The left vectors of ``weight.mT`` are the right ones of W. Two passes over W a step.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    vectors : Tensor, shape (d_out, q)
        Unit columns, or what is left of such.
    enough : Tensor, shape (q,), or float
        A bound below this need not be improved.
    steps : int
        Lanczos steps at most.

    Returns
    -------
    Tensor, shape (q,)
        Dimensionless, float64, at most the vector's length, on the CPU. Where W has fewer columns than rows, the
        part of a vector that W does not reach counts as one more direction, and bounds from below what can be
        certified: take it off by ``reached_part``.

    Raises
    ------
    ValueError
        If the vectors are not of W's output side, or ``steps`` is less than 1.

    Examples
    --------
    >>> weight = torch.diag(torch.arange(64.0, 0.0, -1.0))
    >>> flat = torch.full((64, 1), 0.125)  # the same cosine, 0.125, with every singular vector
    >>> bool(0.125 < float(largest_cosine_bound(weight, flat)) < 0.3)
    True
    """
    if vectors.ndim != 2 or vectors.shape[0] != weight.shape[0]:
        raise ValueError(
            f"expected vectors of {weight.shape[0]} rows, the output side of W, got {tuple(vectors.shape)}."
        )
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    d, q = vectors.shape
    steps = min(steps, d)
    x = vectors.to(weight.device, torch.float64)
    lengths = x.norm(dim=0)
    x = x / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    history = torch.empty(q, steps, d, dtype=torch.float64, device=weight.device)
    diagonal, beside = (torch.zeros(q, steps, dtype=torch.float64, device=weight.device) for _ in range(2))
    target = torch.as_tensor(enough, dtype=torch.float64, device=weight.device).expand(q)
    bound: Tensor = lengths
    for step in range(steps):
        history[:, step] = x.mT
        image = weight_product(weight, weight_product(weight.mT, x))
        size = image.norm(dim=0)
        diagonal[:, step] = (x * image).sum(dim=0)
        past = history[:, : step + 1]
        rest = image.mT[:, :, None]
        for _ in range(2):  # twice is enough (Kahan)
            rest = rest - past.mT @ (past @ rest)
        rest = rest[:, :, 0].mT
        length = rest.norm(dim=0)
        # Below rounding the vectors so far span all that y is made of; what follows has weight 0.
        ended = length <= 1e-13 * size
        beside[:, step] = torch.where(ended, 0.0, length)
        x = torch.where(ended, 0.0, rest / torch.where(ended, 1.0, length))
        if (step + 1) % _EVERY == 0 or step + 1 == steps:
            bound = torch.minimum(bound, lengths * _heaviest(diagonal[:, : step + 1], beside[:, :step]))
            if bool((bound < target).all()):
                break
    return bound.cpu()


def reached_part(weight: Tensor, vectors: Tensor, sigma_max: float) -> tuple[Tensor, Tensor] | None:
    """What the columns of W span of each vector, ``W @ inv(W.T @ W) @ W.T @ y``, for a W of more rows than columns.

    Parameters
    ----------
    weight : Tensor, shape (d_out, d_in)
    vectors : Tensor, shape (d_out, q)
    sigma_max : float
        The largest singular value of W.

    Returns
    -------
    reached : Tensor, shape (d_out, q)
        Float64, on the CPU.
    slack : Tensor, shape (q,)
        Each cosine of a vector with a left singular vector of W is within this of that of its reached part.
    None
        Where W may have a singular value below a thousandth of its largest, so that this is not well determined.

    Examples
    --------
    >>> reached, slack = reached_part(torch.eye(3, 2), torch.full((3, 1), 0.5), 1.0)
    >>> reached.tolist(), slack.tolist()
    ([[0.5], [0.5], [0.0]], [0.0])
    """
    p = weight.shape[1]
    gram = torch.zeros(p, p, dtype=torch.float64, device=weight.device)
    for rows in torch.split(weight.detach(), _ROWS):
        block = rows.double()
        gram.addmm_(block.mT, block)
    floor = _CONDITION * sigma_max
    # Cholesky goes through only if the smallest eigenvalue of W.T @ W is above what is taken off.
    if int(torch.linalg.cholesky_ex(gram - floor**2 * torch.eye(p, dtype=gram.dtype, device=gram.device)).info):
        return None
    lower = torch.linalg.cholesky(gram)
    y = vectors.to(weight.device, torch.float64)
    reached, left_over = torch.zeros_like(y), y
    for _ in range(2):  # the second round takes off the rounding of the first
        reached = reached + weight_product(weight, torch.cholesky_solve(weight_product(weight.mT, left_over), lower))
        left_over = y - reached
    slack: Tensor = weight_product(weight.mT, left_over).norm(dim=0) / floor
    return reached.cpu(), slack.cpu()


def _heaviest(diagonal: Tensor, beside: Tensor) -> Tensor:
    """The root of the largest mass that one point can hold, by column, from the Lanczos tridiagonals."""
    q, n = diagonal.shape
    off = torch.diag_embed(beside, offset=1)
    jacobi = (torch.diag_embed(diagonal) + off + off.mT).expand(_RULES, q, n, n).clone()
    # Any last entry gives a rule; these spread the nodes about evenly between those of the first and the next.
    turn = torch.linspace(-0.5, 0.5, _RULES + 1, dtype=jacobi.dtype, device=jacobi.device)[:-1] + 0.5 / _RULES
    jacobi[:, :, -1, -1] += (torch.pi * turn).tan()[:, None] * (beside[:, -1] if n > 1 else diagonal[:, 0])
    nodes, vectors = torch.linalg.eigh(jacobi)
    weights = vectors[:, :, 0].square()
    upto = weights.cumsum(dim=-1)
    order = nodes.movedim(0, 1).reshape(q, -1).argsort(dim=-1)
    below, above = (
        bound.movedim(0, 1).reshape(q, -1).gather(1, order).clamp(0.0, 1.0) for bound in (upto - weights, upto)
    )
    below = below.cummax(dim=-1).values
    above = above.flip(-1).cummin(dim=-1).values.flip(-1)
    edge = torch.zeros(q, 1, dtype=below.dtype, device=below.device)
    held: Tensor = torch.hstack([above, edge + 1]) - torch.hstack([edge, below])
    root: Tensor = held.amax(dim=1).clamp(min=0.0).sqrt()
    return (root + _ROUNDING).clamp(max=1.0)
