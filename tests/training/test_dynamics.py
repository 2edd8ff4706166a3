"""Training dynamics: every number against dense algebra, the log against what is in memory, and Trainer's callback."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_analysis as la
from lora_analysis import training
from lora_analysis.training.dynamics import COLUMNS, TrainingDynamics, dynamics_table, read_dynamics
from lora_analysis.training.hf_callback import DynamicsCallback
from lora_analysis.training.states import moved, state_of

pytestmark = [
    # peft asks transformers in the old way.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
]

# The oracles decompose dense float64 matrices; kept directions are float32.
RELATIVE, PHI = 1e-9, 1e-5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


def adapted(**options: Any) -> nn.Sequential:
    model = net()
    training.inject(model, ["0", "2"], **({"r": 3, "alpha": 6, "seed": 3} | options))
    return model


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 12, generator=generator) for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = (model(x) - x[:, :3].square()).square().mean()
    return value


def dense_phi(a: Tensor, b: Tensor, k: int, side: str) -> float:
    """Equation 4 written out with dense decompositions."""
    basis = []
    for matrix in (a, b):
        U, _, Vh = np.linalg.svd(matrix.numpy())
        basis.append(Vh[:k].T if side == "in" else U[:, :k])
    return float(np.linalg.norm(basis[0].T @ basis[1]) ** 2 / k)


def rows_at(rows: list[dict[str, Any]], module: str) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in rows if row["module"] == module}


def test_rows_are_what_dense_algebra_gives_at_the_logged_steps() -> None:
    model = adapted()
    dynamics = TrainingDynamics(model, every=4, gain_every=8, directions=2)
    seen: dict[int, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}

    def on_step(step: int, value: float) -> None:
        dynamics(step, value)
        if step % 4 == 0 or step == 18:
            layers = training.lora_layers(model)
            seen[step] = {
                name: (layer.factors.delta_w(), layer.factors.lora_A.detach().clone(), layer.weight.detach().double())
                for name, layer in layers.items()
            }

    losses = training.train(model, batches(18), loss, lr=1e-2, on_step=on_step)
    rows = dynamics.finish()
    assert sorted({row["step"] for row in rows}) == [0, 4, 8, 12, 16, 18]
    assert all(list(row) == list(COLUMNS) for row in rows)
    for module in ("0", "2"):
        found = rows_at(rows, module)
        A0 = training.lora_layers(model)[module].factors.lora_A0
        for step, row in found.items():
            if step == 0:
                continue
            delta_w, A, weight = seen[step][module]
            S = np.linalg.svd(delta_w.numpy(), compute_uv=False)[:3]
            assert row["loss"] == losses[step - 1]
            assert row["norm"] == pytest.approx(np.linalg.norm(delta_w), rel=RELATIVE)
            assert row["sigma_max"] == pytest.approx(S[0], rel=RELATIVE)
            assert row["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2, rel=RELATIVE)
            shares = S / S.sum()
            assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-7)
            assert row["moved_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-5)
            assert math.isnan(row["moved_B"])
            assert (row["k"], row["chance_in"]) == (2, 2 / row["d_in"])
            last = seen[18][module][0]
            for side in ("in", "out"):
                assert row[f"phi_final_{side}"] == pytest.approx(dense_phi(delta_w, last, 2, side), abs=PHI)
            if step % 8 == 0:
                U, _, Vh = np.linalg.svd(delta_w.numpy())
                projected = np.linalg.norm(U[:, :2].T @ weight.numpy() @ Vh[:2].T)
                chance = np.linalg.norm(weight) * 2 / math.sqrt(weight.numel())
                assert row["gain"] == pytest.approx(projected / chance, rel=RELATIVE)
            else:
                assert math.isnan(row["gain"])
        for before, after in ((4, 8), (16, 18)):
            phi = dense_phi(seen[after][module][0], seen[before][module][0], 2, "out")
            assert found[after]["phi_previous_out"] == pytest.approx(phi, abs=PHI)
        assert found[18]["phi_final_in"] == pytest.approx(1, abs=PHI)


def test_gain_is_that_of_the_amplification_table() -> None:
    model = adapted()
    dynamics = TrainingDynamics(model, every=5, gain_every=5)
    training.train(model, batches(5), loss, lr=1e-2, on_step=dynamics)
    table = la.amplification_table(training.extract(model), la.load_base(net()), [3], draws=0).set_index("module")
    for row in dynamics.rows()[-2:]:
        assert row["gain"] == pytest.approx(table.loc[row["module"], "gain"], rel=RELATIVE)


def test_before_the_first_step_the_update_is_zero_and_has_no_shape() -> None:
    for row in TrainingDynamics(adapted(), gain_every=10).rows():
        assert (row["step"], row["norm"], row["sigma_max"], row["k"], row["flags"]) == (0, 0, 0, 0, "zero")
        assert row["moved_A"] == 0
        undefined = (
            "stable_rank",
            "effective_rank",
            "phi_previous_in",
            "phi_final_in",
            "phi_final_out",
            "gain",
            "loss",
        )
        assert all(math.isnan(row[name]) for name in undefined)


def test_rank_one_and_its_multiples_in_closed_form() -> None:
    u, v = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 5.0, 12.0]])
    for c in (1.0, -0.25):
        adapter = la.Adapter({"m": la.LowRankUpdate(u, v, scale=c)})
        row = state_of(adapter.modules["m"], adapter["m"], directions=8).row
        assert row["norm"] == pytest.approx(65 * abs(c), rel=1e-14)
        assert row["sigma_max"] == pytest.approx(65 * abs(c), rel=1e-14)
        assert (row["k"], row["stable_rank"]) == (1, 1)
        assert row["effective_rank"] == pytest.approx(1, rel=1e-12)


def test_scaling_a_factor_changes_norms_alone() -> None:
    model = adapted()
    training.train(model, batches(5), loss, lr=1e-2)
    dynamics = TrainingDynamics(model, every=1, start=5)
    with torch.no_grad():
        training.lora_layers(model)["0"].factors.lora_B.mul_(-3)
    dynamics(6)
    before, after = rows_at(dynamics.rows(), "0").values()
    assert after["norm"] == pytest.approx(3 * before["norm"], rel=1e-6)
    assert after["stable_rank"] == pytest.approx(before["stable_rank"], rel=1e-6)
    assert after["phi_previous_in"] == pytest.approx(1, abs=PHI)
    assert before["phi_final_out"] == pytest.approx(1, abs=PHI)


def test_rank_grows_and_phi_compares_the_directions_there_are() -> None:
    model = adapted()
    factors = training.lora_layers(model)["0"].factors
    dynamics = TrainingDynamics(model, every=1)
    with torch.no_grad():
        factors.lora_B[:, 0] = 1.0
        dynamics(1)
        factors.lora_B[0, 1] = 1.0
        dynamics(2)
    first, second = (rows_at(dynamics.rows(), "0")[step] for step in (1, 2))
    assert (first["k"], second["k"]) == (1, 2)
    earlier, later = torch.zeros(10, 3), factors.lora_B.detach()
    earlier[:, 0] = 1.0
    (_, _, a), (_, _, b) = (np.linalg.svd((B @ factors.lora_A.detach()).double().numpy()) for B in (earlier, later))
    # The smaller subspace lies in the larger: containment, whose chance is 2 / d.
    assert second["phi_previous_in"] == pytest.approx(np.linalg.norm(b[:2] @ a[0]) ** 2, abs=PHI)
    assert second["chance_in"] == 2 / 12
    assert first["phi_final_in"] == pytest.approx((a[0] @ b[0]) ** 2, abs=PHI)


def test_looking_leaves_training_as_it_is() -> None:
    def losses(look: bool) -> list[float]:
        model = adapted(dropout=0.2)
        torch.manual_seed(1)
        on_step = TrainingDynamics(model, every=1, gain_every=1) if look else None
        return training.train(model, batches(12), loss, lr=1e-2, on_step=on_step)

    assert losses(True) == losses(False)


@pytest.mark.parametrize(("steps", "kept"), [(5, [1, 2, 3, 4, 5]), (7, [2, 4, 6, 7]), (33, [8, 16, 24, 32, 33])])
def test_memory_is_bounded_and_what_is_kept_lies_evenly(steps: int, kept: list[int]) -> None:
    model = adapted()
    one_look = (12 + 10 + 10 + 3) * 3 * 4
    dynamics = TrainingDynamics(model, every=1, memory=5 * one_look)
    training.train(model, batches(steps), loss, lr=1e-2, on_step=dynamics)
    rows = rows_at(dynamics.rows(), "0")
    assert len(rows) == steps + 1
    assert [step for step, row in rows.items() if not math.isnan(row["phi_final_in"])] == kept
    assert sum(d.nbytes for kept in dynamics._kept.values() for d in kept.values()) <= 5 * one_look
    assert not any(math.isnan(row["phi_previous_in"]) for step, row in rows.items() if step > 1)


def test_log_holds_the_rows_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    model = adapted()
    dynamics = TrainingDynamics(model, every=2, path=path, source="run")
    lengths = []

    def on_step(step: int, value: float) -> None:
        dynamics(step, value)
        lengths.append(len(path.read_text("utf-8").splitlines()))

    training.train(model, batches(5), loss, on_step=on_step)
    assert lengths == [2, 4, 4, 6, 6]
    rows = dynamics.finish()
    read = read_dynamics(path)
    drawn = [{n: v for n, v in row.items() if "final" not in n} for row in rows]
    assert str([{n: v for n, v in row.items() if "final" not in n} for row in read]) == str(drawn)
    assert all(math.isnan(row["phi_final_in"]) and row["adapter"] == "run" for row in read)
    first = json.loads(path.read_text("utf-8").splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert (first["stable_rank"], first["norm"]) == (None, 0.0)


def test_log_of_a_killed_run_is_read_without_its_torn_line_and_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    model = adapted()
    dynamics = TrainingDynamics(model, every=1, path=path)
    training.train(model, batches(6), loss, on_step=dynamics)
    whole = path.read_text("utf-8")
    path.write_text(whole[:-30], "utf-8")
    assert [row["step"] for row in read_dynamics(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    # Made before training goes on from a state of step 3.
    TrainingDynamics(adapted(), every=1, path=path)(4)
    assert [row["step"] for row in read_dynamics(path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    TrainingDynamics(model, every=1, path=path, start=2)(3)
    assert [row["step"] for row in read_dynamics(path)] == [0, 0, 1, 1, 2, 2, 3, 3]
    TrainingDynamics(adapted(), every=1, path=path, source="afresh")(1)
    assert [(row["adapter"], row["step"]) for row in read_dynamics(path)] == [("afresh", n) for n in (0, 0, 1, 1)]


def test_log_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "module": "0"}\nnonsense\n{}\n', "utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2: expected a row of training dynamics, got 'nonsense'"):
        read_dynamics(path)
    path.write_text('{"loss": 1}\n', "utf-8")
    with pytest.raises(ValueError, match="line 1: expected a row"):
        read_dynamics(path)


def test_table_has_the_columns_also_without_rows() -> None:
    assert list(dynamics_table([]).columns) == list(COLUMNS)
    table = TrainingDynamics(adapted()).table()
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 2


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.fused = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.experts = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.fused(x).chunk(3, -1)
        x = self.attention(q, k, v)[0]
        x = self.grouped(x.mT).mT
        return torch.einsum("btd,edo->bto", x, self.experts)


def test_embeddings_blocks_convolutions_and_experts_move_from_their_own_beginnings() -> None:
    model = Mixed()
    training.inject(model, ["embed", "grouped"], parameters=["experts", "in_proj_weight"], r=2, seed=0)
    dynamics = TrainingDynamics(model, every=3, gain_every=3)
    tokens = torch.arange(18).reshape(2, 9) % 9
    training.train(model, [tokens] * 3, lambda m, x: m(x).square().mean(), lr=1e-2, on_step=dynamics)
    last = {row["module"]: row for row in dynamics.rows() if row["step"] == 3}
    assert list(last) == list(training.extract(model))
    assert sorted(last) == ["attention.in_proj_weight", "embed", "experts.0", "experts.1", "grouped"]
    for name, row in last.items():
        moved_factor, other = ("moved_B", "moved_A") if name == "embed" else ("moved_A", "moved_B")
        assert 0 < row[moved_factor] < 1, name
        assert math.isnan(row[other]), name
        assert row["moved_from"] == "initial"
        assert row["gain"] > 0, name
    site = training.sites(model)["experts"].factors
    expected = float((site.lora_A[1] - site.lora_A0[1]).detach().norm() / site.lora_A0[1].norm())
    assert last["experts.1"]["moved_A"] == pytest.approx(expected, rel=1e-5)


def test_blocks_of_a_fused_weight_are_followed_apart() -> None:
    model = Mixed()
    training.inject(model, ["fused"], r=2, seed=0, slots={"fused": {"q": (0, 8), "v": (16, 24)}})
    dynamics = TrainingDynamics(model, every=3)
    tokens = torch.arange(18).reshape(2, 9) % 9
    training.train(model, [tokens] * 3, lambda m, x: m(x).square().mean(), lr=1e-2, on_step=dynamics)
    factors = training.lora_layers(model)["fused"].factors
    for number, row in enumerate(dynamics.rows()[-2:]):
        assert row["module"] == f"fused.{'qv'[number]}"
        A, A0 = (t.detach()[2 * number : 2 * number + 2] for t in (factors.lora_A, factors.lora_A0))
        assert row["moved_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-5)
        dense = factors.delta_w()[16 * number : 16 * number + 8]
        assert row["norm"] == pytest.approx(float(dense.norm()), rel=RELATIVE)


def test_pissa_begins_at_zero_and_moves_from_its_own_factors() -> None:
    model = adapted(init="pissa")
    dynamics = TrainingDynamics(model, every=2)
    training.train(model, batches(2), loss, lr=1e-2, on_step=dynamics)
    zero, last = rows_at(dynamics.rows(), "0").values()
    assert (zero["norm"], zero["k"], zero["flags"]) == (0, 0, "zero")
    factors = training.lora_layers(model)["0"].factors
    assert last["norm"] == pytest.approx(float(factors.delta_w().norm()), rel=1e-6)
    for name, now, first in (("A", factors.lora_A, factors.lora_A0), ("B", factors.lora_B, factors.lora_B0)):
        expected = float((now - first).detach().norm() / first.norm())
        assert 0 < expected == pytest.approx(last[f"moved_{name}"], rel=1e-5)


def test_dora_is_followed_by_its_low_rank_part() -> None:
    model = adapted(dora=True)
    dynamics = TrainingDynamics(model, every=2)
    training.train(model, batches(2), loss, lr=1e-2, on_step=dynamics)
    row = rows_at(dynamics.rows(), "0")[2]
    assert row["flags"] == "dora-low-rank-part"
    assert row["norm"] == pytest.approx(float(training.lora_layers(model)["0"].factors.delta_w().norm()), rel=RELATIVE)


def test_one_of_several_adapters_is_followed() -> None:
    model = net()
    training.inject(model, ["0"], r=2, adapter="a")
    training.inject(model, ["0", "2"], r=3, adapter="b")
    with pytest.raises(ValueError, match="expected one adapter"):
        TrainingDynamics(model)
    assert [(row["module"], row["r"]) for row in TrainingDynamics(model, adapter="a").rows()] == [("0", 2)]


def test_factors_that_are_not_finite_make_a_row_that_says_so() -> None:
    model = adapted()
    dynamics = TrainingDynamics(model, every=1)
    with torch.no_grad():
        training.lora_layers(model)["0"].factors.lora_A[0, 0] = math.nan
    dynamics(1)
    row = rows_at(dynamics.finish(), "0")[1]
    assert row["flags"] == "nonfinite"
    assert math.isnan(row["norm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"directions": 0}, "directions: expected at least 1"),
        ({"memory": -1}, "memory: expected at least 0"),
        ({"start": -1}, "start: expected a step, got -1"),
        ({"every": 10, "gain_every": 15}, "gain_every: expected a multiple of every=10, got 15"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingDynamics(adapted(), **options)  # type: ignore[arg-type]


def test_steps_that_begin_again_are_refused() -> None:
    model = adapted()
    dynamics = TrainingDynamics(model, every=5)
    training.train(model, batches(3), loss, on_step=dynamics)
    with pytest.raises(ValueError, match="model: expected a step after 3, got 1"):
        training.train(model, batches(3), loss, on_step=dynamics)


def test_of_several_processes_the_first_alone_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for number, count in ((1, 0), (0, 4)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda number=number: number)
        dynamics = TrainingDynamics(adapted(), every=1, path=tmp_path / f"{number}.jsonl")
        dynamics(1)
        assert len(dynamics.finish()) == count
    assert [entry.name for entry in tmp_path.iterdir()] == ["0.jsonl"]


def test_model_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with LoRA layers"):
        TrainingDynamics(net())


def test_move_of_a_factor_of_another_shape_is_unknown() -> None:
    assert math.isnan(moved(torch.ones(2, 3), torch.ones(3, 3)))
    assert math.isnan(moved(torch.ones(2, 3), None))


def test_importing_training_and_its_dynamics_does_not_import_transformers() -> None:
    code = "import sys, lora_analysis.training.dynamics, lora_analysis.training.checkpoints;"
    code += "print([m for m in ('transformers', 'matplotlib', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def tiny_bert() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(number % 2)}
        for number in range(24)
    ]


def trainer(
    model: nn.Module, folder: Path, callback: DynamicsCallback, *, steps: int, **options: Any
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **({"save_strategy": "no"} | options),
    )
    return transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=[callback])


def of_peft(**options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options))
    return peft.get_peft_model(tiny_bert(), config)


def of_this_package() -> nn.Module:
    model = tiny_bert()
    training.inject(model, ["query", "value"], r=2, seed=0)
    return model


@pytest.mark.parametrize("make", [of_peft, of_this_package])
def test_callback_of_trainer_follows_models_of_both_kinds(make: Any, tmp_path: Path) -> None:
    model = make()
    first = {name: update.down.clone() for name, update in training.extract(model).items()}
    path = tmp_path / "log.jsonl"
    callback = DynamicsCallback(every=2, gain_every=4, path=path, source="hf")
    trainer(model, tmp_path, callback, steps=5).train()
    assert callback.dynamics is not None
    rows = callback.dynamics.rows()
    assert sorted({row["step"] for row in rows}) == [0, 2, 4, 5]
    assert len(read_dynamics(path)) == len(rows) == 16
    adapter, base = training.extract(model), la.load_base(tiny_bert())
    gains = la.amplification_table(adapter, base, [2], draws=0).set_index("module")["gain"]
    assert all(math.isnan(row["gain"]) == (row["step"] != 4 or row["k"] == 0) for row in rows)
    for row in rows:
        if row["step"] == 0:
            assert (row["norm"], row["moved_A"]) == (0, 0)
        if row["step"] == 5:
            name = row["module"]
            delta_w = adapter[name].dense()
            assert row["norm"] == pytest.approx(float(delta_w.norm()), rel=RELATIVE)
            A, A0 = adapter[name].down, first[name]
            assert row["moved_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-5)
            assert row["moved_from"] == ("step 0" if make is of_peft else "initial")
            assert row["phi_final_in"] == pytest.approx(1, abs=PHI)
    # One more look at the very end gives the gain of the table.
    last = TrainingDynamics(model, every=1, gain_every=1, start=5).rows()
    for row in last:
        assert row["gain"] == pytest.approx(gains[row["module"]], rel=RELATIVE)


def test_callback_begins_where_a_run_of_peft_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(of_peft(), tmp_path, DynamicsCallback(every=1, path=path), steps=3, **options).train()
    callback = DynamicsCallback(every=1, path=path)
    trainer(of_peft(), tmp_path, callback, steps=4, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert callback.dynamics is not None
    rows = callback.dynamics.rows()
    assert sorted({row["step"] for row in rows}) == [2, 3, 4]
    assert {row["moved_from"] for row in rows} == {"step 2"}
    assert [row["step"] for row in read_dynamics(path)][::4] == [0, 1, 2, 3, 4]


def test_pissa_of_peft_is_followed_less_what_it_began_with() -> None:
    model = of_peft(init_lora_weights="pissa")
    dynamics = TrainingDynamics(model, every=1)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A0, B0 = A.detach().clone(), B.detach().clone()
    with torch.no_grad():
        A.add_(torch.randn_like(A), alpha=0.1)
        B.add_(torch.randn_like(B), alpha=0.1)
    dynamics(1)
    zero, row = rows_at(dynamics.rows(), "bert.encoder.layer.0.attention.self.query").values()
    assert (zero["norm"], zero["moved_A"]) == (0, 0)
    scale = layer.scaling["default"]
    dense = scale * (B.double() @ A.double() - B0.double() @ A0.double()).detach()
    assert row["norm"] == pytest.approx(float(dense.norm()), rel=1e-6)
    assert row["moved_A"] == pytest.approx(float((A - A0).detach().norm() / A0.norm()), rel=1e-5)
    assert row["moved_B"] == pytest.approx(float((B - B0).detach().norm() / B0.norm()), rel=1e-5)
    with pytest.raises(la.MutatedBaseError, match="initial="):
        TrainingDynamics(model, start=1)
