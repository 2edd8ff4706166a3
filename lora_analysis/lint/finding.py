"""What the linter says: one finding, and what its severity means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_analysis.notebook import html_table

Severity = Literal["error", "warning", "info", "undecided"]
"""``error``: the adapter cannot act as it was trained; ``warning``: it acts, and something about it is wrong or wasted;
``info``: right here, and some other tool would misread it, or it could be smaller; ``undecided``: a check that needs
what is not there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, wasteful or open about an adapter.

    Parameters
    ----------
    code : str
        What was found, a fixed word such as ``"zero-update"``; see ``CODES``.
    severity : str
        One of ``Severity``.
    module : str
        The module it is about, ``""`` where it is about the whole adapter.
    message : str
        One line: what is so, and the cure.
    """

    code: str
    severity: Severity
    module: str
    message: str


class Findings(list[Finding]):
    """What the linter found: a list, which in a notebook is a table."""

    def _repr_html_(self) -> str:
        caption = f"{len(self)} findings" if len(self) != 1 else "1 finding"
        rows = [(finding.severity, finding.code, finding.module, finding.message) for finding in self]
        return html_table(caption if self else "Nothing found.", ["severity", "code", "module", "message"], rows)


CODES = {
    "adapter-init": "A has not moved from its initialisation",
    "alora-not-portable": "activated LoRA, which most tools apply to every token",
    "alpha-contradicted": "two places in the file give different alphas",
    "alpha-missing": "the scale rests on a default, because alpha is not in the file",
    "ambiguous-layout": "the tensors allow another reading",
    "base-copy": "a full tensor of the file is the base's own",
    "base-mismatch": "the base has no such matrix, or one of another shape",
    "denormals": "stored numbers are denormal, and have lost digits",
    "dora-contradicted": "magnitudes that the configuration does not announce, so that others ignore them",
    "dora-not-portable": "DoRA's magnitudes, which GGUF and many servers cannot hold or ignore",
    "duplicate-key": "a key of the configuration is there twice, or decides what an earlier one decides",
    "duplicate-tensor": "two tensors of the file hold the same numbers",
    "merged-twice": "PEFT's MultiheadAttention applies this update twice",
    "module-untargeted": "target_modules does not find the module, so that PEFT ignores its factors",
    "mutated-base": "the initialisation moved the base, so s·B·A is not the update",
    "nonfinite": "NaN or infinities",
    "pattern-shadowed": "several pattern keys match one module, and give different values",
    "pattern-unused": "a pattern key matches no module",
    "patterns-not-portable": "alphas or scales differ between modules, which GGUF or MLX cannot express",
    "projections-missing": "VeRA's projections are not in the file and have to be drawn again",
    "r-exceeds-d": "r is larger than the matrix's smaller side",
    "rank-contradicted": "the configuration or header gives another r than the tensors",
    "rslora-not-portable": "rsLoRA's scale, which tools that compute alpha / r get wrong",
    "size-waste": "stored bytes that hold nothing",
    "split-qkv-alpha": "trained in blocks with alpha / r, and read everywhere as alpha / (n·r)",
    "unknown-scale": "nothing states the scale",
    "zero-update": "ΔW is exactly zero",
}
"""Every code, and what it means."""

_DIFFERING: dict[str, tuple[Severity, ...]] = {
    "duplicate-tensor": ("warning", "info"),
    "size-waste": ("warning", "info"),
    "zero-update": ("error", "warning"),
}

_OF_ONE: dict[Severity, tuple[str, ...]] = {
    "error": ("base-mismatch", "dora-contradicted", "module-untargeted", "mutated-base", "nonfinite"),
    "undecided": ("ambiguous-layout", "unknown-scale"),
    "info": (
        "alora-not-portable",
        "dora-not-portable",
        "patterns-not-portable",
        "projections-missing",
        "rslora-not-portable",
    ),
}

SEVERITIES: dict[str, tuple[Severity, ...]] = (
    dict.fromkeys(CODES, ("warning",))
    | {code: (severity,) for severity, codes in _OF_ONE.items() for code in codes}
    | _DIFFERING
)
"""The severities that findings of a code have, the gravest first: an update of zero is an error where all are."""
