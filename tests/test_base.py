"""Base weights: the matrix an update acts on, as (d_out, d_in) however and wherever it is stored."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loralib  # type: ignore[import-untyped]
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.base.orientation import ProvenTransposed
from lora_analysis.checkpoint import SafetensorsFile
from lora_analysis.errors import BaseWeightsError, LoraAnalysisError
from lora_analysis.update import LowRankUpdate

D = 32
CONFIG: dict[str, Any] = {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 64}
# (d_out, d_in) of GPT-2's Conv1D weights, which are stored as (d_in, d_out). The second is square.
SHAPES = {
    "attn.c_attn": (3 * D, D),
    "attn.c_proj": (D, D),
    "mlp.c_fc": (4 * D, D),
    "mlp.c_proj": (D, 4 * D),
}


def gpt2(head: bool = False) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config) if head else GPT2Model(config)


def gpt2_base(kind: str, folder: Path, head: bool) -> BaseWeights:
    model = gpt2(head)
    if kind == "live":
        return load_base(model)
    if kind == "state dict":
        return load_base(model.state_dict())
    if kind == "torch file":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return load_base(folder / "pytorch_model.bin")
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "shards" else "1GB")
    names = {path.name for path in folder.iterdir()}
    assert ("model.safetensors.index.json" in names) == (kind == "shards")
    return load_base(folder)


@pytest.mark.parametrize("named", ["bare", "transformer."])
@pytest.mark.parametrize("head", [False, True], ids=["bare model", "LM model"])
@pytest.mark.parametrize("kind", ["live", "state dict", "torch file", "one file", "shards"])
def test_gpt2_weights_come_back_as_d_out_d_in(tmp_path: Path, kind: str, head: bool, named: str) -> None:
    base = gpt2_base(kind, tmp_path, head)
    stored = {name.removeprefix("transformer."): weight for name, weight in gpt2(head).state_dict().items()}
    prefix = "" if named == "bare" else named
    for layer in range(2):
        for name, shape in SHAPES.items():
            tensor = f"h.{layer}.{name}.weight"
            oracle = stored[tensor].T
            for transposed in (False, True):
                target = Target(prefix + tensor, transposed=transposed)
                for asked in (shape, None):
                    weight = base.matrix(target, asked)
                    assert tuple(weight.shape) == shape
                    assert torch.equal(weight, oracle), (tensor, transposed, asked)
            assert base.shape(prefix + tensor) == shape[::-1]


def test_an_ordinary_square_weight_in_a_file_is_not_turned() -> None:
    base = load_base({"a.q.weight": torch.randn(4, 4), "a.q.bias": torch.randn(4), "a.up.weight": torch.randn(6, 4)})
    weight = base.matrix(Target("a.q.weight"), (4, 4))
    assert torch.equal(weight, load_base({"x": weight}).matrix(Target("x")))
    assert weight[0, 1] != weight[1, 0]
    assert torch.equal(base.matrix(Target("a.up.weight"), (6, 4)), base.matrix(Target("a.up.weight")))


def test_a_bias_along_the_rows_proves_nothing() -> None:
    square = torch.randn(4, 4)
    tensors = {"0.q.weight": square, "1.q.weight": torch.randn(6, 4), "1.q.bias": torch.randn(6)}
    assert torch.equal(load_base(tensors).matrix(Target("0.q.weight"), (4, 4)), square)
    turned = tensors | {"1.q.weight": torch.randn(4, 6)}
    assert torch.equal(load_base(turned).matrix(Target("0.q.weight"), (4, 4)), square.T)


def test_a_weight_at_the_top_is_proven_by_its_own_bias() -> None:
    weight = torch.randn(4, 6)
    turned = load_base({"c_fc.weight": weight, "c_fc.bias": torch.randn(6)})
    assert torch.equal(turned.matrix(Target("c_fc.weight")), weight.T)
    assert turned.transposed(Target("c_fc.weight"))


def test_a_tensor_called_weight_alone_is_no_relative_of_every_other() -> None:
    square = torch.randn(4, 4)
    base = load_base({"weight": square, "a.b.weight": torch.randn(4, 6), "a.b.bias": torch.randn(6)})
    assert torch.equal(base.matrix(Target("weight")), square)


def test_names_are_walked_once_however_many_families_they_are_of() -> None:
    """Once a family, 20,000 tensors of as many names took a minute and a half."""

    class Walked(dict[str, tuple[int, ...]]):
        walks = 0

        def __iter__(self) -> Iterator[str]:
            self.walks += 1
            return super().__iter__()

    names = Walked({f"{i}.w{i}.weight": (4, 4) for i in range(50)} | {"0.w7.weight": (4, 6), "0.w7.bias": (6,)})
    proven = ProvenTransposed(names, names.__getitem__)
    assert [name for name in list(names) if name.endswith(".weight") and proven(name)] == ["7.w7.weight", "0.w7.weight"]
    assert names.walks == 2  # ours above, and its own


def test_the_flag_of_the_adapter_decides_for_a_square_weight_alone() -> None:
    square, tall = torch.randn(4, 4), torch.randn(6, 4)
    base = load_base({"q.weight": square, "up.weight": tall})
    assert torch.equal(base.matrix(Target("q.weight", transposed=False), (4, 4)), square)
    assert torch.equal(base.matrix(Target("q.weight", transposed=True), (4, 4)), square.T)
    assert torch.equal(base.matrix(Target("q.weight", transposed=True)), square.T)
    # Where only one orientation fits the update, a wrong flag does no harm.
    assert torch.equal(base.matrix(Target("up.weight", transposed=True), (6, 4)), tall)
    assert torch.equal(base.matrix(Target("up.weight", transposed=False), (4, 6)), tall.T)


def test_a_live_module_knows_better_than_the_flag() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = load_base(model).matrix(Target("0.weight", transposed=True), (4, 4))
    assert torch.equal(weight, model.state_dict()["0.weight"])


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_live_loralib_layers_are_oriented_by_their_own_flag(fan_in_fan_out: bool) -> None:
    layer = loralib.Linear(4, 4, r=2, fan_in_fan_out=fan_in_fan_out)
    weight = load_base(nn.ModuleDict({"q": layer})).matrix(Target("q.weight"), (4, 4))
    assert torch.equal(weight, layer.weight.T if fan_in_fan_out else layer.weight)


def peft_model(model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        # transformers' own deprecations, which peft runs into.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def test_a_live_model_that_carries_lora_layers_is_a_base() -> None:
    plain = gpt2().state_dict()
    model = peft_model(gpt2(), r=2, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    for source in (model, model.state_dict()):
        base = load_base(source)
        for name in ("h.1.attn.c_attn", "h.1.attn.c_proj", "h.0.mlp.c_fc"):
            shape = SHAPES[name[4:]]
            assert torch.equal(base.matrix(Target(f"{name}.weight"), shape), plain[f"{name}.weight"].T)


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "module.{}",
        "_orig_mod.{}",
        "_orig_mod.module.{}",
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        "base_model.model.{}",
        "module.base_model.model.{}",
        "_orig_mod.base_model.model.{}",
    ],
)
def test_wrappers_round_a_base_do_not_show_in_its_names(wrap: str) -> None:
    # A second name that ends alike, so that only the exact name is right.
    tensors = {"lin.weight": torch.randn(4, 3), "x.lin.weight": torch.randn(4, 3)}
    base = load_base({wrap.format(name): tensor for name, tensor in tensors.items()})
    assert set(base) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(base.matrix(Target(name), (4, 3)), tensor)


def test_rows_and_columns_of_a_fused_weight() -> None:
    fused = torch.randn(12, 5)
    blocks = [(0, 4), (4, 8), (8, 12)]
    for stored in (fused, fused.T.contiguous()):
        base = load_base({"qkv.weight": stored})
        for rows in blocks:
            assert torch.equal(base.matrix(Target("qkv.weight", rows=rows), (4, 5)), fused[slice(*rows)])
    base = load_base({"qkv.weight": fused})
    assert torch.equal(base.matrix(Target("qkv.weight", columns=(1, 3)), (12, 2)), fused[:, 1:3])
    assert torch.equal(base.matrix(Target("qkv.weight", rows=(4, 8), columns=(0, 2)), (4, 2)), fused[4:8, :2])


def test_rows_of_a_fused_square_weight_follow_its_orientation() -> None:
    fused = torch.randn(6, 6)
    base = load_base({"qkv.weight": fused})
    assert torch.equal(base.matrix(Target("qkv.weight", rows=(2, 4)), (2, 6)), fused[2:4])
    assert torch.equal(base.matrix(Target("qkv.weight", transposed=True, rows=(2, 4)), (2, 6)), fused.T[2:4])


def test_blocks_of_gpt2_are_rows_of_the_turned_weight() -> None:
    base = load_base(gpt2())
    whole = gpt2().state_dict()["h.0.attn.c_attn.weight"].T
    for i in range(3):
        rows = (i * D, (i + 1) * D)
        block = base.matrix(Target("transformer.h.0.attn.c_attn.weight", transposed=True, rows=rows), (D, D))
        assert torch.equal(block, whole[slice(*rows)])


def test_experts_and_convolutions_unfold() -> None:
    stack, kernel = torch.randn(3, 6, 4), torch.randn(8, 5, 3, 3)
    base = load_base({"experts.up": stack, "conv.weight": kernel})
    assert torch.equal(base.matrix(Target("experts.up", expert=2), (6, 4)), stack[2])
    assert torch.equal(base.matrix(Target("experts.up", expert=2), (4, 6)), stack[2].T)
    assert torch.equal(base.matrix(Target("conv.weight"), (8, 45)), kernel.reshape(8, 45))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_matrix_keeps_its_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2).to(dtype)
    assert load_base({"w": weight}).matrix(Target("w")).dtype == dtype


def test_gradients_are_left_behind() -> None:
    assert not load_base(nn.Linear(3, 2)).matrix(Target("weight")).requires_grad


BASE = {
    "model.layers.0.q.weight": torch.randn(4, 3),
    "model.layers.1.q.weight": torch.randn(4, 3),
    "model.layers.0.quantised.weight": torch.zeros(4, 3, dtype=torch.int8),
    "model.layers.0.packed.weight": torch.zeros(6, 1, dtype=torch.uint8),
    "model.norm.weight": torch.ones(4),
    "model.experts": torch.randn(2, 4, 3),
}


@pytest.mark.parametrize(
    ("target", "shape", "match"),
    [
        (Target("layers.7.q.weight"), (4, 3), "expected the tensor 'layers.7.q.weight' .* found none of that name"),
        (Target("q.weight"), (4, 3), "'q.weight' could be any of 2 tensors"),
        (Target("layers.0.q.weight"), (4, 5), "expected 4x5, got 4x3. Is this the model"),
        (Target("layers.0.q.weight", rows=(0, 2)), (3, 3), "expected 3x3 in rows 0:2, got 4x3"),
        (Target("layers.0.q.weight", rows=(2, 6)), (4, 3), "expected 4x3 in rows 2:6, got 4x3"),
        (Target("layers.0.q.weight", rows=(2, 6)), None, "expected the target's slice in rows 2:6, got 4x3"),
        (Target("layers.0.q.weight", columns=(0, 9)), None, "expected the target's slice.*, got 4x3"),
        (Target("layers.0.quantised.weight"), (4, 3), r"got torch.int8: a quantised base. Give the original"),
        (Target("layers.0.packed.weight"), (4, 3), "got torch.uint8"),
        (Target("norm.weight"), (4, 3), r"expected a matrix, got shape \(4,\)"),
        (Target("experts", expert=2), (4, 3), r"expected a stack of experts with number 2, got \(2, 4, 3\)"),
        (Target("experts", expert=-1), (4, 3), "expected a stack of experts with number -1"),
        (Target("layers.0.q.weight", expert=0), (4, 3), r"expected a stack of experts with number 0, got \(4, 3\)"),
    ],
    ids=str,
)
def test_a_base_that_does_not_fit_is_named(target: Target, shape: tuple[int, int] | None, match: str) -> None:
    base = load_base(BASE)
    with pytest.raises(BaseWeightsError, match=match) as caught:
        base.matrix(target, shape)
    assert str(caught.value).startswith("state dict: ")
    assert "\n" not in str(caught.value)


def test_names_are_found_with_and_without_prefixes() -> None:
    base = load_base(BASE)
    full = "model.layers.0.q.weight"
    for name in (full, "layers.0.q.weight", "transformer.model.layers.0.q.weight", "a.b.model.layers.0.q.weight"):
        assert base.find(name) == full
    with pytest.raises(BaseWeightsError, match="found none of that name"):
        base.find("a.b.c.model.layers.0.q.weight")
    assert full in base
    assert "layers.0.q.weight" not in base
    assert len(base) == len(BASE)
    assert repr(base) == "BaseWeights('state dict', 6 tensors)"


def test_an_exact_name_wins_over_longer_ones() -> None:
    exact = torch.randn(2, 2)
    base = load_base({"x.lin.weight": torch.randn(2, 2), "lin.weight": exact})
    assert torch.equal(base.matrix(Target("lin.weight"), (2, 2)), exact)


def test_a_name_is_not_found_in_the_middle_of_another() -> None:
    base = load_base({"model.self_attn.fq.weight": torch.randn(2, 2)})
    with pytest.raises(BaseWeightsError, match="found none"):
        base.find("q.weight")


def test_files_and_folders_open(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    save_file({"w": weight}, tmp_path / "anything.safetensors")
    torch.save({"state_dict": {"w": weight}}, tmp_path / "model.pth")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"w": "anything.safetensors"}}))
    for source in (tmp_path, tmp_path / "anything.safetensors", tmp_path / "model.pth", tmp_path / "x.index.json"):
        for path in (source, str(source)):
            base = load_base(path)
            assert torch.equal(base.matrix(Target("w")), weight)
            assert base.source == str(source)


def test_only_the_matrix_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2().save_pretrained(tmp_path)
    reads: list[str] = []
    read = SafetensorsFile.__getitem__

    def counting_read(self: SafetensorsFile, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "__getitem__", counting_read)
    base = load_base(tmp_path)
    base.shape("h.0.attn.c_proj.weight")
    assert reads == []
    base.matrix(Target("h.0.attn.c_proj.weight"), (D, D))
    assert reads == ["h.0.attn.c_proj.weight"]


@pytest.mark.parametrize("kind", ["live", "state dict", "torch file", "one file", "shards"])
def test_bases_pickle(tmp_path: Path, kind: str) -> None:
    base = gpt2_base(kind, tmp_path, head=False)
    pickled = pickle.dumps(base)
    if kind not in ("live", "state dict"):
        assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.source, set(again)) == (base.source, set(base))
    for name in SHAPES:
        target = Target(f"h.0.{name}.weight")
        assert torch.equal(again.matrix(target), base.matrix(target))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], r"expected model weights \(model.safetensors.*found none"),
        (["a.safetensors", "b.safetensors"], "expected model weights .*found 2"),
        (["readme.md"], "found none"),
    ],
    ids=["empty", "two", "foreign"],
)
def test_a_folder_without_weights_is_named(tmp_path: Path, files: list[str], match: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BaseWeightsError, match=match):
        load_base(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BaseWeightsError, match="no such file or directory"):
        load_base(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseWeightsError, match="expected a safetensors file, got an empty file"):
        load_base(tmp_path)


def test_a_missing_shard_is_an_error_of_this_package(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["h.1.mlp.c_fc.weight"]
    (tmp_path / shard).write_bytes(b"")
    base = load_base(tmp_path)
    with pytest.raises(LoraAnalysisError, match="got an empty file"):
        base.matrix(Target("h.1.mlp.c_fc.weight"))


def test_only_repositories_of_the_hub_have_revisions() -> None:
    with pytest.raises(ValueError, match="revision: expected None"):
        load_base({}, revision="main")


def test_an_empty_base_says_so() -> None:
    with pytest.raises(BaseWeightsError, match=r"found none of that name among 0 \(first: 'nothing'\)"):
        load_base({}).matrix(Target("w"))


def test_a_real_base_meets_its_real_adapter(shared_adapters: Path) -> None:
    """toylora: alpha 32 at r 16, lora_A (d_in, r), lora_B (r, d_out), layer i on the i-th linear layer."""
    base = load_base(shared_adapters / "toylora" / "pretrained.pth")
    file = torch.load(shared_adapters / "toylora" / "finetuned.pth", map_location="cpu", weights_only=True)
    modules = [f"network.{i}" for i in (0, 3, 6, 9)]
    adapter = Adapter(
        {
            module: LowRankUpdate(file[f"lora_layers.{i}.lora_B"].T, file[f"lora_layers.{i}.lora_A"].T, scale=2.0)
            for i, module in enumerate(modules)
        },
        source="toylora",
    )
    for i, module in enumerate(modules):
        update = adapter[module]
        a, b = (file[f"lora_layers.{i}.lora_{side}"].double().numpy() for side in "AB")
        dense = 2.0 * (a @ b).T
        np.testing.assert_allclose(update.dense().numpy(), dense, rtol=0, atol=1e-12)
        weight = base.matrix(adapter.targets[module], update.shape)
        assert torch.equal(weight, file[f"lora_layers.{i}.original_layer.weight"])
        assert tuple(weight.shape) == dense.shape
        oracle = np.linalg.svd(dense, compute_uv=False)[: min(update.r, *update.shape)]
        np.testing.assert_allclose(update.svd().S.numpy(), oracle, rtol=1e-9)
    assert adapter["network.9"].svd().S.shape == (10,)


def test_one_change_of_prefix_serves_a_whole_adapter_so_no_two_modules_share_a_matrix() -> None:
    base = load_base({"encoder.lin.weight": torch.ones(2, 2), "proj.weight": torch.ones(2, 2)})
    assert base.find_all(["x.encoder.lin.weight", "x.proj.weight"]) == {
        "x.encoder.lin.weight": "encoder.lin.weight",
        "x.proj.weight": "proj.weight",
    }
    for names in (["text.encoder.lin.weight", "vision.encoder.lin.weight"], ["x.encoder.lin.weight", "y.proj.weight"]):
        with pytest.raises(BaseWeightsError, match="nor all of the adapter's under another prefix"):
            base.find_all(names)
    deeper = load_base({"model.a.q.weight": torch.ones(2, 2), "model.b.q.weight": torch.ones(2, 2)})
    assert deeper.find_all(["a.q.weight", "b.q.weight"]) == {
        "a.q.weight": "model.a.q.weight",
        "b.q.weight": "model.b.q.weight",
    }


def test_scaled_eight_bit_weights_are_refused() -> None:
    for name in ("m.weight_scale_inv", "m.weight_scale"):
        base = load_base({"m.weight": torch.ones(4, 4), name: torch.ones(1)})
        with pytest.raises(BaseWeightsError, match=f"{name}' beside it: a quantised base"):
            base.matrix(Target("m.weight"))
    with pytest.raises(BaseWeightsError, match="float8_e4m3fn: a quantised base"):
        load_base({"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}).matrix(Target("m.weight"))


def test_a_model_with_merged_updates_is_no_base() -> None:
    from lora_analysis import training

    ours = nn.Sequential(nn.Linear(4, 4))
    training.inject(ours, ["0"], r=2)
    assert load_base(ours).matrix(Target("0.weight")).shape == (4, 4)
    training.merge(ours)
    with pytest.raises(BaseWeightsError, match="merged updates"):
        load_base(ours)
    loralib = pytest.importorskip("loralib")
    theirs = nn.Sequential(loralib.Linear(4, 4, r=2))
    load_base(theirs)
    with pytest.raises(BaseWeightsError, match=r"merges in eval\(\)"):
        load_base(theirs.eval())


def test_a_live_models_own_weights_are_found_below_what_lora_puts_round_them() -> None:
    from lora_analysis import training

    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 5), "attn": nn.MultiheadAttention(4, 2), "conv": nn.Conv1d(3, 4, 2)}
    )
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.inject(model, ["embed", "conv"], r=2, parameters=["in_proj_weight"])
    base = load_base(model)
    assert torch.equal(base.matrix(Target("embed.weight", transposed=True)), plain["embed.weight"].T)
    assert torch.equal(base.matrix(Target("attn.in_proj_weight")), plain["attn.in_proj_weight"])
    assert torch.equal(base.matrix(Target("conv.weight", kernel=(2,))), plain["conv.weight"].flatten(1))
    for target in training.extract(model).targets.values():
        assert base.matrix(target).dim() == 2


def test_components_that_only_contain_a_wrappers_name_are_kept() -> None:
    base = load_base({"my_base_layer.weight": torch.ones(2, 2)})
    assert base.find("my_base_layer.weight") == "my_base_layer.weight"
