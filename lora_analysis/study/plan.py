"""What an ablation is: which runs, with what settings, and the margins its claims are judged by, fixed beforehand.

Conventions
-----------
A plan is data: it is written to ``plan.json`` before the first run, and a study directory keeps the plan it was begun
with. Target sets are in the paper's letters, q, k, v and o, or names of the model's own modules. The seed of the
initial factors and that of the order of the data are apart, so that their effects can be told apart (the honest
Figure 4).

Values
------
``Run``, ``Recipe``, ``Margins``, ``Plan``.

References
----------
Hu et al. 2021, arXiv:2106.09685, section 7 (the ablations); Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Method = Literal["lora", "full", "bitfit", "head", "frozen"]
"""What trains: factors; every weight; every bias; the classifier alone; nothing."""

Scaling = Literal["lora", "rslora"]
"""alpha / r, or alpha / sqrt(r)."""

Side = Literal["in", "out"]
"""Of a matrix: the right singular directions, or the left ones."""

Crossing = Literal["paired", "corners", "product"]
"""Which seeds of initial factors meet which orders of the data."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Parameters
    ----------
    task : str
    method : str
    targets : tuple of str
        Adapted projections; () unless ``method`` is ``"lora"``.
    r : int
        0 unless ``method`` is ``"lora"``.
    init_seed, data_seed : int
        Of the initial factors, and of the order of the training data.
    size : int, optional
        How many of the training items it sees; all by default.
    lr : float, optional
        Instead of the recipe's; for tuning.
    scaling : {"lora", "rslora"}, optional
        Instead of the recipe's.

    Examples
    --------
    >>> Run("docstrings", "lora", ("q", "v"), 8, 0, 1).name
    'docstrings-q-v-r8-init0-data1'
    """

    task: str
    method: Method
    targets: tuple[str, ...] = ()
    r: int = 0
    init_seed: int = 0
    data_seed: int = 0
    size: int | None = None
    lr: float | None = None
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method: expected one of {get_args(Method)}, got {self.method!r}.")
        if (self.method == "lora") != bool(self.targets) or (self.method == "lora") != (self.r > 0):
            raise ValueError(f"expected targets and r of LoRA runs and of no others, got {self.method!r}, r={self.r}.")

    @property
    def name(self) -> str:
        """Name of its directory."""
        what = f"{'-'.join(self.targets)}-r{self.r}" if self.method == "lora" else self.method
        seeds = "" if self.method == "frozen" else f"-init{self.init_seed}-data{self.data_seed}"
        size = "" if self.size is None else f"-n{self.size}"
        scaling = "" if self.scaling is None else f"-{self.scaling}"
        return f"{self.task}-{what}{seeds}{size}{scaling}{'' if self.lr is None else f'-lr{self.lr:g}'}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs of a study share.

    Parameters
    ----------
    steps, batch_size : int
    lr : mapping of str to float
        Peak learning rate of AdamW of each method, falling to zero on a line after a tenth of the steps; ``lora-r8``
        is that of LoRA at r = 8, where it differs from ``lora``, and ``lora-rslora`` and ``lora-lora-r8`` are those of
        runs with another scaling rule than the recipe's.
    alpha : float
    scaling : {"lora", "rslora"}
        With rsLoRA one learning rate serves all ranks; with LoRA's own scale each rank needs one of its own.
    weight_decay : float
    max_grad_norm : float, optional
        The norm of all gradients together is clipped to it.
    bfloat16 : bool
        Train and evaluate under bfloat16 autocast.
    """

    steps: int
    batch_size: int
    lr: Mapping[str, float]
    alpha: float
    scaling: Scaling = "rslora"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    bfloat16: bool = False

    def rate(self, run: Run) -> float:
        """The peak learning rate of a run."""
        if run.lr is not None:
            return run.lr
        rule = [] if run.scaling is None else [f"{run.method}-{run.scaling}-r{run.r}", f"{run.method}-{run.scaling}"]
        names = (*rule, f"{run.method}-r{run.r}", run.method)
        return next((self.lr[name] for name in names if name in self.lr), float("nan"))

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"expected at least one step and one item, got {self.steps} and {self.batch_size}.")
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling: expected one of {get_args(Scaling)}, got {self.scaling!r}.")


@dataclass(frozen=True, slots=True)
class Margins:
    """What a claim is judged by, fixed before the first run.

    Parameters
    ----------
    confidence : float
        Of intervals, and 1 - the level of tests.
    sufficiency : float
        Share of the best rank's gain that r = 1 has to reach for the paper's "suffices" (C3).
    equivalence_sds : float
        Half-width of the region in which two metrics count as equal, in standard deviations between seeds (C14, C15).
    plateau_from : int
        The rank from which on the metric should be flat (C14, C15).
    ceiling : float
        The share of the ceiling below which ΔW counts as not lying in W's top directions (C10).
    top_share : float
        Share of W's directions that count as its top ones (C13; the paper's 10 %).
    tail_ratio : float
        Overlap beside the top direction, in units of chance, from which on it counts as shared (C4b).
    side : {"in", "out"}
        Of ΔW whose singular directions C4 to C6b and C8 are judged by: "in" as the paper's, which are A's. What the
        other side says is printed beside it.
    layers_share : float
        Share of layers in which a claim has to hold to hold "across layers" (C8).
    """

    confidence: float = 0.95
    sufficiency: float = 0.9
    equivalence_sds: float = 2.0
    plateau_from: int = 4
    ceiling: float = 0.5
    top_share: float = 0.1
    tail_ratio: float = 1.5
    side: Side = "in"
    layers_share: float = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """An ablation: {target sets} x {ranks} x {seeds} x {tasks} x {scaling rules}, with its controls.

    Parameters
    ----------
    setting : mapping
        What model and which tasks, as ``open_setting`` takes it.
    task : str
        The task of the grid; others are controls (C17).
    recipe : Recipe
    target_sets : tuple of tuple of str
    ranks : tuple of int
    seeds : tuple of int
        Of the initial factors and of the order of the data.
    crossing : {"paired", "corners", "product"}
        Which pairs of the two seeds: equal ones; at the largest rank of ``main`` also the two of the first and last
        seed that are not equal; or all pairs in the whole grid.
    budget : tuple of (targets, r)
        Target sets at ranks of equal numbers of parameters (Table 5), beside the grid.
    controls : tuple of str
        Methods beside LoRA: ``full``, ``bitfit``, ``head``; ``frozen`` is always run.
    other_tasks : tuple of str
        Tasks that ``main`` is adapted to at one rank, for comparison with ``task`` (C17).
    control_tasks : tuple of str
        Tasks likewise that no claim is judged by, such as text without meaning, whose directions differ for sure.
    grid_tasks : tuple of str
        Tasks with a whole grid of their own beside ``task``. Claims are judged on ``task``.
    scalings : tuple of {"lora", "rslora"}
        Scaling rules beside the recipe's with a whole grid of their own. Claims are judged on the recipe's.
    sizes : tuple of int
        Numbers of training items at which LoRA is compared with full fine-tuning (C16).
    margins : Margins
    """

    setting: Mapping[str, Any]
    task: str
    recipe: Recipe
    target_sets: tuple[tuple[str, ...], ...] = (("q",), ("q", "v"), ("q", "k", "v", "o"))
    ranks: tuple[int, ...] = (1, 2, 4, 8, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: tuple[tuple[tuple[str, ...], int], ...] = ()
    controls: tuple[Method, ...] = ("full", "head")
    other_tasks: tuple[str, ...] = ()
    control_tasks: tuple[str, ...] = ()
    grid_tasks: tuple[str, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    crossing: Crossing = "corners"
    sizes: tuple[int, ...] = ()
    margins: Margins = field(default_factory=Margins)

    def __post_init__(self) -> None:
        if not (self.target_sets and self.ranks and self.seeds):
            raise ValueError("expected at least one target set, one rank and one seed.")
        for name in ("target_sets", "ranks", "seeds", "sizes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each once, got {values}.")
        once = {"grid_tasks": self.grid_tasks, "other_tasks": (*self.other_tasks, *self.control_tasks)}
        for name, others in once.items():
            values = (self.task, *others)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each once and other tasks than {self.task!r}, got {values[1:]}.")
        if self.recipe.scaling in self.scalings or len(set(self.scalings)) < len(self.scalings):
            raise ValueError(f"scalings: expected each once, beside {self.recipe.scaling!r}, got {self.scalings}.")
        if self.crossing not in get_args(Crossing):
            raise ValueError(f"crossing: expected one of {get_args(Crossing)}, got {self.crossing!r}.")

    @property
    def main(self) -> tuple[str, ...]:
        """The target set that comparisons of seeds, sizes and tasks are made with: q and v, or the first."""
        return ("q", "v") if ("q", "v") in self.target_sets else self.target_sets[0]

    def runs(self) -> list[Run]:
        """Every run, each once, the costliest first so that a pool ends together."""
        first, last, most = self.seeds[0], self.seeds[-1], max(self.ranks)
        beside = (*self.other_tasks, *self.control_tasks)
        found = [Run(task, "frozen") for task in (self.task, *self.grid_tasks, *beside)]
        pairs = [(i, d) for i, d in itertools.product(self.seeds, repeat=2) if i == d or self.crossing == "product"]
        grid = itertools.product(self.target_sets, self.ranks, pairs)
        for (targets, r, (i, d)), task, scaling in itertools.product(
            grid, (self.task, *self.grid_tasks), (None, *self.scalings)
        ):
            found.append(Run(task, "lora", targets, r, i, d, scaling=scaling))
        for (targets, r), seed in itertools.product(self.budget, self.seeds):
            found.append(Run(self.task, "lora", targets, r, seed, seed))
        if first != last and self.crossing != "paired":
            # The other two cells of {same, different} initial factors x {same, different} order.
            found.append(Run(self.task, "lora", self.main, most, first, last))
            found.append(Run(self.task, "lora", self.main, most, last, first))
        for method, seed in itertools.product(self.controls, self.seeds):
            found.append(Run(self.task, method, init_seed=seed, data_seed=seed))
        shared = 8 if 8 in self.ranks else most
        for task, seed in itertools.product(beside, self.seeds):
            found.append(Run(task, "lora", self.main, shared, seed, seed))
        for size, seed in itertools.product(self.sizes, self.seeds):
            found.append(Run(self.task, "lora", self.main, shared, seed, seed, size=size))
            found.append(Run(self.task, "full", init_seed=seed, data_seed=seed, size=size))
        cost = {"full": 0, "bitfit": 1, "lora": 2, "head": 3, "frozen": 4}
        return sorted(dict.fromkeys(found), key=lambda run: (run.method != "frozen", cost[run.method], -run.r))

    def to_json(self) -> dict[str, Any]:
        """As ``plan.json`` holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """The plan that ``to_json`` gave, also after a round trip through a file."""
        read = dict(content)
        read["recipe"], read["margins"] = Recipe(**read["recipe"]), Margins(**read["margins"])
        read["target_sets"] = tuple(tuple(targets) for targets in read["target_sets"])
        read["budget"] = tuple((tuple(targets), r) for targets, r in read["budget"])
        for name in ("ranks", "seeds", "controls", "other_tasks", "control_tasks", "grid_tasks", "scalings", "sizes"):
            read[name] = tuple(read.get(name, ()))
        return cls(**read)
