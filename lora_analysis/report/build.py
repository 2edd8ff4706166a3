"""A report written: data, pages and assets into a folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.report.adapter_page import (
    adapter_data,
    base_name,
    facts,
    grouped_findings,
    kinds_told,
    metadata,
    scale_told,
    spectra_data,
    told,
)
from lora_analysis.report.columns import ADAPTERS, PAIRS
from lora_analysis.report.data import rounded, shown, write_data
from lora_analysis.report.measured import Measured, at_largest_k, measure
from lora_analysis.report.pairs import Compared, compare_pairs
from lora_analysis.report.verdicts import amplified, found_of, layers_learned, merging, same, wasted_rank
from lora_analysis.tables.frames import as_adapters
from lora_analysis.tables.names import plain_text

_HERE = Path(__file__).parent
_MARK = "made-by-lora-analysis.txt"
"""A file by which a report is known as one that may be replaced."""


def write_report(
    adapters: Adapter | Sequence[Adapter],
    base: BaseWeights | None = None,
    *,
    out: str | os.PathLike[str],
    study: str | os.PathLike[str] | None = None,
    compared: int = 12,
    draws: int = 999,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Pages on every adapter, every two of them, all of them, and a study; they open from disk, without network.

    Parameters
    ----------
    adapters : Adapter or sequence of Adapter
        Of different sources.
    base : BaseWeights, optional
        Without it, what needs W is left out, and the pages say so.
    out : path
        A folder to make, or a report to replace.
    study : path, optional
        A directory of ``ablate`` or ``demo`` for a page on it.
    compared : int
        Adapters that are compared two by two, from the first on; the atlas has all.
    draws, seed : int
        Monte Carlo draws of every null, and their seed.
    workers : int, optional
        Threads, the cores of the machine by default.
    progress : bool
        Show progress bars on stderr.
    say : callable, optional
        Is told what is at work.

    Returns
    -------
    Path
        ``out/index.html``.

    Raises
    ------
    ValueError
        If there are no adapters, two of one source, or something else than a report is at ``out``.
    LoraAnalysisError
        If jinja2 or plotly is not installed, or an adapter, the base or the study does not fit.
    """
    adapters, out, say = as_adapters(adapters), Path(out), say or _silent
    sources = [adapter.source for adapter in adapters]
    if not adapters or len(set(sources)) < len(sources):
        twice = next((source for source, count in Counter(sources).items() if count > 1), None)
        raise ValueError(f"adapters: expected one or more of different sources, got {twice!r} twice or none.")
    _require_place(out)
    plotly, template = _libraries()
    runs = {} if study is None else _runs(Path(study), sources)  # where it is no study, known before the work
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as scratch:
        root = Path(scratch) / "report"
        for folder in ("assets", "data", "adapters"):
            (root / folder).mkdir(parents=True)
        options: dict[str, Any] = {"draws": draws, "seed": seed, "workers": workers}
        measured = measure(adapters, base, progress=progress, say=say, **options)
        pairs = compare_pairs(adapters, measured.names, runs, root / "data", compared=compared, say=say, **options)
        say("atlas")
        others = _other_pages(root, measured, study, seed, workers, progress)
        say("pages")
        _write_pages(root, template, measured, pairs, others)
        for path in sorted((_HERE / "assets").iterdir()):
            shutil.copyfile(path, root / "assets" / path.name)
        (root / "assets" / "plotly.min.js").write_text(plotly, encoding="utf-8")
        (root / _MARK).write_text("A report of lora-analysis, which a later one may replace.\n", encoding="ascii")
        _put_in_place(root, out)
    return out / "index.html"


def _libraries() -> tuple[str, Callable[..., str]]:
    """Plotly's script, and what makes a page of a template's name and its values."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise LoraAnalysisError(f'A report needs {error.name}: pip install "lora-analysis[report]".') from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain_text(value) if type(value) is str else value,  # not of markup
    )
    return get_plotlyjs(), lambda made_by, /, **values: environment.get_template(made_by).render(**values)


def _runs(study: Path, sources: Sequence[str]) -> dict[str, Mapping[Any, Any]]:
    """What a study says of those adapters that are its runs, known by their folder's name."""
    from lora_analysis.report.ablation_page import study_runs

    by_name: dict[str, Mapping[Any, Any]] = {str(row["run"]): row for row in study_runs(study).to_dict("records")}
    return {source: by_name[Path(source).name] for source in sources if Path(source).name in by_name}


def _other_pages(
    root: Path,
    measured: Measured,
    study: str | os.PathLike[str] | None,
    seed: int,
    workers: int | None,
    progress: bool,
) -> dict[str, Any]:
    """Data of the atlas and the ablation page; whether each is there, or why not."""
    from lora_analysis.report.atlas_page import atlas_data

    pages: dict[str, Any] = {"atlas": None, "ablation": None}
    if len(measured.adapters) > 1:
        found = atlas_data(measured.adapters, measured.names, seed=seed, workers=workers, progress=progress)
        pages["atlas"] = found if isinstance(found, str) else ""
        if not isinstance(found, str):
            write_data(root / "data", "atlas", found)
    if study is not None:
        from lora_analysis.report.ablation_page import ablation_data

        write_data(root / "data", "ablation", ablation_data(Path(study)))
        pages["ablation"] = ""
    return pages


def _write_pages(
    root: Path, template: Callable[..., str], measured: Measured, compared: Compared, others: Mapping[str, Any]
) -> None:
    pairs, names = compared.pairs, measured.names
    several = len(names) > 1
    common = {"names": names, "several": several, "notes": compared.notes, **others}
    table = _adapters_table(measured)
    write_data(root / "data", "index", shown(table, ADAPTERS, "adapters", pages=list(range(1, len(names) + 1))))
    numbers = pairs[["number_a", "number_b"]].to_numpy().tolist()
    write_data(root / "data", "pairs", {"names": rounded(names), **shown(pairs, PAIRS, "pairs", pairs=numbers)})

    def page(path: str, made_by: str, /, **values: Any) -> None:
        text = template(made_by, root="../" * path.count("/"), **common, **values)
        (root / path).write_text(text, encoding="utf-8")

    for number, adapter in enumerate(measured.adapters):
        write_data(root / "data", f"adapter-{number + 1}", adapter_data(measured, number))
        write_data(root / "data", f"spectra-{number + 1}", spectra_data(measured, number))
        tables, mine = measured.of(number), _with(pairs, number)
        values = {
            "number": number + 1,
            "name": names[number],
            "facts": facts(measured, number),
            "metadata": metadata(adapter),
            "findings": grouped_findings(measured.findings[number]),
            "verdicts": _verdicts(tables, mine, names[number]) if tables else [],
            "base": measured.base is not None,
            "partners": len(mine),
        }
        page(f"adapters/{number + 1}.html", "adapter.html", **values)
        if not several:
            page("index.html", "adapter.html", **values)
    if several:
        everything = {"rank": measured.rank, "strength": measured.strength}
        if measured.amplification is not None and measured.intruders is not None:
            everything |= {"amplification": measured.amplification, "intruders": measured.intruders}
        page("index.html", "index.html", verdicts=_verdicts(everything, pairs, None))
        page("compare.html", "compare.html", pairs=len(pairs))
        page("atlas.html", "atlas.html")
    if others["ablation"] is not None:
        page("ablation.html", "ablation.html")


def _verdicts(tables: Mapping[str, pd.DataFrame], pairs: pd.DataFrame, name: str | None) -> list[Any]:
    return [
        wasted_rank(tables["rank"]),
        layers_learned(tables["strength"]),
        same(pairs, name),
        merging(pairs, name),
        amplified(tables.get("amplification"), tables.get("intruders")),
    ]


def _with(pairs: pd.DataFrame, number: int) -> pd.DataFrame:
    return pairs[(pairs["number_a"] == number + 1) | (pairs["number_b"] == number + 1)]


def _adapters_table(measured: Measured) -> pd.DataFrame:
    """One row per adapter: what it is, and medians with their chance."""
    rows = []
    for number, adapter in enumerate(measured.adapters):
        tables = measured.of(number)
        severities = Counter(finding.severity for finding in measured.findings[number])
        row: dict[str, Any] = dict.fromkeys((column.key for column in ADAPTERS), None) | {
            "adapter": measured.names[number],
            "base": base_name(adapter) or None,
            "format": adapter.format,
            "targets": kinds_told(adapter),
            "r": told(module.r for module in adapter.modules.values()),
            "scale": scale_told(adapter).partition(" (")[0],
            "scale_source": ", ".join(sorted({module.scale_source for module in adapter.modules.values()})),
            "modules": len(adapter),
            "lint": ", ".join(f"{count} {severity}" for severity, count in severities.most_common()) or "none",
        }
        rows.append(row | (_medians(tables) if tables else {}))
    return pd.DataFrame(rows)


def _medians(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    rank, strength = tables["rank"], tables["strength"]
    known = rank[rank["effective_rank_low"].notna()]
    row: dict[str, Any] = {
        "effective_rank": rank["effective_rank"].median(),
        "norm": strength["norm_update"].median(),
        "relative_norm": strength["relative_norm"].median(),
    }
    if len(known):
        low, high = known["effective_rank_low"].min(), known["effective_rank_high"].max()
        row["effective_rank_chance"] = f"{low:.3g} to {high:.3g}"
        row["below_chance"] = f"{int((known['effective_rank'] < known['effective_rank_low']).sum())} of {len(known)}"
    if "amplification" in tables:
        last, out = at_largest_k(tables["amplification"]), tables["intruders"]
        out = out[out["side"] == "out"]
        row |= {"gain": last["gain"].median(), "gain_found": found_of(last["q"])}
        row |= {"intruder_share": out["energy_share"].mean(), "control_share": out["control_share"].mean()}
    return row


def _require_place(out: Path) -> None:
    """Refuse to write over anything but a report, before the work."""
    if out.resolve() == Path.cwd():
        raise ValueError(
            f"{out}: expected a folder that can be replaced, got the working directory. Name another place."
        )
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise ValueError(f"{out}: expected an empty folder, a report or nothing there, got other files. Name another.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder or nothing there, got a file. Name another place.")


def _put_in_place(made: Path, out: Path) -> None:
    """Move the new report to its place; one that is there goes first, and with it what the new one would not have."""
    if out.exists():
        out.replace(made.parent / "replaced")
    made.replace(out)


def _silent(line: str) -> None:
    """Say nothing."""
