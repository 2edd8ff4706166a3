"""Findings about alpha and the scale: unstated, stated twice, or stated for something else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lora_analysis.adapter import Adapter, Module
from lora_analysis.formats.diffusers.scaling import HEADER, Header
from lora_analysis.formats.kohya.scaling import stated, statements_about
from lora_analysis.formats.peft.configuration import Scaling
from lora_analysis.lint.finding import Finding
from lora_analysis.lint.paths import pattern_path

_HAS_ALPHA = ("peft", "kohya", "lycoris", "mlx", "gguf")
"""Formats with a place for alpha or scale, so that its absence is worth a word."""

_ROUNDED = 1e-2
"""Relative difference that an alpha stored in bfloat16 may have."""


def scale_findings(adapter: Adapter) -> Iterator[Finding]:
    """What the file says about the scales of its modules."""
    for name, module in adapter.modules.items():
        if module.scale_source == "unknown":
            yield Finding(
                "unknown-scale", "undecided", name, "nothing states the scale. Pass alpha (the training script's)."
            )
    yield from _missing(adapter)
    if adapter.format in ("kohya", "lycoris"):
        yield from _against_kohyas_header(adapter)
        yield from _split_qkv(adapter)
    if HEADER in adapter.metadata and adapter.checkpoint is not None:
        yield from _against_diffusers_header(adapter, Header(adapter.checkpoint, None, adapter.source))
    if "peft_type" in adapter.config:
        yield from _against_configuration(adapter)
    if adapter.format == "mlx":
        yield from _beside_mlx_scale(adapter)


def takes_alpha(adapter: Adapter, module: Module) -> bool:
    """Whether alpha multiplies a module: not VeRA's, full differences, LoKr of two whole matrices, a Control-LoRA's."""
    last = {tensor.rpartition(".")[2] for tensor in module.tensors}
    if adapter.format in ("kohya", "lycoris"):
        return not ("diff" in last or {"lokr_w1", "lokr_w2"} <= last or {"up", "down"} <= last)
    return not any(".vera_lambda_" in tensor for tensor in module.tensors)


def _missing(adapter: Adapter) -> Iterator[Finding]:
    scaled = {name: module for name, module in adapter.modules.items() if takes_alpha(adapter, module)}
    defaulted = [name for name, module in scaled.items() if module.scale_source == "format default"]
    if not defaulted:
        return
    where = defaulted[0] if len(defaulted) < len(adapter) else ""
    if adapter.format in _HAS_ALPHA:
        some = f" of {len(defaulted)} of {len(adapter)} modules" if where else ""
        yield Finding(
            "alpha-missing",
            "warning",
            where,
            f"the scale{some} rests on the default of {adapter.format}, because the file holds no alpha. "
            "Write the alpha of training into it.",
        )
    elif adapter.format == "diffusers" and len(ranks := {scaled[name].r for name in defaulted}) > 1:
        yield Finding(
            "alpha-missing",
            "warning",
            where,
            f"no alpha beside r of {', '.join(map(str, sorted(ranks)[:4]))}: alpha is each module's r here, and one r "
            "for all to diffusers before its pull request 14409. Write the alpha of training into the file.",
        )


def _against_kohyas_header(adapter: Adapter) -> Iterator[Finding]:
    linear, conv = stated(adapter.metadata)
    blocks = _blocks(adapter)
    for name, module in adapter.modules.items():
        statements = statements_about(module, linear, conv)
        said = [alpha for statement in statements if (alpha := statement.stored_alpha(module.r)) is not None]
        if len(said) < len(statements) or not takes_alpha(adapter, module):
            continue
        # A block's r is its own, alpha the whole weight's.
        alpha = module.scale * module.r * blocks.get(module.target.tensor, 1)
        if any(math.isclose(alpha, value, rel_tol=_ROUNDED) for value in said):
            continue
        if module.scale_source == "tensor":
            text = f"the tensors give {alpha:g}, which every reader applies. Correct one of them."
        elif module.scale_source == "format default":
            text = f"the module has no alpha, and every reader takes r={module.r}. Write alpha into the file."
        else:
            continue
        yield Finding("alpha-contradicted", "warning", name, f"the header says alpha {said[0]:g}, {text}")


def _blocks(adapter: Adapter) -> Counter[str]:
    """How many blocks each fused weight has that was trained in blocks."""
    return Counter(m.target.tensor for m in adapter.modules.values() if m.target.rows is not None)


def _split_qkv(adapter: Adapter) -> Iterator[Finding]:
    blocks = _blocks(adapter)
    for name, module in adapter.modules.items():
        if module.target.rows is not None and module.scale_source in ("tensor", "header"):
            n = blocks[module.target.tensor]
            yield Finding(
                "split-qkv-alpha",
                "warning",
                name,
                f"one of {n} blocks trained with a scale alpha / r of {n * module.scale:g}, and read everywhere with "
                f"alpha / ({n}·r), {module.scale:g}. If training's is meant, multiply the alpha in the file by {n}.",
            )


def _against_diffusers_header(adapter: Adapter, header: Header) -> Iterator[Finding]:
    for name, module in adapter.modules.items():
        scaling, path = header.of(name)
        if scaling is None or module.scale_source != "tensor":
            continue
        said, _ = scaling.scale(path, module.r)
        if not math.isclose(said, module.scale, rel_tol=_ROUNDED):
            yield _two_scales(name, module, said, "the header's lora_adapter_metadata")


def _against_configuration(adapter: Adapter) -> Iterator[Finding]:
    own = {name: module for name, module in adapter.modules.items() if module.scale_source == "tensor"}
    scaling = Scaling(adapter.config, None, adapter.source) if own else None
    for name, module in own.items():
        said = math.nan if scaling is None else scaling.scale(pattern_path(name, module), module.r)[0]
        if not math.isclose(said, module.scale, rel_tol=_ROUNDED):
            yield _two_scales(name, module, said, "adapter_config.json, which PEFT reads,")


def _two_scales(name: str, module: Module, said: float, place: str) -> Finding:
    return Finding(
        "alpha-contradicted",
        "warning",
        name,
        f"{place} gives the scale {said:g}, the module's own alpha {module.scale:g}; which one counts depends on the "
        "reader (here the tensor). Correct one of them.",
    )


def _beside_mlx_scale(adapter: Adapter) -> Iterator[Finding]:
    parameters = adapter.config.get("lora_parameters")
    if not isinstance(parameters, dict):
        return
    alpha, r, scale = (parameters.get(key) for key in ("alpha", "rank", "scale"))
    if alpha is not None and scale is not None and alpha != r:
        yield Finding(
            "alpha-contradicted",
            "warning",
            "",
            f"an alpha of {alpha:g} beside a scale of {scale:g}: MLX reads the scale alone, as the whole multiplier, "
            "and other tools divide by the rank. Take alpha out, or set scale = alpha / rank if that is meant.",
        )
