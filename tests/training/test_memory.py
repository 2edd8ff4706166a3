from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_analysis import training
from lora_analysis.training.accounting import ParameterCount, lora_count, parameter_count
from lora_analysis.training.memory import (
    FP16,
    FP16_STREAMED,
    FP32,
    FROZEN_16,
    MIXED,
    Precision,
    TrainingMemory,
    measured_memory,
    peak_memory,
    training_memory,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class MLP(nn.Sequential):
    """5·7 + 7 + 7·3 = 63 parameters in 3 tensors; 36 + 30 = 66 in 4 with LoRA at r = 3."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(nn.Linear(5, 7, dtype=dtype), nn.ReLU(), nn.Linear(7, 3, bias=False, dtype=dtype))


def backward(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    model(torch.ones(2, 5, dtype=dtype)).square().mean().backward()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, FP32), (torch.bfloat16, FP16)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_formula_is_what_a_live_optimizer_holds(
    name: str, dtype: torch.dtype, precision: Precision, lora: bool
) -> None:
    model = MLP(dtype)
    predicted = parameter_count(model)
    if lora:
        predicted = lora_count(model, "all-linear", r=3).adapted
        training.inject(model, "all-linear", r=3)
        # The factors of inject are float32; here they are asked for in the model's own dtype.
        model.to(dtype)
    optimizer = OPTIMIZERS[name](trainable(model))
    backward(model, dtype)
    optimizer.step()
    assert measured_memory(model, optimizer) == training_memory(predicted, optimizer=name, precision=precision)


@pytest.mark.parametrize("variant", ["foreach", "fused"])
def test_variants_of_adamw_hold_the_same(variant: str) -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), **{variant: True})
    backward(model)
    optimizer.step()
    assert measured_memory(model, optimizer) == training_memory(parameter_count(model))


def test_a_base_in_16_bits_has_factors_in_32() -> None:
    model = MLP(torch.bfloat16)
    predicted = training_memory(lora_count(model, "all-linear", r=3).adapted, precision=FROZEN_16)
    training.inject(model, "all-linear", r=3)
    optimizer = torch.optim.AdamW(trainable(model))
    backward(model, torch.bfloat16)
    optimizer.step()
    assert measured_memory(model, optimizer) == predicted


def test_mixed_precision_holds_master_weights() -> None:
    model = MLP(torch.bfloat16)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    backward(model, torch.bfloat16)
    for master, parameter in zip(masters, model.parameters(), strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
    optimizer.step()
    optimizer.zero_grad()  # the passing float32 copies of the gradients
    assert measured_memory(model, optimizer) == training_memory(parameter_count(model), precision=MIXED)


def test_gradients_used_as_they_come_are_not_held() -> None:
    model = MLP(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())

    def use(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(use)
    backward(model, torch.bfloat16)
    assert measured_memory(model, optimizer) == training_memory(parameter_count(model), precision=FP16_STREAMED)


def test_gradients_and_states_are_counted_while_they_are_there() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = 4 * 63
    assert measured_memory(model, optimizer) == TrainingMemory(weights, 0, 0, 0)
    backward(model)
    assert measured_memory(model, optimizer) == TrainingMemory(weights, 0, weights, 0)
    optimizer.step()
    optimizer.zero_grad()
    assert measured_memory(model, optimizer) == TrainingMemory(weights, 0, 0, 2 * weights + 3 * 4)


def test_sparse_gradients_count_what_they_store() -> None:
    model = nn.Embedding(100, 4, sparse=True)
    model(torch.tensor([1, 7, 8])).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert measured_memory(model, optimizer).gradients == 3 * 8 + 3 * 4 * 4


def test_states_in_lists_are_counted_and_a_tensor_once() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history, shared = torch.zeros(10, dtype=torch.float64), torch.zeros(7, dtype=torch.int8)
    optimizer.state[model[0].weight] = {"history": [history, (shared, {"last": shared})], "steps": 3, "last": None}
    optimizer.state[model[0].bias] = {"shared": shared}
    assert measured_memory(model, optimizer).optimizer == 80 + 7


def test_bytes_per_parameter_of_full_fine_tuning_with_adam() -> None:
    full = ParameterCount(total=1000, trainable=1000, trainable_tensors=0)
    per_parameter = [training_memory(full, precision=p).total / 1000 for p in (FP32, MIXED, FP16, FP16_STREAMED)]
    assert per_parameter == [16, 16, 8, 6]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer: expected one of \('adam', .*got 'lion'"):
        training_memory(ParameterCount(1, 1, 1), optimizer="lion")


def test_peak_is_the_most_held_at_once() -> None:
    def step() -> None:
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(300)
        del first
        third = torch.empty(1699, dtype=torch.uint8)
        del second, third

    assert peak_memory(step) == 8000 + 1200


def test_peak_counts_buffers_inside_an_operation() -> None:
    values = torch.ones(1000)
    result = 4 * 1000
    # log_softmax of a transposed matrix makes a contiguous copy of it, which never leaves the operation.
    inside = peak_memory(lambda: torch.log_softmax(values.reshape(10, 100).T, 1))
    assert inside == 2 * result


def test_peak_ignores_what_was_there_and_recordings_before() -> None:
    kept: list[Tensor] = []
    assert peak_memory(lambda: kept.append(torch.empty(1000))) == 4000

    def release_and_allocate() -> None:
        kept.clear()
        torch.empty(500)

    assert peak_memory(release_and_allocate) == 2000
    assert peak_memory(lambda: None) == 0


def test_peak_passes_errors_on_and_can_be_called_again() -> None:
    def fail() -> None:
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        peak_memory(fail)
    assert peak_memory(lambda: torch.empty(10)) == 40


class LiveStorages(TorchDispatchMode):
    """Second route to the peak: storages that operations return, until they are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("lora", [False, True])
def test_peak_of_a_training_step_agrees_with_counting_live_storages(lora: bool) -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    if lora:
        # Not the second layer: autograd adds the gradients of an input used twice in place, but not under a mode
        # like the one that counts here.
        training.inject(model, ["0"], r=4)
    optimizer = torch.optim.AdamW(trainable(model))
    x = torch.ones(32, 128)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's states
    measured = peak_memory(step)
    with LiveStorages() as counted:
        step()
    # Only buffers inside operations are the profiler's alone: here the few scalars that tensors are multiplied with.
    assert counted.peak <= measured <= counted.peak + 64


def test_peak_of_a_step_with_lora_is_smaller() -> None:
    def peak(model: nn.Module) -> int:
        optimizer = torch.optim.AdamW(trainable(model))

        def step() -> None:
            model(torch.ones(1, 256)).square().mean().backward()
            optimizer.step()

        return peak_memory(step)

    full, adapted = nn.Sequential(nn.Linear(256, 256)), nn.Sequential(nn.Linear(256, 256))
    count = lora_count(adapted, ["0"], r=1)
    training.inject(adapted, ["0"], r=1)
    # Gradients and states are part of a first step: at least three times what trains.
    assert peak(full) >= 3 * 4 * count.base
    assert 3 * 4 * count.trainable <= peak(adapted) < 4 * count.base


def test_a_device_without_a_peak_is_refused() -> None:
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'meta'"):
        peak_memory(lambda: None, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_on_a_gpu_is_the_most_held_at_once() -> None:
    def step() -> None:
        first = torch.empty(2**20, device="cuda")
        del first
        torch.empty(2**21, device="cuda")

    # The allocator's blocks are multiples of 512 bytes, which these are.
    assert peak_memory(step, device="cuda") == 4 * 2**21
