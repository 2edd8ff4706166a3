"""What an update does to the inputs that a model really has, from moments of them.

Conventions
-----------
Inputs x of a module, one for each token, enter by their moments in the update's own directions alone:
``E[(V.T x)(V.T x).T]`` of k × k numbers, their mean length and that of ``W x``, and the mean input. They are enough for
``‖ΔW X‖_F / ‖W X‖_F``, for the spectrum of ``ΔW Σ^{1/2}`` with ``Σ = E[x x.T]``, and, of updates seen together, for
their agreement on the data. Chance is random directions in place of the update's, measured on the same inputs: those of
a model are far from isotropic, and random directions then differ much among themselves.

Measures
--------
``InputMoments``, ``Activations``; ``lora_analysis.activations`` collects them.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7.3 asks what ΔW amplifies in W; here it is asked of the inputs. Kornblith et
al. 2019, arXiv:1905.00414, eq. 3 (linear CKA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_analysis.update import Svd


@dataclass(frozen=True, slots=True, eq=False)
class InputMoments:
    """Moments of the inputs of one module in the directions of one update; float64.

    Parameters
    ----------
    count : int
        Inputs: tokens, or positions of an image.
    svd : Svd
        Of ΔW, its first k triples; under scale 1 where the scale is unknown.
    second : Tensor, shape (k, k)
        ``E[(V.T x)(V.T x).T]``.
    mean : Tensor, shape (k,)
        ``E[V.T x]``.
    mean_length : float
        ``‖E[x]‖``.
    input_square : float
        ``E‖x‖²``.
    output_square : float
        ``E‖W x‖²``, without bias.
    probes : Tensor, shape (p,)
        ``E[(w.T x)²]`` of p random directions w.
    """

    count: int
    svd: Svd
    second: Tensor
    mean: Tensor
    mean_length: float
    input_square: float
    output_square: float
    probes: Tensor

    @property
    def update_square(self) -> float:
        """``E‖ΔW x‖²``."""
        return float((self.svd.S.square() * self.second.diagonal()).sum())

    @property
    def relative(self) -> float:
        """``‖ΔW X‖_F / ‖W X‖_F``; dimensionless."""
        return math.sqrt(self.update_square / self.output_square) if self.output_square > 0 else math.nan

    @property
    def gain(self) -> float:
        """``‖ΔW X‖_F`` over what directions without regard to the inputs would give; its square is 1 by chance.

        ``sqrt(E‖ΔW x‖² d_in / (‖ΔW‖_F² E‖x‖²))``, dimensionless.
        """
        chance = float(self.svd.S.square().sum()) * self.input_square / self.svd.Vh.shape[1]
        return math.sqrt(self.update_square / chance) if chance > 0 else math.nan

    def chance_gains(self, *, draws: int = 999, seed: int = 0) -> Tensor:
        """Sample of the gain of an update of the same spectrum in random directions; shape (draws,).

        Each of its directions has the second moment of one of the probes, drawn without regard to the others, and over
        their mean, for which the exact one is known: the square of the gain is 1 on average, the gain a little less.
        """
        if not len(self.svd.S) or self.input_square <= 0:
            return torch.full((draws,), math.nan, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        weights = self.svd.S.square() / self.svd.S.square().sum()
        picked = torch.randint(len(self.probes), (draws, len(weights)), generator=generator)
        return (self.probes[picked] / self.probes.mean() @ weights).sqrt()

    def singular_values(self) -> Tensor:
        """Those of ``ΔW Σ^{1/2}``: ΔW weighted by how much the inputs use its directions; shape (k,), descending."""
        half = self.svd.S[:, None] * self.second * self.svd.S
        values: Tensor = torch.linalg.eigvalsh(half).flip(0).clamp_min(0).sqrt()
        return values

    @property
    def mean_cosine(self) -> float:
        """``|cos|`` of the first right singular vector and the mean input, in [0, 1].

        Near 1 the update's first direction is the one that all inputs share, which any two adapters may find.
        """
        return abs(float(self.mean[0])) / self.mean_length if self.mean_length > 0 and len(self.mean) else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Moments of the inputs of every adapted module, for one or several adapters.

    Parameters
    ----------
    moments : mapping of (int, str) to InputMoments
        By the number of the adapter and the name of the module.
    cross : mapping of (int, int, str) to Tensor
        ``E[V_a.T x x.T V_b]`` centred, of every two adapters and module that both have, shape (k_a, k_b).
    unseen : mapping of str to str
        Modules whose inputs were not seen, and why.
    """

    moments: Mapping[tuple[int, str], InputMoments]
    cross: Mapping[tuple[int, int, str], Tensor]
    unseen: Mapping[str, str]

    def agreement(self, a: int, b: int, module: str) -> float:
        """Linear CKA of ``ΔW_a X`` and ``ΔW_b X``, in [0, 1]; NaN where one of them does nothing.

        It has no level of chance here, and few inputs raise it: collect far more than the update's rank.

        ``‖C_ab‖_F² / (‖C_aa‖_F ‖C_bb‖_F)`` with ``C_ab = ΔW_a Cov(x) ΔW_b.T``.
        """
        # Left singular vectors are orthonormal, so norms are those of the small matrices.
        shared, first, second = (self._square(*pair, module) for pair in ((a, b), (a, a), (b, b)))
        return shared / math.sqrt(first * second) if first * second > 0 else math.nan

    def _square(self, a: int, b: int, module: str) -> float:
        """``‖ΔW_a Cov(x) ΔW_b.T‖_F²``."""
        a, b = sorted((a, b))
        one, other = self.moments[a, module].svd.S, self.moments[b, module].svd.S
        return float((one[:, None] * self.cross[a, b, module] * other).square().sum())
