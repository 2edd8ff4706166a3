from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import loralib
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_analysis import training
from lora_analysis.training import LoraFactors, LoraLayer
from lora_analysis.training.initial import initial_down

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def small_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
        )
    )


def peft_targets(model: nn.Module, targets: object) -> set[str]:
    config = peft.LoraConfig(target_modules=targets, fan_in_fan_out=isinstance(model, GPT2LMHeadModel))
    layers = peft.get_peft_model(model, config).base_model.model.named_modules()
    return {name for name, module in layers if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("make", [small_gpt2, small_bert])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.(c_attn|query)", r".*[01]\..*(c_fc|dense)"])
def test_strings_select_what_peft_selects(make: type, targets: str) -> None:
    assert set(training.inject(make(), targets)) == peft_targets(make(), targets)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (small_gpt2, ["c_attn"]),
        (small_gpt2, ["attn.c_proj", "transformer.h.1.mlp.c_fc"]),
        (small_bert, ["query", "value"]),
        (small_bert, ["output.dense"]),
    ],
)
def test_lists_select_what_peft_selects(make: type, targets: list[str]) -> None:
    assert set(training.inject(make(), targets)) == peft_targets(make(), targets)


def test_all_linear_leaves_out_the_output_embedding_of_a_language_model() -> None:
    names = training.inject(small_gpt2(), "all-linear")
    assert "lm_head" not in names
    assert len(names) == 8


def test_only_the_factors_train_and_the_model_begins_as_its_base() -> None:
    model = small_gpt2().eval()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    names = training.inject(model, ["c_attn", "c_proj"], r=2, dropout=0.1)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{name}.adapters.default.{factor}" for name in names for factor in ("lora_A", "lora_B")]
    assert torch.equal(model(tokens).logits, before)
    assert not any(module.training for module in model.modules())


def test_the_scale_is_alpha_over_r_or_its_root() -> None:
    for rslora, scale in ((False, 3 / 4), (True, 3 / 2)):
        model = nn.Sequential(nn.Linear(3, 3))
        training.inject(model, ["0"], r=4, alpha=3, rslora=rslora)
        factors = training.lora_layers(model)["0"].factors
        assert (factors.scale, factors.alpha, factors.r) == (scale, 3, 4)


def test_a_begins_uniform_within_one_over_the_root_of_d_in() -> None:
    d_in = 64
    down = initial_down(d_in, r=200, module="query", seed=0)
    bound = 1 / math.sqrt(d_in)
    assert float(down.abs().max()) <= bound * (1 + 1e-6)
    uniform = stats.uniform(loc=-bound, scale=2 * bound)
    assert stats.kstest(down.flatten().numpy(), uniform.cdf).pvalue > 0.01


def test_a_begins_as_torch_draws_it_from_a_generator_of_the_hashed_seed() -> None:
    seed = int.from_bytes(hashlib.sha256(b"5\x00layers.0.q\x003").digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    linear = torch.empty(3, 10).uniform_(-(10**-0.5), 10**-0.5, generator=generator)
    down = initial_down(10, r=3, module="layers.0.q", seed=5)
    torch.testing.assert_close(down, linear, rtol=1e-6, atol=0)


@given(seeds=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), r=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_depends_on_seed_module_and_r_and_on_nothing_else(seeds: tuple[int, int], r: int) -> None:
    first = initial_down(12, r=r, module="query", seed=seeds[0])
    assert torch.equal(first, initial_down(12, r=r, module="query", seed=seeds[0]))
    assert not torch.equal(first, initial_down(12, r=r, module="value", seed=seeds[0]))
    assert torch.equal(first, initial_down(12, r=r, module="query", seed=seeds[1])) == (seeds[0] == seeds[1])


@pytest.mark.parametrize("large", [9, 16, 64])
def test_a_small_r_is_never_a_prefix_of_a_large_one(large: int) -> None:
    models = []
    for r in (8, large):
        model = nn.Sequential(nn.Linear(16, 4))
        training.inject(model, ["0"], r=r, seed=0)
        models.append(training.lora_layers(model)["0"].factors.lora_A)
    assert not bool((models[0] == models[1][:8]).any())


def test_a_is_the_same_in_every_dtype_and_for_every_choice_of_other_modules() -> None:
    drawn = []
    for dtype, targets in ((torch.float64, ["0", "1"]), (torch.bfloat16, ["1"])):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).to(dtype)
        training.inject(model, targets, r=3, seed=7)
        drawn.append(training.lora_layers(model)["1"].factors.lora_A.double())
    assert torch.equal(*drawn)


def test_the_global_random_state_and_defaults_are_neither_read_nor_moved() -> None:
    drawn = []
    for seed, dtype in ((1, torch.float32), (2, torch.float64)):
        model = nn.Sequential(nn.Linear(4, 4))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        torch.set_default_dtype(dtype)
        try:
            training.inject(model, ["0"])
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(training.lora_layers(model)["0"].factors.lora_A)
    assert torch.equal(*drawn)


def test_a_module_under_two_names_is_adapted_under_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": shared})
    assert training.inject(model, ["b.0"], r=2) == ["a.0"]
    assert isinstance(model["c"], LoraLayer)
    assert model["a"][0] is model["b"][0] is model["c"]
    training.merge(model)  # once, not three times


def test_a_subclass_with_the_forward_of_linear_is_adapted() -> None:
    class Named(nn.Linear):
        pass

    assert training.inject(nn.Sequential(Named(3, 3)), "all-linear") == ["0"]


class Quantised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round()


@pytest.mark.parametrize(
    ("module", "targets", "message"),
    [
        (nn.LSTM(3, 3), ["0"], r"'0': expected a torch.nn.Linear, Embedding or ConvNd.*got .*LSTM"),
        (nn.ConvTranspose2d(3, 3, 1), ["0"], r"'0': .*got torch.nn.modules.conv.ConvTranspose2d"),
        (nn.Embedding(3, 3, max_norm=1.0), ["0"], r"'0': expected an embedding without max_norm"),
        (Quantised(3, 3), ["0"], r"'0': .*whose forward is its own, got .*Quantised"),
        (Quantised(3, 3), "all-linear", r"'0': .*Quantised"),
        (loralib.Linear(3, 3, r=1), ["0"], r"'0': .*got loralib.layers.Linear"),
        (nn.LazyLinear(3), ["0"], r"'0': .*lazy, parametrized, pruned or quantised"),
        (nn.Sequential(nn.Linear(3, 3)), ["0"], r"'0': .*Sequential"),
        (nn.MultiheadAttention(4, 2), ["out_proj"], r"'0.out_proj': torch.nn.MultiheadAttention reads"),
        (nn.TransformerEncoderLayer(4, 2, 8), ["linear1"], r"'0.linear1': torch.nn.TransformerEncoderLayer"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(module: nn.Module, targets: object, message: str) -> None:
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match=message):
        training.inject(model, targets)  # type: ignore[arg-type]
    assert model[0] is module
    assert all(p.requires_grad for p in model.parameters() if not isinstance(module, loralib.Linear))


def test_an_encoder_layer_does_read_past_the_layer_in_eval_mode() -> None:
    # The reason for refusing it: torch's fast path takes the weight and never calls the layer.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).eval()
    wrapped = LoraLayer(layer.linear1)
    wrapped.add("default", LoraFactors(torch.randn(2, 4), torch.randn(8, 2), d_out=8, alpha=1.0, scale=1.0))
    x = torch.randn(1, 3, 4)
    with torch.no_grad():
        before = layer(x)
        layer.linear1 = wrapped
        assert torch.equal(layer(x), before)
    assert not torch.allclose(layer.train()(x), before)


def test_a_parametrized_weight_is_refused() -> None:
    linear = nn.Linear(3, 3)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"'0': .*lazy, parametrized, pruned or quantised"):
        training.inject(nn.Sequential(linear), ["0"])


def test_a_bare_layer_has_no_place_to_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"got a bare torch.nn.modules.linear.Linear. Wrap it"):
        training.inject(nn.Linear(3, 3), "all-linear")


@pytest.mark.parametrize("targets", [["q_proj"], ["query", "q_proj"], "query", [], [""], "q.*("])
def test_targets_that_match_nothing_are_refused_with_candidates(targets: object) -> None:
    expected = "regular expression" if targets == "q.*(" else "'encoder.layer.0.attention.self.query'"
    with pytest.raises(ValueError, match=rf"targets: expected .*{expected}"):
        training.inject(small_bert(), targets)  # type: ignore[arg-type]


def test_a_string_that_was_meant_as_a_suffix_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"A suffix goes into a list: \['query'\]"):
        training.inject(small_bert(), "query")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected at least 1, got 0"),
        ({"alpha": math.nan}, "alpha: expected a finite number, got nan"),
        ({"alpha": math.inf}, "alpha: expected a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"dropout": math.nan}, "dropout: expected a probability"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training.inject(nn.Sequential(nn.Linear(3, 3)), ["0"], **options)  # type: ignore[arg-type]


def test_a_rank_or_seed_that_is_no_integer_is_refused() -> None:
    for options in ({"r": 2.5}, {"seed": 0.5}):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            training.inject(nn.Sequential(nn.Linear(3, 3)), ["0"], **options)  # type: ignore[arg-type]


def test_an_adapter_of_that_name_and_a_model_of_peft_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    training.inject(model, ["0"])
    with pytest.raises(ValueError, match="'0': expected a model without an adapter named 'default', got one on 1"):
        training.inject(model, ["1"])
    foreign = peft.get_peft_model(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"])
    )
    with pytest.raises(ValueError, match=r"'base_model.model.0': .*got one with 1 of peft"):
        training.inject(foreign, ["1"])


def test_r_may_exceed_the_sides_of_the_matrix() -> None:
    model = nn.Sequential(Conv1D(2, 3))
    training.inject(model, ["0"], r=10)
    assert training.extract(model)["0"].singular_values().tolist() == [0.0, 0.0]


def test_importing_training_imports_neither_transformers_nor_peft() -> None:
    code = (
        "import sys; from lora_analysis import training; import torch; "
        "training.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), ['0']); "
        "sys.exit(sum(name.split('.')[0] in {'transformers', 'peft', 'matplotlib'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
