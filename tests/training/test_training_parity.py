"""The libraries that define LoRA as oracles: the same start and data must give the same losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import loralib
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from lora_analysis import training

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Twenty float64 steps of order-one losses: rounding stays below 1e-12, a wrong scale or factor shows in 1e-3.
LOSS = 1e-9
WEIGHT = 1e-9
STEPS = 20
R, ALPHA = 3, 5.0

Loss = Callable[[nn.Module, Any], Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False))


def gpt2() -> nn.Module:
    return GPT2Model(
        GPT2Config(
            vocab_size=30,
            n_positions=10,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def vectors() -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(8, 6, dtype=torch.float64, generator=generator) for _ in range(STEPS)]
    return [(x, x[:, :4].sin()) for x in x]


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(30, (2, 10), generator=generator) for _ in range(STEPS)]
    return [(i, (i[..., None] * torch.arange(1, 17)).double().sin()) for i in ids]


def vector_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).last_hidden_state, batch[1])


CASES = {
    "mlp": (mlp, ["0", "2"], vectors, vector_loss),
    "gpt2": (gpt2, ["c_attn", "c_proj"], tokens, token_loss),
    "bert": (bert, ["query", "value", "intermediate.dense"], tokens, token_loss),
}


def random_base(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def peft_peer(
    base: nn.Module, ours: nn.Module, targets: list[str], *, rslora: bool = False, conv1d: bool = False
) -> nn.Module:
    """Peft's adaptation of the same base, beginning at our factors."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, use_rslora=rslora, fan_in_fan_out=conv1d)
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, layer in training.lora_layers(ours).items():
            theirs = peer.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.factors.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.factors.lora_B)
    return peer


def trained_pair(case: str, *, rslora: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The base, and both adaptations of it after the same training."""
    make, targets, data, loss = CASES[case]
    base = random_base(make)
    ours = copy.deepcopy(base)
    training.inject(ours, targets, r=R, alpha=ALPHA, seed=1, rslora=rslora)
    peer = peft_peer(base, ours, targets, rslora=rslora, conv1d=case == "gpt2")
    our_losses = training.train(ours, data(), loss, lr=1e-2)
    peer_losses = training.train(peer, data(), loss, lr=1e-2)
    assert our_losses == pytest.approx(peer_losses, rel=LOSS)
    assert all(bool((layer.factors.lora_B != 0).all()) for layer in training.lora_layers(ours).values())
    return base, ours, peer


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_losses_updates_and_merged_weights_are_those_of_peft(case: str, rslora: bool) -> None:
    base, ours, peer = trained_pair(case, rslora=rslora)
    adapter = training.extract(ours)
    for name, update in adapter.items():
        theirs = peer.base_model.model.get_submodule(name).get_delta_weight("default")
        oriented = theirs.T if adapter.targets[name].transposed else theirs
        torch.testing.assert_close(update.dense(), oriented.detach(), rtol=WEIGHT, atol=WEIGHT)
    training.merge(ours)
    merged = peer.merge_and_unload().state_dict()
    ours_by_name = {name.replace(".base_layer", ""): t for name, t in ours.state_dict().items()}
    for name, tensor in merged.items():
        torch.testing.assert_close(ours_by_name[name], tensor, rtol=WEIGHT, atol=WEIGHT)
    training.unmerge(ours)
    after = {name.replace(".base_layer", ""): t for name, t in ours.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_peft_and_reach_the_factors_alone(case: str) -> None:
    _, ours, peer = trained_pair(case)
    _, _, data, loss = CASES[case]
    for model in (ours, peer):
        loss(model, data()[0]).backward()
    for name, layer in training.lora_layers(ours).items():
        theirs = peer.base_model.model.get_submodule(name)
        for mine, other in ((layer.factors.lora_A, theirs.lora_A), (layer.factors.lora_B, theirs.lora_B)):
            torch.testing.assert_close(mine.grad, other["default"].weight.grad, rtol=1e-6, atol=1e-9)
    assert all((p.grad is not None) == (".lora_" in name) for name, p in ours.named_parameters())


def test_merging_in_float32_gives_the_weights_of_peft() -> None:
    base = random_base(gpt2, torch.float32)
    ours = copy.deepcopy(base)
    training.inject(ours, ["c_attn", "c_proj"], r=R, alpha=ALPHA)
    for layer in training.lora_layers(ours).values():
        nn.init.normal_(layer.factors.lora_B, std=0.1)
    peer = peft_peer(base, ours, ["c_attn", "c_proj"], conv1d=True)
    training.merge(ours)
    mine = {name.replace(".base_layer", ""): t for name, t in ours.state_dict().items()}
    for name, tensor in peer.merge_and_unload().state_dict().items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_bf16_base_trains_as_in_peft_and_merges_closer_to_the_exact_sum() -> None:
    base = random_base(mlp, torch.bfloat16)
    ours = copy.deepcopy(base)
    training.inject(ours, ["0", "2"], r=R, alpha=ALPHA, seed=1)
    peer = peft_peer(base, ours, ["0", "2"])
    data = [(x.bfloat16(), y.bfloat16()) for x, y in vectors()]
    our_losses = training.train(ours, data, vector_loss, lr=1e-2)
    # The factors are float32 on both sides; outputs are rounded to bf16 beside ties in few places.
    assert our_losses == pytest.approx(training.train(peer, data, vector_loss, lr=1e-2), rel=2e-2)
    layers = training.lora_layers(ours)
    exact = {name: layer.weight.detach().double() + layer.factors.delta_w() for name, layer in layers.items()}
    training.merge(ours)
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, exact[name].bfloat16())


def test_dropout_draws_the_masks_of_peft() -> None:
    base = random_base(mlp)
    ours = copy.deepcopy(base)
    training.inject(ours, ["0", "2"], r=R, alpha=ALPHA, dropout=0.3)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0", "2"], lora_dropout=0.3)
    peer = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, layer in training.lora_layers(ours).items():
            peer.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.factors.lora_A)
    losses = []
    for model in (ours, peer):
        torch.manual_seed(4)
        losses.append(training.train(model, vectors(), vector_loss, lr=1e-2))
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_losses_and_merged_weights_are_those_of_loralib(optimizer: type[torch.optim.Optimizer]) -> None:
    base = random_base(mlp)
    ours = copy.deepcopy(base)
    training.inject(ours, ["0", "2"], r=R, alpha=ALPHA, seed=1)
    peer = nn.Sequential(
        loralib.Linear(6, 10, r=R, lora_alpha=ALPHA),
        nn.Tanh(),
        loralib.Linear(10, 4, r=R, lora_alpha=ALPHA, bias=False),
    ).double()
    ours_by_name = ours.state_dict().items()
    state = {name.replace(".base_layer", "").replace(".adapters.default", ""): tensor for name, tensor in ours_by_name}
    peer.load_state_dict(state)
    loralib.mark_only_lora_as_trainable(peer)
    losses: list[list[float]] = []
    for model in (ours, peer):
        stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)  # type: ignore[call-arg]
        losses.append([])
        for batch in vectors():
            loss = vector_loss(model, batch)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)
    training.merge(ours)
    peer.eval()  # which is how loralib merges
    for name in ("0", "2"):
        torch.testing.assert_close(
            training.lora_layers(ours)[name].weight, peer.get_submodule(name).weight, rtol=WEIGHT, atol=WEIGHT
        )


def test_loralibs_transposed_storage_is_a_conv1d() -> None:
    torch.manual_seed(0)
    peer = loralib.Linear(6, 4, r=R, lora_alpha=ALPHA, fan_in_fan_out=True).double()
    ours = nn.Sequential(Conv1D(4, 6).double())
    training.inject(ours, ["0"], r=R, alpha=ALPHA)
    layer = training.lora_layers(ours)["0"]
    with torch.no_grad():
        nn.init.normal_(peer.lora_B)
        layer.weight.copy_(peer.weight)
        layer.bias.copy_(peer.bias)
        layer.factors.lora_A.copy_(peer.lora_A)
        layer.factors.lora_B.copy_(peer.lora_B)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-12, atol=1e-12)
    peer.eval()
    training.merge(ours)
    torch.testing.assert_close(layer.weight, peer.weight, rtol=1e-12, atol=1e-12)
