"""Every kind of layer and option against peft, loralib and the dense equation: same start and data, same losses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import loralib
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_analysis import training

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

# Twenty float64 steps of order-one losses: rounding stays below 1e-12, a wrong scale or factor shows in 1e-3.
LOSS = 1e-9
WEIGHT = {"rtol": 1e-9, "atol": 1e-9}
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
STEPS = 20
R, ALPHA = 4, 6.0

Inputs = Callable[[], Tensor]


def normal(*shape: int) -> Inputs:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Inputs:
    return lambda: torch.randint(vocabulary, shape)


def losses(model: nn.Module, inputs: Inputs, *, steps: int = STEPS) -> list[float]:
    """Of SGD towards the sine of what the base gives; both models see the same numbers."""
    torch.manual_seed(5)
    stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        y = model(inputs())
        loss = (y - torch.arange(y.numel()).reshape(y.shape).double().sin()).square().mean()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        found.append(loss.item())
    return found


def peft_start(ours: nn.Module, peer: nn.Module) -> None:
    """Begin peft's factors at ours."""
    with torch.no_grad():
        for name, layer in training.lora_layers(ours).items():
            theirs = peer.base_model.model.get_submodule(name)
            factors = layer.factors
            if "default" in theirs.lora_embedding_A:
                theirs.lora_embedding_A["default"].copy_(factors.lora_A)
                theirs.lora_embedding_B["default"].copy_(factors.lora_B)
                continue
            for mine, other in ((factors.lora_A, theirs.lora_A), (factors.lora_B, theirs.lora_B)):
                other["default"].weight.copy_(mine.reshape(other["default"].weight.shape))


def plain_names(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".adapters." not in name}


LAYERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "linear": (lambda: nn.Linear(6, 5), normal(8, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 5, bias=False), normal(2, 3, 6)),
    "conv1d of transformers": (lambda: Conv1D(5, 6), normal(8, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), tokens(9, 3, 4)),
    "embedding with padding": (lambda: nn.Embedding(9, 5, padding_idx=2), tokens(9, 3, 4)),
    "embedding by frequency": (lambda: nn.Embedding(9, 5, scale_grad_by_freq=True), tokens(9, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), normal(2, 3, 8)),
    "conv1d with stride": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1, bias=False), normal(2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), normal(2, 3, 6, 6)),
    "conv2d with stride and padding": (lambda: nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0)), normal(2, 3, 6, 7)),
    "conv2d same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), normal(2, 3, 6, 6)),
    "conv2d of kernel one": (lambda: nn.Conv2d(3, 5, 1), normal(2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 0, 0)), normal(2, 2, 4, 4, 3)),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_losses_and_merged_weights_are_those_of_peft(case: str, rslora: bool) -> None:
    make, inputs = LAYERS[case]
    base = nn.Sequential(make()).double()
    ours = copy.deepcopy(base)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, seed=1, rslora=rslora)
    turned = isinstance(base[0], Conv1D)
    config = peft.LoraConfig(
        target_modules=["0"],
        r=R,
        lora_alpha=ALPHA,
        use_rslora=rslora,
        fan_in_fan_out=turned,  # type: ignore[arg-type]
    )
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    if isinstance(base[0], nn.Embedding):
        assert not training.lora_layers(ours)["0"].factors.lora_A.any()
        assert not peer.base_model.model[0].lora_embedding_A["default"].any()
    peft_start(ours, peer)
    assert losses(ours, inputs) == pytest.approx(losses(peer, inputs), rel=LOSS)
    moved = training.lora_layers(ours)["0"].factors
    assert not torch.equal(moved.lora_A, moved.lora_A0)
    assert not torch.equal(moved.lora_B, moved.lora_B0)
    x = inputs()
    unmerged = ours(x)
    training.merge_and_unload(ours)
    torch.testing.assert_close(ours(x), unmerged, **CLOSE)
    merged = peer.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], **WEIGHT)


def test_a_sparse_embedding_trains_as_a_dense_one() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 5, sparse=sparse)).double()
        training.inject(model, ["0"], r=R, alpha=ALPHA)
        found.append(losses(model, tokens(9, 3, 4)))
    assert found[0] == found[1]


def loralib_losses(ours: nn.Module, peer: nn.Module, inputs: Inputs) -> None:
    """The same start, the same losses, and the same weights once merged; loralib merges in ``eval``."""
    with torch.no_grad():
        for name, site in training.sites(ours).items():
            theirs = peer.get_submodule(name.removesuffix(".conv"))
            theirs.lora_A.copy_(site.factors.lora_A)
            theirs.lora_B.copy_(site.factors.lora_B)
    loralib.mark_only_lora_as_trainable(peer)
    assert losses(ours, inputs) == pytest.approx(losses(peer, inputs), rel=LOSS)
    training.merge_and_unload(ours)
    peer.eval()
    merged = peer.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], **WEIGHT)


LORALIB: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], Inputs]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda **k: loralib.Linear(6, 5, **k), normal(8, 6)),
    "turned": (lambda: Conv1D(5, 6), lambda **k: loralib.Linear(6, 5, fan_in_fan_out=True, **k), normal(8, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda **k: loralib.Embedding(9, 5, **k), tokens(9, 3, 4)),
    "embedding with padding": (
        lambda: nn.Embedding(9, 5, padding_idx=2),
        lambda **k: loralib.Embedding(9, 5, padding_idx=2, **k),
        tokens(9, 3, 4),
    ),
}


@pytest.mark.parametrize("case", LORALIB)
def test_losses_and_merged_weights_are_those_of_loralib(case: str) -> None:
    make, theirs, inputs = LORALIB[case]
    ours = nn.Sequential(make()).double()
    peer = nn.Sequential(theirs(r=R, lora_alpha=ALPHA)).double()
    if case == "embedding":
        assert not peer[0].lora_A.any()  # B is drawn, as here
    peer.load_state_dict(ours.state_dict(), strict=False)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, seed=1)
    loralib_losses(ours, peer, inputs)


MASKS = [list(mask) for n in (2, 3) for mask in itertools.product([True, False], repeat=n) if any(mask)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_slots_are_the_merged_linear_of_loralib(mask: list[bool], turned: bool) -> None:
    d_out = 12
    ours = nn.Sequential(Conv1D(d_out, 6) if turned else nn.Linear(6, d_out)).double()
    peer = nn.Sequential(
        loralib.MergedLinear(6, d_out, enable_lora=mask, fan_in_fan_out=turned, r=R, lora_alpha=ALPHA)
    ).double()
    peer.load_state_dict(ours.state_dict(), strict=False)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, seed=1, slots={"0": mask})
    if turned:  # its forward takes the update of a turned weight the wrong way round, and its merging does not
        peer[0].forward = lambda x: F.linear(  # type: ignore[method-assign]
            x, peer[0].weight.T + peer[0].merge_AB().T * peer[0].scaling, peer[0].bias
        )
    loralib_losses(ours, peer, normal(8, 6))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2, "padding": 1, "bias": False}], ids=str)
def test_a_view_is_the_convolution_of_loralib(options: dict[str, Any]) -> None:
    k, groups = 3, options.get("groups", 1)
    ours = nn.Sequential(loralib.Conv2d(4, 6, k, **options)).double()
    peer = nn.Sequential(loralib.Conv2d(4, 6, k, r=2, lora_alpha=ALPHA, **options)).double()
    peer.load_state_dict(ours.state_dict(), strict=False)
    view = (6 // groups * k, 4 * k)
    training.inject(ours, parameters={"conv.weight": view}, r=2 * k, alpha=ALPHA * k, seed=1)
    loralib_losses(ours, peer, normal(2, 4, 7, 7))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "dilation": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=2), normal(2, 3, 7, 7)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), normal(2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 12, 3, groups=6, stride=2), normal(2, 6, 9)),
    "circular": (lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"), normal(2, 3, 6, 6)),
    "reflect": (lambda: nn.Conv1d(3, 5, 4, padding=2, padding_mode="reflect"), normal(2, 3, 6)),
    "replicate": (lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate", groups=2), normal(1, 2, 3, 4, 3)),
    "same with dilation": (lambda: nn.Conv2d(3, 5, (3, 5), padding="same", dilation=(2, 1)), normal(2, 3, 6, 6)),
    "without a batch": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), normal(4, 5, 5)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_that_of_the_dense_weight(case: str) -> None:
    make, inputs = CONVOLUTIONS[case]
    model = nn.Sequential(make()).double()
    training.inject(model, ["0"], r=R, alpha=ALPHA)
    factors = training.lora_layers(model)["0"].factors
    nn.init.normal_(factors.lora_B)
    dense = copy.deepcopy(model[0].base_layer)
    change = ALPHA / R * factors.lora_B.detach() @ factors.lora_A.detach()
    assert change.shape == (dense.weight.shape[0], dense.weight[0].numel())
    with torch.no_grad():
        dense.weight += change.view(dense.weight.shape)
    x = inputs().requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, dense(x), **CLOSE)
    # Gradients of the factors by the chain rule through the dense weight.
    probe = torch.randn_like(y)
    dense.weight.requires_grad_(True)
    mine = torch.autograd.grad((y * probe).sum(), [x, factors.lora_A, factors.lora_B])
    of_x, of_weight = torch.autograd.grad((dense(x) * probe).sum(), [x, dense.weight])
    of_change = ALPHA / R * of_weight.flatten(1)
    torch.testing.assert_close(mine[0], of_x, **CLOSE)
    torch.testing.assert_close(mine[1], factors.lora_B.detach().T @ of_change, **CLOSE)
    torch.testing.assert_close(mine[2], of_change @ factors.lora_A.detach().T, **CLOSE)
    training.merge(model)
    torch.testing.assert_close(model(x), y, **CLOSE)


DORA: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "linear": (lambda: nn.Linear(6, 5), normal(8, 6)),
    "turned": (lambda: Conv1D(5, 6), normal(8, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2), normal(2, 3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, bias=False), normal(2, 3, 8)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", DORA)
def test_dora_is_that_of_peft(case: str, dropout: float) -> None:
    make, inputs = DORA[case]
    base = nn.Sequential(make()).double()
    ours = copy.deepcopy(base)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, dora=True, dropout=dropout)
    turned = isinstance(base[0], Conv1D)
    config = peft.LoraConfig(
        target_modules=["0"],
        r=R,
        lora_alpha=ALPHA,  # type: ignore[arg-type]
        use_dora=True,
        lora_dropout=dropout,
        fan_in_fan_out=turned,
    )
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    peft_start(ours, peer)
    x = inputs()
    torch.testing.assert_close(ours.eval()(x), base(x), **CLOSE)
    ours.train()
    assert losses(ours, inputs) == pytest.approx(losses(peer, inputs), rel=LOSS)
    factors = training.lora_layers(ours)["0"].factors
    magnitudes = peer.base_model.model[0].lora_magnitude_vector["default"].weight.flatten()
    torch.testing.assert_close(factors.lora_magnitude, magnitudes, **WEIGHT)
    unmerged = ours.eval()(x)
    torch.testing.assert_close(peer.eval()(x), unmerged, **CLOSE)
    training.merge(ours)
    torch.testing.assert_close(ours(x), unmerged, **CLOSE)
    merged = peer.merge_and_unload()[0].weight
    torch.testing.assert_close(training.lora_layers(ours)["0"].weight, merged, **WEIGHT)
    training.unmerge(ours)
    for name, tensor in base.state_dict().items():
        assert torch.equal(plain_names(ours)[name], tensor)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["linear", "turned"])
def test_pissa_is_that_of_peft_which_moves_the_base(make: Callable[[], nn.Module]) -> None:
    base = nn.Sequential(make())  # in float32, which peft asks for at the start
    ours = copy.deepcopy(base)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, init="pissa")
    x = torch.randn(8, 6)
    assert all(torch.equal(plain_names(ours)[name], tensor) for name, tensor in base.state_dict().items())
    assert torch.equal(ours(x), base(x))
    config = peft.LoraConfig(
        target_modules=["0"],
        r=R,
        lora_alpha=ALPHA,  # type: ignore[arg-type]
        init_lora_weights="pissa",
        fan_in_fan_out=isinstance(base[0], Conv1D),
    )
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    for model in (ours, peer):
        model.double()
    # peft's decomposition and residue are of float32. Signs of singular vectors are free, and make no difference.
    assert losses(ours, normal(8, 6)) == pytest.approx(losses(peer, normal(8, 6)), rel=1e-5)
    training.merge_and_unload(ours)
    merged = peer.merge_and_unload()
    assert not torch.allclose(ours[0].weight, base[0].weight.double(), atol=1e-2)
    torch.testing.assert_close(ours[0].weight, merged[0].weight, rtol=1e-5, atol=1e-5)


def test_a_frozen_a_keeps_its_start_while_b_trains_as_if_a_were_data() -> None:
    base = nn.Sequential(nn.Linear(6, 5)).double()
    ours = copy.deepcopy(base)
    training.inject(ours, ["0"], r=R, alpha=ALPHA, freeze_A=True)
    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=ALPHA)  # type: ignore[arg-type]
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    peft_start(ours, peer)
    peer.base_model.model[0].lora_A["default"].weight.requires_grad_(False)
    assert losses(ours, normal(8, 6)) == pytest.approx(losses(peer, normal(8, 6)), rel=LOSS)
    factors = training.lora_layers(ours)["0"].factors
    assert torch.equal(factors.lora_A, factors.lora_A0)
    assert factors.lora_B.any()
    training.activate(ours, None)
    training.activate(ours, "default")
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == ["0.adapters.default.lora_B"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


@pytest.mark.parametrize("slots", [None, {"in_proj_weight": "q,v"}], ids=["whole", "q,v"])
def test_packed_attention_computes_with_the_dense_weights(slots: Any) -> None:
    model = Attention().double()
    dense = copy.deepcopy(model)
    names = training.inject(model, parameters=["in_proj_weight", "out_proj.weight"], r=R, alpha=ALPHA, slots=slots)
    assert sorted(names) == ["attention.in_proj_weight", "attention.out_proj"]
    x = normal(2, 5, 8)()
    assert torch.equal(model(x), dense(x))
    start = losses(model, normal(2, 5, 8))
    assert start[-1] < start[0]
    with torch.no_grad():
        for site, weight in (
            ("attention.in_proj_weight", dense.attention.in_proj_weight),
            ("attention.out_proj", dense.attention.out_proj.weight),
        ):
            factors = training.sites(model)[site].factors
            assert factors.lora_B.any()
            if factors.blocks:
                q, v = ((ALPHA / R) * factors.lora_B[i * 8 :][:8] @ factors.lora_A[i * R :][:R] for i in range(2))
                weight += torch.cat([q, torch.zeros_like(q), v])
            else:
                weight += ALPHA / R * factors.lora_B @ factors.lora_A
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), dense.train(mode)(x), **CLOSE)
    training.merge(model)
    torch.testing.assert_close(model(x), dense(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_of_torch_computes_with_its_parameters_in_both_modes() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    model = nn.TransformerEncoder(layer, 2)
    training.inject(model, parameters=["linear1.weight", "in_proj_weight"], r=R, alpha=ALPHA)
    for site in training.sites(model).values():
        nn.init.normal_(site.factors.lora_B, std=0.3)
    x = normal(2, 5, 8)()
    trained = model.train()(x)
    with torch.no_grad():  # the fast path of eval reads the weights and calls no layer
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-9, atol=1e-9)
    training.merge_and_unload(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-9, atol=1e-9)


class Experts(nn.Module):
    """A small mixture, its experts stacked as (experts, d_out, d_in), or (experts, d_in, d_out) if transposed."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 6, 10) if transposed else torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 10, 6) if transposed else torch.randn(3, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return ((x[None] @ up).tanh() @ down).sum(0)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_those_of_peft(transposed: bool) -> None:
    base = nn.ModuleDict({"experts": Experts(transposed=transposed)}).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = copy.deepcopy(base["experts"])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.experts(x)
            return out

    ours = Model()
    targets = ["experts.up", "experts.down"]
    assert training.inject(ours, parameters=targets, r=R, alpha=ALPHA) == targets
    config = peft.LoraConfig(target_modules=[], target_parameters=targets, r=R, lora_alpha=ALPHA)  # type: ignore[arg-type]
    peer = peft.get_peft_model(Model(), config)
    wrappers = {m.parameter_name: m for m in peer.modules() if type(m).__name__ == "ParamWrapper"}
    assert set(wrappers) == {"up", "down"}
    with torch.no_grad():
        for name, wrapper in wrappers.items():
            factors = training.sites(ours)[f"experts.{name}"].factors
            # peft: A has the experts slowest, B fastest.
            wrapper.lora_A["default"].weight.copy_(factors.lora_A.flatten(0, 1))
            wrapper.lora_B["default"].weight.copy_(factors.lora_B.permute(1, 2, 0).flatten(1))
    assert losses(ours, normal(5, 6)) == pytest.approx(losses(peer, normal(5, 6)), rel=LOSS)
    extracted, theirs = training.extract(ours), training.extract(peer)
    assert sorted(extracted) == sorted(theirs) == sorted(f"{name}.{e}" for name in targets for e in range(3))
    for module, update in extracted.items():
        torch.testing.assert_close(update.dense(), theirs[module].dense(), **WEIGHT)
        assert extracted.targets[module] == theirs.targets[module]
    x = normal(5, 6)()
    unmerged = ours(x)
    training.merge_and_unload(ours)
    torch.testing.assert_close(ours(x), unmerged, **CLOSE)
    merged = peer.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], **WEIGHT)
    again = Model()
    training.attach(again, extracted)
    torch.testing.assert_close(again(x), unmerged, **CLOSE)


def test_mixtral_trains_as_with_peft() -> None:
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        experts_implementation="eager",  # the others know no float64
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lm = MixtralForCausalLM(config).double()

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.lm(ids, use_cache=False).logits
            return out

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    ours = Logits()
    training.inject(ours, ["q_proj", "v_proj"], parameters=targets, r=2, alpha=ALPHA)
    peer = peft.get_peft_model(
        Logits(),
        peft.LoraConfig(
            target_modules=["q_proj", "v_proj"],
            target_parameters=targets,
            r=2,
            lora_alpha=ALPHA,  # type: ignore[arg-type]
        ),
    )
    peft_start(ours, peer)
    wrappers = {m.parameter_name: m for m in peer.modules() if type(m).__name__ == "ParamWrapper"}
    with torch.no_grad():
        for name, site in training.sites(ours).items():
            if (wrapper := wrappers.get(name.rpartition(".")[2])) is not None:
                wrapper.lora_A["default"].weight.copy_(site.factors.lora_A.flatten(0, 1))
                wrapper.lora_B["default"].weight.copy_(site.factors.lora_B.permute(1, 2, 0).flatten(1))
    assert len(wrappers) == 2
    assert losses(ours, tokens(20, 2, 6), steps=5) == pytest.approx(losses(peer, tokens(20, 2, 6), steps=5), rel=LOSS)
    ids = torch.arange(12).reshape(2, 6)
    unmerged = ours(ids)
    training.merge_and_unload(ours)
    torch.testing.assert_close(ours(ids), unmerged, **CLOSE)
