"""Dynamics from saved checkpoints: the rows that the live run logged, and real checkpoints against dense algebra."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_analysis as la
from lora_analysis import training
from lora_analysis.training.checkpoints import checkpoint_dynamics, checkpoints_in
from lora_analysis.training.dynamics import COLUMNS, TrainingDynamics, dynamics_table


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


def trained(folder: Path, **options: Any) -> TrainingDynamics:
    """A run that is followed live and saves what it is at each logged step."""
    model = net()
    training.inject(model, ["0", "2"], **({"r": 3, "alpha": 6, "seed": 3} | options))
    dynamics = TrainingDynamics(model, every=4, gain_every=4, directions=2)

    def save(step: int) -> None:
        la.save_adapter(training.extract(model), folder / f"checkpoint-{step}")

    def on_step(step: int, value: float) -> None:
        dynamics(step, value)
        if step % 4 == 0:
            save(step)

    save(0)
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(16, 12, generator=generator) for _ in range(12)]
    training.train(model, batches, loss, lr=1e-2, on_step=on_step)
    return dynamics


def loss(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = (model(x) - x[:, :3].square()).square().mean()
    return value


def test_checkpoints_give_the_rows_that_the_live_run_logged(tmp_path: Path) -> None:
    live = trained(tmp_path).finish()
    found = checkpoint_dynamics(tmp_path, base=la.load_base(net()), directions=2)
    assert [(row["step"], row["module"]) for row in found] == [(row["step"], row["module"]) for row in live]
    assert [row["step"] for row in found] == [0, 0, 4, 4, 8, 8, 12, 12]
    for row, other in zip(found, live, strict=True):
        assert list(row) == list(COLUMNS)
        assert (row["module"], row["flags"]) == (other["module"], other["flags"])
        for name in set(COLUMNS) - {"adapter", "module", "loss", "moved_from", "flags"}:
            assert row[name] == pytest.approx(other[name], rel=1e-12, nan_ok=True), name
    assert {row["moved_from"] for row in found} == {"step 0"}
    assert {row["adapter"] for row in found} == {str(tmp_path)}


def test_without_the_first_checkpoint_moves_are_counted_from_the_initial_adapter_given(tmp_path: Path) -> None:
    live = {(row["step"], row["module"]): row for row in trained(tmp_path).finish()}
    later = [tmp_path / f"checkpoint-{step}" for step in (4, 12)]
    for initial in (tmp_path / "checkpoint-0", la.load_adapter(tmp_path / "checkpoint-0")):
        for row in checkpoint_dynamics(later, initial=initial, source="late"):
            assert row["moved_A"] == pytest.approx(live[row["step"], row["module"]]["moved_A"], rel=1e-12)
            assert (row["moved_from"], row["adapter"]) == ("initial", "late")
    rows = checkpoint_dynamics(later)
    assert [row["moved_A"] > 0 for row in rows] == [False, False, True, True]
    assert {row["moved_from"] for row in rows} == {"step 4"}
    assert all(math.isnan(row["gain"]) for row in rows)


def test_pissa_saved_as_a_difference_moves_from_the_initial_factors_given(tmp_path: Path) -> None:
    model = net()
    training.inject(model, ["0"], r=3, init="pissa")
    factors = training.lora_layers(model)["0"].factors
    B0, A0 = (factor.clone() for factor in factors.initial)
    initial = la.Adapter({"0": la.LowRankUpdate(B0, A0, factors.scale)})
    dynamics = TrainingDynamics(model, every=2)
    training.train(model, [torch.randn(16, 12)] * 2, lambda m, x: m(x).square().mean(), lr=1e-2, on_step=dynamics)
    la.save_adapter(training.extract(model), tmp_path / "checkpoint-2")
    live, (row,) = dynamics.rows()[-1], checkpoint_dynamics(tmp_path, initial=initial)
    for name in ("norm", "moved_A", "moved_B", "stable_rank"):
        assert row[name] == pytest.approx(live[name], rel=1e-6)


def test_steps_are_numbers_and_not_text(tmp_path: Path) -> None:
    for name in ("checkpoint-1200", "checkpoint-500", "checkpoint-90", "runs", ".checkpoint-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3.txt").touch()
    assert list(checkpoints_in(tmp_path)) == [90, 500, 1200]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("0000100_adapters.safetensors", 100),
        ("epoch_3", 3),
        ("flux-step00000200.safetensors", 200),
        ("flux_r16-000004.safetensors", 4),
        ("checkpoint-2_step-30", 30),
        ("lora_v2.safetensors", None),
        ("adapters.safetensors", None),
        ("rank64", None),
    ],
)
def test_step_in_a_name(name: str, step: int | None, tmp_path: Path) -> None:
    (tmp_path / name).touch() if name.endswith(".safetensors") else (tmp_path / name).mkdir()
    if step is None:
        with pytest.raises(ValueError, match=r"found none\. Pass \{step: path"):
            checkpoints_in(tmp_path)
    else:
        assert list(checkpoints_in(tmp_path)) == [step]


def test_checkpoints_of_mlx_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.0}}'
    )
    updates = {}
    for step in (200, 100):
        torch.manual_seed(step)
        a, b = torch.randn(6, 2), torch.randn(2, 5)
        updates[step] = 4.0 * (a.double() @ b.double())
        stem = "model.layers.0.self_attn.q_proj"
        save_file({f"{stem}.lora_a": a, f"{stem}.lora_b": b}, tmp_path / f"{step:07}_adapters.safetensors")
        save_file({f"{stem}.lora_a": a, f"{stem}.lora_b": b}, tmp_path / "adapters.safetensors")
    rows = checkpoint_dynamics(tmp_path)
    assert [row["step"] for row in rows] == [100, 200]
    for row in rows:
        assert row["norm"] == pytest.approx(float(updates[row["step"]].norm()), rel=1e-9)


def test_adapters_in_memory_are_named_by_their_steps() -> None:
    e = torch.eye(4)
    adapters = {
        7: la.Adapter({"m": la.LowRankUpdate(e[:, 1:2], e[:1], scale=2.0), "gone": la.LowRankUpdate(e, e, scale=1.0)}),
        3: la.Adapter({"m": la.LowRankUpdate(e[:, :1], e[:1], scale=1.0)}),
    }
    first, last, other = checkpoint_dynamics(adapters)
    assert (first["step"], first["norm"], first["phi_final_in"], first["phi_final_out"]) == (3, 1, 1, 0)
    assert (last["step"], last["norm"], last["phi_previous_in"], last["phi_previous_out"]) == (7, 2, 1, 0)
    assert last["moved_A"] == 0
    assert last["moved_B"] == pytest.approx(math.sqrt(2))
    assert (other["module"], other["moved_from"]) == ("gone", "")
    assert math.isnan(other["phi_previous_in"])
    assert len(dynamics_table([first, last, other])) == 3


def test_unknown_scale_leaves_out_what_hangs_on_it() -> None:
    torch.manual_seed(0)
    update = la.LowRankUpdate(torch.randn(5, 2), torch.randn(2, 6), scale=math.nan)
    (row,) = checkpoint_dynamics({1: la.Adapter({"m": update})})
    assert math.isnan(row["norm"])
    assert math.isnan(row["sigma_max"])
    assert row["flags"] == "unknown-scale"
    assert row["stable_rank"] == la.stable_rank(la.with_scale(update, 1.0).singular_values())


def test_checkpoints_of_full_matrices_have_no_factors_to_move() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 5, dtype=torch.float64)
    rows = checkpoint_dynamics({step: la.Adapter({"m": la.DenseUpdate(step * matrix)}) for step in (1, 2)})
    assert [row["norm"] for row in rows] == pytest.approx([float(matrix.norm()), 2 * float(matrix.norm())])
    assert all(math.isnan(row["moved_A"]) and row["moved_from"] == "" for row in rows)
    assert rows[0]["phi_final_out"] == pytest.approx(1, abs=1e-5)


def test_real_checkpoints_agree_with_dense_algebra(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft" / "roberta_base_agnews_r4"
    if not folder.is_dir():
        pytest.skip("the checkpoints of roberta_base_agnews_r4 are not here")
    rows = checkpoint_dynamics(folder, directions=2)
    adapters = {step: la.load_adapter(folder / f"checkpoint-{step}") for step in (500, 1200)}
    assert [row["step"] for row in rows] == [500] * len(adapters[500]) + [1200] * len(adapters[1200])
    by_place = {(row["step"], row["module"]): row for row in rows}
    for name in list(adapters[500])[::9]:
        early, late = (adapters[step][name] for step in (500, 1200))
        bases = []
        for step, update in ((500, early), (1200, late)):
            U, S, Vh = np.linalg.svd(update.dense().numpy())
            row = by_place[step, name]
            assert row["norm"] == pytest.approx(np.linalg.norm(S), rel=1e-7)
            assert row["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-7)
            bases.append((Vh[:2].T, U[:, :2]))
        for side, (a, b) in zip(("in", "out"), zip(*bases, strict=True), strict=True):
            phi = np.linalg.norm(a.T @ b) ** 2 / 2
            assert by_place[500, name][f"phi_final_{side}"] == pytest.approx(phi, abs=1e-5)
            assert by_place[1200, name][f"phi_previous_{side}"] == pytest.approx(phi, abs=1e-5)
        A, A0 = late.down.double(), early.down.double()
        assert by_place[1200, name]["moved_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-9)
        assert by_place[1200, name]["moved_from"] == "step 500"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "checkpoints: expected at least one"),
        ({}, "checkpoints: expected at least one"),
        (["final"], "final: expected a name that says its step"),
        (["checkpoint-5", "checkpoint-4"], "checkpoint-4: expected steps that ascend, got 4 after 5"),
        ("nowhere", "nowhere: expected a directory of checkpoints"),
    ],
)
def test_checkpoints_without_an_order_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint_dynamics(given)


def test_two_checkpoints_of_one_step_are_refused(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "epoch-5"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="expected one checkpoint of step 5, got checkpoint-5 and epoch-5"):
        checkpoint_dynamics(tmp_path)


def test_directions_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        checkpoint_dynamics(tmp_path, directions=0)
