"""Checkpoints for loralib and PEFT: what they load is the same model, and comes back as the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import loralib
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification
from transformers.pytorch_utils import Conv1D

import lora_analysis as la
from lora_analysis import training
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.training.export import load_peft, lora_state_dict, save_peft

# peft 0.21 asks transformers for a name that transformers is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Outputs of order one; the libraries add the same float64 products in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
R, ALPHA = 2, 5.0


def randomised(model: nn.Module) -> nn.Module:
    """Everything that takes gradients, away from where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Small(nn.Module):
    """One layer of each kind that loralib has, and a norm with a bias of its own."""

    def __init__(self, loralib_r: int = 0) -> None:
        super().__init__()
        lora: dict[str, Any] = {"r": loralib_r, "lora_alpha": ALPHA}
        if loralib_r:
            self.embed: nn.Module = loralib.Embedding(11, 6, **lora)
            self.fused: nn.Module = loralib.MergedLinear(6, 18, enable_lora=[True, False, True], **lora)
            self.turned: nn.Module = loralib.Linear(18, 5, fan_in_fan_out=True, **lora)
        else:
            self.embed = nn.Embedding(11, 6)
            self.fused = nn.Linear(6, 18)
            self.turned = Conv1D(5, 18)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.norm(self.turned(self.fused(self.embed(ids)).tanh()))
        return out


def adapted_small(**options: Any) -> tuple[nn.Module, nn.Module]:
    base = Small().double()
    model = copy.deepcopy(base)
    training.inject(model, ["embed", "fused", "turned"], r=R, alpha=ALPHA, slots={"fused": "q,v"}, **options)
    return base, randomised(model)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_loralib_loads_the_state_dict_and_computes_the_same(bias: Any) -> None:
    base, model = adapted_small(bias=bias)
    state = lora_state_dict(model, bias=bias)
    peer = Small(R).double()
    peer.load_state_dict(base.state_dict(), strict=False)
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    assert set(state) == set(loralib.lora_state_dict(peer, bias=bias)) - {"fused.lora_ind"}
    ids = torch.arange(11)
    torch.testing.assert_close(peer(ids), model(ids), **CLOSE)
    torch.testing.assert_close(peer.eval()(ids), model(ids), **CLOSE)
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_reader_gives_the_updates_back_and_they_attach_to_the_base(tmp_path: Path, suffix: str) -> None:
    base, model = adapted_small()
    path = tmp_path / f"lora{suffix}"
    if suffix == ".pt":
        torch.save(lora_state_dict(model), path)
    else:
        save_file(lora_state_dict(model), path)
    read = la.load_adapter(path, alpha=ALPHA, split="q,v", base=la.load_base(base))
    assert read.format == "loralib"
    original = training.extract(model)
    assert sorted(read) == sorted(original) == ["embed", "fused.q", "fused.v", "turned"]
    for module, update in original.items():
        assert torch.equal(read[module].dense(), update.dense())
    fresh = copy.deepcopy(base)
    training.attach(fresh, read)
    ids = torch.arange(11)
    torch.testing.assert_close(fresh(ids), model(ids), **CLOSE)


def test_loralibs_own_convolution_is_the_view_of_its_weight(tmp_path: Path) -> None:
    k, groups = 3, 2
    base = nn.Sequential(loralib.Conv2d(4, 6, k, padding=1, groups=groups)).double()
    model = copy.deepcopy(base)
    view = (6 // groups * k, 4 * k)
    training.inject(model, parameters={"0.conv.weight": view}, r=R * k, alpha=ALPHA * k)
    randomised(model)
    state = lora_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "0.lora_A": (R * k, 4 * k),
        "0.lora_B": (6 // groups * k, R * k),
    }
    peer = nn.Sequential(loralib.Conv2d(4, 6, k, padding=1, groups=groups, r=R, lora_alpha=ALPHA)).double()
    peer.load_state_dict(base.state_dict(), strict=False)
    assert not peer.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), **CLOSE)
    save_file(state, tmp_path / "conv.safetensors")
    read = la.load_adapter(tmp_path / "conv.safetensors", alpha=ALPHA, base=la.load_base(base))
    torch.testing.assert_close(read["0"].dense(), training.extract(model)["0.conv"].dense(), **CLOSE)


def test_a_convolution_of_kernel_one_is_a_convolution_of_loralib() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 1)).double()
    model = copy.deepcopy(base)
    training.inject(model, ["0"], r=R, alpha=ALPHA)
    randomised(model)
    peer = nn.Sequential(loralib.Conv2d(4, 6, 1, r=R, lora_alpha=ALPHA)).double()
    peer.load_state_dict({name.replace("0.", "0.conv."): t for name, t in base.state_dict().items()}, strict=False)
    assert not peer.load_state_dict(lora_state_dict(model), strict=False).unexpected_keys
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), **CLOSE)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(4, 4), {"targets": ["0"], "dora": True}, r"'0': loralib has no place for the magnitudes of DoRA"),
        (nn.Linear(4, 4), {"targets": ["0"], "init": "pissa"}, r"'0': loralib has no place for the initial factors"),
        (nn.Linear(4, 6), {"targets": ["0"], "slots": {"0": {"q": (0, 4)}}}, r"'0': expected blocks.*got q 0-4"),
        (nn.Conv2d(4, 4, 3), {"targets": ["0"]}, r"'0': expected a convolution as loralib has it"),
        (nn.Conv2d(4, 4, 1, groups=2), {"targets": ["0"]}, r"'0': expected a convolution as loralib has it"),
        (nn.MultiheadAttention(4, 2), {"parameters": ["in_proj_weight"]}, r"got in_proj_weight \(12, 4\)"),
        (nn.Conv2d(4, 4, 3), {"parameters": {"0.weight": (4, 36)}}, r"viewed as \(4, 36\). Merge"),
    ],
    ids=["dora", "pissa", "block", "kernel", "groups", "packed", "view"],
)
def test_what_loralib_has_no_layer_for_is_refused(model: nn.Module, options: Any, message: str) -> None:
    holder = nn.Sequential(model)
    training.inject(holder, r=1, **options)
    with pytest.raises(UnsupportedAdapterError, match=message):
        lora_state_dict(holder)


def test_adapters_and_biases_that_are_not_there_are_refused() -> None:
    _, model = adapted_small()
    with pytest.raises(ValueError, match=r"bias: expected one of .* got 'some'"):
        lora_state_dict(model, bias="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an adapter named 'other', got 'default'"):
        lora_state_dict(model, name="other")
    with pytest.raises(ValueError, match="expected a model with LoRA layers, got none"):
        lora_state_dict(nn.Linear(2, 2))


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return RobertaForSequenceClassification(config).double().eval()


IDS = torch.arange(2, 22).reshape(2, 10)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("saved", [[], ["classifier"]])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_peft_loads_the_directory_as_the_same_model(tmp_path: Path, bias: Any, saved: list[str], dora: bool) -> None:
    base = roberta()
    model = copy.deepcopy(base)
    training.inject(model, ["query", "value"], r=R, alpha=ALPHA, bias=bias, modules_to_save=saved, dora=dora)
    randomised(model)
    expected = model(IDS).logits
    assert save_peft(model, tmp_path) == tmp_path
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(peer(IDS).logits, expected, **CLOSE)
    back = copy.deepcopy(base)
    names = load_peft(back, tmp_path)
    torch.testing.assert_close(back(IDS).logits, expected, **CLOSE)
    assert names == list(training.sites(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in back.named_parameters() if parameter.requires_grad] == trained
    again = tmp_path / "again"
    save_peft(back, again)
    first, second = (load_file(place / "adapter_model.safetensors") for place in (tmp_path, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_tensors_are_called_as_peft_calls_them(tmp_path: Path, bias: Any) -> None:
    model = roberta()
    training.inject(model, ["query", "value"], r=R, bias=bias, modules_to_save=["classifier"])
    save_peft(model, tmp_path / "ours", base_model_name_or_path="base")
    config = peft.LoraConfig(target_modules=["query", "value"], r=R, bias=bias, modules_to_save=["classifier"])
    peer = peft.get_peft_model(roberta(), config)
    peer.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "theirs"))
    # peft's bias="all" takes the classifier's own and untrained copies along as well, under names of its wrapper.
    extra = {name for name in theirs if "original_module" in name or "modules_to_save" in name}
    assert ours.keys() == theirs.keys() - extra
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["bias"], written["modules_to_save"]) == (bias, ["classifier"])
    assert written["base_model_name_or_path"] == "base"


def test_a_directory_that_peft_wrote_is_loaded_with_all_that_trained(tmp_path: Path) -> None:
    base = roberta()
    config = peft.LoraConfig(
        target_modules=["query", "value"], r=R, lora_alpha=ALPHA, bias="all", modules_to_save=["classifier"]
    )
    peer = randomised(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    peer.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    load_peft(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, peer(IDS).logits, **CLOSE)


def test_buffers_of_modules_are_a_part_of_them(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    model = copy.deepcopy(base)
    training.inject(model, ["0"], r=R, modules_to_save=["1"])
    randomised(model)
    x = torch.randn(8, 4, dtype=torch.float64)
    model(x)  # moves the running statistics
    save_peft(model.eval(), tmp_path)
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(peer(x), model(x), **CLOSE)
    load_peft(base, tmp_path)
    assert torch.equal(base.eval()(x), model(x))


def test_fused_blocks_and_pissa_are_written_as_plain_factors(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 5)).double()
    model = copy.deepcopy(base)
    training.inject(model, ["0", "1"], r=R, slots={"0": "q,v"}, init="pissa", bias="lora_only")
    randomised(model)
    save_peft(model, tmp_path)
    peer = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(peer(x), model(x), **CLOSE)


def test_each_adapter_is_saved_with_what_trained_beside_it(tmp_path: Path) -> None:
    base = roberta()
    model = copy.deepcopy(base)
    training.inject(model, ["query"], r=R, adapter="a", modules_to_save=["classifier"])
    randomised(model)
    expected = model(IDS).logits
    training.inject(model, ["value"], r=R, adapter="b", bias="lora_only")
    assert not model.classifier.dense.weight.requires_grad
    save_peft(model, tmp_path / "a", name="a")
    save_peft(model, tmp_path / "b", name="b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert any("classifier" in name for name in a)
    assert {name.rpartition(".")[2] for name in b} == {"weight", "bias"}
    assert not any("classifier" in name or "query" in name for name in b)
    load_peft(base, tmp_path / "a", name="mine")
    torch.testing.assert_close(base(IDS).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="expected one adapter, got 'a', 'b'"):
        save_peft(model, tmp_path / "c")


def test_a_merged_model_is_saved_as_the_unmerged_one(tmp_path: Path) -> None:
    base = roberta()
    training.inject(base, ["query"], r=R, bias="all")
    randomised(base)
    save_peft(base, tmp_path / "before")
    training.merge(base)
    save_peft(base, tmp_path / "after")
    before, after = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_takes_gradients_untold_is_warned_of(tmp_path: Path) -> None:
    model = roberta()
    training.inject(model, ["query"], r=1, bias="lora_only")
    model.classifier.dense.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"2 parameters that take gradients are not written \(first: 'classifier.dense"
    ):
        save_peft(model, tmp_path)


def test_what_a_peft_directory_cannot_hold_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    training.inject(attention, parameters=["in_proj_weight"], r=1)
    with pytest.raises(UnsupportedAdapterError, match=r"'0.in_proj_weight': expected updates of layers"):
        save_peft(attention, tmp_path)
    alike = nn.ModuleDict({"out": nn.Linear(2, 2), "lay_out": nn.Linear(2, 2), "lin": nn.Linear(2, 2)})
    training.inject(alike, ["lin"], r=1, modules_to_save=["out"])
    with pytest.raises(UnsupportedAdapterError, match="PEFT takes 'out' for 'lay_out' as well"):
        save_peft(alike, tmp_path)
    listed = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)]), "lin": nn.Linear(2, 2)})
    training.inject(listed, ["lin"], r=1, modules_to_save=["heads"])
    with pytest.raises(UnsupportedAdapterError, match="PEFT saves no ModuleList, such as 'heads'"):
        save_peft(listed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = roberta()
    training.inject(model, ["query"], r=1, modules_to_save=["classifier"])
    save_peft(model, tmp_path)
    small = roberta()
    small.classifier.out_proj = nn.Linear(16, 2).double()
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(BaseWeightsError, match=r"'classifier.out_proj.bias' of \(3,\) in Roberta.*got \(2,\)"):
        load_peft(small, tmp_path)
    after = small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "some"}))
    with pytest.raises(AdapterFormatError, match=r"bias: expected one of .* got 'some'"):
        load_peft(roberta(), tmp_path)
