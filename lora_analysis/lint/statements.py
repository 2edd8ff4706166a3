"""Findings about what the file and its configuration say: alpha, r, patterns, kinds that other tools cannot hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lora_analysis.adapter import Adapter, Module
from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.lint.finding import Finding

_HAS_ALPHA = ("peft", "kohya", "lycoris", "mlx", "gguf")
"""Formats with a place for alpha or scale, so that its absence is worth a word."""


def statement_findings(adapter: Adapter) -> Iterator[Finding]:
    """What the file's own statements show, before any number is read."""
    yield from _scales(adapter)
    yield from _ranks(adapter)
    yield from _patterns(adapter)
    yield from _portability(adapter)
    for name, module in adapter.modules.items():
        if "ambiguous-layout" in module.flags:
            yield Finding(
                "ambiguous-layout",
                "undecided",
                name,
                "the tensors allow another reading, and nothing in the file decides. Pass the base, or see the notes.",
            )


def _scales(adapter: Adapter) -> Iterator[Finding]:
    defaulted = [n for n, m in adapter.modules.items() if m.scale_source == "format default"]
    for name, module in adapter.modules.items():
        if module.scale_source == "unknown":
            yield Finding(
                "unknown-scale", "undecided", name, "nothing states the scale. Pass alpha (the training script's)."
            )
    if adapter.format in _HAS_ALPHA and defaulted:
        some = "" if len(defaulted) == len(adapter) else f" of {len(defaulted)} of {len(adapter)} modules"
        yield Finding(
            "alpha-missing",
            "warning",
            defaulted[0] if some else "",
            f"the scale{some} rests on the default of {adapter.format}, because the file holds no alpha. "
            "Write the alpha of training into it.",
        )
    stated = _header_number(adapter.metadata, "ss_network_alpha")
    if stated is not None:
        for name, module in adapter.modules.items():
            if module.scale_source == "tensor" and not math.isclose(module.scale * module.r, stated, rel_tol=1e-3):
                yield Finding(
                    "alpha-contradicted",
                    "warning",
                    name,
                    f"the header says alpha {stated:g}, the tensors give {module.scale * module.r:g}, which every "
                    "reader applies. Correct one of them.",
                )
    for name, module in adapter.modules.items():
        if adapter.format == "kohya" and module.target.rows is not None:
            yield Finding(
                "split-qkv-alpha",
                "warning",
                name,
                f"trained with alpha / r of its own block, and read everywhere with the r of all blocks together "
                f"({module.scale:g} here). Multiply alpha by the number of blocks if training's scale is meant.",
            )


def _ranks(adapter: Adapter) -> Iterator[Finding]:
    # Keys of a pattern that is no regular expression are a matter of loading, which has been done.
    if adapter.config.get("peft_type") in (None, "LORA"):
        declared: Any = adapter.config.get("r")
        ranks = _compiled(adapter.config, "rank_pattern")
    else:
        declared, ranks = None, []
    header = _header_number(adapter.metadata, "ss_network_dim")
    for name, module in adapter.modules.items():
        said = next((value for _, regex, value in ranks if regex.match(_without_expert(name, module))), declared)
        if said is not None and said != module.r and "less-initial" not in module.flags:
            yield Finding(
                "rank-contradicted",
                "warning",
                name,
                f"the configuration says r={said}, the tensors have r={module.r}; tools that trust it compute another "
                "scale or fail. Correct r or rank_pattern.",
            )
    by_r = Counter(m.r for m in adapter.modules.values() if not m.target.kernel and m.target.rows is None)
    if header is not None and by_r and header not in by_r:
        yield Finding(
            "rank-contradicted",
            "warning",
            "",
            f"the header says r={header:g}, no module has it (most have r={by_r.most_common(1)[0][0]}). Correct it.",
        )


def _patterns(adapter: Adapter) -> Iterator[Finding]:
    if adapter.format != "peft" or adapter.config.get("peft_type") not in (None, "LORA", "LOHA", "LOKR"):
        return
    names = {name: _without_expert(name, module) for name, module in adapter.modules.items()}
    for field in ("rank_pattern", "alpha_pattern"):
        compiled = _compiled(adapter.config, field)
        for key, regex, _ in compiled:
            if not any(regex.match(plain) for plain in names.values()):
                yield Finding(
                    "pattern-unused",
                    "warning",
                    "",
                    f"{field}: {key!r} matches no module, so it does nothing. PEFT matches keys as regular "
                    "expressions against the end of a module's path. Correct it or take it out.",
                )
        for name, plain in names.items():
            matching = [(key, value) for key, regex, value in compiled if regex.match(plain)]
            if len({value for _, value in matching}) > 1:
                yield Finding(
                    "pattern-shadowed",
                    "warning",
                    name,
                    f"{field}: {len(matching)} keys match ({', '.join(repr(key) for key, _ in matching[:3])}) and give "
                    f"different values; the first counts, and PEFT sorts them when it saves. Anchor them with '^'.",
                )


def _portability(adapter: Adapter) -> Iterator[Finding]:
    if adapter.config.get("use_rslora") is True:
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
            "DoRA: GGUF cannot hold magnitudes, diffusers drops them and vLLM refuses them. Merge it into the base "
            "for those.",
        )
    alphas = {f"{m.scale * m.r:.9g}" for m in adapter.modules.values() if not math.isnan(m.scale)}
    if adapter.config.get("alpha_pattern") and len(alphas) > 1:
        yield Finding(
            "patterns-not-portable",
            "info",
            "",
            f"modules have {len(alphas)} different alphas: GGUF and MLX hold one for all, and some servers ignore "
            "patterns. 'lora-analysis convert' folds the difference into the factors.",
        )


def _without_expert(name: str, module: Module) -> str:
    """The path that PEFT matches patterns against, which does not go down to single experts."""
    return name.rsplit(".", 1)[0] if module.target.expert is not None else name


def _compiled(config: Mapping[str, Any], field: str) -> list[tuple[str, re.Pattern[str], Any]]:
    patterns = config.get(field)
    if not isinstance(patterns, Mapping):
        return []
    return [(key, pattern_regex(key), value) for key, value in patterns.items() if not isinstance(value, list)]


def _header_number(metadata: Mapping[str, str], key: str) -> float | None:
    try:
        return float(metadata[key])
    except (KeyError, ValueError):  # absent, or a word such as "Dynamic"
        return None
