"""Updates out of the factors that files hold: plain products, LoHa's, LoKr's, Tucker cores, DoRA's magnitudes.

Conventions
-----------
A convolution's kernel axes are unfolded into the columns, ``(out, in, kh, kw) -> (out, in·kh·kw)``. What is
read as it lies in the file keeps its dtype; what has to be computed is computed in float64, exact factors of
the same matrix, and claims no storage-noise floor: the rounding of stored numbers is then not that of
independent entries (``stored_eps`` is NaN).

Updates
-------
``low_rank``, ``hadamard``, ``kronecker``, ``true_update``.

References
----------
Yeh et al. 2023, arXiv:2309.14859 (LoHa, LoKr and Tucker cores; LyCORIS ``functional/{locon,loha,lokr}.py``);
Hyeon-Woo et al. 2021, arXiv:2108.06098 (the Hadamard product of two low-rank matrices);
Liu et al. 2024, arXiv:2402.09353 (DoRA; peft ``tuners/lora/dora.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Update


def low_rank(up: Tensor, down: Tensor, scale: float, *, middle: Tensor | None = None) -> LowRankUpdate:
    """A product of two factors, with a Tucker core between them where there is one.

    ``ΔW[p, q] = scale · Σ_i up[p, i] down[i, q]``, or with a core
    ``ΔW[p, (q, x, y)] = scale · Σ_ij up[p, i] middle[i, j, x, y] down[j, q]``.

    Parameters
    ----------
    up : Tensor, shape (out, r) or (out, r, 1, …)
    down : Tensor, shape (r, in) or (r, in, k, …)
        With a core, (r, in) or (r, in, 1, …).
    scale : float
        NaN where it is unknown.
    middle : Tensor, shape (r, r, k, …), optional
        Tucker core, LyCORIS' ``lora_mid``. Its two r may differ.

    Returns
    -------
    LowRankUpdate, shape (out, in·k·…)
        The factors themselves; with a core, ``up`` itself and the rest in float64.

    Raises
    ------
    ValueError, TypeError
        If the shapes do not fit or the factors are not floating-point.
    """
    up = _flat("up", up)
    if middle is None:
        return LowRankUpdate(up, _unfolded("down", down), scale)
    return LowRankUpdate(up, _through_core(middle, _flat("down", down)), scale, stored_eps=math.nan)


def hadamard(
    w1: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    scale: float,
    *,
    cores: tuple[Tensor, Tensor] | None = None,
    declared_r: int | None = None,
) -> LowRankUpdate | DenseUpdate:
    """The elementwise product of two low-rank matrices, LoHa: ``scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b)``.

    It is one product of r² columns, ``up[p, (i, j)] = w1_a[p, i] w2_a[p, j]`` and
    ``down[(i, j), q] = w1_b[i, q] w2_b[j, q]`` (Khatri-Rao products). That is how it is held while
    ``r² < min(out, in·k·k) / 4``; beyond, the dense matrix is smaller and its SVD no slower.

    Parameters
    ----------
    w1, w2 : (Tensor, Tensor), shapes (out, r) and (r, in·k·k)
        With cores, (r, out) and (r, in), as the files hold them.
    scale : float
        NaN where it is unknown.
    cores : (Tensor, Tensor), shapes (r, r, k, k), optional
        Tucker cores, ``w[p, (q, x, y)] = Σ_ij core[i, j, x, y] a[i, p] b[j, q]``.
    declared_r : int, optional
        The r of the file, stated by a dense update. By default that of the first product.

    Raises
    ------
    ValueError, TypeError
        If the shapes do not fit or the factors are not floating-point.
    """
    (up1, down1), (up2, down2) = (
        _low_rank_factors(name, *pair, core)
        for name, pair, core in zip(("w1", "w2"), (w1, w2), cores or (None, None), strict=True)
    )
    if (up1.shape[0], down1.shape[1]) != (up2.shape[0], down2.shape[1]):
        raise ValueError(
            f"w1, w2: expected two matrices of one shape, got {up1.shape[0]}x{down1.shape[1]} and "
            f"{up2.shape[0]}x{down2.shape[1]}."
        )
    d_out, d_in = up1.shape[0], down1.shape[1]
    # float64 products of stored numbers of 24 bits or fewer are exact.
    up1, down1, up2, down2 = (factor.double() for factor in (up1, down1, up2, down2))
    if up1.shape[1] * up2.shape[1] < min(d_out, d_in) / 4:
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        return LowRankUpdate(up, down, scale, stored_eps=math.nan)
    matrix = (up1 @ down1) * (up2 @ down2)
    return DenseUpdate(matrix, scale, up1.shape[1] if declared_r is None else declared_r, stored_eps=math.nan)


def kronecker(
    w1: Tensor | tuple[Tensor, Tensor],
    w2: Tensor | tuple[Tensor, Tensor],
    scale: float,
    *,
    core: Tensor | None = None,
    declared_r: int | None = None,
) -> KroneckerUpdate:
    """The Kronecker product of two matrices, LoKr: ``scale · kron(w1, w2)``.

    A convolution's kernel belongs to ``w2``; unfolded, its ΔW is the Kronecker product with the unfolded ``w2``.

    Parameters
    ----------
    w1 : Tensor, shape (m_1, n_1), or (Tensor, Tensor), shapes (m_1, r) and (r, n_1)
        The matrix, or two factors of it.
    w2 : Tensor, shape (m_2, n_2) or (m_2, n_2, k, …), or (Tensor, Tensor), shapes (m_2, r) and (r, n_2·k·…)
        With a core, (r, m_2) and (r, n_2), as the files hold them.
    scale : float
        NaN where it is unknown.
    core : Tensor, shape (r, r, k, k), optional
        Tucker core of ``w2``, ``w2[p, (q, x, y)] = Σ_ij core[i, j, x, y] a[i, p] b[j, q]``.
    declared_r : int, optional
        The r of the file.

    Returns
    -------
    KroneckerUpdate, shape (m_1·m_2, n_1·n_2·k·…)

    Raises
    ------
    ValueError, TypeError
        If the shapes do not fit or the factors are not floating-point.
    """
    if core is not None and isinstance(w2, Tensor):
        raise ValueError(f"w2: expected two factors (r, out) and (r, in) beside a core, got one of {tuple(w2.shape)}.")
    return KroneckerUpdate(_side("w1", w1, None), _side("w2", w2, core), scale, declared_r)


def true_update(
    update: Update, weight: Tensor, magnitude: Tensor, *, axis: int = 1, kernel: tuple[int, ...] = ()
) -> DenseUpdate:
    """What DoRA adds to the base, ``m / ‖W + ΔW‖ · (W + ΔW) - W``: of full rank in general.

    Parameters
    ----------
    update : Update, shape (d_out, d_in)
        The product of its factors, scaled.
    weight : Tensor, shape (d_out, d_in)
        W, the base matrix.
    magnitude : Tensor
        m, of any shape with d_out numbers, or d_in where ``axis`` is 0.
    axis : int
        What the norms run over: 1 gives one per output row, as in PEFT, 0 one per input column.
    kernel : tuple of int
        Kernel of an unfolded convolution. Its norms per input channel run over the kernel as well, so that
        with ``axis=0`` there are d_in / (kh·kw) of them. Without effect for ``axis=1``.

    Returns
    -------
    DenseUpdate
        In float64, of the update's r, with scale 1 and unknown ``eps``. A row without direction, ``W + ΔW = 0``,
        is -W where m is 0 and NaN where it is not, as DoRA itself computes.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    UndefinedUpdateError
        If the scale of the update is unknown.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis: expected 0 or 1, got {axis}.")
    if tuple(weight.shape) != tuple(update.shape):
        raise ValueError(f"weight: expected shape {tuple(update.shape)} like the update, got {tuple(weight.shape)}.")
    d_out, d_in = update.shape
    taps = math.prod(kernel) if axis == 0 else 1
    expected = d_out if axis == 1 else d_in // taps
    if magnitude.numel() != expected or (axis == 0 and d_in % taps):
        raise ValueError(
            f"magnitude: expected {expected} numbers for the norms over axis {axis} of {d_out}x{d_in}, "
            f"got shape {tuple(magnitude.shape)}."
        )
    base = weight.detach().double()
    merged = base + update.dense()
    if axis == 1:
        norms = merged.norm(dim=1, keepdim=True)
    else:
        norms = merged.reshape(d_out, expected, taps).norm(dim=(0, 2)).repeat_interleave(taps)
    lengths = magnitude.detach().double().flatten()
    lengths = lengths[:, None] if axis == 1 else lengths.repeat_interleave(taps)
    factor = torch.where((norms == 0) & (lengths == 0), 0.0, lengths / norms)
    return DenseUpdate(factor * merged - base, declared_r=update.r, stored_eps=math.nan)


def _side(name: str, given: Tensor | tuple[Tensor, Tensor], core: Tensor | None) -> LowRankUpdate | DenseUpdate:
    if isinstance(given, Tensor):
        return DenseUpdate(_unfolded(name, given))
    up, down = _low_rank_factors(name, *given, core)
    return LowRankUpdate(up, down, 1.0, stored_eps=None if core is None else math.nan)


def _low_rank_factors(name: str, a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(up, down)`` with the matrix their product, ``a`` and ``b`` lying the other way round beside a core."""
    if core is not None:
        return _flat(f"{name}_a", a).mT, _through_core(core, _flat(f"{name}_b", b))
    up, down = _flat(f"{name}_a", a), _unfolded(f"{name}_b", b)
    if up.shape[1] != down.shape[0]:
        raise ValueError(
            f"{name}: expected factors (out, r) and (r, in) to share r, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return up, down


def _through_core(core: Tensor, down: Tensor) -> Tensor:
    """``Σ_j core[i, j, x, …] down[j, q]`` as (r, in·k·…), float64."""
    if _floating("core", core).ndim < 2 or core.shape[1] != down.shape[0]:
        raise ValueError(
            f"core: expected shape (r, r, k, …) for a factor ({down.shape[0]}, in), got {tuple(core.shape)}."
        )
    contracted = torch.einsum("ij...,jq->iq...", core.detach().double(), down.detach().double())
    return contracted.flatten(1)


def _flat(name: str, factor: Tensor) -> Tensor:
    """A factor (m, n) or (m, n, 1, …) as a matrix."""
    if _floating(name, factor).ndim < 2 or math.prod(factor.shape[2:]) != 1:
        raise ValueError(f"{name}: expected shape (m, n) or (m, n, 1, …), got {tuple(factor.shape)}.")
    return factor.flatten(1)


def _unfolded(name: str, factor: Tensor) -> Tensor:
    """A factor (m, n) or (m, n, k, …) as a matrix (m, n·k·…)."""
    if _floating(name, factor).ndim < 2:
        raise ValueError(f"{name}: expected shape (m, n) or (m, n, k, …), got {tuple(factor.shape)}.")
    return factor.flatten(1)


def _floating(name: str, factor: Tensor) -> Tensor:
    if not factor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got {factor.dtype}.")
    return factor
