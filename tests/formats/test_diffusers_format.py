"""diffusers and its kin: every age of names, every source of a scale, DoRA, and nothing dropped."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

# Of the largest entry: products in float64 from the same stored float32 numbers.
DENSE = 1e-6

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
ENCODER = "text_model.encoder.layers.0.self_attn"
R, D_IN, D_OUT = 3, 10, 8


def factors(*, r: int = R, d_out: int = D_OUT, d_in: int = D_IN, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """A down and an up factor."""
    return torch.randn(r, d_in, *kernel), torch.randn(d_out, r, *(1 for _ in kernel))


def product(down: Tensor, up: Tensor) -> NDArray[np.float64]:
    """Up times down in numpy, kernels unfolded."""
    flat: NDArray[np.float64] = up.flatten(1).double().numpy() @ down.flatten(1).double().numpy()
    return flat


def pair(stem: str, down: Tensor, up: Tensor, ends: tuple[str, str]) -> dict[str, Tensor]:
    return {f"{stem}{ends[0]}": down, f"{stem}{ends[1]}": up}


PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")


def written(folder: Path, tensors: Mapping[str, Tensor], header: object = None) -> Path:
    path = folder / "pytorch_lora_weights.safetensors"
    metadata = {"format": "pt"} | ({} if header is None else {"lora_adapter_metadata": json.dumps(header)})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def assert_accounted_for(adapter: Adapter, path: Path) -> None:
    assert sorted(adapter.ledger) == sorted(load_file(path))


NAMES = {
    f"unet.{BLOCK}.processor.to_q_lora{{}}.weight": f"unet.{BLOCK}.to_q",
    f"{BLOCK}.processor.to_k_lora{{}}.weight": f"{BLOCK}.to_k",
    f"unet.{BLOCK}.processor.to_out_lora{{}}.weight": f"unet.{BLOCK}.to_out.0",
    f"unet.{BLOCK}.processor.add_k_proj_lora{{}}.weight": f"unet.{BLOCK}.add_k_proj",
    f"unet.{BLOCK}.to_out.0.lora{{}}.weight": f"unet.{BLOCK}.to_out.0",
    f"unet.{BLOCK}.processor.to_v.lora{{}}.weight": f"unet.{BLOCK}.to_v",
    f"text_encoder.{ENCODER}.to_q_lora{{}}.weight": f"text_encoder.{ENCODER}.q_proj",
    f"text_encoder.{ENCODER}.to_out_lora{{}}.weight": f"text_encoder.{ENCODER}.out_proj",
    f"text_encoder_2.{ENCODER}.k_proj.lora_linear_layer{{}}.weight": f"text_encoder_2.{ENCODER}.k_proj",
    "text_encoder_2.text_projection.lora{}.weight": "text_encoder_2.text_projection",
    "double_blocks.7.processor.qkv_lora1{}.weight": "double_blocks.7.img_attn.qkv",
    "double_blocks.7.processor.qkv_lora2{}.weight": "double_blocks.7.txt_attn.qkv",
    "diffusion_model.double_blocks.7.processor.proj_lora1{}.weight": "diffusion_model.double_blocks.7.img_attn.proj",
    "double_blocks.7.processor.proj_lora2{}.weight": "double_blocks.7.txt_attn.proj",
    "single_blocks.3.processor.proj_lora{}.weight": "single_blocks.3.linear2",
}
PEFT_NAMES = {
    f"unet.{BLOCK}.to_q.lora_{{}}.weight": f"unet.{BLOCK}.to_q",
    "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight": "transformer.transformer_blocks.0.attn.to_q",
    "transformer.blocks.1.attn1.to_out.0.lora_{}.weight": "transformer.blocks.1.attn1.to_out.0",
    "transformer.single_transformer_blocks.5.proj_out.lora_{}.weight": (
        "transformer.single_transformer_blocks.5.proj_out"
    ),
    "transformer_blocks.0.attn.to_q.lora_{}.default.weight": "transformer_blocks.0.attn.to_q",
    f"text_encoder.{ENCODER}.q_proj.lora_{{}}.weight": f"text_encoder.{ENCODER}.q_proj",
    f"text_encoder_3.{ENCODER}.q_proj.lora_{{}}.style.weight": f"text_encoder_3.{ENCODER}.q_proj",
    "diffusion_model.blocks.0.self_attn.q.lora_{}.weight": "diffusion_model.blocks.0.self_attn.q",
    "double_blocks.0.img_attn.qkv.lora_{}.weight": "double_blocks.0.img_attn.qkv",
}
ALL_NAMES = (
    {(k.format(".down"), k.format(".up")): v for k, v in NAMES.items()}
    | {(k.format("A"), k.format("B")): v for k, v in PEFT_NAMES.items()}
    | {
        ("diffusion_model.blocks.0.ffn.0.lora_down.weight", "diffusion_model.blocks.0.ffn.0.lora_up.weight"): (
            "diffusion_model.blocks.0.ffn.0"
        )
    }
)


@pytest.mark.parametrize(("keys", "module"), ALL_NAMES.items(), ids=ALL_NAMES.values())
def test_names_of_every_age_become_the_bases(tmp_path: Path, keys: tuple[str, str], module: str) -> None:
    down, up = factors()
    path = written(tmp_path, dict(zip(keys, (down, up), strict=True)))
    adapter = load_adapter(path)
    assert (adapter.format, list(adapter)) == ("diffusers", [module])
    described = adapter.modules[module]
    assert (described.shape, described.r, described.scale) == ((D_OUT, D_IN), R, 1.0)
    assert described.scale_source == "format default"
    assert described.target == Target(f"{module}.weight")
    oracle = product(down, up)
    np.testing.assert_allclose(adapter[module].dense().numpy(), oracle, rtol=0, atol=DENSE * np.abs(oracle).max())
    assert_accounted_for(adapter, path)


LANGUAGE_MODELS = [
    "transformer.h.0.attn.c_attn",
    "transformer.blocks.0.attn.Wqkv",
    "transformer.encoder.layers.0.self_attention.query_key_value",
    "base_model.model.transformer_blocks.0.attn.to_q",
    "model.layers.0.self_attn.q_proj",
]


@pytest.mark.parametrize("module", LANGUAGE_MODELS)
def test_peft_files_of_other_models_are_not_taken_for_diffusers(tmp_path: Path, module: str) -> None:
    """Their scale is not 1 by default."""
    adapter = load_adapter(written(tmp_path, pair(module, *factors(), PEFT_ENDS)))
    assert adapter.format == "peft"
    assert {m.scale_source for m in adapter.modules.values()} == {"unknown"}


def test_components_lie_side_by_side(tmp_path: Path) -> None:
    tensors = pair(f"unet.{BLOCK}.to_q", *factors(), PEFT_ENDS)
    old = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    tensors |= pair(f"text_encoder.{ENCODER}.q_proj", *factors(), old)
    tensors |= pair(f"text_encoder_2.{ENCODER}.q_proj", *factors(r=2), PEFT_ENDS)
    adapter = load_adapter(written(tmp_path, tensors))
    assert list(adapter) == [
        f"text_encoder.{ENCODER}.q_proj",
        f"text_encoder_2.{ENCODER}.q_proj",
        f"unet.{BLOCK}.to_q",
    ]
    assert [module.r for module in adapter.modules.values()] == [R, 2, R]


def test_a_fused_qkv_of_a_single_block_is_the_first_rows_of_its_layer(tmp_path: Path) -> None:
    down, up = factors(d_in=4, d_out=12)
    tensors = pair("single_blocks.0.processor.qkv_lora", down, up, (".down.weight", ".up.weight"))
    adapter = load_adapter(written(tmp_path, tensors))
    assert adapter.targets == {"single_blocks.0.linear1.qkv": Target("single_blocks.0.linear1.weight", rows=(0, 12))}
    weight = torch.randn(28, 4)
    base = load_base({"single_blocks.0.linear1.weight": weight})
    name = "single_blocks.0.linear1.qkv"
    assert torch.equal(base.matrix(adapter.targets[name], adapter[name].shape), weight[:12])
    tensors["single_blocks.0.processor.qkv_lora.up.weight"] = torch.randn(11, R)
    with pytest.raises(AdapterFormatError, match=r"expected the update of q, k and v together, \(3·dim, dim\), got"):
        load_adapter(written(tmp_path, tensors))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3,), (1, 2, 2)], ids=str)
def test_convolutions_are_unfolded(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    down, up = factors(kernel=kernel)
    adapter = load_adapter(written(tmp_path, pair("unet.down_blocks.0.resnets.0.conv1", down, up, PEFT_ENDS)))
    name = "unet.down_blocks.0.resnets.0.conv1"
    assert adapter.modules[name].shape == (D_OUT, D_IN * math.prod(kernel))
    assert adapter.targets[name].kernel == kernel
    np.testing.assert_allclose(adapter[name].dense().numpy(), product(down, up), atol=1e-12)


class Unet(nn.Module):
    """A model with names of a UNet's and one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(D_IN, D_OUT)
        self.to_k = nn.Linear(D_IN, D_IN)
        self.conv1 = nn.Conv2d(4, 6, 3)
        self.token_embedding = nn.Embedding(11, 5)


def adapted(**fields: Any) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A model with random LoRA layers; its configuration, its saved tensors and its base weights."""
    model: Any = Unet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "conv1"], **fields)
    model = inject_adapter_in_model(config, model, adapter_name="style")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    tensors = get_peft_model_state_dict(model, adapter_name="style")
    fields = {
        key: list(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if value is None or isinstance(value, str | int | float | bool | dict | list | set)
    }
    return model, fields, tensors, before


def change(model: Any, layer: str, before: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """What PEFT's own merging adds to a weight, unfolded."""
    module = model.get_submodule(layer)
    module.double()
    module.merge()
    after = module.get_base_layer().weight.detach()
    delta: NDArray[np.float64] = (after - before[f"{layer}.weight"].double()).flatten(1).numpy()
    return delta


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {"lora_alpha": 12, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"^to_q": 5, "conv1": 3}},
}


@pytest.mark.parametrize("prefixed", [True, False], ids=["pipeline", "model"])
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_scales_of_the_header_are_those_peft_merges_with(
    tmp_path: Path, fields: dict[str, Any], prefixed: bool
) -> None:
    model, config, tensors, before = adapted(**fields)
    prefix = "unet." if prefixed else ""
    header = {f"{prefix}{key}": value for key, value in config.items()}
    path = written(tmp_path, {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, header)
    adapter = load_adapter(path)
    assert adapter.format == "diffusers"
    assert list(adapter) == [f"{prefix}{name}" for name in ("conv1", "to_k", "to_q")]
    assert {module.scale_source for module in adapter.modules.values()} == {"header"}
    assert adapter.notes == ()
    for name, update in adapter.items():
        oracle = change(model, name.removeprefix(prefix), before)
        np.testing.assert_allclose(update.dense().numpy(), oracle, rtol=0, atol=DENSE * np.abs(oracle).max())
    assert_accounted_for(adapter, path)


def test_each_component_has_its_own_header(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | pair("text_encoder.q_proj", *factors(), PEFT_ENDS)
    flat = {"unet.r": R, "unet.lora_alpha": 6, "text_encoder.r": R, "text_encoder.lora_alpha": 12}
    nested = {"unet": {"r": R, "lora_alpha": 6}, "text_encoder": {"r": R, "lora_alpha": 12}}
    for header in (flat, nested):
        adapter = load_adapter(written(tmp_path, tensors, header))
        assert {name: module.scale for name, module in adapter.modules.items()} == {
            "text_encoder.q_proj": 12 / R,
            "unet.to_q": 6 / R,
        }
    only = load_adapter(written(tmp_path, tensors, {"unet.r": R, "unet.lora_alpha": 6}))
    assert only.modules["text_encoder.q_proj"].scale_source == "format default"
    assert only.modules["text_encoder.q_proj"].scale == 1.0


def test_a_header_of_a_component_that_is_not_there_is_noted(tmp_path: Path) -> None:
    header = {"transformer.r": R, "transformer.lora_alpha": 12}
    path = written(tmp_path, pair("diffusion_model.blocks.0.q", *factors(), PEFT_ENDS), header)
    adapter = load_adapter(path)
    assert adapter.modules["diffusion_model.blocks.0.q"].scale == 1
    (note,) = adapter.notes
    assert note.startswith("lora_adapter_metadata speaks of 'transformer', which no module is in, and not of 1 modules")
    # A component that was not saved is no matter as long as the others are spoken of.
    header |= {"unet.r": R, "unet.lora_alpha": 6}
    adapter = load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS), header))
    assert (adapter.modules["unet.to_q"].scale, adapter.notes) == (6 / R, ())


def test_an_empty_header_of_a_component_says_nothing(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS), {"unet": {}}))
    assert (adapter.modules["unet.to_q"].scale, adapter.modules["unet.to_q"].scale_source) == (1, "format default")


def test_one_disagreement_of_many_modules_is_one_note(tmp_path: Path) -> None:
    tensors = {}
    for i in range(300):
        tensors |= pair(f"unet.{i}.to_q", *factors(), PEFT_ENDS)
    notes = load_adapter(written(tmp_path, tensors, {"unet.r": 16, "unet.lora_alpha": 6})).notes
    (note,) = notes
    assert note.endswith(f": the header says r=16, the tensors have r={R}; they win. The same of 299 others.")


def test_a_header_without_alpha_means_pefts_default(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS), {"unet.r": R}))
    module = adapter.modules["unet.to_q"]
    assert (module.scale, module.scale_source) == (LoraConfig().lora_alpha / R, "format default")
    assert any("holds no lora_alpha" in note and "unet" in note for note in adapter.notes)


ALPHAS = {
    f"unet.{BLOCK}.processor.to_q_lora.alpha": f"unet.{BLOCK}.processor.to_q_lora",
    f"unet.{BLOCK}.processor.to_q_lora.down.weight.alpha": f"unet.{BLOCK}.processor.to_q_lora",
    f"unet.{BLOCK}.to_q.alpha": f"unet.{BLOCK}.processor.to_q_lora",
    f"unet.{BLOCK}.to_out.0.lora.alpha": f"unet.{BLOCK}.to_out.0.lora",
    f"unet.{BLOCK}.to_out.0.alpha": f"unet.{BLOCK}.to_out.0.lora",
    f"text_encoder.{ENCODER}.q_proj.lora_linear_layer.alpha": f"text_encoder.{ENCODER}.q_proj.lora_linear_layer",
}


@pytest.mark.parametrize(("key", "stem"), ALPHAS.items(), ids=range(len(ALPHAS)))
@pytest.mark.parametrize("alpha", [torch.tensor(6.0), torch.tensor([6]), torch.tensor(6.0, dtype=torch.bfloat16)])
def test_a_modules_own_alpha_is_found(tmp_path: Path, key: str, stem: str, alpha: Tensor) -> None:
    down, up = factors()
    path = written(tmp_path, pair(stem, down, up, (".down.weight", ".up.weight")) | {key: alpha})
    adapter = load_adapter(path)
    ((name, module),) = adapter.modules.items()
    assert (module.scale, module.scale_source) == (6 / R, "tensor")
    assert key in module.tensors
    np.testing.assert_allclose(adapter[name].dense().numpy(), 6 / R * product(down, up), atol=1e-12)
    assert_accounted_for(adapter, path)


def test_sources_of_alpha_in_their_order(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {"unet.to_q.alpha": torch.tensor(6.0)}
    path = written(tmp_path, tensors, {"unet.r": R, "unet.lora_alpha": 12})
    adapter = load_adapter(path)
    assert (adapter.modules["unet.to_q"].scale, adapter.modules["unet.to_q"].scale_source) == (2.0, "tensor")
    assert adapter.notes == ("unet.to_q: its alpha tensor gives scale 2, the header 4; the tensor wins.",)
    told = load_adapter(path, alpha=30).modules["unet.to_q"]
    assert (told.scale, told.scale_source) == (10.0, "caller")
    rooted = written(tmp_path, tensors, {"unet.r": R, "unet.lora_alpha": 12, "unet.use_rslora": True})
    assert load_adapter(rooted, alpha=30).modules["unet.to_q"].scale == 30 / math.sqrt(R)


def test_zero_alpha_is_a_scale_of_zero(tmp_path: Path) -> None:
    """As diffusers, which hands it to PEFT, and unlike kohya."""
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {"unet.to_q.alpha": torch.tensor(0.0)}
    adapter = load_adapter(written(tmp_path, tensors))
    assert adapter.modules["unet.to_q"].scale == 0.0


BAD_ALPHAS = {
    "nan": (torch.tensor(math.nan), "expected a finite alpha, got nan. Pass alpha="),
    "infinite": (torch.tensor(math.inf), "expected a finite alpha, got inf"),
    "vector": (torch.ones(2), r"expected one number, got shape \(2,\)"),
    "empty": (torch.ones(0), r"expected one number, got shape \(0,\)"),
}


@pytest.mark.parametrize(("alpha", "match"), BAD_ALPHAS.values(), ids=BAD_ALPHAS)
def test_an_alpha_that_is_none_is_refused(tmp_path: Path, alpha: Tensor, match: str) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {"unet.to_q.alpha": alpha}
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(written(tmp_path, tensors))


def test_a_rank_that_the_header_denies_is_reported(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS)
    adapter = load_adapter(written(tmp_path, tensors, {"unet.r": 16, "unet.lora_alpha": 16}))
    assert adapter.notes == (f"unet.to_q: the header says r=16, the tensors have r={R}; they win.",)
    assert adapter.modules["unet.to_q"].scale == 16 / R


BAD_HEADERS: dict[str, tuple[object, type[Exception], str]] = {
    "list": ([1], AdapterFormatError, "expected an object, got list"),
    "alpha": ({"unet.r": 4, "unet.lora_alpha": "x"}, AdapterFormatError, "lora_alpha: expected a finite number"),
    "rank": ({"unet.r": 0, "unet.lora_alpha": 1}, AdapterFormatError, "r: expected a positive integer, got 0"),
    "pattern": ({"unet.r": 4, "unet.alpha_pattern": {"(": 1}}, AdapterFormatError, "alpha_pattern: expected"),
    "pissa": ({"unet.init_lora_weights": "pissa"}, UnsupportedAdapterError, "initialised by 'pissa', which may have"),
    "qalora": ({"unet.use_qalora": True}, UnsupportedAdapterError, "use_qalora is set"),
    "experts": ({"unet.target_parameters": ["w"]}, UnsupportedAdapterError, "target_parameters is set"),
    "dora": ({"unet.use_dora": True}, AdapterFormatError, "expected a magnitude beside its factors"),
}


@pytest.mark.parametrize(("header", "error", "match"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_cannot_be_followed_is_refused(
    tmp_path: Path, header: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS), header))


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(pair("unet.to_q", *factors(), PEFT_ENDS), path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterFormatError, match="lora_adapter_metadata in its header: expected a JSON object"):
        load_adapter(path)


def test_one_of_several_adapters_is_chosen_by_name(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, r in (("style", 2), ("face", 4)):
        ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
        tensors |= pair("unet.to_q", *factors(r=r), ends)
    path = written(tmp_path, tensors)
    with pytest.raises(AdapterFormatError, match=r"holds several adapters \('face', 'style'\). Pass name="):
        load_adapter(path)
    adapter = load_adapter(path, name="face")
    assert adapter.modules["unet.to_q"].r == 4
    assert {unused.reason for unused in adapter.unused} == {"a factor of another adapter in the same file"}
    assert_accounted_for(adapter, path)
    with pytest.raises(AdapterFormatError, match="holds several adapters"):
        load_adapter(path, name="other")
    with pytest.raises(AdapterFormatError, match="expected an adapter named 'x', found one without a name"):
        load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS)), name="x")


def test_factors_without_a_name_are_not_part_of_an_adapter_that_has_one(tmp_path: Path) -> None:
    named = pair("unet.to_q", *factors(r=4), (".lora_A.face.weight", ".lora_B.face.weight"))
    nameless = pair("unet.to_k", *factors(r=2), PEFT_ENDS) | {"unet.to_k.lora_magnitude_vector": torch.ones(D_OUT)}
    path = written(tmp_path, named | nameless)
    assert list(load_adapter(path)) == ["unet.to_k"]
    adapter = load_adapter(path, name="face")
    assert list(adapter) == ["unet.to_q"]
    assert {item.tensor for item in adapter.unused} == nameless.keys()
    assert {item.reason for item in adapter.unused} == {"a factor of another adapter in the same file"}
    # Where all factors have a name, magnitudes without one are theirs.
    path = written(tmp_path, named | {"unet.to_q.lora_magnitude_vector": torch.ones(D_OUT)})
    assert load_adapter(path).modules["unet.to_q"].flags == ("dora-low-rank-part",)


@pytest.mark.parametrize("ending", ["", ".weight"], ids=["peft", "diffusers"])
def test_dora_with_a_base_is_what_peft_merges(tmp_path: Path, ending: str) -> None:
    model, config, tensors, before = adapted(lora_alpha=12, use_dora=True)
    named = {
        f"unet.{name}{ending if name.endswith('lora_magnitude_vector') else ''}": tensor
        for name, tensor in tensors.items()
    }
    path = written(tmp_path, named, {f"unet.{key}": value for key, value in config.items()})
    adapter = load_adapter(path)
    assert {module.flags for module in adapter.modules.values()} == {("dora-low-rank-part",)}
    assert [note for note in adapter.notes if "DoRA" in note] == [
        "3 modules have DoRA magnitudes, which rescale the merged weight: what is given is their low-rank part. "
        "Pass base= for the true update."
    ]
    base = load_base({f"unet.{name}": tensor for name, tensor in before.items()})
    true = load_adapter(path, base=base)
    assert {module.flags for module in true.modules.values()} == {()}
    assert true.notes == ()
    for name, update in true.items():
        layer = name.removeprefix("unet.")
        part = adapter[name].dense().numpy()
        np.testing.assert_allclose(
            part, 3 * product(tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]), atol=1e-5
        )
        oracle = change(model, layer, before)
        np.testing.assert_allclose(update.dense().numpy(), oracle, rtol=0, atol=1e-6 * np.abs(oracle).max())
        assert update.r == 4
        magnitude = true.modules[name].magnitude
        assert magnitude is not None
        assert torch.equal(magnitude(), tensors[f"{layer}.lora_magnitude_vector"])
    assert_accounted_for(true, path)


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
def test_dora_scale_is_read_as_lycoris_writes_it(tmp_path: Path, axis: int, kernel: tuple[int, ...]) -> None:
    down, up = factors(d_in=6, d_out=6, kernel=kernel)
    ones = (1,) * len(kernel)
    scale = torch.rand(6, 1, *ones) if axis == 1 else torch.rand(1, 6, *ones)
    weight = torch.randn(6, 6, *kernel)
    path = written(tmp_path, pair("unet.conv1", down, up, PEFT_ENDS) | {"unet.conv1.dora_scale": scale})
    adapter = load_adapter(path, base=load_base({"unet.conv1.weight": weight}))
    assert adapter.modules["unet.conv1"].magnitude_axis == axis
    merged = weight.double() + torch.from_numpy(product(down, up)).view(weight.shape)
    over = tuple(i for i in range(merged.ndim) if i != 1 - axis)
    oracle = scale.double() * merged / merged.pow(2).sum(over, keepdim=True).sqrt() - weight
    np.testing.assert_allclose(adapter["unet.conv1"].dense().numpy(), oracle.flatten(1).numpy(), atol=1e-12)


def test_the_oldest_names_have_magnitudes_too(tmp_path: Path) -> None:
    """Where diffusers converted kohya's: ``…to_out_lora`` beside ``…to_out.lora_magnitude_vector.weight``."""
    stem = f"unet.{BLOCK}.processor.to_out"
    tensors = pair(f"{stem}_lora", *factors(), (".down.weight", ".up.weight"))
    path = written(tmp_path, tensors | {f"{stem}.lora_magnitude_vector.weight": torch.rand(D_OUT)})
    adapter = load_adapter(path)
    assert list(adapter) == [f"unet.{BLOCK}.to_out.0"]
    assert adapter.modules[f"unet.{BLOCK}.to_out.0"].magnitude is not None
    assert adapter.unused == ()


@pytest.mark.parametrize("shape", [(D_IN,), (D_OUT, 2), (), (1, D_OUT + 1)], ids=str)
def test_magnitudes_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {"unet.to_q.lora_magnitude_vector": torch.rand(shape)}
    with pytest.raises(AdapterFormatError, match=r"'unet\.to_q': expected one magnitude for each of its 8 output rows"):
        load_adapter(written(tmp_path, tensors))


def test_dora_with_a_base_that_lacks_the_weight_is_refused(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {"unet.to_q.lora_magnitude_vector": torch.rand(D_OUT)}
    adapter = load_adapter(written(tmp_path, tensors), base=load_base({"other.weight": torch.ones(D_OUT, D_IN)}))
    with pytest.raises(BaseWeightsError, match=r"expected the tensor 'unet\.to_q\.weight'"):
        adapter["unet.to_q"]


def test_embeddings_are_maps_from_words_to_vectors(tmp_path: Path) -> None:
    down, up = factors(d_in=11, d_out=5)
    ends = (".lora_embedding_A", ".lora_embedding_B")
    name = "text_encoder.text_model.embeddings.token_embedding"
    adapter = load_adapter(written(tmp_path, pair(name, down, up, ends)))
    assert adapter.targets == {name: Target(f"{name}.weight", transposed=True)}
    np.testing.assert_allclose(adapter[name].dense().numpy(), product(down, up), atol=1e-12)


def test_what_lies_beside_the_factors_is_listed(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {
        "unet.to_q.lora_B.bias": torch.ones(D_OUT),
        "unet.norm.diff": torch.ones(4),
        "unet.to_q.diff_b": torch.ones(D_OUT),
        "unet.snake.alpha": torch.ones(4),
        "unet.conv_in.weight": torch.ones(4, 2),
        "unet.conv_in.bias": torch.ones(4),
    }
    path = written(tmp_path, tensors)
    adapter = load_adapter(path)
    assert list(adapter) == ["unet.to_q"]
    assert {unused.tensor: unused.reason for unused in adapter.unused} == {
        "unet.to_q.lora_B.bias": "lora_bias: adds scale times it to the output, no part of ΔW",
        "unet.norm.diff": "a full tensor, no part of any update",
        "unet.to_q.diff_b": "diff_b: added to a bias, no part of ΔW",
        "unet.snake.alpha": "beside no factors, no part of any update",
        "unet.conv_in.weight": "a full tensor, no part of any update",
        "unet.conv_in.bias": "bias: a full bias in place of the base's",
    }
    assert_accounted_for(adapter, path)


LEFT_OVER: dict[str, tuple[type[Exception], str]] = {
    "unet.to_q.lora_C.weight": (AdapterFormatError, "'unet.to_q.lora_C.weight': expected the tensors of LoRA to be"),
    "unet.to_k.hada_w1_a": (UnsupportedAdapterError, r"expected updates of one kind, .*another \(LyCORIS\)"),
    "unet.to_k.lora_mid.weight": (AdapterFormatError, "this one's name is none known here"),
    "unet.to_k.diff": (UnsupportedAdapterError, r"another \(LyCORIS, a full difference\)"),
    "unet.to_k.dora_scale": (UnsupportedAdapterError, r"another \(DoRA\)"),
    "unet.to_k.lora_magnitude_vector.weight": (AdapterFormatError, "this one's name is none known here"),
    "unet.to_k.lora_A.weight": (AdapterFormatError, "'unet.to_k': expected down and up factors.*up is missing"),
    "unet.to_k.lora.up.weight": (AdapterFormatError, "'unet.to_k': expected down and up factors.*down is missing"),
    "unet.processor.to_q_lora.down.weight": (AdapterFormatError, "'unet.to_q': expected one down, got"),
}


@pytest.mark.parametrize("key", LEFT_OVER)
def test_a_file_is_read_whole_or_refused(tmp_path: Path, key: str) -> None:
    error, match = LEFT_OVER[key]
    tensors = pair("unet.to_q", *factors(), PEFT_ENDS) | {key: torch.ones(4, 4)}
    with pytest.raises(error, match=match):
        load_adapter(written(tmp_path, tensors), format="diffusers")


SHAPES = [
    ((3, 10), (8, 4)),
    ((3,), (8, 3)),
    ((3, 10), (8,)),
    ((0, 10), (8, 0)),
    ((3, 0), (8, 3)),
    ((3, 10), (0, 3)),
    ((3, 10, 3, 3), (8, 3, 3, 3)),
    ((), ()),
]


@pytest.mark.parametrize(("down", "up"), SHAPES, ids=str)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    tensors = pair("unet.to_q", torch.ones(down), torch.ones(up), PEFT_ENDS)
    with pytest.raises(AdapterFormatError, match=r"'unet\.to_q': expected down .* to share r, got"):
        load_adapter(written(tmp_path, tensors))


def test_factors_of_integers_are_refused(tmp_path: Path) -> None:
    tensors = pair("unet.to_q", torch.ones(3, 10, dtype=torch.int32), torch.ones(8, 3), PEFT_ENDS)
    with pytest.raises(AdapterFormatError, match="expected floating-point factors"):
        load_adapter(written(tmp_path, tensors))


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    name = "unet.\n\x1b[31m" + "9" * 5000 + ".to_q"
    tensors = pair(name, *factors(), PEFT_ENDS)
    adapter = load_adapter(written(tmp_path, tensors, {"unet.r": 16, "unet.lora_alpha": 16}))
    assert list(adapter) == [name]
    assert all(note.isprintable() for note in adapter.notes)
    assert len(adapter.notes) == 1


@pytest.mark.parametrize("name", ["unet.", "unet.processor", "unet.a..to_q", "unet.lora_down.x"])
def test_odd_names_stay_themselves(tmp_path: Path, name: str) -> None:
    adapter = load_adapter(written(tmp_path, pair(name, *factors(), PEFT_ENDS)))
    assert len(adapter) == 1
    assert adapter.unused == ()


def test_a_configuration_of_pefts_makes_it_pefts(tmp_path: Path) -> None:
    save_file(pair(f"base_model.model.{BLOCK}.to_q", *factors(), PEFT_ENDS), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6}))
    adapter = load_adapter(tmp_path)
    assert (adapter.format, list(adapter)) == ("peft", [f"{BLOCK}.to_q"])


def test_a_folder_of_training_holds_other_files_too(tmp_path: Path) -> None:
    written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS))
    torch.save({"state": torch.ones(2)}, tmp_path / "optimizer.bin")
    assert list(load_adapter(tmp_path)) == ["unet.to_q"]


def test_an_adapter_pickles_as_its_source(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pair("unet.to_q", *factors(), PEFT_ENDS)), alpha=6)
    again = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(again["unet.to_q"].dense(), adapter["unet.to_q"].dense())
    assert again.modules["unet.to_q"].scale == 2.0


@pytest.mark.parametrize("folder", ["sd_pokemon", "sd15_attn_processor"])
def test_modules_of_real_files_have_their_models_names(shared_adapters: Path, folder: str) -> None:
    path = shared_adapters / "diffusers" / folder
    tensors = load_file(path / "pytorch_lora_weights.safetensors")
    adapter = load_adapter(path)
    assert adapter.format == "diffusers"
    assert len(adapter) == 128
    assert (adapter.unused, adapter.notes) == ((), ())
    assert sorted(adapter.ledger) == sorted(tensors)
    prefix = "unet." if folder == "sd_pokemon" else ""
    assert {name.split(".")[-1] for name in adapter} == {"to_q", "to_k", "to_v", "0"}
    assert all(
        name.startswith((f"{prefix}down_blocks.", f"{prefix}mid_block.", f"{prefix}up_blocks.")) for name in adapter
    )
    assert not any("lora" in name or "processor" in name for name in adapter)
