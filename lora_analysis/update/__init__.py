"""Updates: matrices ΔW known by a structure that gives their SVD without forming them.

Conventions
-----------
``ΔW = scale · up @ down``, with ``up`` (d_out, r) the paper's B and ``down`` (r, d_in) its A; ΔW is
(d_out, d_in), oriented as ``torch.nn.Linear.weight``. Factors stay in the dtype they were stored in;
every number is computed in float64.

Values
------
``Svd``, ``Update`` (the protocol), ``LowRankUpdate``, ``KroneckerUpdate``, ``DenseUpdate``.

References
----------
Hu et al. 2021, arXiv:2106.09685. The QR route is standard (Golub and Van Loan, *Matrix Computations*,
5.4); the certified Gram route rests on Demmel's bound for Cholesky of a diagonally scaled matrix
(Higham, *Accuracy and Stability of Numerical Algorithms*, theorem 10.5).
"""

from lora_analysis.update.dense import DenseUpdate
from lora_analysis.update.kronecker import KroneckerUpdate
from lora_analysis.update.low_rank import CERTIFIED_CONDITION, LowRankUpdate, distance, factors
from lora_analysis.update.protocol import Svd, Update, rounding_error, with_scale
from lora_analysis.update.rows import rows_of

__all__ = [
    "CERTIFIED_CONDITION",
    "DenseUpdate",
    "KroneckerUpdate",
    "LowRankUpdate",
    "Svd",
    "Update",
    "distance",
    "factors",
    "rounding_error",
    "rows_of",
    "with_scale",
]
