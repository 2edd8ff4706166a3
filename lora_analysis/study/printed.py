"""Numbers that the LoRA paper prints, as data, each under the table it stands in.

They are of GPT-3 175B on WikiSQL and MultiNLI, and of GPT-2 Medium on E2E NLG: other models and other tasks than those
of a study here, so they stand beside a study's numbers and are never mixed with them. Heat maps are printed without
numbers; what the text says of them is in ``OBSERVATIONS``.

Conventions
-----------
Target sets are letters joined by ``+``, as in ``Study.runs``. Accuracies are in per cent, parameters in millions.

Values
------
``TABLE_5``, ``TABLE_6``, ``TABLE_7``, ``TABLE_15``, ``TABLE_18``, ``OBSERVATIONS``; ``GPT_3``, ``SHAPE_GPT_3`` and
``GPT_2``.

References
----------
Hu et al. 2021, arXiv:2106.09685v2.
"""

from __future__ import annotations

from typing import NamedTuple

GPT_3 = "GPT-3 175B"
SHAPE_GPT_3 = (12288, 12288)
"""Of W_q."""
GPT_2 = "GPT-2 Medium, E2E NLG"


class Accuracies(NamedTuple):
    """Validation accuracy in per cent; the spread printed is 0.5 for WikiSQL and 0.1 for MultiNLI."""

    wikisql: float
    multinli: float


class Projected(NamedTuple):
    """One half of table 7, of W_q in layer 48: Frobenius norms."""

    update: float
    """``||U.T @ W @ V||_F``, U and V of ΔW."""
    weight: float
    """The same, U and V of W itself."""
    random: float
    """The same, U and V of a random matrix."""
    norm_weight: float
    norm_update: float


class Tuned(NamedTuple):
    """One row of table 15."""

    millions: float
    """Trainable parameters."""
    wikisql: float
    multinli: float


class Generation(NamedTuple):
    """One row of table 18."""

    loss: float
    """Validation loss, in nats."""
    bleu: float
    nist: float
    meteor: float
    rouge_l: float
    cider: float


TABLE_5 = {
    ("q", 8): Accuracies(70.4, 91.0),
    ("k", 8): Accuracies(70.0, 90.8),
    ("v", 8): Accuracies(73.0, 91.0),
    ("o", 8): Accuracies(73.2, 91.3),
    ("q+k", 4): Accuracies(71.4, 91.3),
    ("q+v", 4): Accuracies(73.7, 91.3),
    ("q+k+v+o", 2): Accuracies(73.7, 91.7),
}
"""By targets and r; 18.9 million parameters each. The first entry of table 6 at q, r = 8 differs: 90.7 on MultiNLI."""

TABLE_6 = {
    ("q", 1): Accuracies(68.8, 90.7),
    ("q", 2): Accuracies(69.6, 90.9),
    ("q", 4): Accuracies(70.5, 91.1),
    ("q", 8): Accuracies(70.4, 90.7),
    ("q", 64): Accuracies(70.0, 90.7),
    ("q+v", 1): Accuracies(73.4, 91.3),
    ("q+v", 2): Accuracies(73.3, 91.4),
    ("q+v", 4): Accuracies(73.7, 91.3),
    ("q+v", 8): Accuracies(73.8, 91.6),
    ("q+v", 64): Accuracies(73.5, 91.4),
    ("q+k+v+o", 1): Accuracies(74.1, 91.2),
    ("q+k+v+o", 2): Accuracies(73.7, 91.7),
    ("q+k+v+o", 4): Accuracies(74.0, 91.7),
    ("q+k+v+o", 8): Accuracies(74.0, 91.5),
    ("q+k+v+o", 64): Accuracies(73.9, 91.4),
}
"""By targets and r."""

TABLE_7 = {
    4: Projected(0.32, 21.67, 0.02, 61.95, 6.91),
    64: Projected(1.90, 37.71, 0.33, 61.95, 3.57),
}
"""By r."""

TABLE_15 = {
    ("full", "", 0): Tuned(175_000.0, 73.8, 89.5),
    ("lora", "v", 2): Tuned(4.7, 73.4, 91.7),
    ("lora", "q+v", 1): Tuned(4.7, 73.4, 91.3),
    ("lora", "q+v", 2): Tuned(9.4, 73.3, 91.4),
    ("lora", "q+k+v+o", 1): Tuned(9.4, 74.1, 91.2),
    ("lora", "q+v", 4): Tuned(18.8, 73.7, 91.3),
    ("lora", "q+k+v+o", 2): Tuned(18.8, 73.7, 91.7),
    ("lora", "q+v", 8): Tuned(37.7, 73.8, 91.6),
    ("lora", "q+k+v+o", 4): Tuned(37.7, 74.0, 91.7),
    ("lora", "q+v", 64): Tuned(301.9, 73.6, 91.4),
    ("lora", "q+k+v+o", 64): Tuned(603.8, 73.9, 91.4),
}
"""By method, targets and r; all weights are "175B". Table 6 prints 73.5 on WikiSQL for q and v at r = 64."""

TABLE_18 = {
    1: Generation(1.23, 68.72, 8.7215, 0.4565, 0.7052, 2.4329),
    2: Generation(1.21, 69.17, 8.7413, 0.4590, 0.7052, 2.4639),
    4: Generation(1.18, 70.38, 8.8439, 0.4689, 0.7186, 2.5349),
    8: Generation(1.17, 69.57, 8.7457, 0.4636, 0.7196, 2.5196),
    16: Generation(1.16, 69.61, 8.7483, 0.4629, 0.7177, 2.4985),
    32: Generation(1.16, 69.33, 8.7736, 0.4642, 0.7105, 2.5255),
    64: Generation(1.16, 69.24, 8.7174, 0.4651, 0.7180, 2.5070),
    128: Generation(1.16, 68.73, 8.6718, 0.4628, 0.7127, 2.5030),
    256: Generation(1.16, 68.92, 8.6982, 0.4629, 0.7128, 2.5012),
    512: Generation(1.16, 68.78, 8.6857, 0.4637, 0.7128, 2.5025),
    1024: Generation(1.17, 69.37, 8.7495, 0.4659, 0.7149, 2.5090),
}
"""By r; hyperparameters were tuned at r = 4."""

OBSERVATIONS = {
    3: r"of A, r = 8 and 64, layer 48, $\phi$ > 0.5 at dimension 1 (chance 0.0001 to 0.005)",
    4: "of A, r = 64, layer 48, more in common for $W_q$ than for $W_v$, nothing for Gaussians",
    6: "of A, r = 8 and 64, layers 1, 32, 64, 96, as in layer 48",
    7: "of A, r = 64, layers 1, 32, 64, 96, as in layer 48",
    8: r"$\phi$ of the top 4 of $\Delta W$ with the top 10 % of W barely exceeds 0.2 (chance 0.1)",
}
"""What the paper says in words of its figures, by figure; chance is from d = 12288."""
