from __future__ import annotations

import json
import struct

import loralib
import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from lora_analysis import training
from lora_analysis.training.accounting import MatrixCount, checkpoint_bytes, lora_count, parameter_count

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def small_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def small_bert() -> BertModel:
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


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3, bias=False))


CASES = [
    (small_mlp, ["0", "2"]),
    (small_mlp, "all-linear"),
    (small_bert, ["query", "value"]),
    (small_bert, ["attention.output.dense"]),
    (small_bert, r".*layer\.1\..*dense"),
    (small_bert, "all-linear"),
    (small_gpt2, ["c_attn"]),
    (small_gpt2, "all-linear"),
]


@pytest.mark.parametrize("r", [1, 4, 20])
@pytest.mark.parametrize(("make", "targets"), CASES)
def test_lora_count_is_what_inject_makes_trainable(make: type, targets: list[str] | str, r: int) -> None:
    model = make()
    count = lora_count(model, targets, r=r)
    base = sum(parameter.numel() for parameter in model.parameters())
    names = training.inject(model, targets, r=r)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [matrix.module for matrix in count.matrices] == names
    assert [tuple(factor.shape) for factor in factors] == [
        shape for matrix in count.matrices for shape in ((r, matrix.d_in), (matrix.d_out, r))
    ]
    assert count.base == base
    assert count.trainable == sum(factor.numel() for factor in factors)
    assert count.adapted == parameter_count(model)


@pytest.mark.parametrize(("make", "targets"), [case for case in CASES if case[0] is not small_mlp])
def test_counts_are_those_of_peft(make: type, targets: list[str] | str) -> None:
    count = lora_count(make(), targets, r=3)
    config = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=make is small_gpt2)
    theirs = peft.get_peft_model(make(), config)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert (count.trainable, count.base + count.trainable) == (trainable, total)
    assert parameter_count(theirs) == count.adapted


def test_embeddings_and_convolutions_count_as_in_peft() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict(
            {"words": nn.Embedding(11, 4), "image": nn.Conv2d(3, 5, (2, 4)), "sound": nn.Conv1d(3, 5, 2)}
        )

    count = lora_count(make(), ["words", "image", "sound"], r=2)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["words", "image", "sound"]))
    assert count.trainable == theirs.get_nb_trainable_parameters()[0]
    assert [(matrix.d_out, matrix.d_in) for matrix in count.matrices] == [(4, 11), (5, 24), (5, 6)]


def test_counts_are_those_of_loralib() -> None:
    theirs = nn.Sequential(loralib.Linear(8, 16, r=3), nn.Tanh(), loralib.Linear(16, 3, r=3, bias=False))
    loralib.mark_only_lora_as_trainable(theirs)
    count = lora_count(small_mlp(), ["0", "2"], r=3)
    assert parameter_count(theirs) == count.adapted
    assert count.trainable == sum(tensor.numel() for tensor in loralib.lora_state_dict(theirs).values())


def test_bitfit_trains_the_biases() -> None:
    model = small_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    count = parameter_count(model)
    d, hidden, layers = 8, 12, 2
    # Per layer: q, k, v, the attention's output, the MLP's two and two norms; besides, one norm and the pooler.
    assert count.trainable == layers * (4 * d + hidden + d + 2 * d) + 2 * d
    assert count.trainable_tensors == layers * 8 + 2
    assert count.frozen == sum(p.numel() for n, p in model.named_parameters() if not n.endswith(".bias"))


def test_full_fine_tuning_trains_everything_and_a_frozen_model_nothing() -> None:
    model = small_mlp()
    assert parameter_count(model).reduction == 1
    assert parameter_count(model.requires_grad_(False)).reduction == float("inf")


def test_a_tied_weight_counts_once() -> None:
    model = small_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    d, vocabulary, positions, layers = 8, 20, 8, 2
    assert parameter_count(model).total == layers * (12 * d * d + 13 * d) + (vocabulary + positions + 2) * d


def test_a_module_under_two_names_counts_once() -> None:
    shared = nn.Linear(4, 6)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [matrix.module for matrix in lora_count(model, "all-linear", r=2).matrices] == ["a"]


def test_counting_leaves_the_model_as_it_is() -> None:
    model = small_bert()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    lora_count(model, ["query"], r=2)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name].requires_grad and torch.equal(after[name], before[name]) for name in before)


def test_reductions_differ_by_the_factors_in_the_total() -> None:
    count = lora_count(small_bert(), ["query"], r=2)
    assert count.reduction == count.base / (2 * 2 * (8 + 8))
    assert count.adapted.reduction == pytest.approx(count.reduction + 1, rel=1e-15)


def test_rows_are_the_matrices() -> None:
    count = lora_count(small_mlp(), ["0"], r=2)
    assert count.rows() == [{"module": "0", "d_out": 16, "d_in": 8, "r": 2, "parameters": 48}]
    assert count.matrices == (MatrixCount("0", 16, 8, 2, 48),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_checkpoint_bytes_are_those_of_a_file_without_its_header(dtype: torch.dtype) -> None:
    model = small_bert()
    count = lora_count(model, ["query", "value"], r=3)
    training.inject(model, ["query", "value"], r=3)
    file = safetensors.torch.save({n: p.detach().to(dtype) for n, p in model.named_parameters() if p.requires_grad})
    (header,) = struct.unpack("<Q", file[:8])
    assert len(json.loads(file[8 : 8 + header])) == 8
    assert checkpoint_bytes(count.trainable, dtype) == len(file) - 8 - header


@pytest.mark.parametrize("r", [0, -3])
def test_r_below_one_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=f"r: expected at least 1, got {r}"):
        lora_count(small_mlp(), ["0"], r=r)


@pytest.mark.parametrize("targets", ["nothing", ["0", "nothing"], ["nothing"]])
def test_a_target_that_matches_nothing_is_refused(targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"targets: expected .*'nothing'.* in Sequential, got none"):
        lora_count(small_mlp(), targets, r=2)


def test_a_target_without_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1': expected .*, got .*Tanh.*Choose other modules"):
        lora_count(small_mlp(), ["0", "1"], r=2)


def test_a_lazy_parameter_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'0\.weight': expected a parameter with a shape, got a lazy one"):
        parameter_count(model)
