"""Blocks below the first adapted one are computed once, and nobody can tell from the losses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from lora_analysis import training
from lora_analysis.training.frozen_prefix import frozen_prefix

ROWS = 12


def bert(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=10,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=10, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2Model(config)


def shuffled(epochs: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(30, (ROWS, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    found = []
    for _ in range(epochs):
        order = torch.randperm(ROWS, generator=generator)
        found += [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in order.split(4)]
    return found


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = model(**batch, **({"use_cache": False} if isinstance(model, GPT2Model) else {})).last_hidden_state
    target = (batch["input_ids"][..., None] * torch.arange(1, 17)).sin()
    error: Tensor = ((hidden - target).square() * batch["attention_mask"][..., None]).mean()
    return error


@pytest.mark.parametrize(("make", "targets"), [(bert, r".*\.[23]\..*(query|value)"), (gpt2, r"h\.[23]\..*c_attn")])
def test_losses_are_those_of_computing_everything(make: Any, targets: str) -> None:
    losses = []
    for cached in (False, True):
        model = make()
        training.inject(model, targets, r=2)
        losses.append(training.train(model, shuffled(), loss, lr=1e-2, cache_frozen=cached))
        assert not any("forward" in vars(module) for module in model.modules())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_frozen_blocks_run_once_for_every_row() -> None:
    model = bert()
    training.inject(model, r".*\.[3]\..*query", r=2)
    calls = [0, 0]
    model.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.encoder.layer[3].attention.register_forward_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
    with frozen_prefix(model) as prefix:
        for batch in shuffled():
            loss(model, batch)
    # Three batches of new rows, and the first known one for comparison.
    assert (prefix.blocks, prefix.hits, prefix.misses) == (3, 8, 4)
    assert calls == [4, 12]
    assert prefix.nbytes == ROWS * 8 * 16 * 4


def test_no_more_is_kept_than_allowed() -> None:
    model = bert()
    training.inject(model, r".*\.[3]\..*query", r=2)
    with frozen_prefix(model, max_bytes=5 * 8 * 16 * 4) as prefix:
        for batch in shuffled():
            loss(model, batch)
    assert prefix.nbytes == 5 * 8 * 16 * 4
    assert prefix.misses > 4


def test_dropout_below_is_noticed() -> None:
    model = bert(dropout=0.1)
    training.inject(model, r".*\.[3]\..*query", r=2)
    with pytest.raises(ValueError, match="cache_frozen: expected the frozen blocks to give the same twice"):
        training.train(model, shuffled(), loss, cache_frozen=True)


def test_something_that_trains_below_is_noticed() -> None:
    model = bert()
    training.inject(model, r".*\.[3]\..*query", r=2, modules_to_save=["word_embeddings"])
    with pytest.raises(ValueError, match="cache_frozen: expected nothing that trains below"):
        training.train(model, shuffled(), loss, cache_frozen=True)


def test_a_first_block_that_trains_leaves_nothing_to_keep() -> None:
    model = bert()
    training.inject(model, ["query"], r=2)
    with frozen_prefix(model) as prefix:
        loss(model, shuffled()[0])
    assert (prefix.blocks, prefix.hits, prefix.misses) == (0, 0, 0)


def test_recomputing_changes_no_loss() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def error(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x.flip(1)).square().mean()

    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = Stack()
        training.inject(stack, nn.Linear, r=2, dropout=0.2)
        torch.manual_seed(1)
        data = itertools.repeat(torch.linspace(-1, 1, 60).reshape(10, 6))
        losses.append(training.train(stack, data, error, steps=8, lr=1e-2, recompute=recompute))
        assert not any("forward" in vars(module) for module in stack.modules())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    plain = nn.Sequential(nn.Linear(6, 6))
    training.inject(plain, ["0"])
    with pytest.raises(ValueError, match=r"Sequential: expected a torch\.nn\.ModuleList of blocks to recompute"):
        training.train(plain, [torch.ones(1, 6)], error, recompute=True)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_transformers_model_recomputes_by_itself(make: Any) -> None:
    losses = []
    for recompute in (False, True):
        model = make()
        training.inject(model, "all-linear", r=2)
        losses.append(training.train(model, shuffled(2), loss, lr=1e-2, recompute=recompute))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
