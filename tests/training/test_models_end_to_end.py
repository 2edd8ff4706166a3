"""The paper's models from adapting to analysing: train, merge, save, load in peft and back, attach, measure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lora_analysis as la
from lora_analysis import training

# peft 0.21 asks transformers for a name that transformers is about to retire; DeBERTa's model compiles with torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

# Logits of order one in float64, through two blocks.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
R, ALPHA, STEPS = 3, 6.0, 6


def roberta() -> nn.Module:
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
        initializer_range=0.3,
    )
    return RobertaForSequenceClassification(config)


def deberta() -> nn.Module:
    config = DebertaV2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
        initializer_range=0.3,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )
    return DebertaV2ForSequenceClassification(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    )


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    targets: list[str]
    slots: dict[str, str] | None
    modules: list[str]


CASES = {
    "roberta": Case(roberta, ["query", "value"], None, ["query", "value"]),
    "deberta": Case(deberta, ["query_proj", "value_proj"], None, ["query_proj", "value_proj"]),
    "gpt2": Case(gpt2, ["c_attn"], None, ["c_attn"]),
    "gpt2 q,v": Case(gpt2, ["c_attn"], {"c_attn": "q,v"}, ["c_attn.q", "c_attn.v"]),
}
IDS = torch.arange(2, 22).reshape(2, 10)


def base_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().double().eval()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    wanted = torch.arange(logits.numel()).reshape(logits.shape).double().sin()
    return nn.functional.mse_loss(logits, wanted)


def trained(case: Case, base: nn.Module, *, seed: int) -> nn.Module:
    model = copy.deepcopy(base)
    training.inject(model, case.targets, r=R, alpha=ALPHA, seed=seed, slots=case.slots)
    torch.manual_seed(seed)
    batches = [torch.randint(2, 30, (2, 10)) for _ in range(STEPS)]
    history = training.train(model, batches, loss, lr=3e-2)
    assert len(history) == STEPS
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_paper_from_end_to_end(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = base_of(case)
    model = trained(case, base, seed=1)
    expected = model(IDS).logits
    assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
    adapter = training.extract(model)
    assert {".".join(module.split(".")[-len(case.modules[0].split(".")) :]) for module in adapter} == set(case.modules)

    # Merged, and unmerged again.
    training.merge(model)
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    training.unmerge(model)
    assert torch.equal(model(IDS).logits, expected)

    # Saved: peft and this package load the same model.
    la.save_adapter(adapter, tmp_path, base=la.load_base(base) if case.slots else None)
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(peer.eval()(IDS).logits, expected, **CLOSE)
    read = la.load_adapter(
        tmp_path, base=base_directory(base, tmp_path / "base"), split="q,k,v" if case.slots else None
    )
    for module, update in adapter.items():
        torch.testing.assert_close(read[module].dense(), update.dense(), **CLOSE)
    for given in (adapter, la.load_adapter(tmp_path)):
        fresh = copy.deepcopy(base)
        training.attach(fresh, given)
        torch.testing.assert_close(fresh(IDS).logits, expected, **CLOSE)


def base_directory(base: nn.Module, path: Path) -> la.BaseWeights:
    """The base as from its own files, so that the layouts of its fused weights are known."""
    base.save_pretrained(path)  # type: ignore[operator]
    return la.load_base(path)


@pytest.mark.parametrize("name", CASES)
def test_the_analyses_agree_on_a_model_of_the_paper(name: str) -> None:
    case = CASES[name]
    base = base_of(case)
    model, other = (trained(case, base, seed=seed) for seed in (1, 2))
    a, b = (training.extract(one, source=source) for one, source in ((model, "a"), (other, "b")))
    merged = copy.deepcopy(model)
    training.merge_and_unload(merged)

    spectrum = la.spectrum_table(a)
    assert list(spectrum["module"]) == list(a)
    for row in spectrum.itertuples():
        target = a.targets[row.module]
        before, after = (la.load_base(one).matrix(target) for one in (base, merged))
        singular = torch.linalg.svdvals(after - before)
        assert row.r == R
        assert row.scale == ALPHA / R
        assert row.norm == pytest.approx(float((after - before).norm()), rel=1e-9)
        assert row.singular_values[:R] == pytest.approx(singular[:R].tolist(), rel=1e-7)
        assert float(singular[R]) < 1e-10

    similarity = la.similarity_table(a, b, draws=50)
    assert set(similarity["module_a"]) == set(a)
    assert similarity["phi"].between(0, 1).all()
    itself = la.similarity_table(a, a, draws=50)
    full = itself[(itself["i"] == R) & (itself["j"] == R)]
    assert full["phi"].to_numpy() == pytest.approx(1.0)

    # The base is the live model, also while it carries the adapter.
    amplification = la.amplification_table(a, la.load_base(model), draws=50)
    plain = la.amplification_table(a, la.load_base(base), draws=50)
    assert amplification["amplification"].to_numpy() == pytest.approx(plain["amplification"].to_numpy(), rel=1e-9)
    assert set(amplification["module"]) == set(a)
    at_r = amplification[amplification["k"] == R].set_index("module")
    norms = spectrum.set_index("module")["norm"]
    for module in a:
        assert at_r.loc[module, "norm_update"] == pytest.approx(norms[module], rel=1e-9)


def test_slots_train_q_and_v_and_leave_k_alone() -> None:
    case = CASES["gpt2 q,v"]
    base = base_of(case)
    model = trained(case, base, seed=1)
    training.merge_and_unload(model)
    for (name, before), after in zip(base.state_dict().items(), model.state_dict().values(), strict=True):
        if not name.endswith("c_attn.weight"):
            assert torch.equal(before, after), name
            continue
        q, k, v = (before != after).chunk(3, dim=1)
        assert q.all()
        assert v.all()
        assert not k.any()
