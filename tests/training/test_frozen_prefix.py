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


class Stack(nn.Module):
    """Blocks one after the other, with a residual outside them or not."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.residual = residual

    def forward(self, x: Tensor, shift: Any = None, **more: Tensor) -> Tensor:
        if shift is not None:
            x = x + (shift["all"].sum() if isinstance(shift, dict) else shift)
        for name, value in more.items():
            x = x + value if name == "plus" else x - value
        for block in self.blocks:
            x = x + block(x) if self.residual else block(x)
        return x


class Wrapped(nn.Module):
    """A model that calls its stack once for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([self.stack(x) for x in inputs])


class Cumulative(nn.Module):
    """A block whose rows depend on those before them, as where the batch is not the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x).cumsum(0)
        return found


X = torch.linspace(-1, 1, 24).reshape(4, 6).sin()
MARKED = torch.zeros(4, 2000).index_fill(1, torch.tensor([1000]), 5.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda model: model(X, torch.tensor(0.0)), lambda model: model(X, torch.tensor(1.0))),
        (lambda model: model(X, plus=X), lambda model: model(X, minus=X)),
        (lambda model: model(X, {"all": 0 * MARKED}), lambda model: model(X, {"all": MARKED})),
    ],
    ids=["scalar", "name", "nested"],
)
def test_calls_that_differ_in_any_argument_are_told_apart(one: Any, other: Any) -> None:
    model = Stack()
    training.inject(model, ["blocks.3.0"], r=2)
    expected = [call(model) for call in (one, one, one, other)]
    with frozen_prefix(model):
        found = [call(model) for call in (one, one, one, other)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_part_of_the_model_that_is_called_by_itself_computes() -> None:
    model = Wrapped()
    training.inject(model, ["blocks.3.0"], r=2)
    expected = model.stack(2 * X)
    with frozen_prefix(model) as prefix:
        for _ in range(3):
            model(X)
        assert prefix.hits == 1
        assert torch.equal(model.stack(2 * X), expected)


def test_a_model_that_runs_its_blocks_twice_is_refused() -> None:
    model = Wrapped()
    training.inject(model, ["blocks.3.0"], r=2)
    with (
        frozen_prefix(model),
        pytest.raises(ValueError, match="cache_frozen: expected the model to run its blocks once"),
    ):
        model(X, 2 * X)


def test_a_residual_outside_the_blocks_is_noticed() -> None:
    model = Stack(residual=True)
    training.inject(model, ["blocks.3.0"], r=2)
    with (
        frozen_prefix(model),
        pytest.raises(ValueError, match="cache_frozen: expected blocks whose output is the next"),
    ):
        model(X)


def test_rows_that_depend_on_each_other_are_noticed() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Cumulative() for _ in range(3))
    model.forward = lambda x: model.layers[2](model.layers[1](model.layers[0](x)))
    training.inject(model, ["layers.2.linear"], r=2)
    with frozen_prefix(model) as prefix:
        for _ in range(3):
            model(X)
        assert prefix.hits == 1
        with pytest.raises(ValueError, match="do the rows of a batch depend on each other"):
            model(X.flip(0))


def test_dropout_is_noticed_though_evaluation_has_none() -> None:
    model = bert(dropout=0.5)
    training.inject(model, r".*\.[3]\..*query", r=2)
    first, second = shuffled(1)[:2]
    with frozen_prefix(model):
        loss(model.train(), first)
        for _ in range(2):
            loss(model.eval(), second)
        with pytest.raises(ValueError, match="cache_frozen: expected the frozen blocks to give the same twice"):
            loss(model.train(), first)


def test_hidden_states_below_are_not_taken_for_real() -> None:
    model = bert()
    training.inject(model, r".*\.[3]\..*query", r=2)
    with frozen_prefix(model):
        for _ in range(3):
            states = model(**shuffled()[0], output_hidden_states=True).hidden_states
    assert states[1].isnan().all()
    assert states[3].isfinite().all()


@pytest.mark.filterwarnings("ignore:.past_key_values")  # renamed in transformers 5
def test_a_cache_of_keys_and_values_is_filled() -> None:
    model = gpt2()
    training.inject(model, r"h\.[3]\..*c_attn", r=2)
    first, second = (batch["input_ids"][:, :5] for batch in shuffled()[:2])

    def continued(start: Tensor) -> Tensor:
        found: Tensor = model(second, past_key_values=model(start).past_key_values).last_hidden_state
        return found

    expected = [continued(start) for start in (first, first, first, second)]
    with frozen_prefix(model):
        found = [continued(start) for start in (first, first, first, second)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_recomputing_and_keeping_go_together_and_leave_the_forwards_of_others() -> None:
    model, losses = Stack(), []
    training.inject(model, ["blocks.3.0"], r=2)
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda x: own(x)  # as accelerate does
    hooked = model.blocks[0].forward
    losses = training.train(
        model, [X] * 4, lambda model, x: model(x).square().mean(), recompute=True, cache_frozen=True
    )
    assert losses[3] < losses[0]
    assert model.blocks[0].forward is hooked
    assert not any("forward" in vars(block) for block in model.blocks[1:])


def test_a_block_that_stands_in_a_list_twice_is_recomputed() -> None:
    block = nn.Sequential(nn.Linear(6, 6))
    model = Stack()
    model.blocks = nn.ModuleList([block, block])
    training.inject(model, "all-linear", r=2)
    assert len(training.train(model, [X] * 2, lambda model, x: model(x).square().mean(), recompute=True)) == 2


def test_checkpointing_that_was_on_stays_on() -> None:
    model = bert()
    training.inject(model, "all-linear", r=2)
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # of transformers 5 and 4
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    training.train(model, shuffled(1), loss, recompute=True)
    assert model.encoder.layer[0].gradient_checkpointing


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
