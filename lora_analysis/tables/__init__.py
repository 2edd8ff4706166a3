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
    W has no part in the directions of ΔW_k: the amplification factor is infinite. Of a part of the spectrum: what
    none of W's singular directions reaches.
``base-top-only``
    Only the top singular vectors of W were computed: cosines are bounds, and directions may be undecided.
``r>d``
    r exceeds the smaller side of the matrix.
``dora-low-rank-part``
    A magnitude rescales the merged weight (DoRA): the update is s·B·A alone; given the base it is the whole.
``less-initial``
    The product that training began with is taken off (``initial=``); r is the sum of both.
``no-chance``
    No product of two factors, whose spectrum by chance is not known.
``start-unknown``
    The bulk of A is like no known initialisation: another start, or most directions learned.
``start-rescaled``
    The bulk of A is a little off the start it is most like: directions are counted without its variance.
``leading-only``
    No r bounds the rank of this update: compared are its first max(r, 64) directions, and they are not all of it.
``same-start``
    Two adapters began with the same rows of A: what they share on the input side is no sign of learning.
``inputs-unseen``
    No inputs of the module were collected.
``ambiguous-layout``
    The file allows another reading of the same tensors; the adapter's notes say which.

Modules are worked on by a pool of threads with one BLAS thread each; results do not depend on how many.

Tables
------
``inspect_table``, ``spectrum_table``, ``similarity_table``, ``amplification_table``, ``magnitude_table``,
``truncation_table``, ``intruder_table``, ``spectrum_overlap_table``, ``used_rank_table``, ``reproducible_table``,
``strength_table``, ``token_table``, ``sameness_table``, ``interference_table``; ``atlas``; ``write_table``.
"""

from lora_analysis.tables.amplification import amplification_table
from lora_analysis.tables.atlas import atlas
from lora_analysis.tables.atlas_result import Atlas
from lora_analysis.tables.frames import write_table
from lora_analysis.tables.inspection import inspect_table
from lora_analysis.tables.interference import interference_table
from lora_analysis.tables.intruders import intruder_table
from lora_analysis.tables.magnitude import magnitude_table
from lora_analysis.tables.reproducible import reproducible_table
from lora_analysis.tables.sameness import sameness_table
from lora_analysis.tables.similarity import similarity_table
from lora_analysis.tables.spectrum import spectrum_table
from lora_analysis.tables.spectrum_overlap import spectrum_overlap_table
from lora_analysis.tables.strength import strength_table
from lora_analysis.tables.tokens import token_table
from lora_analysis.tables.truncation import truncation_table
from lora_analysis.tables.used_rank import used_rank_table

__all__ = [
    "Atlas",
    "amplification_table",
    "atlas",
    "inspect_table",
    "interference_table",
    "intruder_table",
    "magnitude_table",
    "reproducible_table",
    "sameness_table",
    "similarity_table",
    "spectrum_overlap_table",
    "spectrum_table",
    "strength_table",
    "token_table",
    "truncation_table",
    "used_rank_table",
    "write_table",
]
