"""kohya's files against the rule of its trainer, written out in numpy, and its names against bases that hold them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.errors import AdapterFormatError, BaseWeightsError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.unet_names import diffusers_form
from lora_analysis.update import LowRankUpdate, rounding_error

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UNET_PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ENCODER = "text_model_encoder_layers_0_self_attn_q_proj"
ENCODER_PATH = "text_model.encoder.layers.0.self_attn.q_proj"


def pair(d_out: int = 6, d_in: int = 5, r: int = 2, alpha: float | None = 1.0) -> dict[str, Tensor]:
    parts = {"lora_up.weight": torch.randn(d_out, r), "lora_down.weight": torch.randn(r, d_in)}
    return parts if alpha is None else parts | {"alpha": torch.tensor(alpha)}


def written(folder: Path, modules: dict[str, dict[str, Tensor]], **metadata: str) -> Path:
    tensors = {f"{stem}.{key}": value for stem, parts in modules.items() for key, value in parts.items()}
    save_file(tensors, folder / "x.safetensors", metadata=metadata or None)
    return folder / "x.safetensors"


def loaded(folder: Path, modules: dict[str, dict[str, Tensor]], **options) -> Adapter:
    return load_adapter(written(folder, modules), **options)


def test_a_linear_update_is_up_times_down_by_alpha_over_r(tmp_path: Path) -> None:
    parts = pair(alpha=3.0)
    adapter = loaded(tmp_path, {UNET: parts})
    up, down = (parts[f"lora_{side}.weight"].numpy().astype(float) for side in ("up", "down"))
    np.testing.assert_allclose(adapter[UNET].dense(), 3.0 / 2 * np.einsum("pi,iq->pq", up, down), rtol=1e-12)
    assert adapter.format == "kohya"
    module = adapter.modules[UNET]
    assert (module.shape, module.r, module.scale, module.scale_source) == ((6, 5), 2, 1.5, "tensor")
    assert dict(adapter.ledger) == {f"{UNET}.{key}": f"used by {UNET}" for key in parts}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5)])
def test_a_convolution_is_unfolded(tmp_path: Path, kernel: tuple[int, int]) -> None:
    up, down = torch.randn(6, 2, 1, 1), torch.randn(2, 5, *kernel)
    adapter = loaded(tmp_path, {UNET: {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}})
    expected = 0.5 * np.einsum("pi,iqxy->pqxy", up[:, :, 0, 0].numpy().astype(float), down.numpy().astype(float))
    np.testing.assert_allclose(adapter[UNET].dense(), expected.reshape(6, -1), rtol=1e-12)
    assert adapter.modules[UNET].target.kernel == kernel
    # And as kohya's merge_to computes it, by convolving the one with the other.
    conved = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    torch.testing.assert_close(adapter[UNET].dense().float(), 0.5 * conved.flatten(1))


@pytest.mark.parametrize(
    ("alpha", "scale", "source"),
    [
        (torch.tensor(1.0), 0.5, "tensor"),
        (torch.tensor([4.0]), 2.0, "tensor"),
        (torch.tensor(16, dtype=torch.int64), 8.0, "tensor"),
        (torch.tensor(1.0, dtype=torch.bfloat16), 0.5, "tensor"),
        (torch.tensor(0.0), 1.0, "format default"),
        (None, 1.0, "format default"),
    ],
    ids=str,
)
def test_no_alpha_and_zero_mean_r(tmp_path: Path, alpha: Tensor | None, scale: float, source: str) -> None:
    parts = pair(alpha=None) | ({} if alpha is None else {"alpha": alpha})
    module = loaded(tmp_path, {UNET: parts}).modules[UNET]
    assert (module.scale, module.scale_source) == (scale, source)
    module = loaded(tmp_path, {UNET: parts}, alpha=6).modules[UNET]
    assert (module.scale, module.scale_source) == (3.0, "caller")


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "expected a plausible finite number, got nan"),
        (torch.tensor(float("inf")), "expected a plausible finite number, got inf"),
        (torch.ones(2), r"expected one number, got shape \(2,\)"),
        (torch.ones(0), r"expected one number, got shape \(0,\)"),
    ],
    ids=str,
)
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Tensor, message: str) -> None:
    modules = {UNET: pair(alpha=None) | {"alpha": alpha}}
    with pytest.raises(AdapterFormatError, match=rf"{UNET}\.alpha': {message}"):
        loaded(tmp_path, modules)
    # As the message of a number that is none asks for.
    assert loaded(tmp_path, modules, alpha=3).modules[UNET].scale == 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_few_bits_are_read_exactly_and_known_as_coarsely(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = {key: value.to(dtype) if value.ndim else value for key, value in pair().items()}
    update = loaded(tmp_path, {UNET: parts})[UNET]
    up, down = (parts[f"lora_{side}.weight"].double() for side in ("up", "down"))
    torch.testing.assert_close(update.dense(), 0.5 * up @ down, rtol=1e-14, atol=0)
    assert update.eps == rounding_error(dtype)
    assert len(update.singular_values()) == 2


def test_numbers_of_one_byte_are_read_in_every_algorithm(tmp_path: Path) -> None:
    shapes = {
        "lora_unet_loha": {f"hada_w{i}_{side}": (9, 2) if side == "a" else (2, 8) for i in (1, 2) for side in "ab"},
        "lora_unet_lokr": {"lokr_w1": (3, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)},
        "lora_unet_full": {"diff": (9, 8)},
        "lora_unet_tucker": {
            "lora_up.weight": (9, 2, 1, 1),
            "lora_down.weight": (2, 2, 1, 1),
            "lora_mid.weight": (2, 2, 2, 2),
        },
    }
    modules = {
        stem: {part: torch.randn(shape).to(torch.float8_e4m3fn) for part, shape in parts.items()}
        for stem, parts in shapes.items()
    }
    exact = {stem: {part: factor.double() for part, factor in parts.items()} for stem, parts in modules.items()}
    adapter, double = loaded(tmp_path, modules), loaded(tmp_path, exact)
    for module, update in adapter.items():
        assert update.shape == (9, 8)
        torch.testing.assert_close(update.dense(), double[module].dense(), rtol=1e-12, atol=0)
        torch.testing.assert_close(update.singular_values(), double[module].singular_values())
        assert update.norm() == pytest.approx(double[module].norm(), rel=1e-12)


def test_dylora_saves_what_lora_saves(tmp_path: Path) -> None:
    # The rows it trains one by one, stacked on saving: up flat, down with its kernel.
    rows, columns = [torch.randn(1, 5, 3, 3) for _ in range(4)], [torch.randn(6, 1) for _ in range(4)]
    parts = {"lora_up.weight": torch.cat(columns, 1), "lora_down.weight": torch.cat(rows), "alpha": torch.tensor(2.0)}
    adapter = loaded(tmp_path, {UNET: parts})
    expected = 0.5 * sum(up.double() @ down.double().flatten(1) for up, down in zip(columns, rows, strict=True))
    torch.testing.assert_close(adapter[UNET].dense(), expected)


def test_control_lora_has_bare_factors_of_scale_1_beside_full_tensors(tmp_path: Path) -> None:
    up, down = torch.randn(6, 2, 1, 1), torch.randn(2, 5, 3, 3)
    tensors = {
        "lora_controlnet": torch.zeros(()),
        "input_blocks.1.0.in_layers.2.up": up,
        "input_blocks.1.0.in_layers.2.down": down,
        "input_blocks.1.0.in_layers.2.bias": torch.zeros(6),
        "input_hint_block.0.weight": torch.zeros(4, 3, 3, 3),
    }
    save_file(tensors, tmp_path / "x")
    adapter = load_adapter(tmp_path / "x")
    assert list(adapter) == ["input_blocks.1.0.in_layers.2"]
    module = adapter.modules["input_blocks.1.0.in_layers.2"]
    assert (module.scale, module.scale_source, module.target.kernel) == (1.0, "format default", (3, 3))
    expected = up.double().flatten(1) @ down.double().flatten(1)
    torch.testing.assert_close(adapter["input_blocks.1.0.in_layers.2"].dense(), expected)
    assert adapter.ledger["input_hint_block.0.weight"] == "a full tensor, no part of any update"
    assert set(adapter.ledger) == set(tensors)


# Names.


def test_without_a_base_stems_stay_verbatim(tmp_path: Path) -> None:
    stems = [f"lora_te1_{ENCODER}", f"lora_te2_{ENCODER}", UNET, "some.dotted.path"]
    adapter = loaded(tmp_path, {stem: pair() for stem in stems})
    assert set(adapter) == set(stems)
    assert adapter.modules[UNET].target.tensor == f"{UNET}.weight"


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_a_base_gives_back_the_dots(tmp_path: Path, prefix: str) -> None:
    base = {f"{prefix}{UNET_PATH}.weight": torch.randn(6, 5), f"{prefix}conv_in.weight": torch.randn(4, 3, 3, 3)}
    adapter = loaded(tmp_path, {UNET: pair()}, base=base)
    assert list(adapter) == [f"unet.{UNET_PATH}"]
    assert adapter.modules[f"unet.{UNET_PATH}"].target.tensor == f"{prefix}{UNET_PATH}.weight"


def test_components_find_their_own_part_of_a_pipeline(tmp_path: Path) -> None:
    stems = {
        f"lora_te1_{ENCODER}": 8,
        f"lora_te2_{ENCODER}": 8,
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": 8,
        UNET: 5,
    }
    base = {
        f"unet.{UNET_PATH}.weight": torch.randn(6, 5),
        f"text_encoder.{ENCODER_PATH}.weight": torch.randn(6, 8),
        f"text_encoder_2.{ENCODER_PATH}.weight": torch.randn(6, 8),
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(6, 8),
    }
    adapter = loaded(tmp_path, {stem: pair(d_in=d_in) for stem, d_in in stems.items()}, base=base)
    assert {f"{name}.weight" for name in adapter} == set(base)
    assert all(module.target.tensor == f"{name}.weight" for name, module in adapter.modules.items())


def test_single_file_checkpoints_have_prefixes_of_their_own(tmp_path: Path) -> None:
    base = {
        f"model.diffusion_model.{UNET_PATH}.weight": torch.randn(6, 5),
        f"conditioner.embedders.0.transformer.{ENCODER_PATH}.weight": torch.randn(6, 5),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj.weight": torch.randn(6, 5),
    }
    stems = [UNET, f"lora_te1_{ENCODER}", f"lora_te2_{ENCODER}"]
    adapter = loaded(tmp_path, {stem: pair() for stem in stems}, base=base)
    assert set(adapter) == {f"unet.{UNET_PATH}", f"text_encoder.{ENCODER_PATH}", f"lora_te2_{ENCODER}"}
    assert adapter.notes == (
        f"1 of 3 modules are not in the base (first: 'lora_te2_{ENCODER}'): they keep the file's names.",
    )


def test_flux_third_encoder_is_the_pipelines_second(tmp_path: Path) -> None:
    path = "encoder.block.0.layer.0.SelfAttention.q"
    base = {
        f"text_encoder_2.{path}.weight": torch.randn(6, 5),
        f"text_encoder.{ENCODER_PATH}.weight": torch.randn(6, 5),
    }
    stems = ["lora_te3_" + path.replace(".", "_"), f"lora_te1_{ENCODER}"]
    adapter = loaded(tmp_path, {stem: pair() for stem in stems}, base=base)
    assert set(adapter) == {f"text_encoder_2.{path}", f"text_encoder.{ENCODER_PATH}"}


def test_one_encoder_never_takes_the_others_weights(tmp_path: Path) -> None:
    base = {f"text_encoder.{ENCODER_PATH}.weight": torch.randn(6, 5)}
    with pytest.raises(BaseWeightsError, match="expected the base to hold its 1 modules, found none"):
        loaded(tmp_path, {f"lora_te2_{ENCODER}": pair()}, base=base)


def test_bare_encoders_are_told_apart_by_their_shapes_or_refused(tmp_path: Path) -> None:
    modules = {f"lora_te1_{ENCODER}": pair(d_in=5), f"lora_te2_{ENCODER}": pair(d_in=7)}
    adapter = loaded(tmp_path, modules, base={f"{ENCODER_PATH}.weight": torch.randn(6, 7)})
    assert set(adapter) == {f"lora_te1_{ENCODER}", f"text_encoder_2.{ENCODER_PATH}"}
    modules[f"lora_te1_{ENCODER}"] = pair(d_in=7)
    with pytest.raises(BaseWeightsError, match=r"'lora_te1_.*' and 'lora_te2_.*' could both be 'text_model\."):
        loaded(tmp_path, modules, base={f"{ENCODER_PATH}.weight": torch.randn(6, 7)})


def test_names_of_text_models_with_and_without_their_first_level(tmp_path: Path) -> None:
    short = ENCODER_PATH.removeprefix("text_model.")
    adapter = loaded(tmp_path, {f"lora_te_{ENCODER}": pair()}, base={f"{short}.weight": torch.randn(6, 5)})
    assert list(adapter) == [f"text_encoder.{short}"]


def test_underscores_that_could_be_either_of_two_paths_are_refused(tmp_path: Path) -> None:
    base = {"blocks.0.to_q.proj.weight": torch.randn(6, 5), "blocks.0.to.q_proj.weight": torch.randn(6, 5)}
    modules = {"lora_unet_blocks_0_to_q_proj": pair()}
    with pytest.raises(BaseWeightsError, match=r"could be 'blocks\.0\.to_q\.proj\.weight' or 'blocks\.0\.to\.q_proj"):
        loaded(tmp_path, modules, base=base)
    # The shape may decide.
    base["blocks.0.to.q_proj.weight"] = torch.randn(6, 4)
    assert list(loaded(tmp_path, modules, base=base)) == ["transformer.blocks.0.to_q.proj"]


def test_two_unknown_prefixes_that_serve_alike_are_refused(tmp_path: Path) -> None:
    base = {f"{prefix}.{UNET_PATH}.weight": torch.randn(6, 5) for prefix in ("ema", "student")}
    with pytest.raises(BaseWeightsError, match=r"could be 'ema\.down_blocks.* or 'student\.down_blocks"):
        loaded(tmp_path, {UNET: pair()}, base=base)


def test_two_transformers_of_one_pipeline_have_the_same_right_to_a_file(tmp_path: Path) -> None:
    base = {f"{component}.blocks.0.ffn.2.weight": torch.randn(6, 5) for component in ("transformer", "transformer_2")}
    with pytest.raises(BaseWeightsError, match=r"could be 'transformer\.blocks.* or 'transformer_2\.blocks"):
        loaded(tmp_path, {"lora_unet_blocks_0_ffn_2": pair()}, base=base)
    del base["transformer.blocks.0.ffn.2.weight"]
    (module,) = loaded(tmp_path, {"lora_unet_blocks_0_ffn_2": pair()}, base=base).values()
    assert module.shape == (6, 5)


def test_one_tensor_under_two_readings_of_its_prefix_is_one_tensor(tmp_path: Path) -> None:
    base = {f"pipe.encoder.{ENCODER_PATH}.weight": torch.randn(6, 5)}
    adapter = loaded(tmp_path, {f"lora_te_{ENCODER}": pair()}, base=base)
    assert [target.tensor for target in adapter.targets.values()] == [f"pipe.encoder.{ENCODER_PATH}.weight"]


def test_a_doubled_underscore_after_the_prefix_is_one(tmp_path: Path) -> None:
    modules = {"lora_unet__blocks_0_cross_attn_k": pair()}
    adapter = loaded(tmp_path, modules, base={"blocks.0.cross_attn.k.weight": torch.randn(6, 5)})
    assert list(adapter) == ["transformer.blocks.0.cross_attn.k"]


def test_a_convolution_is_not_found_turned_round(tmp_path: Path) -> None:
    parts = {"lora_up.weight": torch.randn(6, 2, 1, 1), "lora_down.weight": torch.randn(2, 5, 3, 3)}
    with pytest.raises(BaseWeightsError, match=r"'lora_unet_conv', 6x45: conv.weight has shape \(45, 6, 1, 1\)"):
        loaded(tmp_path, {"lora_unet_conv": parts}, base={"conv.weight": torch.randn(45, 6, 1, 1)})
    assert list(loaded(tmp_path, {"lora_unet_conv": parts}, base={"conv.weight": torch.randn(6, 5, 3, 3)}))


def test_a_base_of_another_model_is_an_error_that_says_why(tmp_path: Path) -> None:
    base = {f"{UNET_PATH}.weight": torch.randn(6, 9)}
    with pytest.raises(BaseWeightsError, match=r"attn1_to_q', 6x5: down_blocks.* has shape \(6, 9\)\).*trained on\?"):
        loaded(tmp_path, {UNET: pair()}, base=base)
    with pytest.raises(BaseWeightsError, match=r"no name fits"):
        loaded(tmp_path, {UNET: pair()}, base={"x.weight": torch.randn(6, 5)})


ORIGINAL = {
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.8.1.transformer_blocks.9.attn2.to_v": "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v",
    "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.5.1.transformer_blocks.0.ff.net.2": "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
"""Pairs of the table in diffusers' scripts/convert_diffusers_to_original_sdxl.py, one of each kind."""


@pytest.mark.parametrize("turned", [False, True], ids=["original file", "diffusers file"])
def test_original_blocks_and_diffusers_blocks_find_each_other(tmp_path: Path, turned: bool) -> None:
    names = {theirs: ours for ours, theirs in ORIGINAL.items()} if turned else ORIGINAL
    base = {f"{theirs}.weight": torch.randn(6, 5) for theirs in names.values()}
    modules = {"lora_unet_" + ours.replace(".", "_"): pair() for ours in names}
    adapter = loaded(tmp_path, modules, base=base)
    assert set(adapter) == {f"unet.{theirs}" for theirs in names.values()}
    for stem, theirs in zip(modules, names.values(), strict=True):
        assert adapter.ledger[f"{stem}.alpha"] == f"used by unet.{theirs}"


def test_no_two_original_blocks_share_a_diffusers_name() -> None:
    parts = ["0_in_layers_2", "0_op", "1_proj_in", "1_conv", "2_conv"]
    names = [f"{side}_blocks_{i}_{part}" for side in ("input", "output") for i in range(1, 12) for part in parts]
    forms = [diffusers_form(name) for name in names]
    # Upsampling is part 1 without attention and part 2 with it; no model has both.
    doubled = {form for form in forms if forms.count(form) > 1}
    assert doubled == {f"up_blocks_{level}_upsamplers_0_conv" for level in range(4)}


# What the file says of itself.


def test_a_header_that_disagrees_is_noted(tmp_path: Path) -> None:
    conv = {"lora_up.weight": torch.randn(6, 3, 1, 1), "lora_down.weight": torch.randn(3, 5, 3, 3)}
    modules = {UNET: pair(), "lora_unet_conv": conv | {"alpha": torch.tensor(1.0)}}
    arguments = json.dumps({"conv_dim": "4", "conv_alpha": "2"})
    header = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_network_args": arguments}
    adapter = load_adapter(written(tmp_path, modules, **header))
    assert adapter.notes == (
        "the header says r=8, 1 of 1 linear layers have another (first: 2); the tensors win.",
        "the header says alpha=4, 1 of 1 linear layers have another (first: 1); the tensors win.",
        "the header says r=4, 1 of 1 convolutions have another (first: 3); the tensors win.",
        "the header says alpha=2, 1 of 1 convolutions have another (first: 1); the tensors win.",
    )
    assert adapter.modules[UNET].scale == 0.5


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"},
        {"ss_network_dim": "2", "ss_network_alpha": "1.0"},
        {"ss_network_dim": "None", "ss_network_args": "{not json"},
        {"ss_network_dim": "nan", "ss_network_args": "[1]"},
        {"ss_network_dim": "2", "ss_network_args": "null"},
    ],
    ids=str,
)
def test_a_header_that_agrees_or_says_nothing_is_not_noted(tmp_path: Path, header: dict[str, str]) -> None:
    assert load_adapter(written(tmp_path, {UNET: pair()}, **header)).notes == ()


def test_alpha_in_the_header_alone_is_noted_and_not_applied(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, {UNET: pair(alpha=None)}, ss_network_alpha="1"))
    assert (adapter.modules[UNET].scale, adapter.modules[UNET].scale_source) == (1.0, "format default")
    assert "1 of 1 linear layers have no alpha tensor: they are read with alpha = r" in adapter.notes[0]


def test_rslora_in_the_header_explains_an_alpha_times_its_root(tmp_path: Path) -> None:
    header = {"ss_network_dim": "4", "ss_network_alpha": "3", "ss_network_args": json.dumps({"rs_lora": "True"})}
    assert load_adapter(written(tmp_path, {UNET: pair(r=4, alpha=6.0)}, **header)).notes == ()


def test_the_header_names_the_trainer(tmp_path: Path) -> None:
    assert load_adapter(written(tmp_path, {UNET: pair()}, ss_network_module="networks.lora")).format == "kohya"
    assert load_adapter(written(tmp_path, {UNET: pair()}, ss_network_module="lycoris.kohya")).format == "lycoris"


# Bad input.

BROKEN = {
    "no up": ({"lora_down.weight": torch.ones(2, 5)}, "got only lora_down.weight"),
    "no down": ({"lora_up.weight": torch.ones(6, 2)}, "got only lora_up.weight"),
    "two r": (
        {"lora_up.weight": torch.ones(6, 3), "lora_down.weight": torch.ones(2, 5)},
        r"to share r, got \(2, 5\), \(6, 3\)",
    ),
    "a kernel in up": (
        {"lora_up.weight": torch.ones(6, 2, 3, 3), "lora_down.weight": torch.ones(2, 5)},
        r"to share r, got \(2, 5\), \(6, 2, 3, 3\)",
    ),
    "a vector": ({"lora_up.weight": torch.ones(6), "lora_down.weight": torch.ones(2, 5)}, r"got shape \(6,\)"),
    "r = 0": ({"lora_up.weight": torch.ones(6, 0), "lora_down.weight": torch.ones(0, 5)}, r"got shape \(6, 0\)"),
    "integers": (
        {"lora_up.weight": torch.ones(6, 2).int(), "lora_down.weight": torch.ones(2, 5)},
        "expected floating-point factors, got torch.int32",
    ),
    "bias": (pair() | {"lora_up.bias": torch.ones(6)}, r"lora_up\.bias': .* none known here"),
    "an unknown part": (pair() | {"lora_side": torch.ones(6)}, r"lora_side': .* none known here"),
    "raw blocks": (pair() | {"lora_down.0.weight": torch.ones(2, 5)}, r"lora_down\.0\.weight': .* none known here"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    parts, message = BROKEN[case]
    with pytest.raises(AdapterFormatError, match=message) as caught:
        loaded(tmp_path, {UNET: parts, "lora_unet_other": pair()})
    assert UNET in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_control_characters_stay_on_one_line(tmp_path: Path) -> None:
    stem = "lora_unet_a\nb\x1b[31m"
    adapter = loaded(tmp_path, {stem: pair(), UNET: pair()}, base={f"{UNET_PATH}.weight": torch.randn(6, 5)})
    assert set(adapter) == {stem, f"unet.{UNET_PATH}"}
    assert not any(character in note for note in adapter.notes for character in "\n\x1b")
    with pytest.raises(AdapterFormatError, match="to share r") as caught:
        loaded(tmp_path, {stem: {"lora_up.weight": torch.ones(6, 3), "lora_down.weight": torch.ones(2, 5)}})
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_an_adapter_pickles_and_reads_the_same_numbers(tmp_path: Path) -> None:
    adapter = loaded(tmp_path, {UNET: pair()}, base={f"{UNET_PATH}.weight": torch.randn(6, 5)})
    again = pickle.loads(pickle.dumps(adapter))
    assert list(again) == list(adapter) == [f"unet.{UNET_PATH}"]
    update = again[f"unet.{UNET_PATH}"]
    assert isinstance(update, LowRankUpdate)
    torch.testing.assert_close(update.dense(), adapter[f"unet.{UNET_PATH}"].dense(), rtol=0, atol=0)
