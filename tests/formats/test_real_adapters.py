"""Adapters trained by others: read to the last number, or refused by name."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter, save_adapter

# Of the largest entry: our product is in float64 from the same stored numbers, so that even this is generous.
DENSE = 1e-6

ROBERTA = "roberta.encoder.layer.{}.attention.self.{}"


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The file as its own library reads it."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def straight_from(tensors: dict[str, Tensor], module: str, ending: str, scale: float) -> NDArray[np.float64]:
    """scale · B @ A in numpy."""
    (a,), (b,) = ([t for n, t in tensors.items() if n.endswith(f"{module}.lora_{side}{ending}")] for side in "AB")
    product: NDArray[np.float64] = b.double().numpy() @ a.double().numpy()
    return scale * product


def assert_equals_the_file(adapter: Adapter, tensors: dict[str, Tensor], ending: str, scale: float) -> None:
    for module, update in adapter.items():
        oracle = straight_from(tensors, module, ending, scale)
        assert update.shape == adapter.modules[module].shape == oracle.shape
        np.testing.assert_allclose(update.dense().numpy(), oracle, rtol=0, atol=DENSE * np.abs(oracle).max())
        assert update.norm() == pytest.approx(float(np.linalg.norm(oracle)), rel=1e-9)


def assert_accounts_for(adapter: Adapter, tensors: dict[str, Tensor], reasons: dict[str, int]) -> None:
    used = [name for module in adapter.modules.values() for name in module.tensors]
    listed = [unused.tensor for unused in adapter.unused]
    assert sorted(used + listed) == sorted(tensors)
    assert Counter(unused.reason.split(":")[0] for unused in adapter.unused) == reasons
    assert sum(u.nbytes for u in adapter.unused) == sum(
        tensors[name].numel() * tensors[name].itemsize for name in listed
    )


def test_the_papers_own_mnli_checkpoint(shared_adapters: Path) -> None:
    folder = shared_adapters / "loralib" / "roberta_base_mnli_r8"
    tensors = tensors_of(folder / "roberta_base_lora_mnli.bin")
    adapter = load_adapter(folder, alpha=16)
    assert adapter.format == "loralib"
    assert list(adapter) == [ROBERTA.format(i, name) for i in range(12) for name in ("query", "value")]
    assert {(m.shape, m.r, m.scale, m.scale_source) for m in adapter.modules.values()} == {
        ((768, 768), 8, 2.0, "caller")
    }
    assert_equals_the_file(adapter, tensors, "", 2.0)
    full = "a full tensor trained beside LoRA, no part of any update"
    assert_accounts_for(adapter, tensors, {full: 2, "bias": 2})
    assert adapter.notes == ()


def test_its_alpha_is_not_in_the_file(shared_adapters: Path) -> None:
    adapter = load_adapter(shared_adapters / "loralib" / "roberta_base_mnli_r8" / "roberta_base_lora_mnli.bin")
    assert all(math.isnan(module.scale) for module in adapter.modules.values())
    assert {module.scale_source for module in adapter.modules.values()} == {"unknown"}
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        adapter[ROBERTA.format(0, "query")].norm()


@pytest.mark.parametrize("checkpoint", ["checkpoint-500", "checkpoint-1200"])
def test_an_adapter_of_q_k_v_with_all_biases(shared_adapters: Path, checkpoint: str) -> None:
    folder = shared_adapters / "peft" / "roberta_base_agnews_r4" / checkpoint
    tensors = tensors_of(folder / "adapter_model.safetensors")
    adapter = load_adapter(folder)
    assert adapter.format == "peft"
    assert list(adapter) == [ROBERTA.format(i, name) for i in range(12) for name in ("key", "query", "value")]
    assert {(m.r, m.scale, m.scale_source) for m in adapter.modules.values()} == {(4, 4.0, "config")}
    assert_equals_the_file(adapter, tensors, ".weight", 4.0)
    # 103 biases: 99 of the base, and two of the classifier twice, as trained and as it was.
    own = "the base's own tensor, kept beside modules_to_save"
    assert sum(unused.tensor.endswith("bias") for unused in adapter.unused) == 103
    assert_accounts_for(adapter, tensors, {"bias": 99, "modules_to_save": 4, own: 2})
    assert adapter.notes == ()


def test_an_adapter_of_q_and_v(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft" / "roberta_base_mrpc_r8"
    tensors = tensors_of(folder / "adapter_model.safetensors")
    adapter = load_adapter(folder)
    assert list(adapter) == [ROBERTA.format(i, name) for i in range(12) for name in ("query", "value")]
    assert {(m.r, m.scale) for m in adapter.modules.values()} == {(8, 2.0)}
    assert_equals_the_file(adapter, tensors, ".weight", 2.0)
    assert_accounts_for(adapter, tensors, {"bias": 2, "modules_to_save": 2})
    assert adapter.config["base_model_name_or_path"] == "roberta-base"


def test_a_large_adapter_pickles_small(shared_adapters: Path) -> None:
    adapter = load_adapter(shared_adapters / "peft" / "roberta_base_agnews_r4" / "checkpoint-1200")
    pickled = pickle.dumps(adapter)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert list(again) == list(adapter)
    assert again.unused == adapter.unused
    module = ROBERTA.format(3, "value")
    assert torch.equal(again[module].dense(), adapter[module].dense())


def test_an_old_bin_file_with_48_modules(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft_regression" / "lora_opt-350m"
    tensors = tensors_of(folder / "adapter_model.bin")
    adapter = load_adapter(folder)
    assert len(adapter) == 48
    names = [f"model.decoder.layers.{i}.self_attn.{name}" for i in range(24) for name in ("q_proj", "v_proj")]
    assert list(adapter) == names
    assert {(m.shape, m.r, m.scale) for m in adapter.modules.values()} == {((1024, 1024), 8, 1.0)}
    assert adapter.unused == ()
    for module in (names[0], names[-1]):
        update = adapter[module]
        oracle = straight_from(tensors, module, ".weight", 1.0)
        np.testing.assert_allclose(update.dense().numpy(), oracle, rtol=0, atol=DENSE * np.abs(oracle).max())
    for module, update in adapter.items():
        assert update.norm() == pytest.approx(naive_norm(tensors, module), rel=1e-9)


def naive_norm(tensors: dict[str, Tensor], module: str) -> float:
    (a,), (b,) = ([t for n, t in tensors.items() if n.endswith(f"{module}.lora_{side}.weight")] for side in "AB")
    a_, b_ = a.double().numpy(), b.double().numpy()
    return math.sqrt(float(np.trace(b_.T @ b_ @ a_ @ a_.T)))


class Perceptron(nn.Module):
    """The base of the regression files, in the order in which it was initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.lin1(F.relu(self.lin0(x))), dim=-1)


def golden(folder: Path) -> Tensor:
    output: Tensor = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    return output


def test_the_output_of_another_version_of_peft_is_reproduced(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft_regression" / "lora_mlp"
    torch.manual_seed(0)
    model = Perceptron()
    adapter = load_adapter(folder)
    assert list(adapter) == ["lin0"]
    base = load_base(model)
    merged = base.matrix(adapter.targets["lin0"], (20, 10)).double() + adapter["lin0"].dense()
    x = torch.arange(90.0).reshape(9, 10)
    expected = golden(folder)
    with torch.no_grad():
        assert not torch.allclose(model(x), expected, atol=1e-2)
        model.lin0.weight.copy_(merged)
        # Float32, inputs up to 89 and logits of some hundreds.
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Convolved(nn.Module):
    """The base of the convolution among the regression files, in the order in which it was initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(5, 10, 3)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.lin0(F.relu(self.conv2d(x.reshape(2, 5, 3, 3))).flatten(1)), dim=-1)


def test_the_output_of_a_convolution_of_another_version_of_peft_is_reproduced(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft_regression" / "lora_conv2d"
    torch.manual_seed(0)
    model = Convolved()
    adapter = load_adapter(folder)
    module = adapter.modules["conv2d"]
    assert (module.shape, module.r, module.scale, module.target.kernel) == ((10, 45), 8, 1.0, (3, 3))
    merged = load_base(model).matrix(module.target, module.shape).double() + adapter["conv2d"].dense()
    x, expected = torch.arange(90.0), golden(folder)
    with torch.no_grad():
        assert not torch.allclose(model(x), expected, atol=1e-2)
        model.conv2d.weight.copy_(merged.reshape(10, 5, 3, 3))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_modules_saved_beside_it_are_listed(shared_adapters: Path) -> None:
    folder = shared_adapters / "peft_regression" / "lora_mlp_modules_to_save"
    adapter = load_adapter(folder)
    assert list(adapter) == ["lin0"]
    assert_accounts_for(adapter, tensors_of(folder / "adapter_model.bin"), {"bias": 1, "modules_to_save": 1})


@pytest.mark.filterwarnings("ignore:.*tensors not written:UserWarning")
def test_real_adapters_survive_writing(shared_adapters: Path, tmp_path: Path) -> None:
    adapter = load_adapter(shared_adapters / "loralib" / "roberta_base_mnli_r8", alpha=16)
    again = load_adapter(save_adapter(adapter, tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 16
    assert again.targets == adapter.targets
    for module in adapter:
        assert torch.equal(again[module].dense(), adapter[module].dense())


REFUSED = {
    "cloneofsimo/lora_kiriko2.ti.pt": "holds learned token embeddings",
    "not_low_rank/ia3_mlp": "holds PEFT IA3",
    "not_low_rank/ia3_mlp/adapter_model.bin": "holds PEFT IA3",
    "not_low_rank/unilora": "holds PEFT UNILORA",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(shared_adapters: Path, name: str) -> None:
    source = shared_adapters / name
    with pytest.raises(UnsupportedAdapterError, match=f"{REFUSED[name]}.*not read") as caught:
        load_adapter(source, alpha=1)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)


FOREIGN = {
    "toylora/finetuned.pth": r"'lora_layers.0': looks transposed: expected lora_A \(r, d_in\) and lora_B",
    "toylora/pretrained.pth": r"no known format matches its 8 tensors \(first: 'network.0.weight'\)",
    "peft_regression/lora_mlp/output.pt": "expected a mapping of names to tensors, got a Tensor",
    "sam_lora/round_a": "expected one file of tensors, found 4",
    "cloneofsimo": "expected one file of tensors, found 5",
    "peft": r"found a folder of 1 \(roberta_base_mrpc_r8\)",
    "peft/roberta_base_agnews_r4": r"found a folder of 2 \(checkpoint-1200, checkpoint-500\)",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_adapter_is_named_in_one_line(shared_adapters: Path, name: str) -> None:
    with pytest.raises(AdapterFormatError, match=FOREIGN[name]) as caught:
        load_adapter(shared_adapters / name, alpha=1)
    assert str(caught.value).startswith(str(shared_adapters / name))
    assert "\n" not in str(caught.value)
