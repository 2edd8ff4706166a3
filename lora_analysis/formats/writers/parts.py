"""What every writer starts from: the factors of whole matrices, with their scale, and what is left behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_analysis.adapter import Adapter, Module, Target
from lora_analysis.base import BaseWeights
from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.update import LowRankUpdate, Svd, Update


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One matrix to be written, ``ΔW = scale · up @ down``.

    Parameters
    ----------
    name : str
        Of the module.
    target : Target
    up : Tensor, shape (d_out, r)
    down : Tensor, shape (r, d_in)
    scale : float
    magnitude : Tensor, optional
        DoRA's.
    magnitude_axis : int
        The axis of (d_out, d_in) that its norms run over.
    embedding : bool
        Whether the base keeps it as an embedding's table.
    truncation_error : float
        ‖ΔW − scale · up @ down‖_F, exact, where the update had to be cut to r; else 0.
    """

    name: str
    target: Target
    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None
    magnitude_axis: int = 1
    embedding: bool = False
    truncation_error: float = 0.0

    @property
    def r(self) -> int:
        """The inner dimension that is written."""
        return self.up.shape[1]

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
    names : mapping of str to str
        Module to its name when the file is read back without a base.
    losses : tuple of str
        What the file does not hold, or holds rounded.
    """

    names: Mapping[str, str]
    losses: tuple[str, ...] = ()


def parts_of(
    adapter: Adapter,
    *,
    r: int | None = None,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
) -> list[Part]:
    """The modules of an adapter as factors of whole matrices.

    Blocks of one fused weight are put together again, into factors whose r is the sum of theirs.

    Parameters
    ----------
    adapter : Adapter
    r : int, optional
        Cut updates that are not one product of at most r columns to their best rank-r part (Eckart-Young).
    dtype : torch.dtype, optional
        Of the factors. By default what is stored, and float32 for factors that had to be computed.
    base : BaseWeights, optional
        Says how many rows a fused weight has.

    Raises
    ------
    UndefinedUpdateError
        If a scale is unknown.
    UnsupportedAdapterError
        If an update is not a product of two factors and r is not given, or has no place in a file of factors.
    """
    if not len(adapter):
        raise ValueError(f"{adapter.source}: expected an adapter with modules to save, got none.")
    whole: dict[str, Part] = {}
    blocks: dict[str, list[Part]] = {}
    for name, module in adapter.modules.items():
        part = _part(adapter, name, module, r, dtype)
        if module.target.rows is None:
            whole[name] = part
        else:
            blocks.setdefault(module.target.tensor, []).append(part)
    for tensor, members in blocks.items():
        fused = _fused(adapter.source, tensor, members, base)
        whole[fused.name] = fused
    return list(whole.values())


def _part(adapter: Adapter, name: str, module: Module, r: int | None, dtype: torch.dtype | None) -> Part:
    where = f"{adapter.source}: {name!r}"
    if math.isnan(module.scale):
        raise UndefinedUpdateError(f"{where}: expected a known scale to save, it is unknown. Pass alpha= when loading.")
    if module.target.expert is not None or module.target.columns is not None:
        raise UnsupportedAdapterError(
            f"{where}: expected an update of a whole matrix to save, got one of a slice of {module.target.tensor!r}: "
            "writing experts and blocks of columns is not supported."
        )
    update = adapter[name]
    factored, error = _factored(where, update, r)
    if factored.r == 0:
        raise UnsupportedAdapterError(f"{where}: expected factors to save, got r=0.")
    # Factors that are not as stored were computed in float64, which no consumer expects.
    wanted = dtype or (torch.float32 if factored.up.dtype == torch.float64 != _stored(update) else None)
    up, down = factored.up.detach(), factored.down.detach()
    if wanted is not None:
        up, down = up.to(wanted), down.to(wanted)
    # Of a true update, the magnitude has done its work.
    magnitude = module.magnitude() if module.magnitude and "dora-low-rank-part" in module.flags else None
    return Part(
        name, module.target, up, down, factored.scale, magnitude, module.magnitude_axis, module.embedding, error
    )


def _stored(update: Update) -> torch.dtype | None:
    """The dtype of factors that are as stored; None of computed ones."""
    if isinstance(update, LowRankUpdate) and update.stored_eps is None:
        return update.up.dtype
    return None


def _factored(where: str, update: Update, r: int | None) -> tuple[LowRankUpdate, float]:
    """The update as one product, and the exact error of cutting it to r."""
    if isinstance(update, LowRankUpdate) and (r is None or update.r <= r):
        return update, 0.0
    if r is None:
        raise UnsupportedAdapterError(
            f"{where}: expected a product of two factors to save, got {update!r}. Pass r= to cut it to its best "
            "rank-r part, with the error stated."
        )
    svd: Svd = update.svd()
    kept = svd.top(r)
    root = kept.S.sqrt()
    cut = LowRankUpdate(kept.U * root, root[:, None] * kept.Vh, 1.0, stored_eps=math.nan)
    return cut, float(svd.S[r:].norm())


def _fused(source: str, tensor: str, members: Sequence[Part], base: BaseWeights | None) -> Part:
    """Blocks of rows of one weight as one update of the whole: stacked ``down``, block-diagonal ``up``."""
    module = tensor.removesuffix(".weight")
    first = members[0]
    if base is None:
        raise UnsupportedAdapterError(
            f"{source}: {module!r}: expected an update of a whole matrix to save, got {len(members)} blocks of its "
            "rows. Pass base=, which says how many rows it has."
        )
    height = base.matrix(replace(first.target, rows=None)).shape[0]
    if any(part.magnitude is not None for part in members):
        raise UnsupportedAdapterError(f"{source}: {module!r}: blocks with magnitudes cannot be put together.")
    rank = sum(part.r for part in members)
    up = first.up.new_zeros(height, rank)
    column = 0
    for part in members:
        up[slice(*(part.target.rows or ())), column : column + part.r] = scaled(part, part.scale / first.scale)
        column += part.r
    down = torch.cat([part.down for part in members])
    error = math.hypot(*(part.truncation_error for part in members))
    return Part(module, replace(first.target, rows=None), up, down, first.scale, truncation_error=error)


def scaled(part: Part, factor: float) -> Tensor:
    """``factor · up``, in the dtype of ``up``: exact where the factor is a power of two."""
    return part.up if factor == 1 else (part.up.double() * factor).to(part.up.dtype)


def common_scale(parts: Sequence[Part], of: Callable[[Part], float], what: str) -> tuple[float, list[Part], list[str]]:
    """One number for a file that holds one for all modules, the rest of each folded into its ``up``.

    Parameters
    ----------
    parts : sequence of Part
    of : callable
        A part's own number, in proportion to its scale.
    what : str
        What the number is called, for the list of losses.

    Returns
    -------
    float
        The most frequent number.
    list of Part
        With ``up`` rescaled where the number differs.
    list of str
        Which modules were rescaled by more than a power of two, so that their factors are rounded.
    """
    common = Counter(of(part) for part in parts if of(part) != 0).most_common(1)
    number = common[0][0] if common else 1.0
    folded, rounded = [], []
    for part in parts:
        factor = of(part) / number
        if factor not in (0.0, 1.0) and math.frexp(factor)[0] not in (0.5, -0.5):
            rounded.append(part.name)
        folded.append(replace(part, up=scaled(part, factor)))
    losses = (
        [f"{len(rounded)} modules have another {what} than {number:g}; it is folded into their factors, and rounded."]
        if rounded
        else []
    )
    return number, folded, losses


def refuse_magnitudes(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse DoRA for a format that cannot hold it."""
    if part := next((part for part in parts if part.magnitude is not None), None):
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: DoRA, whose magnitudes {format} cannot hold. Read it with base= and cut the "
            "true update to r=, or convert to peft or mlx."
        )


def refuse_embeddings(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse embeddings for a format that has another layout for them."""
    if part := next((part for part in parts if part.embedding), None):
        raise UnsupportedAdapterError(f"{source}: {part.name!r}: an embedding, which is not written as {format}.")


def refuse_convolutions(source: str, parts: Iterable[Part], format: str) -> None:
    """Refuse convolutions for a format of language models."""
    if part := next((part for part in parts if part.target.kernel), None):
        raise UnsupportedAdapterError(f"{source}: {part.name!r}: a convolution, for which {format} has no place.")
