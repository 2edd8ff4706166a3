"""Tables: the one place that loops over modules. Long-form pandas frames, one row per fact.

Conventions
-----------
Every table starts with ``adapter`` (or ``adapter_a``, ``adapter_b``) and ends with ``flags``, words separated
by spaces that say why a value is missing or weak:

``zero``
    ΔW = 0: rank measures are NaN, integer ranks 0.
``nonfinite``
    The factors hold NaN or infinities: every value is NaN.
``unknown-scale``
    Nothing states the scale: norms, singular values and amplification are NaN, scale-free figures are given.
``storage-noise``
    A singular value is below three times the rounding noise of its storage dtype.
``order-undetermined``
    Two neighbouring singular values are closer than that noise, so a cut between them is arbitrary.
``beyond-rank``
    i, j or k exceeds the numerical rank: the value is NaN.
``zero-base``
    W = 0: its norms are 0, what divides by them is NaN.
``outside-base``
    W has no part in the directions of ΔW_k: the amplification factor is infinite.
``r>d``
    r exceeds the smaller side of the matrix.
``dora-low-rank-part``
    A magnitude rescales the merged weight (DoRA): the update is s·B·A alone; given the base it is the whole.
``less-initial``
    The product that training began with is taken off (``initial=``); r is the sum of both.
``ambiguous-layout``
    The file allows another reading of the same tensors; the adapter's notes say which.

Modules are worked on by a pool of threads with one BLAS thread each; results do not depend on how many.

Tables
------
``inspect_table``, ``spectrum_table``, ``similarity_table``, ``amplification_table``, ``magnitude_table``,
``truncation_table``; ``write_table``.
"""

from lora_analysis.tables.amplification import amplification_table
from lora_analysis.tables.frames import write_table
from lora_analysis.tables.inspection import inspect_table
from lora_analysis.tables.magnitude import magnitude_table
from lora_analysis.tables.similarity import similarity_table
from lora_analysis.tables.spectrum import spectrum_table
from lora_analysis.tables.truncation import truncation_table

__all__ = [
    "amplification_table",
    "inspect_table",
    "magnitude_table",
    "similarity_table",
    "spectrum_table",
    "truncation_table",
    "write_table",
]
