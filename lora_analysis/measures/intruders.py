"""Which directions of the adapted model are new to it.

Conventions
-----------
Directions are unit columns of (d, k) matrices, signs ignored. A singular vector of W + ΔW is called an
*intruder* where no singular vector of W is close to it: where ``largest_cosine`` is below a threshold (0.5).
The basis must then be *all* singular vectors of W: against its top ones only, an old direction that ΔW has
made strong looks new.

Only this cosine is here; the top singular vectors of W + ΔW without a dense decomposition, and the energy
share of intruders against a control of equal spectrum, are not yet. Read it with chance in mind: *every*
random direction is an intruder, its largest cosine being about ``sqrt(2 ln d / d)``, 0.06 at d = 4096.

Measures
--------
``largest_cosine``.

References
----------
Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228.
"""

from __future__ import annotations

from torch import Tensor


def largest_cosine(vectors: Tensor, basis: Tensor) -> Tensor:
    """The cosine of each vector with the closest of the basis, ``max_j |<y_k, u_j>|``.

    Parameters
    ----------
    vectors : Tensor, shape (d, k)
        Unit columns: singular vectors of W + ΔW.
    basis : Tensor, shape (d, n)
        Unit columns: singular vectors of W on the same side.

    Returns
    -------
    Tensor, shape (k,)
        Dimensionless, float64, in [0, 1]; at least ``1 / sqrt(d)`` where the basis is complete (n = d).

    Raises
    ------
    ValueError
        If the two have different numbers of rows, or the basis is empty.

    References
    ----------
    Shuttleworth et al. 2024, arXiv:2410.21228, the definition of an intruder dimension.

    Examples
    --------
    >>> import torch
    >>> largest_cosine(torch.tensor([[0.6], [-0.8]]), torch.eye(2)).tolist()
    [0.800000011920929]
    """
    if vectors.ndim != 2 or basis.ndim != 2 or vectors.shape[0] != basis.shape[0] or basis.shape[1] == 0:
        raise ValueError(
            "expected vectors (d, k) and a basis (d, n) of at least one column, "
            f"got {tuple(vectors.shape)} and {tuple(basis.shape)}."
        )
    cosines: Tensor = (basis.double().mT @ vectors.double()).abs().amax(dim=0)
    return cosines.clamp(max=1.0)
