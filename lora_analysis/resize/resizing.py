"""``resize``: every module of an adapter at another r, with the error stated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lora_analysis.adapter import Adapter, Contents, Module, Origin
from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.measures.spectrum import energy_rank, numerical_rank
from lora_analysis.resize.factors import numbers_of, truncated, widened
from lora_analysis.resize.notes import Resized, summary
from lora_analysis.resize.ranks import budget_ranks, threshold_rank
from lora_analysis.update import Update, with_scale

_LOW_RANK_PART = "dora-low-rank-part"

_OUTDATED_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "lora_parameters",  # MLX's rank and scale
)
_OUTDATED_HEADERS = ("ss_network_", "lora_adapter_metadata")
"""What configurations and headers say of r, alpha and the factors, which are others now."""

ValueT = TypeVar("ValueT")


class _Criterion(NamedTuple):
    name: str
    value: float


def resize(
    adapter: Adapter,
    *,
    r: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Adapter:
    """An adapter of other ranks, each module the best approximation of its ΔW that has so many.

    Exactly one of ``r``, ``energy``, ``threshold`` and ``budget`` says how many.

    Parameters
    ----------
    adapter : Adapter
        Updates of any kind; each module is read once for its spectrum and once to be cut. Those that are no product
        of two factors are formed, one at a time, to measure the error.
    r : int, optional
        Every module gets exactly r columns. Those of more are cut to their best rank-r part. Those of fewer are
        raised: ΔW is not changed, new rows of ``down`` are drawn as of a fresh LoRA, uniform in ``±1/sqrt(d_in)``,
        and new columns of ``up`` are zero, so that training can go on with them (of embeddings, ``up`` is drawn,
        standard normal, and ``down`` zero). So it is where ΔW has fewer than r directions: none is left that
        training could not move.
    energy : float, optional
        Each module keeps the least number of directions that hold this share of its ‖ΔW‖_F², in (0, 1], by the rule
        of ``energy_rank``: with 0.9 the ``k90`` of ``spectrum_table``.
    threshold : float, optional
        Each module keeps the directions with ``σ_k >= threshold · σ_1``, in (0, 1).
    budget : int, optional
        At most so many parameters, ``sum of r (d_out + d_in)``, distributed over the modules for the least squared
        error in sum: optimal where all modules have the same d_out + d_in, else within ``σ²`` of the first direction
        that did not fit, see ``budget_ranks``.
    seed : int
        Of the new rows, together with the module's name.

    Returns
    -------
    Adapter
        ``LowRankUpdate``s, held in memory, of the scales, targets and names they had. ``modules[name]`` states the
        new ``r`` and ``truncation_error = ‖ΔW - ΔW_resized‖_F``, measured with the rounding of the factors (of an
        adapter that was truncated before, both errors together); ``truncation_table`` gives all. ``notes`` sum up
        parameters and errors. It pickles with its factors.

        A module of which nothing is kept, because it is zero or the budget goes elsewhere, stays with r = 0 and its
        whole norm as error. No format holds such a module: it is left out when saved, with a warning.

    Raises
    ------
    ValueError, TypeError
        If not exactly one criterion is given, or one is out of range.
    UndefinedUpdateError
        If an update holds NaN or infinities; with ``budget``, if a scale is unknown, for then errors of different
        modules cannot be compared.
    UnsupportedAdapterError
        With ``budget``, if a module is the low-rank part of DoRA, whose error is not that of the weights. Or if a
        number is beyond the dtype of the factors.

    Notes
    -----
    Where a scale is unknown it stays so, and with it the error of what was cut, which is NaN; ``notes`` give the
    relative one. The scale that becomes known later is the old one, alpha over the r of training.

    Low-rank parts of DoRA keep their magnitudes and at least one column, and their errors are those of the product
    before magnitudes act on it. To cut the true update, read the adapter with ``base=``.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.update import LowRankUpdate
    >>> update = LowRankUpdate(torch.diag(torch.tensor([8.0, 6.0, 0.0])), torch.eye(3), scale=0.5)
    >>> small = resize(Adapter({"lin": update}), energy=0.6)
    >>> small["lin"].r, round(small["lin"].norm(), 6), round(small.modules["lin"].truncation_error, 6)
    (1, 4.0, 3.0)
    >>> large = resize(small, r=4)
    >>> large["lin"].r, round(large["lin"].norm(), 6)
    (4, 4.0)

    References
    ----------
    Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}. Open it with load_adapter.")
    criterion = _criterion(r=r, energy=energy, threshold=threshold, budget=budget)
    ranks = _ranks(adapter, criterion)
    modules: dict[str, Module] = {}
    found: dict[str, Resized] = {}
    for name, k in ranks.items():
        modules[name], found[name] = _resized(adapter, name, k, whole=criterion.name == "r", seed=seed)
    magnitudes = [name for name, module in modules.items() if _LOW_RANK_PART in module.flags]
    notes = summary(f"{criterion.name}={criterion.value}", found, magnitudes)
    config = {field: value for field, value in adapter.config.items() if field not in _OUTDATED_FIELDS}
    metadata = {
        field: value
        for field, value in adapter.metadata.items()
        if not field.startswith(_OUTDATED_HEADERS) and not field.endswith(":rank")  # cloneofsimo's
    }
    contents = Contents(modules, adapter.unused, (*adapter.notes, *notes))
    return _restored(contents, adapter.source, adapter.format, config, metadata)


def held_parameters(adapter: Adapter) -> int:
    """How many numbers the updates of an adapter are held as.

    Both factors of a product, of which LoHa is one of r² columns; both sides of a Kronecker product; all of a dense
    matrix.

    Examples
    --------
    >>> import torch
    >>> from lora_analysis.update import LowRankUpdate
    >>> held_parameters(Adapter({"lin": LowRankUpdate(torch.ones(5, 2), torch.ones(2, 7), scale=1.0)}))
    24
    """
    return sum(numbers_of(update) for update in adapter.values())


def _criterion(**given: Any) -> _Criterion:
    """The one that is given, checked."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        got = " and ".join(f"{name}=" for name in chosen) or "none"
        raise ValueError(f"expected exactly one of {'=, '.join(given)}=, got {got}.")
    [(name, value)] = chosen.items()
    if name in ("r", "budget"):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an integer, got {value!r}.")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
        value = int(value)
    if name == "energy" and not 0 < value <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {value}.")
    if name == "threshold" and not 0 < value < 1:
        raise ValueError(f"threshold: expected a part of the largest singular value in (0, 1), got {value}.")
    return _Criterion(name, value)


def _ranks(adapter: Adapter, criterion: _Criterion) -> dict[str, int]:
    """How many directions to keep of each module."""
    name, value = criterion
    if name == "budget":
        return _ranks_in_budget(adapter, int(value))
    if name == "r":
        return dict.fromkeys(adapter, int(value))
    rule = energy_rank if name == "energy" else threshold_rank
    return {module: rule(_unscaled(adapter, module)[0].singular_values(), value) for module in adapter}


def _ranks_in_budget(adapter: Adapter, budget: int) -> dict[str, int]:
    spectra: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        update, scale = _unscaled(adapter, name)
        if math.isnan(scale) and len(adapter) > 1:
            raise UndefinedUpdateError(
                f"{adapter.source}: {name!r}: expected known scales, by which a budget weighs modules against each "
                "other, this one is unknown. Pass alpha= when loading, or cut by r=, energy= or threshold=."
            )
        if _LOW_RANK_PART in module.flags:
            raise UnsupportedAdapterError(
                f"{adapter.source}: {name!r}: expected updates whose errors are those of the weights, got the low-rank "
                "part of DoRA. Read it with base=, or cut by r=, energy= or threshold=."
            )
        S = update.singular_values()
        # No parameters for the rounding of the decomposition.
        S = S[: numerical_rank(S, update.shape)]
        spectra[name] = S if math.isnan(scale) else abs(scale) * S
    costs = {name: sum(module.shape) for name, module in adapter.modules.items()}
    useful = [costs[name] for name, S in spectra.items() if bool((S > 0).any())]
    if useful and budget < min(useful):
        raise ValueError(
            f"budget: expected at least {min(useful):,} parameters, one direction of the smallest module, got "
            f"{budget:,}. Nothing would be left."
        )
    return budget_ranks(spectra, costs, budget)


def _unscaled(adapter: Adapter, name: str) -> tuple[Update, float]:
    """A module's ΔW / scale, on which its directions do not depend, and the scale.

    The update's own: that of DoRA's true update is 1, whatever alpha it was made with.
    """
    update = adapter[name]
    if not getattr(update, "finite", True) or math.isinf(update.scale):
        raise UndefinedUpdateError(
            f"{adapter.source}: {name!r}: expected finite numbers to resize, got NaN or infinities. lint names all "
            "such modules; leave them out."
        )
    return with_scale(update, 1.0), update.scale


def _resized(adapter: Adapter, name: str, k: int, *, whole: bool, seed: int) -> tuple[Module, Resized]:
    """A module at its new r, held; with ``whole`` in exactly k columns."""
    module = adapter.modules[name]
    update, scale = _unscaled(adapter, name)
    low_rank_part = _LOW_RANK_PART in module.flags
    # Without a product PEFT would leave out the magnitudes, too.
    least = k if whole else int(low_rank_part)
    cut, error = truncated(update, max(k, least))
    if math.isinf(error):
        raise UnsupportedAdapterError(
            f"{adapter.source}: {name!r}: expected factors within the range of {cut.up.dtype}, got larger ones. "
            "Convert it to float32 before."
        )
    held = widened(cut, least, module=name, seed=seed, embedding=module.embedding)
    size = abs(scale)
    made = replace(
        module,
        r=held.r,
        scale=scale,
        read=partial(_held, with_scale(held, scale)),
        magnitude=partial(_held, module.magnitude()) if module.magnitude and low_rank_part else None,
        # A truncation of a truncation: what each cuts off is orthogonal to what the other does.
        truncation_error=math.hypot(module.truncation_error, size * error if error else 0.0),
    )
    return made, Resized(
        before=numbers_of(update),
        after=numbers_of(held),
        raised=held.r - cut.r,
        norm=update.norm(),
        error=error,
        scale=size,
    )


def _held(value: ValueT) -> ValueT:
    return value


def _restored(
    contents: Contents, source: str, format: str, config: Mapping[str, Any], metadata: Mapping[str, str]
) -> Adapter:
    origin = Origin(_restored, (contents, source, format, config, metadata))
    return Adapter.from_contents(
        contents, source=source, format=format, origin=origin, config=config, metadata=metadata
    )
