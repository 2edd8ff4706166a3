"""Two processes under torchrun give the losses of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_analysis import training
from lora_analysis.training.distributed import part_of

SCRIPT = '''
"""Trains a small model; the same script runs in one process and in several."""
import json, sys
import torch
from torch import nn
from lora_analysis import training
from lora_analysis.training.distributed import rank

def model_of():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = blocks, nn.Linear(8, 3)
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)
    model = Stack().double()
    training.inject(model, r"blocks\\.[12]\\.0", r=2, bias="lora_only", modules_to_save=["head"])
    return model

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

generator = torch.Generator().manual_seed(1)
batches = [
    {"x": torch.randn(8, 8, dtype=torch.float64, generator=generator), "y": torch.randint(3, (8,), generator=generator)}
    for _ in range(5)
] * 4
options = json.loads(sys.argv[2])
with training.process_group():
    model = model_of()
    losses = training.train(model, list(training.local_parts(batches)), loss, lr=1e-2, **options)
    weights = {name: p.tolist() for name, p in model.named_parameters() if p.requires_grad}
    with open(f"{sys.argv[1]}.{rank()}", "w") as file:
        json.dump([losses, weights], file)
'''


def run(tmp_path: Path, name: str, processes: int, **options: object) -> list[list[object]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / name
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{i}").read_text()) for i in range(processes)]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "max_grad_norm": 0.1, "schedule": "cosine"}, {"recompute": True}]
)
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path: Path, options: dict[str, object]) -> None:
    ((losses, weights),) = run(tmp_path, "one", 1, **options)
    results = run(tmp_path, "two", 2, **options)
    assert len(losses) == 20 // int(str(options.get("accumulate", 1)))
    for other_losses, other_weights in results:
        # float64; the mean of two means is rounded another way.
        torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-9, atol=1e-12)
        assert other_weights.keys() == weights.keys()
        for name in weights:
            torch.testing.assert_close(
                torch.tensor(other_weights[name]), torch.tensor(weights[name]), rtol=1e-7, atol=1e-10
            )


def test_a_run_of_two_processes_is_taken_up_by_two(tmp_path: Path) -> None:
    ((losses, _),) = run(tmp_path, "one", 1)
    state = str(tmp_path / "state.pt")
    run(tmp_path, "half", 2, steps=10, checkpoint=state)
    for again, _ in run(tmp_path, "rest", 2, checkpoint=state, log=str(tmp_path / "log.jsonl")):
        torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=1e-9, atol=1e-12)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 10


def failed(tmp_path: Path, script: str) -> str:
    """What two processes say that fail."""
    path = tmp_path / "failing.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    return done.stderr


UNEVEN = """
import sys, torch
from torch import nn
from lora_analysis import training
from lora_analysis.training.distributed import rank

def loss(model, x):
    return model(x)[0].square().mean()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x):
        return self.used(x), self.unused(x)

with training.process_group():
    torch.manual_seed(0)
    model = Model()
    training.inject(model, TARGETS, r=2)
    training.train(model, [torch.ones(2, 3)] * 4, loss, checkpoint=CHECKPOINT, steps=2)
    training.train(model, [torch.ones(2, 3)] * 4, loss, checkpoint=CHECKPOINT if rank() == 0 else None)
"""


def test_parameters_that_the_loss_leaves_out_are_named(tmp_path: Path) -> None:
    script = UNEVEN.replace("TARGETS", "'all-linear'").replace("CHECKPOINT", "None")
    assert "ValueError: 'unused.adapters.default.lora_A': expected a loss that depends" in failed(tmp_path, script)


def test_a_checkpoint_that_one_process_alone_has_is_refused(tmp_path: Path) -> None:
    script = UNEVEN.replace("TARGETS", "['used']").replace("CHECKPOINT", repr(str(tmp_path / "state.pt")))
    assert "ValueError: checkpoint: steps made: expected the same in every process, got [2, 0]" in failed(
        tmp_path, script
    )


def test_streams_that_end_at_different_steps_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    whole = UNEVEN.replace("TARGETS", "['used']").replace("CHECKPOINT", "None")
    script = whole.replace("[torch.ones(2, 3)] * 4, loss", "iter([torch.ones(2, 3)] * (3 + rank())), loss")
    assert script != whole
    assert "ValueError: batches: whether there are more: expected the same in every process, got [False, True]" in (
        failed(tmp_path, script)
    )


def test_every_process_has_its_own_device_under_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", called.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with training.process_group("nccl"):
        assert called == [3, "nccl"]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_parts_keep_the_kind_of_a_batch() -> None:
    x = torch.arange(6).reshape(6, 1)
    part = part_of({"pair": Pair(x, x + 1), "list": [x], "name": "kept", "number": torch.tensor(3)}, 1, 3)
    assert isinstance(part["pair"], Pair)
    assert torch.equal(part["pair"].y, x[2:4] + 1)
    assert torch.equal(part["list"][0], x[2:4])
    assert (part["name"], int(part["number"])) == ("kept", 3)
    with pytest.raises(ValueError, match="rows for 4 processes in equal parts, got 6"):
        part_of(x, 0, 4)


def test_one_process_has_everything() -> None:
    with training.process_group():
        assert list(training.local_parts([1, 2])) == [1, 2]
