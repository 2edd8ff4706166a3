"""The scales of kohya's and LyCORIS' modules, and what the header says about them.

Conventions
-----------
``scale = alpha / r`` with the module's own ``alpha``, a scalar tensor; without one, or with 0, alpha = r, as every
loader of these formats has it. The header's ``ss_network_dim`` and ``ss_network_alpha``, and ``conv_dim`` and
``conv_alpha`` among its ``ss_network_args``, are what training was asked for: they decide nothing, a disagreement is
noted. Tools that give each module its own r write ``Dynamic``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_analysis.adapter import Module, ScaleSource
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats.kohya.algorithms import Product
from lora_analysis.formats.options import MAX_ALPHA, ReadOptions

_UNFOLDED = (".hada_w1_b", ".lokr_w1", ".lokr_w1_a")
"""Factors of a LoHa or LoKr, whose kernel, if there is one, may be unfolded already."""


def scale_of(checkpoint: Checkpoint, stem: str, product: Product, options: ReadOptions) -> tuple[float, ScaleSource]:
    """A module's scale, and where it is from."""
    if not product.scaled:
        return 1.0, "format default"
    if options.alpha is not None:
        return options.alpha / product.r, "caller"
    key = f"{stem}.alpha"
    alpha = scalar(checkpoint, key, options.where) if key in checkpoint else 0.0
    return (alpha / product.r, "tensor") if alpha else (1.0, "format default")


def scalar(checkpoint: Checkpoint, key: str, where: str) -> float:
    """The number in a tensor of one, which is read.

    Raises
    ------
    AdapterFormatError
        If it holds none, several, or nothing finite.
    """
    shape = checkpoint.shape(key)
    if math.prod(shape) != 1:
        raise AdapterFormatError(f"{where}: {key!r}: expected one number, got shape {shape}.")
    value = float(checkpoint[key].reshape(()).double())
    if not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(f"{where}: {key!r}: expected a plausible finite number, got {value}. Pass alpha=.")
    return value


def require_folded_scalar(checkpoint: Checkpoint, stem: str, where: str) -> None:
    """Refuse a LyCORIS ``scalar`` that was not multiplied into its factors when the file was saved.

    LyCORIS folds it in on saving and sets it to 1 on loading; a file that holds another has two readings.
    """
    key = f"{stem}.scalar"
    if key in checkpoint and (value := scalar(checkpoint, key, where)) != 1:
        raise AdapterFormatError(
            f"{where}: {key!r}: expected LyCORIS' scalar to be folded into the factors, got {value:g} beside them; "
            "training multiplied by it, and every loader ignores it. Multiply lora_up, hada_w1_a or lokr_w1 by it, "
            "and remove it."
        )


@dataclass(frozen=True, slots=True)
class Stated:
    """What a header says training was asked for, of linear layers or of convolutions."""

    r: float | None
    alpha: float | None
    root: bool
    """Whether LyCORIS was to store alpha times sqrt(r), for rsLoRA."""

    def stored_alpha(self, r: int) -> float | None:
        """The alpha that a module of this r should have in the file."""
        return self.alpha if self.alpha is None or not self.root else self.alpha * math.sqrt(r)


def stated(metadata: Mapping[str, str]) -> tuple[Stated, Stated]:
    """What a header says of linear layers, and of convolutions."""
    arguments = _arguments(metadata)
    r, alpha = (_number(metadata.get(f"ss_network_{name}")) for name in ("dim", "alpha"))
    root = str(arguments.get("rs_lora", "")).lower() == "true"
    conv_r, conv_alpha = (_number(arguments.get(f"conv_{name}")) for name in ("dim", "alpha"))
    return Stated(r, alpha, root), Stated(conv_r or r, conv_alpha or alpha, root)


def statements_about(module: Module, linear: Stated, conv: Stated) -> tuple[Stated, ...]:
    """Those of the two that may be about a module: both where its factors are unfolded and do not tell its kernel."""
    if math.prod(module.target.kernel) > 1:
        return (conv,)
    unfolded = any(tensor.endswith(_UNFOLDED) for tensor in module.tensors)
    return (linear, conv) if unfolded and conv != linear else (linear,)


def header_notes(
    metadata: Mapping[str, str], modules: Mapping[str, Module], products: Mapping[str, Product]
) -> list[str]:
    """Where the header and the tensors disagree."""
    linear, conv = stated(metadata)
    groups: dict[str, list[Module]] = {"linear layers": [], "convolutions": [], "modules": []}
    about = {"linear layers": (linear,), "convolutions": (conv,), "modules": (linear, conv)}
    for name, module in modules.items():
        if products[name].scaled:
            several = len(statements_about(module, linear, conv)) > 1
            convolution = math.prod(module.target.kernel) > 1
            groups["modules" if several else "convolutions" if convolution else "linear layers"].append(module)
    return [note for kind, chosen in groups.items() for note in _notes_of(about[kind], chosen, kind)]


def _notes_of(statements: tuple[Stated, ...], chosen: Sequence[Module], kind: str) -> list[str]:
    """Where modules disagree with every statement that may be about them."""
    notes = []
    ranks = [statement.r for statement in statements if statement.r is not None]
    if len(ranks) == len(statements) and (others := [m.r for m in chosen if m.r not in ranks]):
        notes.append(
            f"the header says r={_shown(ranks)}, {len(others)} of {len(chosen)} {kind} have another (first: "
            f"{others[0]}); the tensors win."
        )
    alphas = [statement.alpha for statement in statements if statement.alpha is not None]
    if len(alphas) < len(statements):
        return notes
    root = " times sqrt(r), for rs_lora" if statements[0].root else ""
    differing = [
        module
        for module in chosen
        if module.scale_source == "tensor"
        and module.target.rows is None  # blocks of split_qkv have a note of their own
        and not any(
            math.isclose(module.scale * module.r, statement.stored_alpha(module.r) or 0.0, rel_tol=1e-2)
            for statement in statements
        )
    ]
    if differing:
        first = differing[0].scale * differing[0].r
        notes.append(
            f"the header says alpha={_shown(alphas)}{root}, {len(differing)} of {len(chosen)} {kind} have another "
            f"(first: {first:g}); the tensors win."
        )
    missing = sum(m.scale_source == "format default" and m.r not in alphas for m in chosen)
    if missing:
        notes.append(
            f"the header says alpha={_shown(alphas)}, {missing} of {len(chosen)} {kind} have no alpha tensor: they "
            f"are read with alpha = r, as every loader does. Pass alpha={alphas[0]:g} if training used it."
        )
    return notes


def _shown(values: Sequence[float]) -> str:
    return " or ".join(f"{value:g}" for value in dict.fromkeys(values))


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, object]:
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _number(stated: object) -> float | None:
    """A positive number that a header states; None for ``Dynamic`` and whatever else is none."""
    try:
        value = float(stated) if isinstance(stated, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return value if 0 < value <= MAX_ALPHA else None
