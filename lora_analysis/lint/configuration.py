"""Findings about what the configuration says of the modules: r, patterns, targets, DoRA, keys given twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_analysis.adapter import Adapter, Module
from lora_analysis.formats.diffusers.scaling import HEADER, Header
from lora_analysis.formats.kohya.scaling import stated, statements_about
from lora_analysis.formats.patterns import PatternKeys, pattern_regex
from lora_analysis.formats.peft.configuration import Scaling
from lora_analysis.lint.finding import Finding
from lora_analysis.lint.paths import pattern_path
from lora_analysis.lint.scales import takes_alpha

_CONFIG = "adapter_config.json"
_WITH_PATTERNS = ("LORA", "LOHA", "LOKR")
_NAMED = 3
"""Keys that one finding names."""


def configuration_findings(adapter: Adapter) -> Iterator[Finding]:
    """What the configuration or header says, against the modules that are there."""
    yield from _ranks(adapter)
    if adapter.format == "peft":
        yield from _patterns(adapter)
        yield from _untargeted(adapter)
        yield from _attention(adapter)
    yield from _unannounced_magnitudes(adapter)
    if adapter.config:
        yield from _repeated_keys(adapter)
    for name, module in adapter.modules.items():
        if "ambiguous-layout" in module.flags:
            given = "heads=" if adapter.format == "torchtune" else "base=, or see the adapter's notes"
            yield Finding(
                "ambiguous-layout",
                "undecided",
                name,
                f"the tensors allow another reading, and nothing in the file decides. Pass {given}.",
            )


def _ranks(adapter: Adapter) -> Iterator[Finding]:
    declared = _declared(adapter)
    for name, module in adapter.modules.items():
        said = None if declared is None else declared(name, module)
        if said is not None and said != module.r and "less-initial" not in module.flags:
            yield Finding(
                "rank-contradicted",
                "warning",
                name,
                f"the configuration says r={said}, the tensors have r={module.r}; tools that trust it compute another "
                "scale or fail. Correct r or rank_pattern.",
            )
    if adapter.format in ("kohya", "lycoris"):
        yield from _ranks_of_kohyas_header(adapter)


def _declared(adapter: Adapter) -> Callable[[str, Module], int | None] | None:
    """What gives the r that the file states of a module beside its tensors."""
    config, metadata = adapter.config, adapter.metadata
    if adapter.format == "peft" and _family(config) in (*_WITH_PATTERNS, "VERA"):
        scaling = Scaling({key: config[key] for key in ("r", "rank_pattern") if key in config}, None, adapter.source)
        return lambda name, module: scaling.declared_r(pattern_path(name, module))
    if adapter.format == "torchtune":
        return lambda name, module: _integer(config.get("r"))
    if adapter.format == "mlx":
        parameters = config.get("lora_parameters")
        rank = _integer(parameters.get("rank")) if isinstance(parameters, Mapping) else None
        return lambda name, module: rank
    if adapter.format == "cloneofsimo":
        return lambda name, module: _integer(metadata.get("{0}:{2}:rank".format(*name.rpartition("."))))
    if HEADER in metadata and adapter.checkpoint is not None:
        header = Header(adapter.checkpoint, None, adapter.source)

        def by_header(name: str, module: Module) -> int | None:
            scaling, path = header.of(name)
            return None if scaling is None else scaling.declared_r(path)

        return by_header
    return None


def _family(config: Mapping[str, Any]) -> str:
    stated = config.get("peft_type")
    return stated.upper() if isinstance(stated, str) else "LORA"


def _integer(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ranks_of_kohyas_header(adapter: Adapter) -> Iterator[Finding]:
    """Where the header's r is nobody's: a tool that gives modules their own often leaves it as it was."""
    linear, conv = stated(adapter.metadata)
    scaled = [module for module in adapter.modules.values() if takes_alpha(adapter, module)]
    fitting = [
        module for module in scaled if any(s.r in (None, module.r) for s in statements_about(module, linear, conv))
    ]
    if scaled and not fitting:
        most, _ = Counter(module.r for module in scaled).most_common(1)[0]
        yield Finding(
            "rank-contradicted",
            "warning",
            "",
            f"the header says r={linear.r or conv.r:g}, no module has it (most have r={most}). Correct it.",
        )


def _patterns(adapter: Adapter) -> Iterator[Finding]:
    """Keys that are nobody's, or that an earlier one decides for."""
    if _family(adapter.config) not in _WITH_PATTERNS:
        return
    paths = {name: pattern_path(name, module) for name, module in adapter.modules.items()}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = adapter.config.get(field)
        if not isinstance(patterns, Mapping) or not patterns:
            continue
        keys, values = list(patterns), list(patterns.values())
        lookup = PatternKeys()
        for key in keys:
            lookup.append(key)
        matching = {path: lookup.matching(path) for path in set(paths.values())}
        found = {index for indices in matching.values() for index in indices}
        first = {indices[0] for indices in matching.values() if indices}
        if unused := [key for index, key in enumerate(keys) if index not in found]:
            yield Finding(
                "pattern-unused",
                "warning",
                "",
                f"{field}: {_named(unused)} no module. PEFT matches keys as regular expressions with the end of a "
                "module's path. Correct or remove.",
            )
        differing = {
            path: indices for path, indices in matching.items() if len({values[index] for index in indices}) > 1
        }
        for name, path in paths.items():
            if path in differing:
                shown = ", ".join(repr(keys[index]) for index in differing[path][:_NAMED])
                yield Finding(
                    "pattern-shadowed",
                    "warning",
                    name,
                    f"{field}: {len(differing[path])} keys match ({shown}) and give different values; the first "
                    "counts, and PEFT sorts them when it saves. Anchor them with '^'.",
                )
        contested = {index for indices in differing.values() for index in indices}
        if repeated := [keys[index] for index in sorted(found - first - contested)]:
            yield Finding(
                "duplicate-key",
                "warning",
                "",
                f"{field}: {_named(repeated)} only modules for which an earlier key says the same. Remove.",
            )


def _named(keys: list[str]) -> str:
    """Some keys, and the verb that follows them."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{', '.join(map(repr, keys[:_NAMED]))}{more} {'match' if len(keys) > 1 else 'matches'}"


def _untargeted(adapter: Adapter) -> Iterator[Finding]:
    """Modules on which PEFT would put no layer, so that their factors go nowhere."""
    targets = adapter.config.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        ends = tuple(f".{target}" for target in targets)

        def targeted(path: str) -> bool:
            return f".{path}".endswith(ends)

    elif isinstance(targets, str) and targets and targets != "all-linear":
        try:
            pattern_regex(targets)  # raises where matching might take very long
            regex = re.compile(targets)
        except (ValueError, re.error, RecursionError, OverflowError):
            return

        def targeted(path: str) -> bool:
            return regex.fullmatch(path) is not None

    else:
        return
    parameters = adapter.config.get("target_parameters") or ()
    for name, module in adapter.modules.items():
        path = pattern_path(name, module)
        if not targeted(path) and not any(f".{path}".endswith(f".{parameter}") for parameter in parameters):
            yield Finding(
                "module-untargeted",
                "error",
                name,
                "target_modules does not find it: PEFT puts no layer there and leaves its factors out, with a warning "
                "at most. Add it to target_modules.",
            )


def _attention(adapter: Adapter) -> Iterator[Finding]:
    for name, module in adapter.modules.items():
        if any(".base_layer.out_proj.lora_A" in tensor for tensor in module.tensors):
            yield Finding(
                "merged-twice",
                "warning",
                name,
                "the out_proj of a MultiheadAttention, which PEFT merges twice: 2·s·B·A acts in training and in PEFT, "
                "s·B·A elsewhere. Double its B for other tools.",
            )


def _unannounced_magnitudes(adapter: Adapter) -> Iterator[Finding]:
    config = adapter.config
    dora = config.get("use_dora") is True or config.get("fine_tune_type") == "dora"
    if not config or dora or adapter.format not in ("peft", "mlx"):
        return
    setting = "use_dora" if adapter.format == "peft" else "fine_tune_type"
    for name, module in adapter.modules.items():
        if module.magnitude is not None:
            yield Finding(
                "dora-contradicted",
                "error",
                name,
                f"holds DoRA's magnitudes, and {setting} does not say DoRA: the library that wrote it would ignore "
                f"them. Set {setting} in {_CONFIG}.",
            )


def _repeated_keys(adapter: Adapter) -> Iterator[Finding]:
    """Keys that the text of the configuration holds twice, of which readers of JSON keep the last."""
    source = Path(adapter.source)
    path = (source if source.is_dir() else source.parent) / _CONFIG
    if not path.is_file():
        return
    repeated: list[str] = []

    def collected(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        repeated.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=collected)
    for key in repeated:
        yield Finding(
            "duplicate-key",
            "warning",
            "",
            f"{_CONFIG} holds {key!r} twice in one object; readers keep the last, silently. Remove one of them.",
        )
