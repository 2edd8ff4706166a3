"""An adapter at other ranks: cut to those that matter, or raised to make room, with the exact error of each module.

Conventions
-----------
By Eckart and Young the best rank-k part of ΔW is its first k singular triples, and what is lost has the Frobenius
norm ``sqrt(sum(S[k:]**2))``. A product of two factors is never formed to find them. A module that would not shrink is
kept as it is stored, bit for bit; one that is cut gets balanced factors ``up = U sqrt(S)``, ``down = sqrt(S) Vh`` of
``ΔW / scale``, rounded to the dtype of those it had. The scale of every module stays what it was, so that alpha is
scale·r at its new r, and training goes on under the same one. Errors are measured on the rounded factors, not
derived.

Criteria look at one module (``r``, ``energy``, ``threshold``), and do not depend on its scale, or at all of them
(``budget``), and do.

Values
------
``resize``; ``held_parameters``; ``threshold_rank`` and ``budget_ranks``, the rules on spectra alone.

References
----------
Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.
"""

from lora_analysis.resize.ranks import budget_ranks, threshold_rank
from lora_analysis.resize.resizing import held_parameters, resize

__all__ = ["budget_ranks", "held_parameters", "resize", "threshold_rank"]
