from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_analysis import training
from lora_analysis.training.loop import Schedule, learning_rate_factor


def adapted_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    training.inject(model, ["0", "2"], r=2, seed=3)
    return model


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(count)]
    return [(x, x.prod(dim=1, keepdim=True)) for x in inputs]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = (model(x) - y).square().mean()
    return error


def test_training_moves_the_factors_and_nothing_else() -> None:
    model = adapted_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = training.train(model, batches(1) * 60, squared_error, lr=1e-2, weight_decay=0.1)
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {
        "0.adapters.default.lora_A",
        "0.adapters.default.lora_B",
        "2.adapters.default.lora_A",
        "2.adapters.default.lora_B",
    }
    assert all(p.grad is None for p in model.parameters())


def test_training_is_the_loop_written_out() -> None:
    model, peer = adapted_model(), adapted_model()
    losses = training.train(
        model,
        batches(12),
        squared_error,
        lr=3e-2,
        weight_decay=0.05,
        schedule="linear",
        warmup=3,
        max_grad_norm=0.1,
    )
    factors = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, weight_decay=0.05)
    for step, batch in enumerate(batches(12)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * (step / 3 if step < 3 else (12 - step) / 9)
        loss = squared_error(peer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_training_is_deterministic() -> None:
    runs = [training.train(adapted_model(), batches(8), squared_error, lr=1e-2) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (10, 10), (12, 10)])
def test_schedules_are_those_of_transformers(schedule: Schedule, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    peer = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate_factor(schedule, step, warmup=warmup, total=total)
        assert ours == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()


def test_batches_may_be_endless_when_steps_are_given() -> None:
    seen: list[tuple[int, float]] = []
    losses = training.train(
        adapted_model(),
        itertools.cycle(batches(2)),
        squared_error,
        steps=5,
        schedule="cosine",
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert seen == list(enumerate(losses, start=1))
    assert len(losses) == 5


def test_no_batch_beyond_the_last_step_is_taken() -> None:
    stream = iter(batches(4))
    training.train(adapted_model(), stream, squared_error, steps=3)
    assert len(list(stream)) == 1


def test_autocast_runs_the_loss_in_bf16_and_trains_float32_factors() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = model(batch[0])
        seen.append(output.dtype)
        return nn.functional.mse_loss(output.float(), batch[1])

    model = adapted_model()
    losses = training.train(model, batches(3), loss, autocast=torch.bfloat16)
    plain = training.train(adapted_model(), batches(3), squared_error)
    assert set(seen) == {torch.bfloat16}
    assert training.lora_layers(model)["0"].factors.lora_A.dtype == torch.float32
    assert losses == pytest.approx(plain, rel=0.02)  # a few bf16 roundings of 2⁻⁸


def test_modes_are_restored_module_by_module() -> None:
    model = adapted_model().eval()
    model[1].train()
    modes: list[bool] = []
    training.train(
        model,
        batches(1),
        squared_error,
        on_step=lambda *_: modes.extend(module.training for module in model.modules()),
    )
    assert all(modes)
    assert [module.training for module in (model, model[0], model[1], model[2])] == [False, False, True, False]


def test_running_statistics_of_the_frozen_base_do_not_drift() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    training.inject(model, ["0"])
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    training.train(model, batches(3), squared_error)
    assert all(torch.equal(model[1].state_dict()[name], tensor) for name, tensor in before.items())
    model[1].requires_grad_(True)
    training.train(model, batches(3), squared_error)
    assert not torch.equal(model[1].running_mean, before["running_mean"])


def test_a_loss_that_is_not_finite_stops_before_its_step() -> None:
    model = adapted_model().eval()
    states: list[dict[str, Tensor]] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return squared_error(model, batch) * (math.nan if len(states) == 3 else 1)

    with pytest.raises(FloatingPointError, match="step 3: expected a finite loss, got nan"):
        training.train(model, batches(5), loss)
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "batches: expected steps=4 of them, got 3. Pass more, or itertools.cycle"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"schedule": "step"}, "schedule: expected one of .*got 'step'"),
        ({"warmup": -1}, "warmup: expected a number of steps, got -1"),
        ({"autocast": torch.float16}, "autocast: expected None or torch.bfloat16, got torch.float16"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_step(options: dict[str, Any], message: str) -> None:
    model = adapted_model()
    with pytest.raises(ValueError, match=message):
        training.train(model, batches(3), squared_error, **options)
    assert bool((training.lora_layers(model)["0"].factors.lora_B == 0).all())


def test_a_stream_that_runs_out_says_after_how_many() -> None:
    with pytest.raises(ValueError, match="batches: expected steps=5 of them, got 2"):
        training.train(adapted_model(), iter(batches(2)), squared_error, steps=5)
    with pytest.raises(ValueError, match="batches: expected at least one, got 0"):
        training.train(adapted_model(), iter([]), squared_error)
    with pytest.raises(ValueError, match="batches: expected at least one, got 0"):
        training.train(adapted_model(), [], squared_error)


def test_a_decaying_schedule_needs_to_know_its_end() -> None:
    with pytest.raises(ValueError, match="schedule: 'linear' needs the number of steps"):
        training.train(adapted_model(), iter(batches(3)), squared_error, schedule="linear")


def test_models_with_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear: expected trainable parameters, got none"):
        training.train(nn.Linear(6, 1).requires_grad_(False), batches(1), squared_error)
    model = adapted_model()
    training.merge(model)
    with pytest.raises(ValueError, match="'0': expected an unmerged layer, got a merged one"):
        training.train(model, batches(1), squared_error)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"step 1: .*scalar Tensor, got shape \(16, 1\)"),
        (lambda model, batch: 1.0, "step 1: .*scalar Tensor, got float"),
        (lambda model, batch: model(batch[0]).sum().detach(), "step 1: expected a loss that depends on"),
    ],
)
def test_a_loss_that_cannot_be_descended_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.train(adapted_model(), batches(1), loss)


def test_progress_goes_to_stderr_and_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = training.train(adapted_model(), batches(4), squared_error)
    assert capsys.readouterr() == ("", "")
    losses = training.train(adapted_model(), batches(4), squared_error, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert f"loss {losses[-1]:.4g}" in " ".join(err.split())
    assert "tokens/s" in " ".join(err.split())
    assert losses == quiet


def test_accumulated_batches_are_one_large_batch() -> None:
    small = batches(12)
    large = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 3], strict=True)) for i in range(0, 12, 3)]
    losses = training.train(adapted_model(), small, squared_error, lr=1e-2, accumulate=3, max_grad_norm=0.5)
    assert losses == pytest.approx(
        training.train(adapted_model(), large, squared_error, lr=1e-2, max_grad_norm=0.5), rel=1e-5
    )
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: expected at least 1 batch, got 0"),
        ({"accumulate": 2}, "batches: expected a multiple of accumulate=2, got 3. Pass steps="),
        ({"accumulate": 2, "steps": 2}, "batches: expected steps=2 times accumulate=2 of them, got 3"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr_ratio": math.inf}, "lr_ratio: expected a positive number, got inf"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1 step, got 0"),
    ],
)
def test_accumulation_and_rates_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.train(adapted_model(), batches(3), squared_error, **options)


def test_a_stream_that_ends_within_an_update_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate=2 of them for every step, got 1 at the end"):
        training.train(adapted_model(), iter(batches(3)), squared_error, accumulate=2)


def test_b_learns_faster_by_the_ratio_of_lora_plus() -> None:
    model, peer = adapted_model(), adapted_model()
    training.train(model, batches(6), squared_error, lr=1e-2, lr_ratio=8)
    named = [(name, p) for name, p in peer.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 8e-2 if name.endswith("lora_B") else 1e-2} for name, p in named], weight_decay=0.0
    )
    for batch in batches(6):
        squared_error(peer, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_gradients_left_by_others_are_not_trained_on_nor_left() -> None:
    plain, used = adapted_model(), adapted_model()
    (1e3 * squared_error(used, batches(1)[0])).backward()
    assert training.train(used, batches(3), squared_error) == training.train(plain, batches(3), squared_error)

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        squared_error(model, batch).backward()
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        training.train(used, batches(1), failing)
    assert all(p.grad is None for p in used.parameters())


def test_gradients_that_are_not_finite_stop_before_their_step() -> None:
    model = adapted_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="step 1: expected a finite norm of the gradients, got nan"):
        training.train(model, batches(1), lambda model, batch: (0 * model(batch[0]).sum()).sqrt())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_stream_that_knows_no_length_is_used_up() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(batches(3))

    loader: Any = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert len(training.train(adapted_model(), loader, squared_error)) == 3


def test_tokens_may_be_counted_by_a_tensor(tmp_path: Path) -> None:
    count: Any = lambda batch: torch.tensor(len(batch[0]))  # noqa: E731
    training.train(adapted_model(), batches(1), squared_error, tokens=count, log=tmp_path / "log.jsonl")
    assert json.loads((tmp_path / "log.jsonl").read_text())["tokens"] == len(batches(1)[0][0])
