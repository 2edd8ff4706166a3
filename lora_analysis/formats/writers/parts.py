"""What writers are given and give back: the factors of whole matrices, with what was lost on the way to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_analysis.adapter import Target
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.update import LowRankUpdate, distance


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One matrix to be written, ``ΔW = scale · up @ down``.

    Parameters
    ----------
    name : str
        Of the matrix in the base, without ``.weight``.
    target : Target
    up : Tensor, shape (d_out, r)
    down : Tensor, shape (r, d_in)
    scale : float
    modules : tuple of str
        The adapter's modules that it is made of: one, or the blocks of a fused weight.
    magnitude : Tensor, optional
        DoRA's.
    magnitude_axis : int
        The axis of (d_out, d_in) that its norms run over.
    embedding : bool
        Whether the base keeps it as an embedding's table.
    truncation_error : float
        Frobenius norm of what was cut off, where the update had to be cut to r; else 0.
    rounding_error : float
        Bound on the Frobenius norm of what rounding the factors changed; 0 where they are as they were.
    """

    name: str
    target: Target
    up: Tensor
    down: Tensor
    scale: float
    modules: tuple[str, ...]
    magnitude: Tensor | None = None
    magnitude_axis: int = 1
    embedding: bool = False
    truncation_error: float = 0.0
    rounding_error: float = 0.0

    @property
    def r(self) -> int:
        """The inner dimension that is written."""
        return self.up.shape[1]

    @property
    def update(self) -> LowRankUpdate:
        """The ΔW that is written."""
        return LowRankUpdate(self.up, self.down, self.scale)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """``up`` and ``down`` as a convolution's: (out, r, 1, …) and (r, in, k, …); as they are for a linear layer."""
        kernel = self.target.kernel
        if not kernel:
            return self.up, self.down
        return (
            self.up.reshape(*self.up.shape, *(1 for _ in kernel)),
            self.down.reshape(self.r, -1, *kernel),
        )


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What the caller says about the file to be written.

    Parameters
    ----------
    component : str, optional
        Put before module names that have none: ``unet``, ``transformer``, ``text_encoder``, …
    architecture : str, optional
        GGUF's name of the base's architecture, such as ``"llama"``.
    heads : (int, int), optional
        Query and key-value heads, for formats that store q and k rows in another rotary order.
    """

    component: str | None = None
    architecture: str | None = None
    heads: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer did.

    Parameters
    ----------
    parts : sequence of Part
        As they were written, in factors that the format made rescale or round.
    names : mapping of str to str
        Part to its name when the file is read back without a base.
    losses : tuple of str
        What the format made the file say otherwise or roundedly.
    """

    parts: Sequence[Part]
    names: Mapping[str, str]
    losses: tuple[str, ...] = ()


def refactored(source: str, part: Part, up: Tensor, down: Tensor, scale: float) -> Part:
    """A part in other factors, with what that changes added to its rounding error.

    Raises
    ------
    UnsupportedAdapterError
        If a number is beyond their dtype.
    """
    made = replace(part, up=up, down=down, scale=scale)
    if not made.update.finite:
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: expected factors within the range of {up.dtype}, got larger ones. Pass another "
            "dtype=, such as float32."
        )
    return replace(made, rounding_error=part.rounding_error + distance(part.update, made.update))


def in_dtype(source: str, part: Part, dtype: torch.dtype) -> Part:
    """A part with its factors in this dtype.

    Raises
    ------
    UnsupportedAdapterError
        If a number is beyond it.
    """
    if part.up.dtype == part.down.dtype == dtype:
        return part
    return refactored(source, part, part.up.to(dtype), part.down.to(dtype), part.scale)


def scaled(factor: Tensor, by: float) -> Tensor:
    """A factor times a number, in its own dtype: exact where that is a power of two."""
    return (factor.double() * by).to(factor.dtype)
