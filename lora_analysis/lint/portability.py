"""Findings about what is right here and cannot be said, or is misread, in other formats and tools."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_analysis.adapter import Adapter
from lora_analysis.formats.diffusers.scaling import HEADER, Header
from lora_analysis.lint.finding import Finding


def portability_findings(adapter: Adapter) -> Iterator[Finding]:
    """What GGUF, kohya, MLX and servers cannot express, or read otherwise; each once for the adapter."""
    if _rslora(adapter):
        yield Finding(
            "rslora-not-portable",
            "info",
            "",
            "use_rslora: the scale is alpha / sqrt(r). GGUF, kohya and MLX files cannot say so, and some servers "
            "compute alpha / r. Convert with 'lora-analysis convert', which writes the scale itself.",
        )
    if any(module.magnitude is not None for module in adapter.modules.values()):
        yield Finding(
            "dora-not-portable",
            "info",
            "",
            "DoRA: GGUF cannot hold magnitudes, diffusers drops those of LyCORIS, and vLLM refuses them. Merge it into "
            "the base for those.",
        )
    yield from _patterns(adapter)
    if adapter.config.get("alora_invocation_tokens"):
        yield Finding(
            "alora-not-portable",
            "info",
            "",
            "activated LoRA acts from its invocation tokens on; tools that do not know it apply it to every token. "
            "Serve it with one that does.",
        )
    vera = str(adapter.config.get("peft_type")).upper() == "VERA"
    if vera and not any("vera_A" in tensor for tensor in adapter.ledger):
        yield Finding(
            "projections-missing",
            "info",
            "",
            "VeRA's projections are not in the file: only PEFT's own generator draws them again, from the seed and the "
            "base's dtype. Train with save_projection=True.",
        )


def _rslora(adapter: Adapter) -> bool:
    if adapter.config.get("use_rslora") is True:
        return True
    if HEADER not in adapter.metadata or adapter.checkpoint is None:
        return False
    header = Header(adapter.checkpoint, None, adapter.source)
    return any(header.says("use_rslora", name) for name in adapter)


def _patterns(adapter: Adapter) -> Iterator[Finding]:
    if not adapter.config.get("alpha_pattern") and not adapter.config.get("rank_pattern"):
        return
    known = [module for module in adapter.modules.values() if not math.isnan(module.scale)]
    alphas = {f"{module.scale * module.r:.9g}" for module in known}
    scales = {f"{module.scale:.9g}" for module in known}
    if len(alphas) > 1:
        text = f"modules have {len(alphas)} different alphas: GGUF holds one for all"
    elif len(scales) > 1:
        text = f"modules have {len(scales)} different scales: MLX holds one for all"
    else:
        return
    yield Finding(
        "patterns-not-portable",
        "info",
        "",
        f"{text}, and some servers ignore patterns. 'lora-analysis convert' folds the difference into the factors.",
    )
