"""What a LoRA training step costs, against peft, loralib, full fine-tuning, and what no adapter can save.

1. One step (forward, backward, AdamW) of 6 transformer layers, d = 384, 12 heads, 1536 inside (the encoder of
   MiniLM), 16 texts of 64 tokens, float32, r = 8: LoRA on query and value, and on all linear layers. Each
   contender has the same weights and, to begin with, the same factors; the gradients are compared at the end.
   The input is the embedded text, so that the size of a vocabulary plays no part; there is no dropout.
   Floor: forward and the gradient of the input with every weight frozen. LoRA layers may stop above the first
   adapted layer and so get a little below it.
2. Inference with the factors merged against the model as it was.
3. ``merge`` of the linear layers of a Llama-2-7B layer (bfloat16, r = 16) against peft's.
   Floor: reading and writing the weights once.

    python tests/benchmarks/bench_training.py [--quick] [--threads N]
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import loralib
import peft
import torch
from timing import arguments, medians, seconds, table, threads
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis import training

QUERY_AND_VALUE = ["query", "value"]
ALL_LINEAR = ["query", "key", "value", "attention_output", "intermediate", "output"]
ALPHA = 12
"""Not r times a power of two, or where the scale is multiplied in would not show in the gradients."""

FLOOR_OF_MERGING = "floor: read and write the weights"


class Layer(nn.Module):
    """A transformer layer as in BERT."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.attention_output = (nn.Linear(d, d) for _ in range(4))
        self.intermediate, self.output = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.first_norm, self.second_norm = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first_norm(x + self.attention_output(mixed))
        y: Tensor = self.second_norm(x + self.output(F.gelu(self.intermediate(x))))
        return y


class Classifier(nn.Module):
    """Layers, the mean over tokens, and a linear classifier of 6 classes."""

    def __init__(self, layers: int, d: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(d, heads) for _ in range(layers)))
        self.classifier = nn.Linear(d, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layers(x).mean(dim=1))
        return logits


def with_ours(base: nn.Module, targets: list[str], r: int) -> nn.Module:
    model = copy.deepcopy(base)
    training.inject(model, targets, r=r, alpha=ALPHA)
    for layer in training.lora_layers(model).values():
        nn.init.normal_(
            layer.factors.lora_B, std=0.02
        )  # at B = 0 the gradient of A is zero, and compares equal to anything
    return model


def with_peft(ours: nn.Module, base: nn.Module, targets: list[str], r: int) -> Any:
    config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets)
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, layer in training.lora_layers(ours).items():
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.factors.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.factors.lora_B)
    return model


def with_loralib(ours: nn.Module, base: nn.Module, r: int) -> nn.Module:
    model = copy.deepcopy(base)
    for name, layer in training.lora_layers(ours).items():
        parent, _, child = name.rpartition(".")
        theirs = loralib.Linear(layer.in_features, layer.out_features, r=r, lora_alpha=ALPHA, merge_weights=False)
        theirs.load_state_dict(
            {"weight": layer.weight, "bias": layer.bias, "lora_A": layer.factors.lora_A, "lora_B": layer.factors.lora_B}
        )
        setattr(model.get_submodule(parent), child, theirs)
    loralib.mark_only_lora_as_trainable(model)
    return model


def step_of(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(x), labels))
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_of(base: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    model, x = copy.deepcopy(base).requires_grad_(False), x.clone().requires_grad_()

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(x), labels))
        x.grad = None

    return step


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Of A and B of every adapted module, in the order of the modules."""
    torch.autograd.backward(F.cross_entropy(model(x), labels))
    found = []
    for part in ("lora_A", "lora_B"):
        found += [p.grad for name, p in model.named_parameters() if part in name and p.grad is not None]
    model.zero_grad()
    return found


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    return max(float((a - b).norm() / a.norm()) for a, b in zip(ours, theirs, strict=True))


def steps(base: nn.Module, targets: list[str], title: str, target: str, x: Tensor, r: int, rounds: int) -> None:
    labels = torch.arange(len(x)) % 6
    ours = with_ours(base, targets, r)
    models = {
        "ours: training.inject": ours,
        "peft": with_peft(ours, base, targets, r),
        "loralib": with_loralib(ours, base, r),
    }
    found = {name: gradients(model.train(), x, labels) for name, model in models.items()}
    contenders = {name: step_of(model, x, labels) for name, model in models.items()}
    full = "full fine-tuning"
    floor = "floor: forward and input gradient"
    contenders[full] = step_of(copy.deepcopy(base), x, labels)
    contenders[floor] = floor_of(base, x, labels)
    times = medians(contenders, rounds=rounds)
    table(f"Training step, LoRA on {title}", times, ours="ours: training.inject", floors=[floor], target=target)
    of_full = {name: value / times[full] for name, value in times.items() if name != full}
    print("  of full fine-tuning:", ", ".join(f"{name} {value:.2f}" for name, value in of_full.items()))
    for name in ("peft", "loralib"):
        difference = largest_difference(found["ours: training.inject"], found[name])
        print(f"  gradients differ from {name}'s by {difference:.1g} at most, relative to each tensor's norm")


def inference(base: nn.Module, x: Tensor, r: int, rounds: int) -> None:
    merged = with_ours(base, ALL_LINEAR, r).eval()
    unmerged = copy.deepcopy(merged)
    training.merge(merged)
    with torch.no_grad():
        times = medians(
            {
                "ours: merged": lambda: merged(x),
                "not merged": lambda: unmerged(x),
                "floor: the model as it was": lambda: base(x),
            },
            rounds=3 * rounds,
        )
    table(
        "Inference, LoRA on all linear layers",
        times,
        ours="ours: merged",
        floors=["floor: the model as it was"],
        target="1.00 +- 0.02",
    )


def merging(divide: int, r: int, rounds: int) -> None:
    d, inner = 4096 // divide, 11008 // divide
    shapes = 4 * [(d, d)] + 2 * [(inner, d)] + [(d, inner)]
    linears = {f"linear{i}": nn.Linear(n, m, bias=False).bfloat16() for i, (m, n) in enumerate(shapes)}
    base, names = nn.ModuleDict(linears), list(linears)
    ours = with_ours(base, names, r)
    theirs = with_peft(ours, base, names, r)
    floor = [module.weight.detach().clone() for module in linears.values()]

    def read_and_write() -> None:
        for module, saved in zip(linears.values(), floor, strict=True):
            saved.copy_(module.weight.detach())

    turns: dict[str, list[float]] = {name: [] for name in ("ours: merge", "peft: merge_adapter", FLOOR_OF_MERGING)}
    for _ in range(rounds + 1):
        turns["ours: merge"].append(seconds(lambda: training.merge(ours)))
        turns["peft: merge_adapter"].append(seconds(theirs.merge_adapter))
        turns[FLOOR_OF_MERGING].append(seconds(read_and_write))
        unequal = [
            float((layer.weight != theirs.base_model.model.get_submodule(name).weight).double().mean())
            for name, layer in training.lora_layers(ours).items()
        ]
        training.unmerge(ours)
        theirs.unmerge_adapter()
    times = {name: statistics.median(values[1:]) for name, values in turns.items()}  # the first warms up
    table(
        f"Merging {len(names)} modules of a Llama-2-7B layer, bfloat16, r = {r}",
        times,
        ours="ours: merge",
        floors=[FLOOR_OF_MERGING],
        target="peft >= 10 x, values equal to peft's",
    )
    print(f"  share of weights that differ from peft's: {max(unequal):.1g} at most")


def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    layers, d, heads, rounds = (2, 96, 4, 3) if options.quick else (6, 384, 12, 11)
    base = Classifier(layers, d, heads)
    x = torch.randn(16, 64, d)
    with threads(options.threads):
        steps(base, QUERY_AND_VALUE, "query and value", "<= 1.05 x floor", x, 8, rounds)
        steps(
            base, ALL_LINEAR, "all linear layers", "<= 0.95 of full fine-tuning, gradients equal to 1e-6", x, 8, rounds
        )
        inference(base, x, 8, rounds)
        merging(8 if options.quick else 1, 16, 3)


if __name__ == "__main__":
    main()
