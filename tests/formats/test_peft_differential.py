"""Random adapters of PEFT against PEFT's own merge: the same ΔW, for every kind of layer and every option of LoRA.

The oracle is ``merge_and_unload`` less the base, in float64, and ``get_delta_weight``. Both are sums of r products,
so that a difference beyond rounding is one of orientation, scale, order or kind.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.formats import load_adapter
from lora_analysis.update import DenseUpdate, LowRankUpdate

# Of the largest entry. Everything here is float64, and a wrong rule is wrong by a factor.
EXACT = 1e-10

KINDS = ("linear", "turned", "embedding", "convolution", "experts", "mixed")
COUNT = 240


class Experts(nn.Module):
    """As the mixtures of experts of transformers hold their weights, either way round."""

    def __init__(self, count: int, hidden: int, inner: int, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        gate, down = ((hidden, 2 * inner), (inner, hidden)) if transposed else ((2 * inner, hidden), (hidden, inner))
        self.gate_up_proj = nn.Parameter(torch.randn(count, *gate))
        self.down_proj = nn.Parameter(torch.randn(count, *down))
        self.router = nn.Parameter(torch.randn(count, hidden))


class Net(nn.Module):
    """Whatever layers; it is never called."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for name, layer in layers.items():
            number, _, last = name.partition(".")
            setattr(self.layers[int(number)], last, layer)

    def forward(self, x: Tensor) -> Tensor:
        return x


def linear(draw: random.Random) -> nn.Module:
    return nn.Linear(draw.randint(1, 12), draw.randint(1, 12))


def turned(draw: random.Random) -> nn.Module:
    return Conv1D(draw.randint(1, 12), draw.randint(1, 12))


def embedding(draw: random.Random) -> nn.Module:
    return nn.Embedding(draw.randint(2, 12), draw.randint(2, 12))


def convolution(draw: random.Random) -> nn.Module:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    axes = draw.randint(1, 3)
    # PEFT takes a kernel (1, 1, k) for one of a Conv2d with k lost.
    kernel = (draw.randint(2 if axes == 3 else 1, 3), *(draw.randint(1, 3) for _ in range(axes - 1)))
    return kinds[axes - 1](draw.randint(1, 5), draw.randint(1, 5), kernel)  # type: ignore[no-any-return]


LAYERS = {"linear": linear, "turned": turned, "embedding": embedding, "convolution": convolution}
NAMES = ("q_proj", "proj", "lin", "out.proj")


def random_model(kind: str, draw: random.Random) -> nn.Module:
    if kind == "experts":
        hidden, inner = draw.choice([(5, 3), (8, 5), (4, 7)])
        layers: dict[str, nn.Module] = {
            f"{i}.experts": Experts(draw.randint(2, 4), hidden, inner, draw.random() < 0.5) for i in range(2)
        }
    else:
        makers = [LAYERS[kind]] if kind != "mixed" else [linear, embedding, convolution]
        layers = {f"{i}.{name}": draw.choice(makers)(draw) for i in range(2) for name in NAMES[:3]}
    torch.manual_seed(draw.randrange(10**6))
    return Net(layers)


def random_patterns(draw: random.Random, highest: int) -> dict[str, int]:
    keys = [
        "proj",
        "q_proj",
        "lin",
        r"layers\.0\..*",
        "layers.1.lin",
        "^layers.1.lin",
        ".*_proj",
        "experts.down_proj",
        "up_proj",
    ]
    chosen = draw.sample(keys, draw.choice([0, 0, 1, 2, 4]))
    # Sorted, as PEFT saves them: the first that matches counts, and training would else have used another.
    return {key: draw.randint(1, highest) for key in sorted(chosen)}


def random_options(kind: str, draw: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "r": draw.randint(1, 6),
        "lora_alpha": draw.randint(1, 20),
        "use_rslora": draw.random() < 0.3,
        "rank_pattern": random_patterns(draw, 5),
        "alpha_pattern": random_patterns(draw, 30),
        "init_lora_weights": draw.choice([True, False, "gaussian"]),
    }
    if kind == "experts":
        parameters = ["experts.gate_up_proj", "experts.down_proj", "experts.router"]
        draw.shuffle(parameters)
        return options | {"target_modules": [], "target_parameters": parameters[: draw.randint(1, 3)]}
    if kind == "turned":
        options["fan_in_fan_out"] = True
    options["target_modules"] = draw.choice([list(NAMES), ["proj", "lin"], r"layers\.\d\..*proj"])
    if draw.random() < 0.4:
        options["use_dora"] = True
    elif kind in ("linear", "turned", "convolution") and draw.random() < 0.4:
        options |= {"lora_bias": True, "init_lora_weights": True}
    return options


def trained(model: nn.Module, options: dict[str, Any], dtype: torch.dtype, draw: random.Random) -> Any:
    """An adapted model whose factors and magnitudes are random."""
    made = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    torch.manual_seed(draw.randrange(10**6))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.copy_(parameter * (0.5 + torch.rand_like(parameter)))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
                parameter.data = parameter.data.to(dtype)
    return made


def merged(model: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.double().merge_and_unload().state_dict()
    return state


def own_products(model: Any) -> dict[str, Tensor]:
    """``get_delta_weight`` of every layer, by the tensor it changes."""
    products = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            tensor = f"{path}.{getattr(layer, 'parameter_name', 'weight')}"
            products[tensor] = layer.get_delta_weight("default").detach()
    return products


def assert_equal(adapter: Adapter, theirs: dict[str, Tensor], said: object) -> None:
    """Every ΔW is the one of these tensors, turned and unfolded as the base's would be, and none is left over."""
    assert {target.tensor for target in adapter.targets.values()} == theirs.keys()
    counts = Counter(target.tensor for target in adapter.targets.values())
    assert all(
        counts[name] == (len(tensor) if "experts." in name and tensor.ndim == 3 else 1)
        for name, tensor in theirs.items()
    )
    held = load_base(theirs)
    for name, module in adapter.modules.items():
        ours, oracle = adapter[name].dense(), held.matrix(module.target, module.shape)
        assert adapter[name].shape == module.shape == tuple(oracle.shape)
        assert bool((ours - oracle).abs().max() <= EXACT * oracle.abs().max() + 1e-14), (name, said)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`")
@pytest.mark.parametrize("seed", range(COUNT))
def test_the_update_of_a_random_adapter_is_what_peft_merges(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    options = random_options(kind, draw)
    model = random_model(kind, draw).double()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = trained(model, options, dtype, draw)
    with warnings.catch_warnings():
        # peft takes the bias of its own lora_bias for a broken factor.
        warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape", UserWarning)
        live.save_pretrained(tmp_path)
    dora = bool(options.get("use_dora"))
    # The widths of gate_up_proj and down_proj tell them apart; other sets of parameters take the base's shapes.
    wide = len(options.get("target_parameters", ())) > 1
    known = load_base(base) if dora or wide or draw.random() < 0.5 else None
    adapter = load_adapter(tmp_path, base=known)
    assert {module.scale_source for module in adapter.modules.values()} == {"config"}
    assert all(not module.flags for module in adapter.modules.values())
    # PEFT sorts the patterns it saves, and these are sorted.
    assert all("keys of alpha_pattern match" in note for note in adapter.notes)

    exact = copy.deepcopy(live).double()
    after = merged(copy.deepcopy(exact))
    # A bias of B moves the layer's bias, which is no part of ΔW.
    changed = {
        name: after[name] - base[name]
        for name in base
        if not torch.equal(after[name], base[name]) and not name.endswith("bias")
    }
    assert_equal(adapter, changed, options)
    assert all(isinstance(update, DenseUpdate if dora else LowRankUpdate) for update in adapter.values())

    low_rank = load_adapter(tmp_path) if dora else adapter
    assert_equal(low_rank, own_products(exact), options)
    assert {module.flags for module in low_rank.modules.values()} == {("dora-low-rank-part",) if dora else ()}


def test_the_draws_cover_what_they_are_meant_to() -> None:
    drawn = []
    for seed in range(COUNT):
        draw = random.Random(seed)
        dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        drawn.append((KINDS[seed % len(KINDS)], dtype, random_options(KINDS[seed % len(KINDS)], draw)))
    assert sum(dtype == torch.bfloat16 for _, dtype, _ in drawn) > 20
    assert sum(bool(options.get("lora_bias")) for _, _, options in drawn) > 20
    assert sum(options["use_rslora"] for _, _, options in drawn) > 40
    assert sum(len(options["alpha_pattern"]) > 1 for _, _, options in drawn) > 40
    for kind in KINDS:
        assert kind == "experts" or sum(bool(o.get("use_dora")) for k, _, o in drawn if k == kind) > 8
