"""What ``inject`` can be told, against peft where peft can be told the same, and what torch does with the result."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.training.added_low_rank import added_low_rank
from lora_analysis.training.initial import initial_factors, principal_factors

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Sums of tens of float64 products of order one.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def bert(layers: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    return BertForSequenceClassification(config)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def moved(model: nn.Module) -> nn.Module:
    """With factors that are all away from zero."""
    for site in training.sites(model).values():
        for factors in site.adapters.named().values():
            nn.init.normal_(factors.lora_A, std=0.5)
            nn.init.normal_(factors.lora_B, std=0.5)
    return model


X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)


PATTERNS: list[tuple[dict[str, int], dict[str, float]]] = [
    ({"query": 2}, {}),
    ({"layer.1.attention.self.query": 2, "query": 3}, {"value": 5.0}),
    ({"query": 3, "layer.1.attention.self.query": 2}, {"layer.0.attention.self.value": 7.0, "value": 5.0}),
    ({r"layer\.[02]\..*\.value": 6}, {r".*\.1\..*": 1.0}),
    ({r"^bert.encoder.layer.2.attention.self.query": 1}, {"^bert.*key|.*value": 3.0}),
    ({"1.attention.self.value": 5}, {"self.query": 2.0}),
]


@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS, ids=str)
def test_patterns_resolve_as_in_peft(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    ours = bert()
    training.inject(ours, ["query", "value"], r=4, alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    config = peft.LoraConfig(
        target_modules=["query", "value"],
        r=4,
        lora_alpha=8,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    peer = peft.get_peft_model(bert(), config).base_model.model
    for name, layer in training.lora_layers(ours).items():
        theirs = peer.get_submodule(name)
        got = (layer.factors.r, layer.factors.alpha, layer.factors.scale)
        assert got == (theirs.r["default"], theirs.lora_alpha["default"], theirs.scaling["default"]), name


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (nn.Linear, ["0", "1.0"]),
        ([nn.Conv2d], ["2"]),
        ([nn.Conv2d, "1.0"], ["1.0", "2"]),
        ([nn.Embedding, Conv1D], ["3", "4"]),
    ],
)
def test_types_are_targets(targets: Any, expected: list[str]) -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Conv2d(2, 2, 1), nn.Embedding(3, 2), Conv1D(2, 2)
    )
    assert training.inject(model, targets, r=1) == expected


@pytest.mark.parametrize("saved", [[], ["classifier"], ["pooler.dense", "classifier"]])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_and_modules_train_as_in_peft(bias: Any, saved: list[str]) -> None:
    ours = bert()
    training.inject(ours, ["query", "output.dense"], bias=bias, modules_to_save=saved)
    config = peft.LoraConfig(target_modules=["query", "output.dense"], bias=bias, modules_to_save=saved)
    peer = peft.get_peft_model(bert(), config).base_model.model

    def trained(model: nn.Module) -> set[str]:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        plain = {name.replace(".base_layer", "").replace(".modules_to_save.default", "") for name in names}
        # peft's copies beside modules_to_save, which are not part of the model that is trained.
        return {name for name in plain if ".lora_" not in name and ".original_module." not in name}

    assert trained(ours) == trained(peer)


def test_every_bias_of_torch_is_a_bias() -> None:
    model = nn.ModuleDict(
        {"lin": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "lstm": nn.LSTM(4, 4)}
    )
    training.inject(model, ["lin"], bias="all")
    taking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in taking if ".lora_" not in name} == {
        "lin.base_layer.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "attention.bias_k",
        "attention.bias_v",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: expected at least 1, got 0"),
    ({"alpha": math.nan}, "alpha: expected a finite number, got nan"),
    ({"alpha_pattern": {"0": math.inf}}, "alpha: expected a finite number, got inf"),
    ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ({"bias": "some"}, r"bias: expected one of \('none', 'lora_only', 'all'\), got 'some'"),
    ({"init": "loftq"}, "init: expected one of .*'pissa'.*got 'loftq'"),
    ({"init": "pissa", "r": 5}, "init='pissa': expected r of at most 4 singular values, got 5"),
    ({"init": "pissa", "r": 2, "alpha": -1}, "init='pissa': expected a positive alpha, got a scale of -0.5"),
    ({"rank_pattern": {"0": 0}}, "rank_pattern: expected at least 1, got 0"),
    ({"rank_pattern": {"9": 2}}, "rank_pattern: expected an adapted module that matches '9', got none"),
    ({"alpha_pattern": {"9": 2}}, "alpha_pattern: expected an adapted module that matches '9', got none"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(': expected a regular expression"),
    ({"adapter": "a.b"}, "adapter: expected a name without dots, got 'a.b'"),
    ({"adapter": ""}, "adapter: expected a name without dots, got ''"),
    ({"slots": {"9": "q"}}, "slots: expected an adapted weight named '9', got none"),
    ({"slots": {"0": [True] * 4}}, "slots: '0': expected 4 equal blocks, got 6 rows. Give ranges"),
    ({"slots": {"0": {"q": (0, 7)}}}, "slots: '0': expected names without dots and ranges of its 6 rows"),
    ({"slots": {"0": {"q": (0, 3), "k": (2, 6)}}}, "slots: '0': expected .* ranges of its 6 rows that do not overlap"),
    ({"slots": {"0": {"q": (2, 2)}}}, "slots: '0': expected .* ranges"),
    ({"slots": {"0": {"a.b": (0, 2)}}}, "slots: '0': expected names without dots"),
    ({"slots": {"0": {}}}, "slots: '0': expected names"),
    (
        {"parameters": ["mix"]},
        "parameters: expected a parameter named 'mix' in Sequential, got none. It has: '0.weight'",
    ),
    (
        {"parameters": ["2.bias"]},
        r"parameters: '2.bias': expected a floating-point tensor of at least two axes, got \(3",
    ),
    ({"parameters": {"2.weight": (5, 5)}}, r"parameters: '2.weight': a tensor \(3, 6\) cannot be viewed as \(5, 5\)"),
    ({"parameters": ["0.weight"]}, "'0': expected each weight once, got it as a module and as a parameter"),
    ({"modules_to_save": ["9"]}, "targets: expected a module named '9' in Sequential, got none"),
    ({"modules_to_save": ["0"]}, "modules_to_save: expected modules without adapted weights, got '0' with '0'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_what_is_out_of_range_is_refused_and_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        training.inject(model, ["0"], **options)
    assert not training.sites(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_options_of_the_wrong_kind_of_weight_are_refused() -> None:
    embedding = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(ValueError, match="'0': dora= is for linear layers and convolutions, and this is an embedding"):
        training.inject(embedding, ["0"], dora=True)
    with pytest.raises(ValueError, match="'0': freeze_A= would keep A of an embedding at zero"):
        training.inject(embedding, ["0"], freeze_A=True)
    with pytest.raises(ValueError, match="slots: '0': expected a fused linear weight, got another kind"):
        training.inject(embedding, ["0"], slots={"0": "q,v"})
    with pytest.raises(ValueError, match="'0': dora= is for linear layers and convolutions, and this is a parameter"):
        training.inject(nn.Sequential(nn.Linear(3, 3)), parameters=["0.weight"], dora=True)
    watched = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(watched[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"'0.weight': expected a plain parameter, got one that is parametrized"):
        training.inject(watched, parameters=["0.weight"])


@pytest.mark.parametrize("dora", [False, True])
def test_factors_and_magnitudes_begin_on_the_device_of_the_weight(dora: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3, device="meta", dtype=torch.bfloat16))
    training.inject(model, ["0"], dora=dora)
    places = {(p.device.type, p.dtype) for p in training.lora_layers(model)["0"].factors.parameters()}
    assert places == {("meta", torch.float32)}


def test_a_module_that_trains_in_full_holds_no_adapted_weight_of_any_adapter() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 3)), "lin": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"got 'block' with 'block.0'. Name it as one or as the other"):
        training.inject(model, ["block.0", "lin"], modules_to_save=["block"])
    training.inject(model, ["block.0"], adapter="a")
    with pytest.raises(ValueError, match=r"got 'block' with 'block.0'"):
        training.inject(model, ["lin"], modules_to_save=["block"], adapter="b")


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fused_step_has_right_first_and_second_derivatives(shape: tuple[int, ...], with_bias: bool) -> None:
    x, down, up = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (2, 4), (3, 2)))
    weight = torch.randn(3, 4, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = (x, down, up) if bias is None else (x, down, up, bias)

    def fused(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        return added_low_rank(x, weight, bias, down, up, scale=0.7)

    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), {}),
    "slots": (lambda: nn.Linear(4, 6), (5, 4), {"slots": {"0": "q,v"}}),
    "pissa": (lambda: nn.Linear(4, 3), (5, 4), {"init": "pissa"}),
    "convolution": (lambda: nn.Conv2d(4, 6, 2, groups=2), (1, 4, 3, 3), {}),
    "parameter": (lambda: nn.Linear(4, 3), (5, 4), {"parameters": ["0.weight"], "targets": ()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_layers_have_right_first_and_second_derivatives(kind: str) -> None:
    make, shape, options = KINDS[kind]
    model = nn.Sequential(make()).double()
    training.inject(model, **({"targets": ["0"], "r": 2} | options))
    moved(model)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *factors: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(zip(names, factors, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(output, (x, *parameters))
    assert torch.autograd.gradgradcheck(output, (x, *parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients_are_those_of_backward(kind: str) -> None:
    make, shape, options = KINDS[kind]
    model = nn.Sequential(make()).double()
    training.inject(model, **({"targets": ["0"], "r": 2} | options))
    moved(model)
    x = torch.randn(3, *shape, dtype=torch.float64)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, factors, (x,)).square().sum()
        return out

    sums = {name: torch.zeros_like(p) for name, p in factors.items()}
    for one in x:
        for name, gradient in torch.func.grad(loss)(factors, one).items():
            sums[name] += gradient
    for one in x:
        model(one).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, sums[name], **CLOSE)
    if kind != "parameter":  # torch's parametrisations are swapped by functional_call, which vmap cannot follow
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)
        for name, gradient in each.items():
            torch.testing.assert_close(gradient.sum(0), sums[name], **CLOSE)
    # The first jvp of a process warns of what torch.jit, which it compiles its rules with, is to become.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (x[0],), (x[0],))
    outputs, change = torch.func.jvp(model, (x[0],), (torch.ones_like(x[0]),))
    step = 1e-6
    torch.testing.assert_close(change, (model(x[0] + step) - outputs) / step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, dropout: float) -> None:
    model = mlp()
    training.inject(model, ["0", "2"], r=2, dropout=dropout)
    moved(model)
    gradients = []
    for wrapped in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if wrapped else model(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None] + [x.grad])
    assert len(gradients[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_of_transformers_gives_the_same_gradients() -> None:
    model = bert().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    training.inject(model, ["query", "value"], r=2)
    moved(model)
    ids = torch.arange(16).reshape(2, 8)
    gradients = []
    for wrapped in (False, True):
        if wrapped:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 12
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


OPTIONS: list[dict[str, Any]] = [
    {"targets": ["0", "2"]},
    {"targets": ["0", "2"], "dora": True},
    {"targets": ["0", "2"], "init": "pissa", "r": 3},
    {"targets": ["0"], "slots": {"0": "q,v"}, "bias": "all", "modules_to_save": ["2"]},
    {"targets": ["0"], "parameters": ["2.weight"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_copy_is_a_model_of_its_own(options: dict[str, Any]) -> None:
    model = mlp()
    training.inject(model, **options)
    moved(model)
    twin = copy.deepcopy(model)
    before = model(X)
    assert torch.equal(twin(X), before)
    assert [n for n, p in twin.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    moved(twin)
    assert not torch.equal(twin(X), before)
    training.merge(twin)
    assert torch.equal(model(X), before)
    merged = copy.deepcopy(twin)
    training.unmerge(merged)
    assert training.sites(twin)["0"].merged


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_pickles_and_files_of_whole_models_are_the_same_models(options: dict[str, Any], merged: bool) -> None:
    model = mlp()
    training.inject(model, **options)
    moved(model)
    if merged:
        training.merge(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(again(X), model(X))
        assert training.adapters(again) == training.adapters(model)
        training.activate(again, None) if not merged else training.unmerge(again)


def test_torch_pickles_no_model_with_parametrised_tensors_but_their_state() -> None:
    model = mlp()
    training.inject(model, **OPTIONS[-1])
    with pytest.raises(
        RuntimeError, match="Serialization of parametrized modules is only supported through state_dict"
    ):
        pickle.dumps(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_state_dict_fills_a_model_that_was_adapted_alike(options: dict[str, Any]) -> None:
    model = mlp()
    training.inject(model, **options)
    moved(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = mlp()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    training.inject(fresh, **(options | {"seed": 5}))
    assert fresh.load_state_dict(torch.load(file)) == ([], [])
    assert torch.equal(fresh(X), model(X))
    assert all(
        torch.equal(update.dense(), training.extract(model)[name].dense())
        for name, update in training.extract(fresh).items()
    )


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("random", ["down", "up"])
@pytest.mark.parametrize("r", [2, 9])
def test_one_factor_is_drawn_and_the_other_is_zero(init: Any, random: str, r: int) -> None:
    A, B = initial_factors(5, 7, r=r, module="q", seed=0, init=init, random=random)
    assert (A.shape, B.shape) == ((r, 7), (5, r))
    drawn, zero = (A, B) if random == "down" else (B.mT, A)
    assert not zero.any()
    assert bool((drawn != 0).all())
    if init == "orthogonal":
        gram = drawn @ drawn.mT if r <= drawn.shape[1] else drawn.mT @ drawn
        torch.testing.assert_close(3 * gram, torch.eye(len(gram)), rtol=0, atol=1e-6)


def test_principal_factors_are_the_best_approximation() -> None:
    matrix = torch.randn(5, 7, dtype=torch.float64)
    A, B = principal_factors(matrix, r=2, scale=0.5)
    S = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix - 0.5 * B @ A), S[2:].norm(), **CLOSE)
    torch.testing.assert_close(torch.linalg.svdvals(A), (S[:2] / 0.5).sqrt(), **CLOSE)
    torch.testing.assert_close(torch.linalg.svdvals(B), (S[:2] / 0.5).sqrt(), **CLOSE)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_the_draw_is_the_same_whatever_the_defaults(init: Any) -> None:
    expected = initial_factors(5, 8, r=2, module="query", seed=0, init=init)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = initial_factors(5, 8, r=2, module="query", seed=0, init=init)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dora_refuses_a_row_without_a_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    with pytest.raises(ValueError, match=r"'0': dora= divides by the norm of every row .* and row 1 is zero"):
        training.inject(model, ["0"], dora=True)
    assert type(model[0]) is nn.Linear
