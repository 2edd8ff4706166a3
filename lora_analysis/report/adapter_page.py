"""What the page of one adapter says: facts, the map of its modules, its tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.lint import Finding
from lora_analysis.report.columns import AMPLIFICATION, INTRUDERS, RANK, STRENGTH, Column
from lora_analysis.report.data import rounded, shown
from lora_analysis.report.measured import Measured, at_largest_k
from lora_analysis.tables.discoveries import RATE

if TYPE_CHECKING:
    from lora_analysis.plots.modules import Place

_TABLES: dict[str, tuple[Column, ...]] = {
    "rank": RANK,
    "strength": STRENGTH,
    "amplification": AMPLIFICATION,
    "intruders": INTRUDERS,
}
_KINDS = 8
"""Most kinds of matrices that are named."""
_SEVERITIES = ("error", "warning", "undecided", "info")


def facts(measured: Measured, number: int) -> list[tuple[str, str]]:
    """What the adapter is, as pairs of a heading and text."""
    adapter = measured.adapters[number]
    parts = [name] if (name := base_name(adapter)) else []
    parts += [f"given: {measured.base.source}"] if measured.base is not None else []
    found = [
        ("source", adapter.source),
        ("format", adapter.format),
        ("base", "; ".join(parts) or "not named"),
        ("targets", f"{len(adapter)} modules: {kinds_told(adapter)}"),
        ("r", told(module.r for module in adapter.modules.values())),
        ("scale", scale_told(adapter)),
    ]
    if adapter.unused:
        reasons = Counter(item.reason for item in adapter.unused).most_common()
        found.append(("other tensors", "; ".join(f"{count} × {reason}" for reason, count in reasons)))
    found += [("note", note) for note in adapter.notes]
    return found


def metadata(adapter: Adapter) -> list[tuple[str, str]]:
    """What the file's header and its configuration say, key by key."""
    found = [(str(key), str(value)) for key, value in adapter.metadata.items()]
    return found + [
        (str(key), json.dumps(value, default=str, ensure_ascii=False)) for key, value in adapter.config.items()
    ]


def grouped_findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings of one code together, the gravest first, with the first message and the modules they are about."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code), []).append(finding)
    return [
        {"severity": severity, "code": code, "message": found[0].message, "modules": [f.module for f in found]}
        for (severity, code), found in sorted(groups.items(), key=lambda item: _SEVERITIES.index(item[0][0]))
    ]


def adapter_data(measured: Measured, number: int) -> dict[str, Any]:
    """The modules with their places, what the map can show of each, and the tables."""
    adapter, tables = measured.adapters[number], measured.of(number)
    places, labels = _places(adapter, update=True)
    stem = f"adapter-{number + 1}"
    data: dict[str, Any] = {
        "name": measured.names[number],
        "modules": [
            {"name": name, "layer": p.layer, "kind": labels[p.kind]}
            for name, p in zip(rounded(list(adapter)), places, strict=True)
        ],
        "metrics": _metrics(tables),
        "tables": {},
    }
    if not tables:
        return data
    for name, columns in _TABLES.items():
        if name in tables:
            data["tables"][name] = shown(tables[name], columns, f"{name}-{stem}")
    return data


def spectra_data(measured: Measured, number: int) -> dict[str, Any]:
    """Singular values over ‖ΔW‖ of every module, their noise floors, errors of cuts, and the bands of chance."""
    tables = measured.of(number)
    if not tables:
        return {"modules": [], "bands": {}}
    modules, bands = [], {}
    columns = ("d_out", "d_in", "r", "flags", "singular_values", "noise_floors", "truncation_errors")
    rows = zip(*(tables["rank"][column].tolist() for column in columns), strict=True)
    for d_out, d_in, r, flags, values, floors, errors in rows:
        product = not {"no-chance", "zero", "nonfinite"} & set(flags.split())
        known = product and (d_out, d_in, r) in measured.bands
        band = f"{d_out}-{d_in}-{r}" if known else None
        if band is not None:
            bands[band] = rounded(measured.bands[d_out, d_in, r])
        modules.append({"S": rounded(values), "floors": rounded(floors), "errors": rounded(errors), "band": band})
    return {"modules": modules, "bands": bands}


def base_name(adapter: Adapter) -> str:
    """The base as the configuration names it."""
    named = adapter.config.get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


def kinds_told(adapter: Adapter) -> str:
    """The kinds of matrices that are adapted, with how many of each."""
    places, labels = _places(adapter, update=False)
    kinds = Counter(p.kind for p in places)
    most = len(kinds) if len(kinds) <= _KINDS else 2
    told_kinds = [f"{labels[kind]} ({count})" for kind, count in kinds.most_common(most)]
    return ", ".join(told_kinds) + (f" and {len(kinds) - most} more kinds" if most < len(kinds) else "")


def scale_told(adapter: Adapter) -> str:
    """The scales and where they came from."""
    found = Counter((module.scale, module.scale_source) for module in adapter.modules.values())
    if all(source == "unknown" for _, source in found):
        return "unknown: sizes are left out; pass --alpha"
    sources = ", ".join(dict.fromkeys(source for _, source in found))
    return f"{told(scale for scale, _ in found)} (from: {sources})"


def told(values: Any) -> str:
    """Distinct values in order, or their range where there are many."""
    distinct = sorted(set(values))
    if len(distinct) > 4:
        return f"{distinct[0]:.4g} to {distinct[-1]:.4g}"
    return ", ".join(f"{value:.4g}" for value in distinct)


def _places(adapter: Adapter, *, update: bool) -> tuple[list[Place], dict[str, str]]:
    """Layer and kind of every module, and what each kind is called."""
    from lora_analysis.plots.modules import kind_labels, place

    places = [place(name) for name in adapter]
    if all(p.layer is None for p in places):  # kohya's stems have their path between underscores
        places = [place(name.replace("_", ".")) for name in adapter]
    labels = kind_labels((p.kind for p in places), update=update)
    return places, {kind: _as_text(label) for kind, label in labels.items()}


def _as_text(label: str) -> str:
    r"""A figure's label as text: ``$\Delta W_q$`` is ``ΔW_q``."""
    return str(rounded(label.replace(r"$\Delta W_", "ΔW_").replace("$W_", "W_").removesuffix("$").replace(r"\$", "$")))


def _metrics(tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """What the map can show: values by module, chance for the colour bar, and which are consistent with it."""
    if not tables:
        return []
    rank, strength = tables["rank"], tables["strength"]
    within = rank["effective_rank"].between(rank["effective_rank_low"], rank["effective_rank_high"])
    k90_within = rank["k90"].astype(float).between(rank["k90_low"], rank["k90_high"])
    found = [
        _metric(
            "relative_norm", "relative norm", "share", strength["relative_norm"], log=True,
            chance=(strength["rounding"], strength["rounding"]), word="bfloat16 rounding",
            plain_word="no more than rounding",
            plain=strength["merge_signal_to_noise"] <= 1, help="‖ΔW‖ / ‖W‖, size of the update beside its weight",
        ),
        _metric(
            "norm", "norm", "number", strength["norm_update"], log=True, help="‖ΔW‖, which has no chance level"
        ),
        _metric(
            "effective_rank", "effective rank", "number", rank["effective_rank"],
            chance=(rank["effective_rank_low"], rank["effective_rank_high"]), plain=within,
            help="exp of the entropy of σ / Σσ; chance: 1 % to 99 % of random factors",
        ),
        _metric(
            "used_share", "used-rank share", "share", rank["k90"].astype(float) / rank["r"],
            chance=(rank["k90_low"] / rank["r"], rank["k90_high"] / rank["r"]), plain=k90_within,
            help="k90 / r, share of r that holds 90 % of ‖ΔW‖²; chance: 1 % to 99 % of random factors",
        ),
    ]  # fmt: skip
    if "amplification" in tables:
        last = at_largest_k(tables["amplification"])
        one = pd.Series(1.0, index=last.index)
        found.append(
            _metric(
                "gain", "gain", "number", last["gain"], log=True, chance=(one, one), plain=last["q"] > RATE,
                help="‖UᵀWV‖ over that of random directions at the largest k; 1 by chance",
            )
        )  # fmt: skip
    if "intruders" in tables:
        rows = tables["intruders"]
        for side in ("out", "in"):
            mine = rows[rows["side"] == side]
            found.append(
                _metric(
                    f"intruders_{side}", f"intruder share, {side}", "share", mine["energy_share"],
                    chance=(mine["control_share"], mine["control_share"]),
                    plain=mine["energy_share"] <= mine["control_share"], word="random updates",
                    plain_word="no more than random updates",
                    help="share of the energy of W + ΔW's top directions that is in new ones; chance: random updates "
                    "of the same singular values",
                )
            )  # fmt: skip
    return [
        metric
        for metric in found
        if any(value is not None and (value > 0 or not metric["log"]) for value in metric["values"])
    ]


def _metric(
    key: str,
    label: str,
    kind: str,
    values: pd.Series[Any],
    *,
    help: str,
    log: bool = False,
    chance: tuple[pd.Series[Any], pd.Series[Any]] | None = None,
    plain: pd.Series[bool] | None = None,
    word: str = "chance",
    plain_word: str = "consistent with chance",
) -> dict[str, Any]:
    return {
        "key": key,
        "label": label,
        "kind": kind,
        "help": help,
        "log": log,
        "word": word,
        "plain_word": plain_word,
        "values": rounded(values.tolist()),
        "low": None if chance is None else rounded(chance[0].tolist()),
        "high": None if chance is None else rounded(chance[1].tolist()),
        "plain": None if plain is None else [bool(value) for value in plain],
    }
