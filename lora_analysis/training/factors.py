"""The trainable factors of one adapter on one weight, and the named adapters a weight has.

Conventions
-----------
``ΔW = scale · B @ A``; less what training began with, ``scale · (B @ A - B0 @ A0)``, where the initial factors are a
part of the base (PiSSA), so that the base itself is never touched. A is (r, d_in) and B is (d_out, r). With blocks of
a fused weight, A holds the blocks' factors one below the other and B likewise: ``up`` and ``down`` are the factors of
the whole matrix, B's blocks on a diagonal. Experts have a leading axis, (experts, r, d_in).

With magnitudes (DoRA) the merged weight is ``m · (W + ΔW) / ‖W + ΔW‖``, the norms taken over each output's row.

Values
------
``Block``, ``Beside``, ``LoraFactors``, ``Adapters``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3; DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5; PiSSA: Meng et
al. 2024, arXiv:2404.02948, eq. 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` of a fused weight, such as its q."""

    name: str
    start: int
    stop: int


class Beside(NamedTuple):
    """What trains in full beside the factors of an adapter, for ``activate`` and for those who save it."""

    bias: Literal["none", "lora_only", "all"] = "none"
    """Of none, of the layers that are adapted, or of all."""
    modules: tuple[str, ...] = ()
    """Names of modules."""


class LoraFactors(nn.Module):
    """The factors of one adapter on one weight.

    Parameters
    ----------
    A : Tensor, shape (blocks · r, d_in) or (experts, r, d_in)
        Copied.
    B : Tensor, shape (rows of all blocks, r) or (experts, d_out, r)
        Copied.
    d_out : int
        Of the whole matrix.
    scale : float
        alpha / r, or alpha / sqrt(r) for rsLoRA.
    alpha : float
        What ``scale`` was made from; nothing is computed from it here.
    dropout : float
        Probability of dropping an input of A while training, in [0, 1).
    blocks : sequence of Block
        Rows that are adapted, in ascending order; none for the whole matrix.
    magnitude : Tensor, optional, shape (d_out,)
        DoRA's, trained as well.
    less_initial : bool
        Whether the initial product is taken off the update.
    freeze_A : bool
        Train B alone (LoRA-FA).

    Attributes
    ----------
    lora_A, lora_B : Parameter
    lora_magnitude : Parameter or None
    lora_A0, lora_B0 : Tensor
        The factors as they were at the start, for study; buffers, saved only if they are a part of the update.
    r : int
    beside : Beside
        What trains in full beside the factors; ``inject`` says.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """

    lora_A0: Tensor
    lora_B0: Tensor

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        d_out: int,
        scale: float,
        alpha: float,
        dropout: float = 0.0,
        blocks: Sequence[Block] = (),
        magnitude: Tensor | None = None,
        less_initial: bool = False,
        freeze_A: bool = False,
    ) -> None:
        super().__init__()
        rows = sum(block.stop - block.start for block in blocks) if blocks else d_out
        r = B.shape[-1]
        if B.shape[-2:] != (rows, r) or A.shape[-2] != r * (len(blocks) or 1) or A.shape[:-2] != B.shape[:-2]:
            raise ValueError(
                f"expected lora_A ({'blocks · ' if blocks else ''}r, d_in) and lora_B ({rows}, r), "
                f"got {tuple(A.shape)} and {tuple(B.shape)}."
            )
        self.lora_A = nn.Parameter(A.detach().clone())
        self.lora_B = nn.Parameter(B.detach().clone())
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude.detach().clone())
        self.register_buffer("lora_A0", A.detach().clone(), persistent=less_initial)
        self.register_buffer("lora_B0", B.detach().clone(), persistent=less_initial)
        self.r, self.d_out = r, d_out
        self.scale, self.alpha, self.dropout = scale, alpha, dropout
        self.blocks = tuple(blocks)
        self.less_initial, self.freeze_A = less_initial, freeze_A
        self.beside = Beside()
        self.trainable(True)

    def extra_repr(self) -> str:
        """The sizes and the scale, for ``print(model)``."""
        shape = f"d_out={self.d_out}, d_in={self.lora_A.shape[-1]}"
        blocks = f", blocks={','.join(block.name for block in self.blocks)}" if self.blocks else ""
        return f"{shape}, r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}{blocks}"

    def pairs(self, *, initial: bool = False) -> list[tuple[Tensor, Tensor]]:
        """A and B, or those it began with: of the whole matrix, of each block, or of each expert."""
        A, B = (self.lora_A0, self.lora_B0) if initial else (self.lora_A, self.lora_B)
        if A.dim() == 3:
            return list(zip(A, B, strict=True))
        heights = [block.stop - block.start for block in self.blocks] or [len(B)]
        return list(zip(A.chunk(len(heights)), torch.split(B, heights), strict=True))

    def trainable(self, train: bool) -> None:
        """Let the factors (and magnitudes) take gradients, or not; a frozen A never does."""
        self.lora_A.requires_grad_(train and not self.freeze_A)
        self.lora_B.requires_grad_(train)
        if self.lora_magnitude is not None:
            self.lora_magnitude.requires_grad_(train)

    @property
    def down(self) -> Tensor:
        """A of the whole matrix, shape (blocks · r, d_in) or (experts, r, d_in)."""
        return self.lora_A

    @property
    def up(self) -> Tensor:
        """B of the whole matrix, shape (d_out, blocks · r) or (experts, d_out, r)."""
        return self._whole(self.lora_B)

    @property
    def initial(self) -> tuple[Tensor, Tensor]:
        """``up`` and ``down`` as they were at the start."""
        return self._whole(self.lora_B0), self.lora_A0

    def _whole(self, B: Tensor) -> Tensor:
        if not self.blocks:
            return B
        whole = B.new_zeros(self.d_out, self.r * len(self.blocks))
        heights = [block.stop - block.start for block in self.blocks]
        for i, (block, part) in enumerate(zip(self.blocks, torch.split(B, heights), strict=True)):
            whole[block.start : block.stop, i * self.r : (i + 1) * self.r] = part
        return whole

    def product(self) -> tuple[Tensor, Tensor]:
        """Float64 factors ``up`` and ``down`` with ``ΔW = scale · up @ down``, without gradients."""
        up, down = self.up.detach().double(), self.down.detach().double()
        if self.less_initial:
            first, second = (factor.double() for factor in self.initial)
            up, down = torch.cat([up, -first], -1), torch.cat([down, second], -2)
        return up, down

    def delta_w(self) -> Tensor:
        """ΔW without what magnitudes make of it, shape (d_out, d_in) or (experts, d_out, d_in); float64."""
        up, down = self.product()
        return self.scale * (up @ down)

    def differentiable_delta_w(self) -> Tensor:
        """The same in the dtype of the factors, for a forward pass that needs the whole matrix."""
        whole = self.up @ self.down
        if self.less_initial:
            up, down = self.initial
            whole = whole - up @ down
        return self.scale * whole


class Adapters(nn.ModuleDict):
    """The named adapters of one weight, and which of them act with what weight.

    Attributes
    ----------
    active : dict of str to float
        Adapters that act, each times its weight. All others are at rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: dict[str, float] = {}

    def extra_repr(self) -> str:
        """What acts, for ``print(model)``."""
        return f"active={self.active}"

    def named(self) -> Mapping[str, LoraFactors]:
        """The adapters by name."""
        return cast("dict[str, LoraFactors]", dict(self.items()))

    def acting(self) -> list[tuple[LoraFactors, float]]:
        """The adapters that act, with their weights."""
        return [(cast(LoraFactors, self[name]), weight) for name, weight in self.active.items() if weight != 0]

    def only(self) -> LoraFactors:
        """The one adapter there is.

        Raises
        ------
        ValueError
            If there are several.
        """
        if len(self) != 1:
            raise ValueError(f"expected one adapter, got {len(self)}: {', '.join(self)}. Choose by adapters[name].")
        return next(iter(self.named().values()))
