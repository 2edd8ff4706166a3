"""A run that is killed and taken up again is the run that was never killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_analysis import training
from lora_analysis.errors import AdapterFormatError
from lora_analysis.training.resume import RunState, set_random_state

STEPS = 12


def model_of(init: str = "kaiming") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
    training.inject(model, ["0", "3"], r=2, seed=3, dropout=0.3, init=init)  # type: ignore[arg-type]
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(STEPS)]
    return [(x, x.prod(dim=1, keepdim=True)) for x in inputs]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    error: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return error


class Killed(Exception):
    pass


def killed_after(steps: int) -> Any:
    def on_step(step: int, loss: float) -> None:
        if step == steps:
            raise Killed

    return on_step


OPTIONS: dict[str, Any] = {"lr": 1e-2, "schedule": "cosine", "warmup": 3, "weight_decay": 0.1, "lr_ratio": 4.0}


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_run_taken_up_is_the_run_that_was_never_interrupted(tmp_path: Path, init: str) -> None:
    whole, interrupted = model_of(init), model_of(init)
    torch.manual_seed(9)
    expected = training.train(whole, data(), squared_error, **OPTIONS)
    torch.manual_seed(9)
    path = tmp_path / "run" / "state.pt"
    with pytest.raises(Killed):
        training.train(
            interrupted, data(), squared_error, checkpoint=path, checkpoint_every=3, on_step=killed_after(8), **OPTIONS
        )
    # Another process: another model, another random state.
    again = model_of(init)
    torch.manual_seed(1234)
    with torch.no_grad():
        for p in again.parameters():
            if p.requires_grad:
                p.add_(1)
    losses = training.train(again, data(), squared_error, checkpoint=path, checkpoint_every=3, **OPTIONS)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    factors = training.lora_layers(again)["0"].factors
    assert torch.equal(factors.lora_A0, training.lora_layers(whole)["0"].factors.lora_A0)
    # A finished run trains nothing.
    assert training.train(model_of(init), data(), squared_error, checkpoint=path, **OPTIONS) == expected


def test_the_log_of_a_run_taken_up_has_each_step_once(tmp_path: Path) -> None:
    state, log = tmp_path / "state.pt", tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        training.train(
            model_of(), data(), squared_error, checkpoint=state, checkpoint_every=5, log=log, on_step=killed_after(8)
        )
    assert len(log.read_text().splitlines()) == 8
    with log.open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    losses = training.train(model_of(), data(), squared_error, checkpoint=state, log=log)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == losses
    assert [record["tokens"] for record in records] == [16 * step for step in range(1, STEPS + 1)]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert all(record["grad_norm"] > 0 and record["lr"] == 1e-3 for record in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 2e-3}, "expected a run with lr=0.002, got one with 0.001"),
        ({"schedule": "linear"}, "expected a run with .*schedule='linear', got one with 'constant'|steps=12"),
        ({"accumulate": 2}, "expected a run with accumulate=2, got one with 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    training.train(model_of(), data(), squared_error, checkpoint=tmp_path / "s.pt", steps=2)
    with pytest.raises(ValueError, match=message):
        training.train(model_of(), data(), squared_error, checkpoint=tmp_path / "s.pt", **options)


def test_a_constant_run_can_be_prolonged(tmp_path: Path) -> None:
    torch.manual_seed(2)
    training.train(model_of(), data(), squared_error, checkpoint=tmp_path / "s.pt", steps=5)
    prolonged = training.train(model_of(), data(), squared_error, checkpoint=tmp_path / "s.pt", steps=9)
    torch.manual_seed(2)
    assert prolonged == training.train(model_of(), data(), squared_error, steps=9)


def test_checkpoints_of_another_model_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    training.train(model_of(), data(), squared_error, checkpoint=path, steps=2)
    other = nn.Sequential(nn.Linear(6, 1))
    training.inject(other, ["0"], r=2)
    with pytest.raises(ValueError, match="expected the parameters that train here, got those of another"):
        training.train(other, data(), squared_error, checkpoint=path, steps=3)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(AdapterFormatError, match=r"s.pt: expected a checkpoint of a training run"):
        training.train(model_of(), data(), squared_error, checkpoint=path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(AdapterFormatError, match="expected a checkpoint of a training run, got something else"):
        training.train(model_of(), data(), squared_error, checkpoint=path)


def test_other_processes_and_devices_than_a_checkpoints_leave_their_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: devices.append(device))
    set_random_state(RunState(1, [], 0, [{"cpu": torch.get_rng_state(), "cuda": [torch.ones(1), torch.ones(1)]}]))
    assert devices == [0]
    set_random_state(RunState(1, [], 0, []))


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_draw_random_numbers_do_not_disturb_a_run_taken_up(tmp_path: Path, shuffle: bool) -> None:
    def run(**options: Any) -> list[float]:
        model = model_of()
        torch.manual_seed(5)
        loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data(), strict=True))), 16, shuffle)
        return training.train(model, loader, squared_error, **options)

    run(steps=5, checkpoint=tmp_path / "s.pt")
    assert run(checkpoint=tmp_path / "s.pt") == run()


def test_running_statistics_of_what_trains_are_taken_up(tmp_path: Path) -> None:
    def normalised() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        training.inject(model, ["0"], r=2, modules_to_save=["1"])
        return model

    whole, again = normalised(), normalised()
    training.train(whole, data(), squared_error)
    training.train(normalised(), data(), squared_error, steps=5, checkpoint=tmp_path / "s.pt")
    training.train(again, data(), squared_error, checkpoint=tmp_path / "s.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), again.buffers(), strict=True))


def test_numbers_of_numpy_can_be_read_back(tmp_path: Path) -> None:
    rate = np.float64(1e-3)
    training.train(model_of(), data(), squared_error, lr=rate, steps=2, checkpoint=tmp_path / "s.pt")
    assert len(training.train(model_of(), data(), squared_error, lr=rate, checkpoint=tmp_path / "s.pt")) == STEPS


def test_an_adapter_at_rest_is_not_part_of_a_checkpoint(tmp_path: Path) -> None:
    model = model_of()
    training.inject(model, ["0"], r=2, adapter="second")
    training.train(model, data(), squared_error, steps=2, checkpoint=tmp_path / "s.pt")
    alone = model_of()
    training.remove(alone)
    training.inject(alone, ["0"], r=2, adapter="second")
    assert len(training.train(alone, data(), squared_error, checkpoint=tmp_path / "s.pt")) == STEPS


SCRIPT = """
import sys, itertools, time, torch
sys.path.insert(0, sys.argv[2])
from test_resume import model_of, data, squared_error
from lora_analysis import training
torch.manual_seed(9)
losses = training.train(
    model_of(), itertools.cycle(data()), squared_error, steps=40, schedule="linear", checkpoint=sys.argv[1],
    checkpoint_every=5, log=sys.argv[1] + ".jsonl", on_step=lambda step, loss: time.sleep(float(sys.argv[3])))
print(repr(losses))
"""


def test_a_process_killed_by_the_system_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    command = [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent)]
    process = subprocess.Popen([*command, "0.05"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = torch.load(path, weights_only=True)["step"]
    assert 5 <= done < 40
    again = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    torch.manual_seed(9)
    losses = training.train(model_of(), itertools.cycle(data()), squared_error, steps=40, schedule="linear")
    assert again.stdout.strip() == repr(losses)
    assert not list(tmp_path.glob(".*"))
