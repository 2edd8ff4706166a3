"""Moments of the inputs of every adapted module, collected in one pass over a model.

Conventions
-----------
Inputs are seen by hooks on the base model, without the adapter, and nothing that is kept grows with their number; see
``measures.activations`` for what is kept and what it says.

Values
------
``collect_activations``, which gives ``Activations``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.adapter import Adapter, Target
from lora_analysis.errors import BaseWeightsError, LoraAnalysisError
from lora_analysis.measures.activations import Activations, InputMoments
from lora_analysis.tables.directions import usable_svd
from lora_analysis.update import Svd

PROBES = 256
"""Random directions, orthonormal, that say what chance gives."""


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    adapters: Adapter | Sequence[Adapter],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    seed: int = 0,
) -> Activations:
    """Run a model over batches and keep moments of the inputs of what adapters adapt.

    Parameters
    ----------
    model : Module
        The base model, with no adapter acting; in eval mode meanwhile, without gradients.
    batches : iterable
        Of what ``forward`` takes.
    adapters : Adapter or sequence of Adapter
        Of this base.
    forward : callable, optional
        ``forward(model, batch)``; by default mappings are passed as keywords, tuples as arguments, else one argument.
    mask : callable, optional
        ``mask(batch)`` gives a Tensor (n, length), nonzero where a token counts; by default the mapping's
        ``attention_mask``, where it has one. It is used where a module's inputs are (n, length, d).
    seed : int
        Of the probes.

    Returns
    -------
    Activations

    Raises
    ------
    BaseWeightsError
        If the model lacks all modules of the adapters.
    LoraAnalysisError
        If there were no batches.

    Examples
    --------
    >>> from lora_analysis.update import LowRankUpdate
    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> adapter = Adapter({"0": LowRankUpdate(torch.ones(2, 1), torch.eye(3)[:1], scale=1.0)})
    >>> found = collect_activations(model, [torch.eye(3)], adapter)  # three inputs, of which one is seen by ΔW
    >>> round(found.moments[0, "0"].update_square, 6)
    0.666667
    """
    items = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    collectors, unseen = _collectors(model, items, seed)
    if not collectors:
        raise BaseWeightsError(
            f"{type(model).__name__}: expected modules that the adapter adapts, got none of {len(unseen)}. "
            f"{next(iter(unseen.values()), '')}"
        )
    run = forward or _forward
    masked = mask or _mask
    batch = None
    with _eval_mode(model), torch.no_grad(), _hooked(collectors):
        for batch in batches:
            kept = masked(batch)
            for collector in collectors:
                collector.mask = kept
            run(model, batch)
    if batch is None:
        raise LoraAnalysisError("batches: expected at least one, got none.")
    moments: dict[tuple[int, str], InputMoments] = {}
    cross: dict[tuple[int, int, str], Tensor] = {}
    for collector in collectors:
        if not collector.count:
            unseen |= {use.name: "its module was never called" for use in collector.uses}
            continue
        collector.results(moments, cross)
    return Activations(moments, cross, unseen)


@dataclass(slots=True)
class _Use:
    """An update on a module: which rows of its output are its own, and its directions."""

    number: int
    name: str
    rows: tuple[int, int] | None
    svd: Svd
    output_square: float = 0.0


@dataclass(slots=True)
class _Collector:
    """Sums over the inputs of one module of the model."""

    module: nn.Module
    uses: list[_Use]
    basis: Tensor
    """(d_in, all directions and probes)."""
    probes: int
    count: int = 0
    second: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    input_total: Tensor = field(default_factory=lambda: torch.empty(0))
    input_square: float = 0.0
    probe_square: Tensor = field(default_factory=lambda: torch.empty(0))
    mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0].detach(), output.detach()
        keep = self.mask
        tokens = x.dim() == (2 if isinstance(module, nn.Embedding) else 3)
        if keep is not None and tokens and x.shape[:2] == keep.shape:
            chosen = keep.bool().to(x.device)
            x, y = x[chosen], y[chosen]
        if isinstance(module, nn.Embedding):
            x, y = x.flatten(), y.flatten(0, -2).double()
            projected, lengths = self.basis.to(x.device)[x], torch.ones(len(x), dtype=torch.float64)
            mean = torch.bincount(x, minlength=len(self.basis)).double()
        else:
            x, y = _rows_of_inputs(module, x, y)
            projected, lengths = x @ self.basis.to(x.device), x.square().sum(1)
            mean = x.sum(0)
        own = projected[:, : projected.shape[1] - self.probes]
        if not self.count:
            self.second = torch.zeros(own.shape[1], own.shape[1], dtype=torch.float64)
            self.total, self.input_total = own.new_zeros(own.shape[1]).cpu(), mean.new_zeros(len(mean)).cpu()
            self.probe_square = torch.zeros(self.probes, dtype=torch.float64)
        self.count += len(x)
        self.second += (own.mT @ own).cpu()
        self.total += own.sum(0).cpu()
        self.input_total += mean.cpu()
        self.input_square += float(lengths.sum())
        self.probe_square += projected[:, own.shape[1] :].square().sum(0).cpu()
        for use in self.uses:
            part = y if use.rows is None else y[:, use.rows[0] : use.rows[1]]
            use.output_square += float(part.square().sum())

    def results(self, moments: dict[tuple[int, str], InputMoments], cross: dict[tuple[int, int, str], Tensor]) -> None:
        n = self.count
        second, mean = self.second / n, self.total / n
        covariance = second - torch.outer(mean, mean)
        places, start = {}, 0
        for use in self.uses:
            stop = start + len(use.svd.S)
            places[use.number, use.name] = slice(start, stop)
            moments[use.number, use.name] = InputMoments(
                count=n,
                svd=use.svd,
                second=second[start:stop, start:stop].clone(),
                mean=mean[start:stop].clone(),
                mean_length=float((self.input_total / n).norm()),
                input_square=self.input_square / n,
                output_square=use.output_square / n,
                probes=self.probe_square / n,
            )
            start = stop
        for (a, name), first in places.items():
            for (b, other), last in places.items():
                if name == other and a <= b:
                    cross[a, b, name] = covariance[first, last].clone()


def _collectors(model: nn.Module, adapters: Sequence[Adapter], seed: int) -> tuple[list[_Collector], dict[str, str]]:
    uses: dict[str, list[_Use]] = {}
    unseen: dict[str, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for number, adapter in enumerate(adapters):
        for name, module in adapter.modules.items():
            where = _module_of(module.target, modules)
            if where is None or (why := _unlike(modules[where], module.target)):
                unseen[name] = why if where is not None else f"{module.target.tensor!r} is of no module of the model"
                continue
            svd, _ = usable_svd(module, scale_bound=False, leading_only=True)
            if svd is None:
                unseen[name] = "its update holds NaN or infinities"
                continue
            uses.setdefault(where, []).append(_Use(number, name, module.target.rows, svd))
    made = []
    generator = torch.Generator().manual_seed(seed)
    for where, mine in uses.items():
        d_in = mine[0].svd.Vh.shape[1]
        count = min(PROBES, d_in)
        probes = torch.linalg.qr(torch.randn(d_in, count, dtype=torch.float64, generator=generator)).Q
        basis = torch.cat([*(use.svd.V for use in mine), probes], dim=1)
        made.append(_Collector(modules[where], mine, basis, count))
    return made, unseen


def _module_of(target: Target, modules: Mapping[str, nn.Module]) -> str | None:
    """The module whose weight a target is; a base model may lack the prefix of the adapter's names, or have one."""
    path = target.tensor.removesuffix(".weight")
    if path in modules:
        return path
    ends = [name for name in modules if name.endswith(f".{path}") or (name and path.endswith(f".{name}"))]
    return ends[0] if len(ends) == 1 else None


def _unlike(module: nn.Module, target: Target) -> str:
    """Why the inputs of a module are not those of its weight as a matrix; empty where they are."""
    if target.columns is not None or target.expert is not None:
        return "updates of some columns, and of experts, are not collected"
    if isinstance(module, nn.Conv2d):
        simple = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return "" if simple else "convolutions with groups or other padding than zeros are not collected"
    if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
        return ""
    return f"inputs of {type(module).__name__} are not collected"


def _rows_of_inputs(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (n, d_in) and outputs without bias (n, d_out), float64."""
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Conv2d):
        options = {name: getattr(module, name) for name in ("dilation", "padding", "stride")}
        x = F.unfold(x.double(), module.kernel_size, **options).mT.flatten(0, 1)
        y = y.double().flatten(2).mT.flatten(0, 1)
    else:
        x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    return x, y if bias is None else y - bias.detach().double()


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


@contextmanager
def _hooked(collectors: Sequence[_Collector]) -> Iterator[None]:
    handles = [collector.module.register_forward_hook(collector) for collector in collectors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
