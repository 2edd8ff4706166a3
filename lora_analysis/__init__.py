"""Rank-deficiency analysis of LoRA: exact spectra, subspace similarity and amplification, each with its null.

An adapter is a mapping from the matrices of a base model to updates; an update is a matrix ΔW known by a
structure that gives its SVD without forming it.

>>> import torch, lora_analysis as la
>>> generator = torch.Generator().manual_seed(0)
>>> up, down = (torch.randn(shape, generator=generator) for shape in ((64, 4), (4, 48)))
>>> adapter = la.Adapter({"layer.0.query": la.LowRankUpdate(up, down, scale=2.0)})
>>> adapter["layer.0.query"].svd().S.shape
torch.Size([4])
>>> int(la.spectrum_table(adapter)["numerical_rank"][0])
4

Open files with ``load_adapter`` and ``load_base``; loop over modules with ``spectrum_table``,
``similarity_table`` and ``amplification_table``; take single numbers from the measures. Adapters for study
are made by ``lora_analysis.training``; ``lora_analysis.plots`` draws the paper's figures;
``lora_analysis.study`` holds the demo. The method is section 7 of Hu et al. 2021, arXiv:2106.09685.
"""

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.convert import Conversion, convert
from lora_analysis.diff import diff
from lora_analysis.errors import (
    AdapterFormatError,
    AmbiguousAdapterError,
    BaseWeightsError,
    CheckpointError,
    LoraAnalysisError,
    MutatedBaseError,
    UndefinedUpdateError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter, save_adapter
from lora_analysis.lint import Finding, lint
from lora_analysis.measures.null import similarity_null
from lora_analysis.measures.spectrum import (
    effective_rank,
    effective_rank_energy,
    energy_rank,
    nuclear_ratio,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lora_analysis.measures.subspace import (
    grassmann_distance,
    principal_angles,
    projection_metric,
    subspace_similarity,
)
from lora_analysis.merge import merge
from lora_analysis.resize import resize
from lora_analysis.tables import (
    amplification_table,
    atlas,
    inspect_table,
    interference_table,
    intruder_table,
    magnitude_table,
    reproducible_table,
    sameness_table,
    similarity_table,
    spectrum_overlap_table,
    spectrum_table,
    strength_table,
    token_table,
    truncation_table,
    used_rank_table,
    write_table,
)
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate, Svd, Update, with_scale

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterFormatError",
    "AmbiguousAdapterError",
    "BaseWeights",
    "BaseWeightsError",
    "CheckpointError",
    "Conversion",
    "DenseUpdate",
    "Finding",
    "KroneckerUpdate",
    "LoraAnalysisError",
    "LowRankUpdate",
    "MutatedBaseError",
    "Svd",
    "Target",
    "UndefinedUpdateError",
    "UnsupportedAdapterError",
    "Update",
    "amplification_table",
    "atlas",
    "convert",
    "diff",
    "effective_rank",
    "effective_rank_energy",
    "energy_rank",
    "grassmann_distance",
    "inspect_table",
    "interference_table",
    "intruder_table",
    "lint",
    "load_adapter",
    "load_base",
    "magnitude_table",
    "merge",
    "nuclear_ratio",
    "numerical_rank",
    "participation_ratio",
    "principal_angles",
    "projection_metric",
    "reproducible_table",
    "resize",
    "sameness_table",
    "save_adapter",
    "similarity_null",
    "similarity_table",
    "spectrum_overlap_table",
    "spectrum_table",
    "stable_rank",
    "strength_table",
    "subspace_similarity",
    "token_table",
    "truncation_table",
    "used_rank_table",
    "with_scale",
    "write_table",
]
