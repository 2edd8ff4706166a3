"""A converted adapter has the same ΔW by the rules of its new format, or is refused, or says what it lost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from convertible import OPTIONS, close, destination, diffusion_model, language_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Contents
from lora_analysis.base import load_base
from lora_analysis.convert import convert
from lora_analysis.errors import UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter, save_adapter
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("to", OPTIONS)
def test_a_plain_adapter_survives_every_format_without_loss(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    adapter = language_model(dtype=dtype)
    done = convert(adapter, destination(tmp_path, to), to=to, **OPTIONS[to])
    assert done.modules == len(done.errors) == 6
    assert done.largest_error < 1e-12
    assert [loss for loss in done.losses if "header" not in loss] == []


def test_the_written_peft_adapter_is_what_peft_merges(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 6, bias=False)

    model = nn.ModuleDict({"a": Attention(), "b": Attention()}).double()
    adapter = Adapter(
        {
            "a.q_proj": LowRankUpdate(torch.randn(12, 2), torch.randn(2, 8), 0.7),
            "b.q_proj": LowRankUpdate(torch.randn(12, 5), torch.randn(5, 8), -1.3),
            "b.k_proj": LowRankUpdate(torch.randn(6, 2), torch.randn(2, 8), 0.7),
        }
    )
    convert(adapter, tmp_path / "out", to="peft")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    after = merged.state_dict()
    for name, update in adapter.items():
        close(after[f"{name}.weight"] - before[f"{name}.weight"], update.dense())
    torch.testing.assert_close(after["a.k_proj.weight"], before["a.k_proj.weight"])


def test_the_written_kohya_file_follows_its_rule(tmp_path: Path) -> None:
    adapter = diffusion_model()
    path = tmp_path / "out.safetensors"
    done = convert(adapter, path, to="kohya")
    assert done.losses == ()
    tensors = load_file(path)
    stems = {
        "lora_unet_down_blocks_0_attentions_0_to_q": "unet.down_blocks.0.attentions.0.to_q",
        "lora_unet_conv_in": "unet.conv_in",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        ),
    }
    assert len(tensors) == 3 * len(stems)
    for stem, name in stems.items():
        up, down = (tensors[f"{stem}.lora_{side}.weight"] for side in ("up", "down"))
        scale = float(tensors[f"{stem}.alpha"]) / down.shape[0]
        close(scale * (up.double().flatten(1) @ down.double().flatten(1)), adapter[name].dense())
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (12, 3, 1, 1)


def test_the_written_diffusers_file_follows_its_rule(tmp_path: Path) -> None:
    adapter = diffusion_model()
    path = tmp_path / "out.safetensors"
    convert(adapter, path, to="diffusers")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(path)
    for name, update in adapter.items():
        component, _, rest = name.partition(".")
        alphas = header[f"{component}.alpha_pattern"]
        alpha = alphas.get(rest, header[f"{component}.lora_alpha"])
        a, b = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in "AB")
        close(alpha / len(a) * (b @ a), update.dense())


def test_the_written_mlx_adapter_follows_its_rule(tmp_path: Path) -> None:
    adapter = language_model(r=4, scale=2.0)
    mixed = Adapter(
        dict(adapter) | {"model.layers.0.mlp.up_proj": LowRankUpdate(torch.randn(9, 2), torch.randn(2, 7), 3.1)}
    )
    done = convert(mixed, tmp_path / "out", to="mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert (config["fine_tune_type"], config["lora_parameters"]["rank"]) == ("lora", 4)
    assert "mlp.up_proj" in config["lora_parameters"]["keys"]
    for name, update in mixed.items():
        a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == 4
        close(config["lora_parameters"]["scale"] * (a @ b).T, update.dense())
    assert len(done.losses) == 3  # another scale, another r, and what the rounding came to
    assert 0 < done.largest_error < 1e-7


def test_the_written_gguf_file_follows_its_rule(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    adapter = language_model()
    path = tmp_path / "out.gguf"
    convert(adapter, path, to="gguf", architecture="llama", heads=(4, 2))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    names = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "ffn_down": ("mlp.down_proj", None)}
    for i in range(2):
        for short, (name, heads) in names.items():
            a, b = (tensors[f"blk.{i}.{short}.weight.lora_{side}"] for side in "ab")
            product = fields["adapter.lora.alpha"] / len(a) * (b @ a)
            expected = adapter[f"model.layers.{i}.{name}"].dense().numpy()
            if heads:  # as llama.cpp's converter permutes the base: from half-split to interleaved
                d_out, d_in = expected.shape
                expected = expected.reshape(heads, 2, d_out // heads // 2, d_in).swapaxes(1, 2).reshape(d_out, d_in)
            close(product, expected)


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_scales_that_differ_are_folded_into_the_factors(tmp_path: Path, to: str) -> None:
    adapter = language_model()
    first = next(iter(adapter))
    doubled = Adapter({n: LowRankUpdate(u.up, u.down, 4.0 if n == first else 2.0) for n, u in adapter.items()})
    done = convert(doubled, destination(tmp_path, to), to=to, **OPTIONS[to])
    assert done.losses == ()  # by a power of two, so exactly
    thirds = Adapter({n: LowRankUpdate(u.up, u.down, 2 / 3 if n == first else 2.0) for n, u in adapter.items()})
    done = convert(thirds, destination(tmp_path, to), to=to, **OPTIONS[to])
    assert any("1 module of another" in loss for loss in done.losses)
    assert 1e-9 < done.errors[first] < 1e-6
    assert max(error for name, error in done.errors.items() if name != first) < 1e-12


def test_an_rslora_scale_survives(tmp_path: Path) -> None:
    adapter = language_model(r=8, scale=16 / math.sqrt(8))
    for to, options in OPTIONS.items():
        done = convert(adapter, destination(tmp_path, to), to=to, **options)
        assert done.largest_error < 1e-7


def test_a_round_through_all_formats_gives_the_first_adapter(tmp_path: Path) -> None:
    adapter = diffusion_model()
    base = load_base(
        {
            target.tensor: torch.zeros(
                *adapter[name].shape[:1], *((4, *target.kernel) if target.kernel else adapter[name].shape[1:])
            )
            for name, target in adapter.targets.items()
        }
    )
    convert(adapter, tmp_path / "a.safetensors", to="kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", base=base)
    convert(tmp_path / "b.safetensors", tmp_path / "c", to="peft", base=base)
    back = load_adapter(tmp_path / "c", base=base)
    assert set(back) == set(adapter)
    for name in adapter:
        close(back[name].dense(), adapter[name].dense())
        assert back.targets[name].kernel == adapter.targets[name].kernel


def test_what_is_beside_the_updates_is_listed_as_lost(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.model.layers.0.q.lora_A.weight": torch.randn(2, 8),
        "base_model.model.model.layers.0.q.lora_B.weight": torch.randn(8, 2),
        "base_model.model.model.layers.0.q.bias": torch.randn(8),
    }
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    done = convert(tmp_path / "in", tmp_path / "out", to="mlx")
    assert len(done.losses) == 1
    assert "1 tensor not written" in done.losses[0]


def test_what_is_no_product_is_refused_or_cut_with_its_error(tmp_path: Path) -> None:
    matrix = torch.randn(12, 10)
    adapter = Adapter(
        {
            "model.layers.0.q": DenseUpdate(matrix),
            "model.layers.0.k": KroneckerUpdate(torch.randn(3, 2), torch.randn(4, 5)),
        }
    )
    with pytest.raises(UnsupportedAdapterError, match="Pass r="):
        convert(adapter, tmp_path / "out", to="peft")
    done = convert(adapter, tmp_path / "out", to="peft", r=3)
    S = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    expected = math.sqrt((S[3:] ** 2).sum() / (S**2).sum())
    assert done.errors["model.layers.0.q"] == pytest.approx(expected, rel=1e-5)
    assert "2 modules cut" in done.losses[-1]
    assert load_adapter(tmp_path / "out").modules["model.layers.0.q"].r == 3


def test_a_rank_that_is_enough_cuts_nothing(tmp_path: Path) -> None:
    done = convert(language_model(r=4), tmp_path / "out", to="peft", r=8)
    assert done.losses == ()
    assert {module.r for module in load_adapter(tmp_path / "out").modules.values()} == {4}


def test_a_coarser_dtype_is_a_loss_that_is_measured(tmp_path: Path) -> None:
    done = convert(language_model(), tmp_path / "out", to="peft", dtype=torch.bfloat16)
    assert 1e-4 < done.largest_error < 1e-2
    assert "rounded" in done.losses[-1]


def test_blocks_of_a_fused_weight_are_put_together_with_the_base(tmp_path: Path) -> None:
    tensors = {"h.0.c_attn.lora_A": torch.randn(8, 16), "h.0.c_attn.lora_B": torch.randn(32, 4)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(UnsupportedAdapterError, match="Pass base="):
        convert(tmp_path / "in.safetensors", tmp_path / "out", to="peft", alpha=8, split="q,v")
    base = load_base({"h.0.c_attn.weight": torch.randn(48, 16)})
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", to="peft", base=base, alpha=8, split="q,v")
    assert done.largest_error < 1e-12
    whole = load_adapter(tmp_path / "out")["h.0.c_attn"].dense()
    blocks = load_adapter(tmp_path / "in.safetensors", base=base, alpha=8, split="q,v")
    close(whole[:16], blocks["h.0.c_attn.q"].dense())
    close(whole[32:], blocks["h.0.c_attn.v"].dense())
    assert not whole[16:32].any()


def dora(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    weight = torch.randn(8, 8)
    name = "model.layers.0.q"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 8),
        f"base_model.model.{name}.lora_B.weight": torch.randn(8, 2),
        f"base_model.model.{name}.lora_magnitude_vector": torch.rand(8) + 1,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, {f"{name}.weight": weight}


def test_dora_survives_where_there_are_magnitudes_and_is_refused_elsewhere(tmp_path: Path) -> None:
    path, base = dora(tmp_path / "in")
    for to in ("peft", "mlx"):
        done = convert(path, tmp_path / to, to=to)
        assert done.largest_error < 1e-12
        again = load_adapter(tmp_path / to, base=load_base(base))["model.layers.0.q"].dense()
        close(again, load_adapter(path, base=load_base(base))["model.layers.0.q"].dense())
    for to in ("kohya", "diffusers", "gguf"):
        with pytest.raises(UnsupportedAdapterError, match="magnitudes"):
            convert(path, destination(tmp_path, to), to=to, **OPTIONS[to])


@pytest.mark.parametrize(
    ("axis", "size", "match"),
    [(0, 8, "got one for each input"), (1, 7, "expected 8 magnitudes, one for each output, got 7")],
)
@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_magnitudes_of_other_axes_are_refused(tmp_path: Path, to: str, axis: int, size: int, match: str) -> None:
    """LyCORIS has them for each input: of a square weight they have the length of the others."""
    path, _ = dora(tmp_path / "in")
    adapter = load_adapter(path)
    name, module = next(iter(adapter.modules.items()))
    other = replace(module, magnitude=lambda: torch.ones(size), magnitude_axis=axis)
    adapter = Adapter.from_contents(
        Contents({name: other}), source="x", format="lycoris", config={}, metadata={}, checkpoint=None, origin=None
    )
    for write in (convert, save_adapter):
        with pytest.raises(UnsupportedAdapterError, match=rf"x: '{name}': .*{match}"):
            write(adapter, tmp_path / "out", **{"to" if write is convert else "format": to})
    assert not (tmp_path / "out").exists()


def test_the_true_update_of_dora_can_be_cut_for_the_others(tmp_path: Path) -> None:
    path, base = dora(tmp_path / "in")
    done = convert(path, tmp_path / "out.safetensors", to="kohya", base=load_base(base), r=4, component="unet")
    assert 0 < done.largest_error < 1


def test_an_unknown_scale_is_refused(tmp_path: Path) -> None:
    adapter = Adapter({"q": LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), math.nan)})
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        convert(adapter, tmp_path / "out", to="peft")


def test_names_that_a_format_cannot_say_are_refused(tmp_path: Path) -> None:
    adapter = Adapter({"q": LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), 1.0)})
    with pytest.raises(UnsupportedAdapterError, match="numbered layer"):
        convert(adapter, tmp_path / "out", to="mlx")
    for to in ("kohya", "diffusers"):
        with pytest.raises(UnsupportedAdapterError, match="component="):
            convert(adapter, tmp_path / "out.safetensors", to=to)
    with pytest.raises(UnsupportedAdapterError, match="architecture"):
        convert(adapter, tmp_path / "out.gguf", to="gguf")
    clash = Adapter({f"unet.{n}": LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), 1.0) for n in ("a.b", "a_b")})
    match = r"'unet.a_b': expected a kohya name of its own, got 'lora_unet_a_b', as 'unet.a.b' has"
    with pytest.raises(UnsupportedAdapterError, match=match):
        convert(clash, tmp_path / "out.safetensors", to="kohya")


def test_convolutions_have_no_place_in_formats_of_language_models(tmp_path: Path) -> None:
    for to in ("mlx", "gguf"):
        with pytest.raises(UnsupportedAdapterError, match="convolution"):
            convert(diffusion_model(), destination(tmp_path, to), to=to, **OPTIONS[to])


def test_an_unknown_format_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of peft, kohya"):
        convert(language_model(), tmp_path / "out", to="onnx")


def test_the_command_says_what_was_lost(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        convert(language_model(), tmp_path / "in", to="peft")
    command = [
        sys.executable,
        "-m",
        "lora_analysis",
        "convert",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--to",
        "mlx",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 modules, read back and compared" in run.stdout
    assert run.stdout.endswith("Nothing lost.\n")
    refused = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "expected nothing there, got a folder" in " ".join(refused.stderr.split())
    run = subprocess.run([*command, "--json", "--overwrite"], capture_output=True, text=True, check=True)
    summary = json.loads(run.stdout)
    assert (summary["losses"], summary["notes"]) == ([], [])
