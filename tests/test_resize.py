"""Resized adapters against dense decompositions, closed forms, and every choice there is."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lora_analysis as la
from lora_analysis.adapter import Target
from lora_analysis.resize import budget_ranks, held_parameters, threshold_rank

# Factors are held in float32: relative to the norm of the matrix.
ROUNDED = 1e-6


def with_spectrum(values: list[float], d_out: int = 9, d_in: int = 7, scale: float = 1.0) -> la.LowRankUpdate:
    """An update whose singular values, times the scale, are these."""
    S = torch.tensor(values, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(d, len(S), dtype=torch.float64)).Q for d in (d_out, d_in))
    return la.LowRankUpdate(U * S, V.mT, scale)


def normal(d_out: int, d_in: int, r: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> la.LowRankUpdate:
    return la.LowRankUpdate(torch.randn(d_out, r).to(dtype), torch.randn(r, d_in).to(dtype), scale)


def best(update: la.Update, k: int) -> np.ndarray[Any, Any]:
    """The best rank-k part, of the dense matrix."""
    U, S, Vh = np.linalg.svd(update.dense().numpy(), full_matrices=False)
    part: np.ndarray[Any, Any] = U[:, :k] * S[:k] @ Vh[:k]
    return part


def ranks(adapter: la.Adapter) -> dict[str, int]:
    return {name: module.r for name, module in adapter.modules.items()}


KINDS: dict[str, Any] = {
    "low rank": lambda: normal(9, 7, 5, 0.5),
    "negative scale": lambda: normal(9, 7, 5, -1.5),
    "more columns than rows": lambda: normal(4, 6, 8),
    "deficient": lambda: la.LowRankUpdate(torch.ones(9, 4), torch.randn(4, 7), 1.0),
    "dense": lambda: la.DenseUpdate(torch.randn(6, 8), 0.3),
    "Kronecker": lambda: la.KroneckerUpdate(torch.randn(2, 3), torch.randn(4, 2), -2.0),
}


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_cut_to_its_best_part_with_its_error(kind: str, k: int) -> None:
    update = KINDS[kind]()
    resized = la.resize(la.Adapter({"lin": update}), r=k)
    found, module = resized["lin"], resized.modules["lin"]
    size = update.norm()
    assert isinstance(found, la.LowRankUpdate)
    assert (found.r, module.r, found.scale, module.scale) == (k, k, update.scale, update.scale)
    np.testing.assert_allclose(found.dense().numpy(), best(update, k), rtol=0, atol=ROUNDED * size)
    off = float((update.dense() - found.dense()).norm())
    assert module.truncation_error == pytest.approx(off, rel=1e-9, abs=1e-14 * size)
    tail = float(np.linalg.norm(np.linalg.svd(update.dense().numpy(), compute_uv=False)[k:]))
    assert module.truncation_error == pytest.approx(tail, rel=1e-5, abs=ROUNDED * size)


def test_factors_of_a_cut_update_are_balanced() -> None:
    found = la.resize(la.Adapter({"lin": with_spectrum([8.0, 2.0, 0.5], scale=2.0)}), r=2)["lin"]
    assert isinstance(found, la.LowRankUpdate)
    for gram in (found.up.mT @ found.up, found.down @ found.down.mT):
        assert torch.allclose(gram, torch.diag(torch.tensor([8.0, 2.0], dtype=gram.dtype)), atol=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_keeps_the_least_number_that_holds_it(energy: float) -> None:
    adapter = la.Adapter({str(i): normal(9, 7, 5) for i in range(3)})
    resized = la.resize(adapter, energy=energy)
    for name, update in adapter.items():
        squares = np.linalg.svd(update.dense().numpy(), compute_uv=False) ** 2
        least = next(k for k in range(1, 8) if squares[:k].sum() >= energy * (1 - 1e-12) * squares.sum())
        assert resized.modules[name].r == least
        relative = resized.modules[name].truncation_error / update.norm()
        assert relative <= math.sqrt(1 - energy) + ROUNDED
    if energy == 0.9:
        assert ranks(resized) == la.spectrum_table(adapter).set_index("module")["k90"].to_dict()


def test_energy_of_equal_shares_is_not_a_matter_of_rounding() -> None:
    # 9 + 1 = 10: one direction holds 0.9 exactly.
    assert ranks(la.resize(la.Adapter({"lin": with_spectrum([3.0, 1.0])}), energy=0.9)) == {"lin": 1}


@pytest.mark.parametrize(("threshold", "kept"), [(0.9, 1), (0.75, 2), (0.6, 2), (0.5, 3), (0.25, 4), (0.1, 4)])
def test_a_threshold_keeps_exactly_those_that_reach_it(threshold: float, kept: int) -> None:
    """Versions of kohya's resize keep one more: the count plus one, as if it were an index."""
    S = [4.0, 3.0, 2.0, 1.0]
    assert threshold_rank(torch.tensor(S), threshold) == kept == sum(value >= threshold * S[0] for value in S)
    resized = la.resize(la.Adapter({"lin": with_spectrum(S, scale=-3.0)}), threshold=threshold)
    assert ranks(resized) == {"lin": kept}
    assert resized.modules["lin"].truncation_error == pytest.approx(3 * math.hypot(*S[kept:], 0.0))


def least_error(spectra: dict[str, Tensor], costs: dict[str, int], budget: int) -> float:
    """The least squared error that any ranks within the budget have."""
    choices = itertools.product(*(range(len(S) + 1) for S in spectra.values()))
    return min(
        sum(float((S[k:] ** 2).sum()) for k, S in zip(ks, spectra.values(), strict=True))
        for ks in choices
        if sum(k * costs[name] for k, name in zip(ks, spectra, strict=True)) <= budget
    )


@pytest.mark.parametrize("equal", [True, False], ids=["equal costs", "unequal costs"])
def test_a_budget_is_spent_as_well_as_any_other_way(equal: bool) -> None:
    rng = np.random.default_rng(0)
    exact = 0
    for _ in range(60):
        names = ["a", "b", "c"]
        spectra = {name: torch.from_numpy(-np.sort(-rng.exponential(size=4))) for name in names}
        costs = {name: 10 if equal else int(rng.integers(5, 30)) for name in names}
        budget = int(rng.integers(min(costs.values()), 4 * sum(costs.values())))
        found = budget_ranks(spectra, costs, budget)
        assert sum(found[name] * costs[name] for name in names) <= budget
        error = sum(float((spectra[name][found[name] :] ** 2).sum()) for name in names)
        least = least_error(spectra, costs, budget)
        passed_over = [float(spectra[name][k]) ** 2 for name, k in found.items() if k < 4]
        assert least - 1e-12 <= error <= least + max(passed_over, default=0.0) + 1e-12
        exact += error <= least + 1e-12
    assert exact == 60 if equal else exact >= 30


def test_a_budget_goes_where_it_removes_most() -> None:
    adapter = la.Adapter(
        {
            "strong": with_spectrum([4.0, 3.0, 1.0], scale=2.0),
            "weak": with_spectrum([8.0, 6.0, 2.0], scale=0.1),
            "wide": with_spectrum([8.0, 1.0], 90, 70),
        }
    )
    resized = la.resize(adapter, budget=160 + 3 * 16)
    assert ranks(resized) == {"strong": 3, "weak": 0, "wide": 1}
    assert held_parameters(resized) == 160 + 3 * 16
    # What is left over after the wide one did not fit goes to the next that does.
    assert ranks(la.resize(adapter, budget=160 + 15 + 2 * 16)) == {"strong": 2, "weak": 0, "wide": 1}
    assert ranks(la.resize(adapter, budget=159)) == {"strong": 3, "weak": 3, "wide": 0}
    whole = la.resize(adapter, budget=10_000)
    assert ranks(whole) == {"strong": 3, "weak": 3, "wide": 2}
    assert all(module.truncation_error == 0 for module in whole.modules.values())


def test_no_parameters_go_to_rounding() -> None:
    deficient = la.LowRankUpdate(torch.ones(9, 4), torch.ones(4, 7), 1.0)
    assert ranks(la.resize(la.Adapter({"lin": deficient}), budget=1000)) == {"lin": 1}


def test_a_module_that_gets_nothing_stays_with_its_whole_norm_as_error(tmp_path: Path) -> None:
    adapter = la.Adapter({"strong": with_spectrum([4.0, 3.0]), "weak": with_spectrum([2.0])})
    resized = la.resize(adapter, budget=40)
    assert ranks(resized) == {"strong": 2, "weak": 0}
    assert resized.modules["weak"].truncation_error == pytest.approx(2.0)
    assert "1 of 2 modules have r = 0, which no format holds" in " ".join(resized.notes)
    table = la.truncation_table(resized).set_index("module")
    assert table.loc["weak", "truncation_error_relative"] == 1.0
    assert table.loc["weak", "flags"] == "zero"
    with pytest.warns(UserWarning, match=r"1 module of r = 0 not written, .*'weak'"):
        la.save_adapter(resized, tmp_path, dtype=torch.float64)
    assert ranks(la.load_adapter(tmp_path)) == {"strong": 2}


def test_raising_r_keeps_the_update_bit_for_bit_and_draws_as_a_fresh_lora_does() -> None:
    update = normal(40, 30, 2, 0.5)
    resized = la.resize(la.Adapter({"lin": update}), r=6)
    found = resized["lin"]
    assert isinstance(found, la.LowRankUpdate)
    assert torch.equal(found.up[:, :2], update.up)
    assert torch.equal(found.down[:2], update.down)
    assert not found.up[:, 2:].any()
    bound = 1 / math.sqrt(30)
    assert bound / 2 < float(found.down[2:].abs().max()) <= bound
    assert (found.scale, resized.modules["lin"].truncation_error) == (0.5, 0.0)
    assert torch.equal(found.dense(), update.dense())
    assert "420 in place of 140 parameters, ‖error‖_F / ‖ΔW‖_F = 0 over" in resized.notes[0]
    assert "1 of 1 modules have columns that change nothing until they are trained" in " ".join(resized.notes)


def test_new_rows_belong_to_the_seed_and_the_module() -> None:
    updates = {name: normal(5, 4, 1) for name in ("a", "b")}

    def drawn(name: str, seed: int, **more: la.LowRankUpdate) -> Tensor:
        found = la.resize(la.Adapter({**more, **updates}), r=3, seed=seed)[name]
        assert isinstance(found, la.LowRankUpdate)
        return found.down[1:]

    state = torch.get_rng_state()
    assert torch.equal(drawn("a", 0), drawn("a", 0, c=normal(2, 3, 1)))
    assert not torch.equal(drawn("a", 0), drawn("b", 0))
    assert not torch.equal(drawn("a", 0), drawn("a", 1))
    torch.set_rng_state(state)
    drawn("a", 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_raised_can_be_trained_whatever_was_there() -> None:
    """Of every column one factor has a gradient: none is zero on both sides."""
    updates = {
        "few": normal(5, 4, 1),
        "zero": la.LowRankUpdate(torch.zeros(5, 8), torch.randn(8, 4), 1.0),
        "deficient": la.LowRankUpdate(torch.ones(5, 8), torch.randn(8, 4), 1.0),
        "small": normal(2, 3, 9),
        "dense": la.DenseUpdate(torch.ones(5, 4)),
    }
    adapter = la.Adapter(updates)
    resized = la.resize(adapter, r=6)
    for name, found in resized.items():
        assert isinstance(found, la.LowRankUpdate)
        assert found.r == 6
        assert bool((found.up.norm(dim=0) + found.down.norm(dim=1) > 0.01).all()), name
        np.testing.assert_allclose(found.dense().numpy(), adapter[name].dense().numpy(), rtol=0, atol=1e-5)


def test_new_columns_of_embeddings_are_the_drawn_side() -> None:
    adapter = la.Adapter({"embed": normal(6, 50, 1)}, targets={"embed": Target("embed.weight", transposed=True)})
    adapter.modules = {"embed": replace(adapter.modules["embed"], embedding=True)}
    found = la.resize(adapter, r=3)
    assert found.modules["embed"].embedding
    assert found.targets == adapter.targets
    update = found["embed"]
    assert isinstance(update, la.LowRankUpdate)
    assert not update.down[1:].any()
    assert bool(update.up[:, 1:].all())
    assert torch.equal(update.dense(), adapter["embed"].dense())


@pytest.mark.parametrize("criterion", [{"r": 4}, {"energy": 1.0}, {"threshold": 1e-6}, {"budget": 10**6}], ids=str)
def test_what_would_not_shrink_is_kept_as_it_is_stored(criterion: dict[str, Any]) -> None:
    update = normal(9, 7, 4, 0.5, torch.bfloat16)
    found = la.resize(la.Adapter({"lin": update}), **criterion)
    held = found["lin"]
    assert isinstance(held, la.LowRankUpdate)
    assert torch.equal(held.up, update.up)
    assert torch.equal(held.down, update.down)
    assert held.eps == update.eps
    assert found.modules["lin"].truncation_error == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_factors_keep_their_dtypes_and_rounding_is_part_of_the_error(dtype: torch.dtype) -> None:
    update = normal(9, 7, 4, 0.5, dtype)
    resized = la.resize(la.Adapter({"lin": update}), r=2)
    found = resized["lin"]
    assert isinstance(found, la.LowRankUpdate)
    assert found.up.dtype == found.down.dtype == dtype
    off = float((update.dense() - found.dense()).norm())
    assert resized.modules["lin"].truncation_error == pytest.approx(off, rel=1e-9)
    assert math.isnan(found.eps)


def test_numbers_beyond_the_dtype_are_refused() -> None:
    huge = la.LowRankUpdate(torch.full((900, 2), 6e4).half(), torch.full((2, 900), 6e4).half(), 1.0)
    with pytest.raises(la.UnsupportedAdapterError, match=r"'lin': expected factors within .*float16.*Convert it to fl"):
        la.resize(la.Adapter({"lin": huge}), r=1)


@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"threshold": 0.5}, {"r": 2}, {"budget": 100}], ids=str)
def test_the_gauge_of_the_factors_does_not_matter(criterion: dict[str, Any]) -> None:
    update = normal(9, 7, 4, 0.5, torch.float64)
    G = torch.randn(4, 4, dtype=torch.float64)
    turned = la.LowRankUpdate(update.up @ G, torch.linalg.solve(G, update.down), 0.5)
    other = normal(6, 5, 3)
    found, again = (la.resize(la.Adapter({"lin": one, "other": other}), **criterion) for one in (update, turned))
    assert ranks(found) == ranks(again)
    for name in found:
        assert torch.allclose(found[name].dense(), again[name].dense(), atol=1e-12)
        assert found.modules[name].truncation_error == pytest.approx(again.modules[name].truncation_error, abs=1e-12)


@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"threshold": 0.5}, {"budget": 60}], ids=str)
def test_errors_grow_with_the_scale_and_ranks_do_not(criterion: dict[str, Any]) -> None:
    updates = {"a": normal(9, 7, 4), "b": normal(6, 5, 3)}
    found, again = (
        la.resize(la.Adapter({name: la.with_scale(update, scale) for name, update in updates.items()}), **criterion)
        for scale in (1.0, -4.0)
    )
    assert ranks(found) == ranks(again)
    for name, module in found.modules.items():
        assert again.modules[name].truncation_error == pytest.approx(4 * module.truncation_error)


@pytest.mark.parametrize("criterion", [{"energy": 0.6}, {"threshold": 0.9}, {"r": 1}], ids=str)
def test_an_unknown_scale_stays_unknown_and_the_relative_error_is_told(criterion: dict[str, Any]) -> None:
    adapter = la.Adapter({"lin": with_spectrum([4.0, 3.0], scale=math.nan), "other": with_spectrum([2.0])})
    resized = la.resize(adapter, **criterion)
    module = resized.modules["lin"]
    assert (module.r, module.scale_source) == (1, "unknown")
    assert math.isnan(module.scale)
    assert math.isnan(module.truncation_error)
    assert resized.modules["other"].truncation_error == 0
    assert "‖error‖_F / ‖ΔW‖_F = unknown, as scales are, over all 2 modules; largest in 'lin', 0.6." in resized.notes[0]
    known = la.with_scale(resized["lin"], 0.5)
    assert known.singular_values().tolist() == pytest.approx([2.0])
    row = la.truncation_table(resized).set_index("module").loc["lin"]
    assert math.isnan(row["truncation_error_relative"])
    assert row["flags"] == "unknown-scale"
    with pytest.raises(la.UndefinedUpdateError, match=r"memory: 'lin': expected known scales.*Pass alpha="):
        la.resize(adapter, budget=16)
    # Alone it has nothing to be weighed against.
    assert ranks(la.resize(la.Adapter({"lin": adapter["lin"]}), budget=20)) == {"lin": 1}


@pytest.mark.parametrize("criterion", [{"energy": 1.0}, {"threshold": 0.5}, {"budget": 100}], ids=str)
def test_of_a_zero_update_nothing_is_kept(criterion: dict[str, Any]) -> None:
    zeros = {
        "zero": la.LowRankUpdate(torch.zeros(5, 3), torch.randn(3, 4), 1.0),
        "dense": la.DenseUpdate(torch.zeros(3, 3)),
        "empty": la.LowRankUpdate(torch.zeros(5, 0), torch.zeros(0, 4), 1.0),
    }
    resized = la.resize(la.Adapter(zeros), **criterion)
    assert ranks(resized) == dict.fromkeys(zeros, 0)
    assert all(module.truncation_error == 0 for module in resized.modules.values())
    assert "‖error‖_F / ‖ΔW‖_F = 0 over" in resized.notes[0]


def test_a_scale_of_zero_is_kept() -> None:
    resized = la.resize(la.Adapter({"lin": normal(5, 4, 3, 0.0)}), r=2)
    assert (resized.modules["lin"].r, resized["lin"].scale, resized.modules["lin"].truncation_error) == (2, 0.0, 0.0)
    with pytest.raises(ValueError, match="budget: expected at least 9 parameters"):
        la.resize(la.Adapter({"a": normal(5, 4, 3, 0.0), "b": normal(5, 4, 3)}), budget=8)


def test_an_adapter_without_modules_stays_one() -> None:
    resized = la.resize(la.Adapter({}), budget=5)
    assert (len(resized), resized.notes) == (0, ())


@pytest.mark.parametrize("criterion", [{"r": 1}, {"r": 9}, {"energy": 0.9}, {"budget": 50}], ids=str)
@pytest.mark.parametrize(
    "update",
    [
        la.LowRankUpdate(torch.full((5, 2), math.nan), torch.ones(2, 4), 1.0),
        la.LowRankUpdate(torch.ones(5, 2), torch.full((2, 4), math.inf), 1.0),
        la.LowRankUpdate(torch.ones(5, 2), torch.ones(2, 4), math.inf),
        la.DenseUpdate(torch.full((5, 4), math.nan)),
        la.KroneckerUpdate(torch.ones(2, 2), torch.full((2, 2), math.inf)),
    ],
    ids=["NaN", "infinity", "scale", "dense", "Kronecker"],
)
def test_what_is_not_finite_is_refused_by_name(update: la.Update, criterion: dict[str, Any]) -> None:
    with pytest.raises(la.UndefinedUpdateError, match=r"memory: 'bad': expected finite numbers .*leave them out"):
        la.resize(la.Adapter({"good": normal(5, 4, 2), "bad": update}), **criterion)


@pytest.mark.parametrize(
    ("criterion", "error", "match"),
    [
        ({}, ValueError, "expected exactly one of r=, energy=, threshold=, budget=, got none"),
        ({"r": 1, "energy": 0.5}, ValueError, "expected exactly one of .*, got r= and energy="),
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r: expected an integer, got 2.0"),
        ({"budget": True}, TypeError, "budget: expected an integer, got True"),
        ({"budget": -5}, ValueError, "budget: expected at least 1, got -5"),
        ({"budget": 8}, ValueError, "budget: expected at least 9 parameters, one direction .*, got 8. Nothing would"),
        ({"energy": 0}, ValueError, r"energy: expected a share in \(0, 1\], got 0"),
        ({"energy": math.nan}, ValueError, r"energy: expected a share in \(0, 1\], got nan"),
        ({"threshold": 1.0}, ValueError, r"threshold: expected a part of the largest .* in \(0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(criterion: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        la.resize(la.Adapter({"lin": normal(5, 4, 2)}), **criterion)


def test_a_path_is_not_an_adapter() -> None:
    with pytest.raises(TypeError, match=r"adapter: expected an Adapter, got str\. Open it with load_adapter"):
        la.resize("runs/r8", r=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"threshold: expected a part .*, got 0"):
        threshold_rank(torch.ones(2), 0)


def test_sums_and_the_worst_module_are_in_the_notes() -> None:
    adapter = la.Adapter({"a": with_spectrum([12.0, 4.0]), "b": with_spectrum([4.0, 3.0])})
    resized = la.resize(adapter, r=1)
    # sqrt((16 + 9) / (160 + 25)), and 3 / 5.
    assert resized.notes == (
        "resized by r=1: kept 32 of 64 parameters, ‖error‖_F / ‖ΔW‖_F = 0.37 over all 2 modules; largest in 'b', 0.6.",
    )
    table = la.truncation_table(resized)
    assert table["truncation_error"].tolist() == pytest.approx([4.0, 3.0])
    assert table["truncation_error_relative"].tolist() == pytest.approx([4 / math.hypot(12, 4), 0.6])


def test_errors_of_one_truncation_after_another_are_those_of_both() -> None:
    matrix = with_spectrum([8.0, 4.0, 3.0]).dense()
    first = la.diff({"lin.weight": matrix}, {"lin.weight": torch.zeros_like(matrix)}, r=2)
    second = la.resize(first, r=1)
    assert second.modules["lin"].truncation_error == pytest.approx(5.0)
    assert second.modules["lin"].truncation_error == pytest.approx(float((matrix - second["lin"].dense()).norm()))
    raised = la.resize(second, r=3)
    assert raised.modules["lin"].truncation_error == second.modules["lin"].truncation_error


def test_it_pickles_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    la.save_adapter(la.Adapter({"lin": normal(9, 7, 4, 0.5), "other": normal(5, 5, 4, 0.5)}), tmp_path / "in")
    loaded = la.load_adapter(tmp_path / "in")
    resized = la.resize(loaded, r=2)
    (tmp_path / "in" / "adapter_model.safetensors").unlink()  # it is held, and needs the file no more
    again = pickle.loads(pickle.dumps(resized))
    for one in (resized, again):
        assert (one.source, one.format, one.notes) == (loaded.source, loaded.format, resized.notes)
        assert one.ledger == loaded.ledger
        assert one.targets == loaded.targets
        assert {"r", "lora_alpha"}.isdisjoint(one.config)
        assert one.modules["lin"].truncation_error == resized.modules["lin"].truncation_error
        assert torch.equal(one["lin"].dense(), resized["lin"].dense())
    assert la.lint(again) == []


def test_blocks_of_a_stack_do_not_hold_the_whole_of_it() -> None:
    stack = torch.randn(100, 8, 2)
    resized = la.resize(la.Adapter({"expert": la.LowRankUpdate(stack[3], torch.randn(2, 8), 1.0)}), r=2)
    assert len(pickle.dumps(resized)) < 5000


def with_magnitudes(zero: bool = False) -> la.Adapter:
    """As DoRA is read without its base."""
    update = la.LowRankUpdate(torch.zeros(5, 4), torch.randn(4, 6), 0.5) if zero else normal(5, 6, 4, 0.5)
    adapter = la.Adapter({"lin": update})
    module = replace(adapter.modules["lin"], flags=("dora-low-rank-part",), magnitude=lambda: torch.arange(1.0, 6.0))
    adapter.modules = {"lin": module}
    return adapter


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "zero"])
def test_low_rank_parts_of_dora_keep_their_magnitudes(tmp_path: Path, zero: bool) -> None:
    la.save_adapter(with_magnitudes(zero), tmp_path / "in")
    adapter = la.load_adapter(tmp_path / "in")
    resized = pickle.loads(pickle.dumps(la.resize(adapter, energy=0.3)))
    assert "1 of 1 modules are low-rank parts of DoRA" in " ".join(resized.notes)
    again = la.load_adapter(la.save_adapter(resized, tmp_path / "out"))
    for one in (resized, again):
        module = one.modules["lin"]
        assert module.flags == ("dora-low-rank-part",)
        assert module.r == 1
        assert module.magnitude().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(la.UnsupportedAdapterError, match=r"'lin': expected updates whose errors are .*Read it with ba"):
        la.resize(adapter, budget=11)


def test_doras_true_update_is_cut_as_the_matrix_it_is(tmp_path: Path) -> None:
    """Its scale is 1, whatever alpha its factors had."""
    la.save_adapter(with_magnitudes(), tmp_path / "in")
    adapter = la.load_adapter(tmp_path / "in", base=la.load_base({"lin.weight": torch.randn(5, 6)}))
    assert (adapter.modules["lin"].scale, adapter["lin"].scale) == (0.5, 1.0)
    for criterion in ({"r": 2}, {"budget": 22}):
        resized = la.resize(adapter, **criterion)  # type: ignore[arg-type]
        module = resized.modules["lin"]
        np.testing.assert_allclose(resized["lin"].dense().numpy(), best(adapter["lin"], 2), rtol=0, atol=1e-5)
        off = float((adapter["lin"].dense() - resized["lin"].dense()).norm())
        assert module.truncation_error == pytest.approx(off, rel=1e-9)
        assert (module.r, module.scale, module.magnitude, module.flags) == (2, 1.0, None, ())
        again = la.load_adapter(la.save_adapter(resized, tmp_path / "out"))
        assert torch.allclose(again["lin"].dense(), resized["lin"].dense())


def test_what_updates_are_held_as_is_counted() -> None:
    updates = {
        "product": normal(5, 4, 2),
        "dense": la.DenseUpdate(torch.ones(3, 3)),
        "Kronecker": la.KroneckerUpdate(normal(4, 4, 1), torch.ones(2, 3)),
    }
    assert held_parameters(la.Adapter(updates)) == 18 + 9 + 8 + 6
