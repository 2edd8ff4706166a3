"""What a conversion says it lost is all it lost, and no more."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from convertible import OPTIONS, destination, diffusion_model, language_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.convert import convert
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats import load_adapter, save_adapter
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate

FIRST = "model.layers.0.self_attn.q_proj"


def with_scales(adapter: Adapter, *scales: float) -> Adapter:
    updates = {}
    for i, (name, update) in enumerate(adapter.items()):
        assert isinstance(update, LowRankUpdate)
        updates[name] = LowRankUpdate(update.up, update.down, scales[i % len(scales)])
    return Adapter(updates, targets=adapter.targets, source=adapter.source)


@pytest.mark.parametrize("to", ["mlx", "gguf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_folding_a_scale_into_coarse_factors_is_a_loss_and_no_failure(
    tmp_path: Path, to: str, dtype: torch.dtype
) -> None:
    adapter = with_scales(language_model(dtype=dtype), 2.0, 2 / 3)
    done = convert(adapter, destination(tmp_path, to), to=to, **OPTIONS[to])
    what = "scale than 2" if to == "mlx" else "alpha than 8"
    assert done.losses == (
        f"3 modules of another {what}, which is folded into the factors.",
        f"3 modules rounded, by at most {done.largest_error:.1e} of their norm.",
    )
    assert done.errors[FIRST] < 1e-12
    eps = torch.finfo(dtype).eps
    assert 0.01 * eps < done.largest_error < eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_dtypes_that_the_format_does_not_compute_in_become_float32(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    up, down = (torch.randn(8, 3) / 3).to(dtype), torch.randn(3, 8).to(dtype)
    if dtype == torch.float64:
        up = up / 3
    adapter = Adapter({FIRST: LowRankUpdate(up, down, 1.0)})
    done = convert(adapter, destination(tmp_path, to), to=to, **OPTIONS[to])
    update = next(iter(load_adapter(done.path).values()))
    assert isinstance(update, LowRankUpdate)
    assert update.up.dtype == update.down.dtype == torch.float32
    assert len(done.losses) == (1 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("to", OPTIONS)
def test_scales_of_zero_and_below_come_back(tmp_path: Path, to: str) -> None:
    adapter = with_scales(language_model(), -1.5, 0.0, 3.0)
    done = convert(adapter, destination(tmp_path, to), to=to, **OPTIONS[to])
    assert done.largest_error < 1e-12
    back = load_adapter(done.path)
    zero = {name for name, update in back.items() if not update.dense().any()}
    assert len(zero) == 2
    keeps = to in ("peft", "diffusers")
    assert ("2 modules of scale 0 written as zeros, in place of its factors." in done.losses) == (not keeps)
    only = convert(with_scales(language_model(), 0.0), destination(tmp_path / "zero", to), to=to, **OPTIONS[to])
    assert only.largest_error == 0.0


@pytest.mark.parametrize("scale", [1e-45, 1e-60, 1e60])
@pytest.mark.parametrize("to", ["kohya", "gguf"])
def test_alphas_beyond_float32_are_refused(tmp_path: Path, to: str, scale: float) -> None:
    with pytest.raises(UnsupportedAdapterError, match="expected an alpha that a float32 can hold, got 4e"):
        convert(language_model(scale=scale), destination(tmp_path, to), to=to, **OPTIONS[to])


def test_blocks_of_other_scales_are_rounded_and_it_is_said(tmp_path: Path) -> None:
    blocks = {
        f"h.{n}": LowRankUpdate(torch.randn(4, 2).bfloat16(), torch.randn(2, 4).bfloat16(), s)
        for n, s in (("q", 0.0), ("k", 2.0), ("v", 2 / 3))
    }
    targets = {f"h.{n}": Target("h.weight", rows=(4 * i, 4 * i + 4)) for i, n in enumerate("qkv")}
    base = load_base({"h.weight": torch.zeros(12, 4)})
    adapter = Adapter(blocks, targets=targets)
    done = convert(adapter, tmp_path / "out", to="peft", base=base)
    assert done.losses == (f"1 module rounded, by at most {done.errors['h.v']:.1e} of their norm.",)
    assert 1e-4 < done.errors["h.v"] < 1e-2
    assert done.errors["h.q"] == 0
    assert done.errors["h.k"] < 1e-12
    whole = load_adapter(tmp_path / "out")["h"].dense()
    for i, n in enumerate("qkv"):
        torch.testing.assert_close(whole[4 * i : 4 * i + 4], adapter[f"h.{n}"].dense(), rtol=1e-2, atol=1e-2)
    cut = convert(adapter, tmp_path / "cut", to="peft", base=base, r=1)
    assert "1 module cut to a smaller rank" in cut.losses[0]
    with pytest.warns(UserWarning, match="1 module (cut to a smaller rank|rounded)") as caught:
        save_adapter(adapter, tmp_path / "saved", base=base, r=1)
    assert len(caught) == 2
    assert {warning.filename for warning in caught} == {__file__}


def test_blocks_of_several_dtypes_are_written_in_one_that_holds_them(tmp_path: Path) -> None:
    dtypes = {"q": torch.bfloat16, "k": torch.float16, "v": torch.float8_e4m3fn}
    blocks = {
        f"h.{n}": LowRankUpdate(torch.randn(4, 2).to(dtype), torch.randn(2, 4).to(dtype), 1.0)
        for n, dtype in dtypes.items()
    }
    targets = {f"h.{n}": Target("h.weight", rows=(4 * i, 4 * i + 4)) for i, n in enumerate(dtypes)}
    base = load_base({"h.weight": torch.zeros(12, 4)})
    done = convert(Adapter(blocks, targets=targets), tmp_path / "out", to="peft", base=base)
    assert done.losses == ()
    assert done.largest_error < 1e-12
    update = load_adapter(tmp_path / "out")["h"]
    assert isinstance(update, LowRankUpdate)
    assert update.up.dtype == torch.float32


def test_a_weight_whose_blocks_and_whole_are_both_adapted_is_refused(tmp_path: Path) -> None:
    updates = {name: LowRankUpdate(torch.ones(4, 1), torch.ones(1, 4), 1.0) for name in ("h", "h.q")}
    adapter = Adapter(updates, targets={"h.q": Target("h.weight", rows=(0, 4))})
    with pytest.raises(UnsupportedAdapterError, match="'h': expected one update of this weight to save"):
        convert(adapter, tmp_path / "out", to="peft", base=load_base({"h.weight": torch.zeros(4, 4)}))


def test_modules_of_no_rank_are_left_out(tmp_path: Path) -> None:
    """As AdaLoRA prunes them."""
    empty = LowRankUpdate(torch.zeros(3, 0), torch.zeros(0, 4), 0.0)
    adapter = Adapter({"a": empty, "b": LowRankUpdate(torch.ones(3, 1), torch.ones(1, 4), 1.0)})
    done = convert(adapter, tmp_path / "out", to="peft")
    assert done.losses == ("1 module of r = 0 not written, an update of zero (first: 'a').",)
    assert (done.modules, set(done.errors), list(load_adapter(tmp_path / "out"))) == (1, {"b"}, ["b"])
    with pytest.raises(ValueError, match="expected an adapter with modules to save, got none of r > 0"):
        convert(Adapter({"a": empty}), tmp_path / "none", to="peft")


def peft_folder(folder: Path, config: dict[str, Any], header: dict[str, str] | None = None) -> Path:
    name = "base_model.model.model.layers.0.q"
    folder.mkdir()
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", header)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def test_the_name_of_the_base_and_a_header_are_losses(tmp_path: Path) -> None:
    header = {"format": "pt", "note": "mine", "ss_tag_frequency": "{}"}
    source = peft_folder(tmp_path / "in", {"base_model_name_or_path": "org/base"}, header)
    fields = r"2 fields of the header not written (first: 'note')."
    assert convert(source, tmp_path / "mlx", to="mlx").losses == (
        "the name of the base model, 'org/base', is not written.",
        fields,
    )
    done = convert(source, tmp_path / "peft", to="peft")
    assert done.losses == (fields,)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_what_a_format_has_its_own_way_to_say_is_no_loss(tmp_path: Path) -> None:
    convert(diffusion_model(), tmp_path / "a.safetensors", to="kohya")
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya").losses == ()
    convert(diffusion_model(), tmp_path / "c.safetensors", to="diffusers")
    assert convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", to="kohya").losses == ()


def test_a_peft_adapter_is_of_one_model(tmp_path: Path) -> None:
    """As it is of the U-Net of a pipeline, whose own names have no component in front."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid = nn.ModuleDict({"to_q": nn.Linear(8, 6, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return x

    update = LowRankUpdate(torch.randn(6, 2), torch.randn(2, 8), 0.7)
    convert(Adapter({"unet.mid.to_q": update}), tmp_path / "in.safetensors", to="diffusers")
    done = convert(tmp_path / "in.safetensors", tmp_path / "one", to="peft")
    assert done.losses == ("the component 'unet' is not written: a PEFT adapter is of one model.",)
    net = Net().double()
    before = net.mid["to_q"].weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(net, tmp_path / "one").merge_and_unload()
    torch.testing.assert_close(merged.mid["to_q"].weight - before, update.dense(), rtol=1e-6, atol=1e-6)
    both = {f"{component}.mid.to_q": update for component in ("unet", "text_encoder")}
    convert(Adapter(both), tmp_path / "both.safetensors", to="diffusers")
    done = convert(tmp_path / "both.safetensors", tmp_path / "two", to="peft")
    assert done.losses[0].startswith("updates of text_encoder and unet are in one adapter")
    # A GPT-2 has a transformer, too, which is no component.
    gpt2 = Adapter({"transformer.h.0.attn.c_attn": update})
    assert convert(gpt2, tmp_path / "gpt2", to="peft").losses == ()
    assert list(load_adapter(tmp_path / "gpt2")) == ["transformer.h.0.attn.c_attn"]


def test_activated_lora_stays_so_in_peft_and_is_a_loss_elsewhere(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "in", {"alora_invocation_tokens": [1, 2]})
    done = convert(source, tmp_path / "peft", to="peft")
    assert done.losses == ()
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [1, 2]
    (loss,) = convert(source, tmp_path / "mlx", to="mlx").losses
    assert "act from the invocation tokens on only" in loss


def test_two_readings_of_the_source_are_passed_on(tmp_path: Path) -> None:
    """torchtune does not say which rotary order its rows are in, where only a base gives the names."""
    save_file(
        {f"layers.0.attn.q_proj.lora_{side}.weight": torch.randn(8, 8) for side in "ab"}, tmp_path / "in.safetensors"
    )
    base = load_base({"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)})
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", to="peft", base=base, alpha=8)
    assert "1 module written by one of the readings that the source allows" in done.losses[0]
    known = convert(tmp_path / "in.safetensors", tmp_path / "out", to="peft", heads=(2, 2), alpha=8)
    assert known.losses == ()


def test_cutting_states_the_exact_error(tmp_path: Path) -> None:
    adapter = Adapter(
        {"a": KroneckerUpdate(torch.randn(3, 2), torch.randn(4, 5)), "b": DenseUpdate(torch.randn(9, 7).double())}
    )
    done = convert(adapter, tmp_path / "out", to="peft", r=2)
    squares = []
    for name, update in adapter.items():
        S = np.linalg.svd(update.dense().numpy(), compute_uv=False)
        squares.append(((S[2:] ** 2).sum(), (S**2).sum()))
        assert done.errors[name] == pytest.approx(float(np.sqrt(squares[-1][0] / squares[-1][1])), rel=1e-5)
    lost, whole = map(sum, zip(*squares, strict=True))
    assert f"{np.sqrt(lost / whole):.2e} of that of all together" in done.losses[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv, self.point = nn.Linear(8, 6), nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 1)


def test_lycoris_merges_the_kohya_file_to_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris import create_lycoris_from_weights
        from lycoris.wrapper import LycorisNetwork
    model = nn.ModuleList([Block()]).double()
    kernels = {"to_q": (), "conv": (3, 3), "point": (1, 1)}
    scales = {"to_q": 0.7, "conv": -1.3, "point": 0.0}
    updates = {
        f"unet.0.{name}": LowRankUpdate(
            torch.randn(getattr(model[0], name).weight.shape[0], 2),
            torch.randn(2, getattr(model[0], name).weight[0].numel()),
            scales[name],
        )
        for name in kernels
    }
    targets = {f"unet.0.{name}": Target(f"unet.0.{name}.weight", kernel=kernel) for name, kernel in kernels.items()}
    convert(Adapter(updates, targets=targets), tmp_path / "out.safetensors", to="kohya")
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "out.safetensors"), model)
    assert len(network.loras) == 3
    network.double().merge_to(1.0)
    for name, update in updates.items():
        key = f"{name.removeprefix('unet.')}.weight"
        added = (model.state_dict()[key] - before[key]).flatten(1)
        np.testing.assert_allclose(added.detach().numpy(), update.dense().numpy(), atol=1e-6)


ENCODERS = {
    "Stable Diffusion 1": (
        {
            "text_encoder.text_model.q": "lora_te_text_model_q",
            "unet.mid_block.attentions.0.transformer_blocks.0.q": (
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_q"
            ),
        }
    ),
    "SDXL with its first encoder alone": (
        {
            "text_encoder.text_model.q": "lora_te1_text_model_q",
            "unet.down_blocks.2.attentions.0.transformer_blocks.9.q": (
                "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_q"
            ),
        }
    ),
    "SDXL": (
        {"text_encoder.text_model.q": "lora_te1_text_model_q", "text_encoder_2.text_model.q": "lora_te2_text_model_q"}
    ),
    "Flux": (
        {
            "text_encoder.text_model.q": "lora_te1_text_model_q",
            "text_encoder_2.encoder.block.0.layer.0.q": "lora_te3_encoder_block_0_layer_0_q",
            "transformer.double_blocks.0.proj": "lora_unet_double_blocks_0_proj",
        }
    ),
    "SD3": (
        {
            "text_encoder.text_model.q": "lora_te1_text_model_q",
            "text_encoder_2.text_model.q": "lora_te2_text_model_q",
            "text_encoder_3.encoder.block.0.q": "lora_te3_encoder_block_0_q",
        }
    ),
}


@pytest.mark.parametrize("names", ENCODERS.values(), ids=ENCODERS)
def test_text_encoders_have_the_prefixes_of_kohyas_trainers(tmp_path: Path, names: dict[str, str]) -> None:
    adapter = Adapter({name: LowRankUpdate(torch.ones(3, 1), torch.ones(1, 2), 1.0) for name in names})
    path = tmp_path / "out.safetensors"
    convert(adapter, path, to="kohya")
    assert {name.partition(".")[0] for name in load_file(path)} == set(names.values())


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_components_are_known_ones_and_give_one_name_each(tmp_path: Path, to: str) -> None:
    update = LowRankUpdate(torch.ones(3, 1), torch.ones(1, 2), 1.0)
    path = tmp_path / "out.safetensors"
    with pytest.raises(UnsupportedAdapterError, match=f"{to}'s names need, and component='unett' is none. Pass"):
        convert(Adapter({"q": update}), path, to=to, component="unett")
    with pytest.raises(UnsupportedAdapterError, match=rf"'q': expected a {to} name of its own, got .* as 'unet.q' has"):
        convert(Adapter({"unet.q": update, "q": update}), path, to=to, component="unet")
    assert convert(Adapter({"q": update}), path, to=to, component="unet").largest_error < 1e-12
