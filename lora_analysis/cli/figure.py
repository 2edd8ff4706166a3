"""``lora-analysis figure``: the paper's figures, and ours, of any adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_analysis import tables
from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights
from lora_analysis.cli import options
from lora_analysis.cli.output import report_notes, say
from lora_analysis.errors import LoraAnalysisError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".pdf", ".png", ".svg")
Kind = Literal[
    "spectra", "ranks", "seeds", "grid", "amplification", "gain", "map", "overlap", "atlas", "ablation"
]  # fmt: skip
Side = Literal["in", "out"]
METRICS = {
    "relative-norm": ("relative_norm", "‖ΔW‖ / ‖W‖"),
    "merge-kept": ("merge_kept", "kept by a bfloat16 merge"),
    "effective-rank": ("effective_rank", "effective rank"),
    "stable-rank": ("stable_rank", "stable rank"),
    "learned": ("learned_directions", "directions learned in A"),
    "gain": ("gain", "gain over chance, k = r"),
    "intruder-share": ("energy_share", "energy in intruders"),
}
Metric = Literal["relative-norm", "merge-kept", "effective-rank", "stable-rank", "learned", "gain", "intruder-share"]


def _checked_out(value: Path | None) -> Path | None:
    if value is not None and value.suffix not in SUFFIXES:
        raise typer.BadParameter(f"expected a name ending in {', '.join(SUFFIXES)}, got {str(value)!r}.")
    return value


def figure(
    kind: Annotated[
        Kind,
        typer.Argument(
            metavar="NAME",
            help="spectra; ranks, seeds (figures 3 and 4 of the paper), grid; amplification, gain (table 7); map; "
            "overlap (figure 8); atlas; ablation, of a study.",
        ),
    ],
    sources: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapters; for ablation a study.")],
    module: Annotated[
        list[str] | None, typer.Option(help="Modules to draw; q and v of the middle layer, or all, by default.")
    ] = None,
    side: Annotated[Side, typer.Option(help="Input or output directions.")] = "in",
    target: Annotated[
        Literal["update", "A", "B"], typer.Option(help="Of ranks, seeds, grid: of ΔW, A or B.")
    ] = "update",
    metric: Annotated[Metric, typer.Option(help="Of map: what the colours say.")] = "relative-norm",
    k: Annotated[int | None, typer.Option(help="Of gain, overlap: top directions; all by default.", min=1)] = None,
    columns: Annotated[int, typer.Option(help="Width: one column of print or two.", min=1, max=2)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="FILE.pdf, .png or .svg; NAME.png by default.", callback=_checked_out)
    ] = None,
    seed: options.Seed = 0,
    format: options.Format = None,
    alpha: options.Alpha = None,
    base: options.Base = None,
    split: options.Split = None,
    name: options.Name = None,
    initial: options.Initial = None,
    heads: options.Heads = None,
    pattern: options.Pattern = None,
    revision: options.Revision = None,
    base_revision: options.BaseRevision = None,
    device: options.Device = "cpu",
    workers: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """A figure in print quality, with what chance gives drawn in it.

    Example: lora-analysis figure ranks runs/r8 runs/r64 --out ranks.pdf
    """
    from lora_analysis import plots

    weights = options.open_base(base, device, base_revision)
    opened = [] if kind == "ablation" else options.open_adapters(
        sources,
        format=format,
        alpha=alpha,
        base=weights,
        split=split,
        name=name,
        initial=initial,
        heads=heads,
        pattern=pattern,
        device=device,
        revision=revision,
    )  # fmt: skip
    report_notes(opened)
    request = _Request(
        sources, opened, weights, module, side, target, metric, k, columns, {"seed": seed, "workers": workers}
    )
    path = plots.save_figure(_MAKERS[kind](request), out or Path(f"{kind}.png"))
    if as_json:
        print(json.dumps({"figure": str(path)}))
    else:
        say(f"drawn: {path}")


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be drawn of what."""

    sources: Sequence[str]
    adapters: Sequence[Adapter]
    base: BaseWeights | None
    modules: Sequence[str] | None
    side: Side
    target: Literal["update", "A", "B"]
    metric: str
    k: int | None
    columns: int
    computing: dict[str, Any]

    def one(self) -> Adapter:
        return self._of(1)[0]

    def two(self) -> Sequence[Adapter]:
        return self._of(2)

    def _of(self, count: int) -> Sequence[Adapter]:
        if len(self.adapters) != count:
            words = "one adapter" if count == 1 else "two adapters"
            raise typer.BadParameter(f"expected {words}, got {len(self.adapters)}.", param_hint="ADAPTER")
        return self.adapters

    def weights(self) -> BaseWeights:
        if self.base is None:
            raise typer.BadParameter("expected the base model for this figure.", param_hint="--base")
        return self.base

    def axes(self) -> Any:
        from matplotlib.figure import Figure

        from lora_analysis.plots.appearance import ONE_COLUMN, TWO_COLUMNS

        width = (ONE_COLUMN, TWO_COLUMNS)[self.columns - 1]
        return Figure(figsize=(width, 2.8), layout="compressed").add_subplot()

    def drawn(self, names: Sequence[str]) -> list[str]:
        """The modules asked for; q and v of the middle layer, else the first two kinds there, by default."""
        if self.modules:
            missing = [module for module in self.modules if module not in names]
            if missing:
                raise LoraAnalysisError(f"no module {missing[0]!r} (first: {names[0] if names else None!r}).")
            return list(self.modules)
        return middle_modules(names)

    def similarity(self) -> Any:
        a, b = self.two()
        shared = self.drawn([name for name in a if name in b])
        if not shared:
            raise LoraAnalysisError(f"{a.source} and {b.source}: expected modules of like name, found none.")
        pairs = [(name, name) for name in shared]
        return tables.similarity_table(a, b, target=self.target, pairs=pairs, cells="all", draws=1), shared


def middle_modules(names: Sequence[str]) -> list[str]:
    """The modules that the paper draws: q and v of the middle layer; where there are none, the first two kinds.

    Examples
    --------
    >>> middle_modules([f"layers.{i}.attn.{kind}_proj" for i in range(5) for kind in "kqv"])
    ['layers.2.attn.q_proj', 'layers.2.attn.v_proj']
    """
    from lora_analysis.plots.modules import kind_labels, place

    places = {name: place(name) for name in names}
    labels = kind_labels(found.kind for found in places.values())
    wanted = [kind for kind, label in labels.items() if label in ("$W_q$", "$W_v$")] or list(labels)[:2]
    chosen = []
    for kind in wanted:
        mine = [name for name in names if places[name].kind == kind]
        chosen.append(mine[len(mine) // 2])
    return chosen


def _spectra(request: _Request) -> Figure:
    from lora_analysis import plots

    table = tables.spectrum_table(request.one())
    return _of(plots.spectra(table, modules=request.modules, ax=request.axes()))


def _ranks(request: _Request) -> Figure:
    from lora_analysis import plots

    table, modules = request.similarity()
    return plots.figure_ranks(table, modules, side=request.side)


def _seeds(request: _Request) -> Figure:
    from lora_analysis import plots

    table, modules = request.similarity()
    return plots.figure_seeds(table, modules, side=request.side)


def _grid(request: _Request) -> Figure:
    from lora_analysis import plots

    table, modules = request.similarity()
    return _of(plots.similarity_grid(table, module=modules[0], side=request.side, ax=request.axes()))


def _amplification(request: _Request) -> Figure:
    from lora_analysis import plots

    adapter, base = request.one(), request.weights()
    [module, *_] = request.drawn(list(adapter))
    table = tables.amplification_table(adapter, base, **request.computing)
    return _of(plots.amplification_points(table, module=module, ax=request.axes()))


def _gain(request: _Request) -> Figure:
    from lora_analysis import plots

    base = request.weights()
    ks = None if request.k is None else [request.k]
    table = tables.amplification_table(list(request.adapters), base, ks=ks, **request.computing)
    return _of(plots.gain_by_layer(table, k=request.k, ax=request.axes()))


def _map(request: _Request) -> Figure:
    from lora_analysis import plots

    column, label = METRICS[request.metric]
    adapter = request.one()
    chance, q = None, None
    if request.metric in ("relative-norm", "merge-kept"):
        table = tables.strength_table(adapter, request.weights(), **request.computing)
    elif request.metric == "gain":
        table = tables.amplification_table(adapter, request.weights(), **request.computing)
        table, chance, q = table.dropna(subset="gain").groupby("module", sort=False).tail(1), 1.0, "q"
    elif request.metric == "intruder-share":
        table = tables.intruder_table(adapter, request.weights(), **request.computing)
        table = table[table["side"] == "out"]
        chance = float(table["control_share"].mean())
    else:
        table = tables.used_rank_table(adapter, **request.computing)
        if request.metric == "learned":
            q = "learned_q"
        else:
            chance = float(table[f"{column}_low"].mean())
    return _of(plots.module_map(table, column, label=label, chance=chance, q=q))


def _overlap(request: _Request) -> Figure:
    from lora_analysis import plots

    ks = None if request.k is None else [request.k]
    table = tables.spectrum_overlap_table(request.one(), request.weights(), ks=ks, **request.computing)
    return _of(plots.spectrum_overlap(table, side=request.side, k=request.k, ax=request.axes()))


def _atlas(request: _Request) -> Figure:
    from lora_analysis import plots

    return plots.figure_atlas(tables.atlas(list(request.adapters), **request.computing))


def _ablation(request: _Request) -> Figure:
    from lora_analysis import plots
    from lora_analysis.study.evidence import open_study

    [source] = request.sources
    study = open_study(Path(source))
    runs = study.runs
    lora = runs[(runs["method"] == "lora") & (runs["task"] == study.plan.task) & runs["size"].isna()]
    lora = lora[lora["scaling"] == study.plan.recipe.scaling].assign(seed=lora["init_seed"])
    metric = "held_out_loss" if lora["accuracy"].isna().any() else "accuracy"
    frozen = runs[(runs["method"] == "frozen") & (runs["task"] == study.plan.task)][metric]
    baseline = float(frozen.iloc[0]) if len(frozen) else None
    return _of(plots.rank_ablation(lora, metric=metric, baseline=baseline, ax=request.axes()))


def _of(ax: Any) -> Figure:
    drawn: Figure = ax.figure
    return drawn


_MAKERS: dict[str, Callable[[_Request], Any]] = {
    "spectra": _spectra,
    "ranks": _ranks,
    "seeds": _seeds,
    "grid": _grid,
    "amplification": _amplification,
    "gain": _gain,
    "map": _map,
    "overlap": _overlap,
    "atlas": _atlas,
    "ablation": _ablation,
}
