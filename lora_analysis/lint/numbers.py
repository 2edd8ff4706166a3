"""Findings about the stored numbers of one module."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_analysis.adapter import Module
from lora_analysis.lint.finding import Finding
from lora_analysis.update import DenseUpdate, LowRankUpdate, Update

_FEWEST = 256
"""Numbers of A below which its distribution says too little."""

_DENORMAL_SHARE = 0.01
"""Share of denormals among the numbers that are not zero, from which it is worth saying."""


def number_findings(name: str, module: Module, update: Update) -> Iterator[Finding]:
    """What the numbers of one module show."""
    if module.r > min(module.shape):
        d_out, d_in = module.shape
        yield Finding(
            "r-exceeds-d",
            "warning",
            name,
            f"r={module.r} exceeds the smaller side of {d_out}x{d_in}: the rank cannot pass {min(module.shape)}. "
            "Train with a smaller r, or store the product.",
        )
    if not _finite(update):
        yield Finding("nonfinite", "error", name, "the factors hold NaN or infinities. Take an earlier checkpoint.")
        return
    if _is_zero(update):
        yield Finding(
            "zero-update",
            "warning",
            name,
            "ΔW is exactly zero: never trained, or inert in training. Check target_modules, or leave it out.",
        )
        return
    if isinstance(update, LowRankUpdate):
        yield from _factor_findings(name, update)


def _finite(update: Update) -> bool:
    finite: bool = getattr(update, "finite", True)
    return finite


def _is_zero(update: Update) -> bool:
    if isinstance(update, LowRankUpdate):
        return update.scale == 0 or not bool(update.up.any()) or not bool(update.down.any())
    if isinstance(update, DenseUpdate):
        return update.scale == 0 or not bool(update.matrix.any())
    return not math.isnan(update.scale) and update.norm() == 0


def _factor_findings(name: str, update: LowRankUpdate) -> Iterator[Finding]:
    up, down = update.up.detach(), update.down.detach()
    dead = int(((~up.bool().any(0)) | (~down.bool().any(1))).sum())
    if dead:
        yield Finding(
            "size-waste",
            "warning",
            name,
            f"{dead} of {update.r} directions are zero on one side, and add nothing. Cut them off.",
        )
    for side, factor in (("B", up), ("A", down)):
        if share := _denormal_share(factor):
            yield Finding(
                "denormals",
                "warning",
                name,
                f"{share:.0%} of the numbers of {side} are denormal in {_dtype(factor)} and have lost digits. "
                "Store it as float32 or bfloat16.",
            )
    if up.dtype == down.dtype == torch.float32 and _holds_bfloat16(up) and _holds_bfloat16(down):
        yield Finding(
            "size-waste",
            "info",
            name,
            "stored as float32, and every number is a bfloat16: half of the bytes hold nothing. Store it as bfloat16.",
        )
    if looks_initial(down):
        yield Finding(
            "adapter-init",
            "warning",
            name,
            "A is still at its initialisation, uniform on ±1/√d_in to the last number: frozen (LoRA-FA) or not "
            "trained. Its subspaces say nothing about what was learned.",
        )


def looks_initial(down: Tensor) -> bool:
    """Whether A is what LoRA starts from: uniform on ±1/√d_in, ``kaiming_uniform_(a=sqrt(5))``.

    Sharp, because training carries some of the many numbers near the bound beyond it: not one may lie outside, the
    largest must come as close to it as that of uniform numbers does, and their distribution must be uniform.
    An initialisation by a normal distribution has no bound, and is not recognised.

    Parameters
    ----------
    down : Tensor, shape (r, d_in)

    Examples
    --------
    >>> A = torch.empty(8, 64).uniform_(-1 / 8, 1 / 8, generator=torch.Generator().manual_seed(0))
    >>> looks_initial(A), looks_initial(A + 1e-3)
    (True, False)
    """
    if down.numel() < _FEWEST:
        return False
    bound = 1 / math.sqrt(down.shape[1])
    largest = float(down.abs().max())
    rounding = torch.finfo(down.dtype).eps
    # Of n uniform numbers, none comes within 20/n of the bound with probability exp(-20).
    if not bound * (1 - 20 / down.numel() - rounding) <= largest <= bound * (1 + rounding):
        return False
    if rounding > 1e-6:  # numbers of two bytes are too coarse to be continuous for the test below
        return True
    from scipy import stats  # a third of a second to import, and not needed by most

    return float(stats.kstest(down.double().flatten().numpy(force=True) / bound, "uniform", args=(-1, 2)).pvalue) > 1e-3


def _denormal_share(factor: Tensor) -> float:
    size = factor.abs()
    nonzero = int((size > 0).sum())
    denormal = int(((size > 0) & (size < torch.finfo(factor.dtype).tiny)).sum())
    share = denormal / nonzero if nonzero else 0.0
    return share if share > _DENORMAL_SHARE else 0.0


def _holds_bfloat16(factor: Tensor) -> bool:
    return bool((factor.bfloat16().float() == factor).all())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
