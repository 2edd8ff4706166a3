"""The paper's system claims, each beside what a formula gives at the size of GPT-3.

Conventions
-----------
A claim is quoted with its place; the figure beside it comes from ``accounting`` and ``memory`` on a model of GPT-3's
shapes and is never adjusted to fit. Where the paper leaves an assumption open, there is one row for each reading, and
none is called right.

Values
------
``gpt3_175b``, ``system_claims``, ``Claim``.

References
----------
Hu et al. 2021, arXiv:2106.09685v2, abstract, section 4.2, tables 5 and 15. Brown et al. 2020, arXiv:2005.14165,
table 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lora_analysis.training.accounting import ParameterCount, checkpoint_bytes, lora_count, parameter_count
from lora_analysis.training.memory import FP16, FP16_STREAMED, FP32, MIXED, training_memory

_LAYERS, _WIDTH, _VOCABULARY, _CONTEXT = 96, 12288, 50257, 2048
_PRINTED_PARAMETERS = 175_000_000_000

_PRECISIONS = {
    "everything fp32": FP32,
    "mixed precision, fp32 master weights and moments": MIXED,
    "everything fp16": FP16,
    "everything fp16, gradients not held": FP16_STREAMED,
}

_BUDGETS = (
    (("Wq",), 8),
    (("Wk",), 8),
    (("Wv",), 8),
    (("Wo",), 8),
    (("Wq", "Wk"), 4),
    (("Wq", "Wv"), 4),
    (("Wq", "Wk", "Wv", "Wo"), 2),
)
"""Table 5: what is adapted, and r."""

_TABLE_15 = (
    (("Wv",), 2, 4.7),
    (("Wq", "Wv"), 1, 4.7),
    (("Wq", "Wv"), 2, 9.4),
    (("Wq", "Wk", "Wv", "Wo"), 1, 9.4),
    (("Wq", "Wv"), 4, 18.8),
    (("Wq", "Wk", "Wv", "Wo"), 2, 18.8),
    (("Wq", "Wv"), 8, 37.7),
    (("Wq", "Wk", "Wv", "Wo"), 4, 37.7),
    (("Wq", "Wv"), 64, 301.9),
    (("Wq", "Wk", "Wv", "Wo"), 64, 603.8),
)
"""Table 15, the rows of LoRA alone: what is adapted, r, and millions of parameters as printed."""


class Claim(NamedTuple):
    """One printed figure beside the formula's."""

    place: str
    claim: str
    """In the paper's words, shortened."""
    assumption: str
    """What the formula was given, or takes the words to mean."""
    printed: float
    formula: float
    unit: str

    @property
    def ratio(self) -> float:
        """``formula / printed``, dimensionless: 1 where they agree."""
        return self.formula / self.printed


def gpt3_175b() -> nn.ModuleDict:
    """The parameters of GPT-3 175B on the "meta" device: shapes without memory, and no forward pass.

    96 layers of width d = 12288: ``Wq``, ``Wk``, ``Wv``, ``Wo``, an MLP of width 4d, biases, two layer norms; 50257
    tokens, whose embedding is the output's too, and 2048 positions. 174.6e9 parameters in all, printed as 175.0B.

    References
    ----------
    Brown et al. 2020, arXiv:2005.14165, table 2.1; the vocabulary, the tied embedding and the final layer norm are
    GPT-2's.

    Examples
    --------
    >>> parameter_count(gpt3_175b()).total
    174604259328
    """
    with torch.device("meta"):
        layers = nn.ModuleList(_layer() for _ in range(_LAYERS))
        return nn.ModuleDict(
            {
                "tokens": nn.Embedding(_VOCABULARY, _WIDTH),
                "positions": nn.Embedding(_CONTEXT, _WIDTH),
                "layers": layers,
                "norm": nn.LayerNorm(_WIDTH),
            }
        )


def system_claims() -> list[Claim]:
    """What the paper says LoRA saves on GPT-3 175B, beside what follows from the shapes.

    Returns
    -------
    list of Claim
        In the order: trainable parameters, checkpoint, memory of training, optimizer states, tables 5 and 15.

    Notes
    -----
    *10,000 times.* ``175.0e9 / (96·2·2·12288·4) = 9,272``; with the shapes' own total, 174.6e9, it is 9,251. The
    "35MB" of section 4.2 is 37.7 MB, or 36 MiB; "10,000" is 350GB / 35MB.

    *3 times.* "1.2TB to 350GB" is 3.43 times, and 350 GB is the 16-bit base alone. 1.2 TB is 6.9 bytes a parameter:
    between the 6 of 16-bit weights and two moments, which give 3.0 times and the "2/3" exactly, and the 8 with
    gradients, which give 4.0. Float32 gives 4.0 from 2.8 TB; mixed precision with float32 masters 8.0.

    *Tables.* "18.8M", "301.9M" and "603.8M" are not roundings of 18.87, 301.99 and 603.98 million.

    Examples
    --------
    >>> claim = system_claims()[0]
    >>> claim.place, claim.claim, f"{claim.formula:,.0f}"
    ('abstract', 'reduce the number of trainable parameters by 10,000 times', '9,251')
    """
    model = gpt3_175b()
    full = parameter_count(model)
    return [
        *_parameter_claims(model),
        *_checkpoint_claims(model),
        *_memory_claims(full, lora_count(model, ["Wq", "Wv"], r=4).adapted),
        *_table_claims(model),
    ]


def _layer() -> nn.ModuleDict:
    matrices = {name: nn.Linear(_WIDTH, _WIDTH) for name in ("Wq", "Wk", "Wv", "Wo")}
    return nn.ModuleDict(
        {
            "attention_norm": nn.LayerNorm(_WIDTH),
            **matrices,
            "mlp_norm": nn.LayerNorm(_WIDTH),
            "mlp_in": nn.Linear(_WIDTH, 4 * _WIDTH),
            "mlp_out": nn.Linear(4 * _WIDTH, _WIDTH),
        }
    )


def _parameter_claims(model: nn.Module) -> list[Claim]:
    place, claim = "abstract", "reduce the number of trainable parameters by 10,000 times"
    count = lora_count(model, ["Wq", "Wv"], r=4)
    printed = _PRINTED_PARAMETERS / count.trainable
    smallest = lora_count(model, ["Wq", "Wv"], r=1)
    return [
        Claim(place, claim, "Wq and Wv at r=4, the shapes' own total", 1e4, count.reduction, "times"),
        Claim(place, claim, "Wq and Wv at r=4, a total of 175.0e9", 1e4, printed, "times"),
        Claim(place, claim, "Wq and Wv at r=1, the shapes' own total", 1e4, smallest.reduction, "times"),
    ]


def _checkpoint_claims(model: nn.Module) -> list[Claim]:
    place, claim = "section 4.2", "the checkpoint size is reduced by roughly 10,000x (from 350GB to 35MB)"
    count = lora_count(model, ["Wq", "Wv"], r=4)
    whole, adapter = (checkpoint_bytes(n, torch.float16) for n in (count.base, count.trainable))
    return [
        Claim(place, claim, "the whole model in fp16", 350, whole / 1e9, "GB"),
        Claim(place, claim, "the factors in fp16, MB of 1e6 bytes", 35, adapter / 1e6, "MB"),
        Claim(place, claim, "the factors in fp16, MiB of 2^20 bytes", 35, adapter / 2**20, "MiB"),
        Claim(place, claim, "one over the other", 1e4, whole / adapter, "times"),
    ]


def _memory_claims(full: ParameterCount, adapted: ParameterCount) -> list[Claim]:
    rows, shares = [], []
    vram = "reduce the VRAM consumption during training from 1.2TB to 350GB"
    up_to = "reduce that VRAM usage by up to 2/3 [without] the optimizer states for the frozen parameters"
    for assumption, precision in _PRECISIONS.items():
        tuned, lora = (training_memory(count, optimizer="adam", precision=precision) for count in (full, adapted))
        times = tuned.total / lora.total
        rows += [
            Claim("section 4.2", vram, f"fine-tuning, {assumption}", 1.2, tuned.total / 1e12, "TB"),
            Claim("section 4.2", vram, f"LoRA, {assumption}", 350, lora.total / 1e9, "GB"),
            Claim("section 4.2", vram, f"one over the other, {assumption}", 1200 / 350, times, "times"),
            Claim("abstract", "[reduce] the GPU memory requirement by 3 times", assumption, 3, times, "times"),
        ]
        states = (tuned.optimizer - lora.optimizer) / tuned.total
        shares += [
            Claim("section 4.2", up_to, f"optimizer states alone, {assumption}", 2 / 3, states, "of the total"),
            Claim("section 4.2", up_to, f"all that is saved, {assumption}", 2 / 3, 1 - 1 / times, "of the total"),
        ]
    return rows + shares


def _table_claims(model: nn.Module) -> list[Claim]:
    rows = [("table 5", "18M", targets, r, 18.0) for targets, r in _BUDGETS]
    rows += [("table 15", f"{printed}M", targets, r, printed) for targets, r, printed in _TABLE_15]
    return [
        Claim(
            place,
            f"{text} trainable parameters",
            f"{', '.join(targets)} at r={r}",
            printed,
            lora_count(model, targets, r=r).trainable / 1e6,
            "million",
        )
        for place, text, targets, r, printed in rows
    ]
