"""Which reader takes which file: layouts of all families, alone, mixed, with and without headers and configurations.

No file may be half read, or read by the wrong reader. Factors are called as their writers call them; numbers are of no
importance here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

Shapes = dict[str, tuple[int, ...]]

PEFT = "base_model.model.model.layers.0.self_attn.q_proj"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
ENCODER = "text_model_encoder_layers_0_mlp_fc1"
COMFY = "diffusion_model.blocks.0.self_attn.q"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
MLX = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
GGUF = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "general.architecture": "llama",
    "adapter.lora.alpha": "4",
}
HEADER = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}


def lora(stem: str, adapter: str = "") -> Shapes:
    return {f"{stem}.lora_A{adapter}.weight": (2, 16), f"{stem}.lora_B{adapter}.weight": (8, 2)}


def bare(stem: str) -> Shapes:
    return {f"{stem}.lora_A": (2, 16), f"{stem}.lora_B": (8, 2)}


def kohya(stem: str) -> Shapes:
    return {f"{stem}.lora_down.weight": (2, 16), f"{stem}.lora_up.weight": (8, 2)}


def alpha(stem: str) -> Shapes:
    return {f"{stem}.alpha": ()}


def loha(stem: str) -> Shapes:
    return {f"{stem}.hada_w{i}_{s}": (8, 2) if s == "a" else (2, 16) for i in (1, 2) for s in "ab"}


def lokr(stem: str) -> Shapes:
    return {f"{stem}.lokr_w1": (2, 4), f"{stem}.lokr_w2": (4, 4)}


def old(stem: str, end: str = ".lora") -> Shapes:
    return {f"{stem}{end}.down.weight": (2, 16), f"{stem}{end}.up.weight": (8, 2)}


def mlx(stem: str) -> Shapes:
    return {f"{stem}.lora_a": (16, 2), f"{stem}.lora_b": (2, 8)}


def torchtune(stem: str) -> Shapes:
    return {f"{stem}.lora_a.weight": (2, 16), f"{stem}.lora_b.weight": (8, 2)}


def gguf(stem: str) -> Shapes:
    return {f"{stem}.weight.lora_a": (2, 16), f"{stem}.weight.lora_b": (8, 2)}


def vera(stem: str) -> Shapes:
    return {f"{stem}.vera_lambda_b": (8,), f"{stem}.vera_lambda_d": (2,)}


def glora(stem: str) -> Shapes:
    return {f"{stem}.{part}.weight": (2, 4) for part in ("a1", "a2", "b1", "b2")}


SAM: Shapes = {f"w_{side}_{i:03d}": (2, 8) if side == "a" else (8, 2) for i in (0, 1) for side in "ab"}
CLONE: Shapes = {"unet:0:up": (8, 2), "unet:0:down": (2, 16)}
CONTROL: Shapes = {"lora_controlnet": (1,), "input_blocks.0.0.up": (8, 2), "input_blocks.0.0.down": (2, 16)}
CONV: Shapes = {f"{PEFT}.lora_A.weight": (2, 4, 3, 3), f"{PEFT}.lora_B.weight": (8, 2, 1, 1)}

# name: (tensors, adapter_config.json, header, format, scale); a scale of None is unknown.
READ: dict[str, tuple[Shapes, dict[str, Any], dict[str, str], str, float | None]] = {
    "peft": (lora(PEFT), LORA, {}, "peft", 2.0),
    "peft, type in lower case": (lora(PEFT), {**LORA, "peft_type": "lora"}, {}, "peft", 2.0),
    "peft, no configuration": (lora(PEFT), {}, {}, "peft", None),
    "peft, raw dump": (lora(PEFT, ".default"), {}, {}, "peft", None),
    "peft, without its prefix": (lora("model.layers.0.q_proj"), {}, {}, "peft", None),
    "peft, conv": (CONV, LORA, {}, "peft", 2.0),
    "peft, a diffusion model": (lora(UNET), LORA, {}, "peft", 2.0),
    "peft, Wan of DiffSynth": (lora("blocks.0.self_attn.q", ".default"), {}, {}, "peft", None),
    "peft, a convolution of a bare unet": (lora("down_blocks.0.resnets.0.conv1"), {}, {}, "peft", None),
    "peft, AdaLoRA, no configuration": (bare(PEFT) | {f"{PEFT}.lora_E": (2, 1)}, {}, {}, "peft", None),
    "peft, LoHa": (loha(PEFT), {"peft_type": "LOHA", "r": 2, "alpha": 4}, {}, "peft", 2.0),
    "peft, LoHa, no configuration": (loha(PEFT), {}, {}, "peft", None),
    "peft, LoKr, no configuration": (lokr(PEFT), {}, {}, "peft", None),
    "loralib": (bare("roberta.q"), {}, {}, "loralib", None),
    "loralib, DDP": (bare("module.q"), {}, {}, "loralib", None),
    "loralib, with the base": (bare("q") | {"q.weight": (8, 16), "q.bias": (8,)}, {}, {}, "loralib", None),
    "kohya": (kohya(KOHYA) | alpha(KOHYA), {}, {}, "kohya", 1.0),
    "kohya, no alpha": (kohya(KOHYA), {}, {}, "kohya", 1.0),
    "kohya, two text encoders": (kohya(f"lora_te1_{ENCODER}") | kohya(f"lora_te2_{ENCODER}"), {}, {}, "kohya", 1.0),
    "kohya, header": (kohya("lora_unet_x"), {}, {"ss_network_module": "networks.lora"}, "kohya", 1.0),
    "kohya, dotted": (kohya("model.q") | alpha("model.q"), {}, {}, "kohya", 1.0),
    "kohya, OneTrainer": (kohya("lora_transformer_blocks_0_q") | {"bundle_emb.cat.x": (4,)}, {}, {}, "kohya", 1.0),
    "kohya, control": (CONTROL, {}, {}, "kohya", 1.0),
    "lycoris, DoRA": (kohya(KOHYA) | alpha(KOHYA) | {f"{KOHYA}.dora_scale": (8, 1)}, {}, {}, "lycoris", 1.0),
    "lycoris, prefix": (kohya("lycoris_a") | alpha("lycoris_a"), {}, {}, "lycoris", 1.0),
    "lycoris, header": (kohya("lora_unet_a"), {}, {"ss_network_module": "lycoris.kohya"}, "lycoris", 1.0),
    "lycoris, LoHa": (loha("lora_unet_a") | alpha("lora_unet_a"), {}, {}, "lycoris", 1.0),
    "lycoris, LoKr": (lokr("lycoris_a") | alpha("lycoris_a"), {}, {}, "lycoris", 1.0),
    "lycoris, LoKr of ComfyUI": (lokr(COMFY), {}, {}, "lycoris", 1.0),
    "lycoris, full": ({"lora_unet_a.diff": (8, 16)}, {}, {}, "lycoris", 1.0),
    "lycoris, mixed": (kohya(KOHYA) | loha("lora_unet_k") | lokr("lora_unet_v"), {}, {}, "lycoris", 1.0),
    "lycoris, mixed, of ComfyUI": (kohya(COMFY) | lokr(f"{COMFY}2"), {}, {}, "lycoris", 1.0),
    "diffusers": (lora(UNET), {}, {}, "diffusers", 1.0),
    "diffusers, named": (lora(UNET, ".default_0"), {}, {}, "diffusers", 1.0),
    "diffusers, header": (lora("unet.x"), {}, HEADER, "diffusers", 2.0),
    "diffusers, empty header": (lora("unet.x"), {}, {"lora_adapter_metadata": '{"unet": {}}'}, "diffusers", 1.0),
    "diffusers, one model alone": (lora(UNET.removeprefix("unet.")), {}, {}, "diffusers", 1.0),
    "diffusers, text encoder": (lora("text_encoder.layers.0.self_attn.q_proj"), {}, {}, "diffusers", 1.0),
    "diffusers, ai-toolkit": (lora("transformer.single_transformer_blocks.0.attn.to_q"), {}, {}, "diffusers", 1.0),
    "diffusers, ComfyUI": (kohya(COMFY) | alpha(COMFY), {}, {}, "diffusers", 1.0),
    "diffusers, BFL": (lora("double_blocks.0.img_attn.proj") | {"x.norm.scale": (8,)}, {}, {}, "diffusers", 1.0),
    "diffusers, old": (old(UNET), {}, {}, "diffusers", 1.0),
    "diffusers, oldest": (old("unet.mid_block.attn1.processor.to_q", "_lora"), {}, {}, "diffusers", 1.0),
    "diffusers, XLabs": (old("double_blocks.0.processor.proj", "_lora1"), {}, {}, "diffusers", 1.0),
    "diffusers, old and new": (old(UNET) | lora(f"{UNET}2"), {}, {}, "diffusers", 1.0),
    "diffusers, stems of kohya": (kohya("lora_unet_x") | lora(UNET), {}, {}, "diffusers", 1.0),
    "mlx": (mlx(PEFT), MLX, {}, "mlx", 3.0),
    "mlx, no configuration": (mlx("model.layers.0.q_proj"), {}, {}, "mlx", None),
    "torchtune": (torchtune("layers.0.attn.q_proj"), {}, {}, "torchtune", None),
    "torchtune, configuration for peft": (torchtune("layers.0.attn.q_proj"), LORA, {}, "torchtune", 2.0),
    "gguf": (gguf("blk.0.attn_q"), {}, GGUF, "gguf", 2.0),
    "sam_lora": (SAM, {}, {}, "sam_lora", 1.0),
    "cloneofsimo": (CLONE, {}, {}, "cloneofsimo", 1.0),
}

LEFT = "expected the tensors of LoRA to be factors of a module"
KINDS = "expected updates of one kind, got a part of another"

# name: (tensors, adapter_config.json, header, what the refusal says)
REFUSED: dict[str, tuple[Shapes, dict[str, Any], dict[str, str], str]] = {
    "a model": ({"model.layers.0.q_proj.weight": (8, 16)}, {}, {}, "no known format matches its 1 tensors"),
    "full differences alone": ({f"{COMFY}.diff": (8, 16)}, {}, {}, "no known format matches"),
    "nothing of LoRA": ({"x.weight": (2, 2)}, LORA, {}, r"found none among its 1 tensors \(read as 'peft'\)"),
    "peft's configuration, kohya": (kohya(KOHYA), LORA, {}, "found none .*read as 'peft'.*Pass format="),
    "peft's configuration, loralib": (bare("q"), LORA, {}, "found none .*read as 'peft'.*Pass format="),
    "peft's configuration, mlx": (mlx("q"), LORA, {}, "found none .*read as 'peft'.*Pass format="),
    "mlx's configuration, peft": (lora(PEFT), MLX, {}, LEFT),
    "peft, VeRA": (vera(PEFT), {}, {}, "a VeRA file does not say how many inputs"),
    "peft, OFT": ({f"{PEFT}.oft_R.weight": (2, 4)}, {"peft_type": "OFT"}, {}, "holds PEFT OFT"),
    "peft, OFT, no configuration": ({f"{PEFT}.oft_R.weight": (2, 4)}, {}, {}, "holds OFT or BOFT"),
    "peft, IA3": ({f"{PEFT}.ia3_l": (8, 1)}, {}, {}, "holds IA3"),
    "peft, VBLoRA": ({f"{PEFT}.vblora_logits_A": (2, 4, 4)}, {}, {}, "holds PEFT VBLORA, whose factors are mixed"),
    "peft, FourierFT": ({f"{PEFT}.fourierft_spectrum": (16,)}, {}, {}, "holds PEFT FOURIERFT, a sparse update"),
    "peft, HRA": ({f"{PEFT}.hra_u": (2, 4)}, {}, {}, "holds PEFT HRA, a multiplicative update"),
    "peft, RandLoRA": ({f"{PEFT}.randlora_lambda": (2, 4)}, {}, {}, "holds PEFT RANDLORA"),
    "prompts": ({"prompt_embeddings": (2, 4)}, {}, {}, "holds PEFT PROMPT_TUNING, which changes no weight"),
    "textual inversion": ({"<cat>": (4,)}, {}, {}, "learned token embeddings"),
    "lycoris, IA3": ({"lora_unet_a.weight": (8,), "lora_unet_a.on_input": ()}, {}, {}, "'lora_unet_a' is IA3"),
    "lycoris, GLoRA": (glora("lora_unet_a"), {}, {}, "'lora_unet_a' is GLoRA"),
    "lycoris, OFT": ({"lora_unet_k.oft_blocks": (2, 4, 4)}, {}, {}, "'lora_unet_k' is OFT or BOFT"),
    "gguf without its header": (gguf("blk.0.attn_q"), {}, {}, "expected a GGUF header"),
    "loralib, merged": ({"a.lora_A": (4, 16), "a.lora_B": (16, 2)}, {}, {}, "the file does not say which. Pass split="),
    "x A B": ({"a.lora_A": (16, 4), "a.lora_B": (4, 8)}, {}, {}, "looks transposed"),
    "loralib and DoRA by hand": (bare("q") | {"q.m": (8,)}, {}, {}, "'q.m': expected lora_A, lora_B, weight and bias"),
    "loralib and dora_scale": (bare("q") | {"q.dora_scale": (8, 1)}, {}, {}, rf"{KINDS} \(DoRA\)"),
    "loralib and peft": (bare("q") | lora("k"), {}, {}, f"'q.lora_A': {LEFT}"),
    "loralib and mlx": (bare("q") | mlx("k"), {}, {}, f"'q.lora_A': {LEFT}"),
    "loralib and LoHa": (bare("q") | loha("k"), {}, {}, f"'q.lora_A': {LEFT}"),
    "loralib and sam": (bare("q") | SAM, {}, {}, rf"'w_a_000': {KINDS} \(Sam_LoRA\)"),
    "loralib and cloneofsimo": (bare("q") | CLONE, {}, {}, KINDS),
    "kohya and peft": (kohya(KOHYA) | lora(PEFT), {}, {}, LEFT),
    "kohya and mlx": (kohya(KOHYA) | mlx("k"), {}, {}, f"lora_down.weight': {LEFT}"),
    "kohya and sam": (kohya(KOHYA) | SAM, {}, {}, KINDS),
    "kohya and cloneofsimo": (kohya(KOHYA) | CLONE, {}, {}, KINDS),
    "kohya and VeRA": (kohya(KOHYA) | vera("k"), {}, {}, rf"{KINDS} \(VeRA\)"),
    "kohya and IA3": (kohya(KOHYA) | {"k.ia3_l": (8, 1)}, {}, {}, "holds IA3"),
    "kohya and OFT": (kohya(KOHYA) | {"lora_unet_k.oft_blocks": (2, 4, 4)}, {}, {}, "is OFT or BOFT"),
    "kohya and a stray alpha": (kohya(KOHYA) | alpha("lora_unet_k"), {}, {}, f"'lora_unet_k.alpha': {LEFT}"),
    "lycoris and a stray alpha": (kohya("lycoris_a") | alpha("lycoris_b"), {}, {}, f"'lycoris_b.alpha': {LEFT}"),
    "lycoris and the unknown": (kohya("lycoris_a") | {"lycoris_b.new": (2, 2)}, {}, {}, f"'lycoris_b.new': {LEFT}"),
    "lycoris and diffusers of old": (loha("lora_unet_a") | old(UNET), {}, {}, rf"{KINDS} \(diffusers' LoRA of old\)"),
    "lycoris and sam": (loha("k") | SAM, {}, {}, KINDS),
    "kohya's stems, peft's factors": (lora(KOHYA) | alpha(KOHYA), {}, {}, "per-module alpha tensors.*format='diff"),
    "diffusers and loralib": (lora(UNET) | bare("unet.q"), {}, {}, f"'unet.q.lora_A': {LEFT}"),
    "diffusers and sam": (lora(UNET) | SAM, {}, {}, KINDS),
    "diffusers and mlx": (lora(UNET) | mlx("k"), {}, {}, LEFT),
    "diffusers and LoKr": (lora(COMFY) | lokr(f"{COMFY}2"), {}, {}, f"lora_A.weight': {LEFT}"),
    "diffusers and a difference": (kohya(COMFY) | {f"{COMFY}2.diff": (8, 16)}, {}, {}, rf"{KINDS} \(LyCORIS, a full"),
    "diffusers, a magnitude alone": (lora(UNET) | {"unet.k.lora_magnitude_vector.weight": (8,)}, {}, {}, LEFT),
    "peft and LoHa": (lora(PEFT) | loha(f"{PEFT}2"), LORA, {}, rf"{KINDS} \(LyCORIS\)"),
    "peft and VeRA": (lora(PEFT) | vera(f"{PEFT}2"), LORA, {}, rf"{KINDS} \(VeRA\)"),
    "peft and lora_E": (lora(PEFT) | {f"{PEFT}2.lora_E": (2, 1)}, LORA, {}, LEFT),
    "peft and FourierFT": (lora(PEFT) | {f"{PEFT}2.fourierft_spectrum": (8,)}, LORA, {}, "holds PEFT FOURIERFT"),
    "peft and kohya's alpha": (lora(PEFT) | alpha(PEFT), LORA, {}, "per-module alpha tensors"),
    "mlx and torchtune": (mlx("a.q") | torchtune("a.k"), {}, {}, LEFT),
    "mlx and LoHa": (mlx("a.q") | loha("a.k"), {}, {}, KINDS),
    "torchtune and kohya": (torchtune("a.q") | kohya("a.k"), {}, {}, LEFT),
    "torchtune and LoHa": (torchtune("a.q") | loha("a.k"), {}, {}, KINDS),
    "gguf and sam": (gguf("blk.0.attn_q") | SAM, {}, GGUF, KINDS),
    "sam and cloneofsimo": (SAM | CLONE, {}, {}, KINDS),
}


def written(folder: Path, shapes: Shapes, config: dict[str, Any], header: dict[str, str]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = {name: torch.ones(shape) if shape else torch.tensor(2.0) for name, shape in shapes.items()}
    save_file(tensors, path, metadata=header or None)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_by_its_own_reader(tmp_path: Path, name: str) -> None:
    shapes, config, header, format, scale = READ[name]
    adapter = load_adapter(written(tmp_path, shapes, config, header))
    assert adapter.format == format
    assert sorted(adapter.ledger) == sorted(shapes)
    assert {module.scale_source == "unknown" for module in adapter.modules.values()} == {scale is None}
    if scale is not None:
        assert {module.scale for module in adapter.modules.values()} == {scale}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_no_reader_reads_whole_is_refused(tmp_path: Path, name: str) -> None:
    shapes, config, header, match = REFUSED[name]
    with pytest.raises((AdapterFormatError, UnsupportedAdapterError), match=match) as caught:
        load_adapter(written(tmp_path, shapes, config, header))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft", "loralib", "mlx", "sam_lora", "cloneofsimo"])
def test_a_hostile_name_beside_it_stays_on_one_line(tmp_path: Path, name: str) -> None:
    shapes, config, header = READ[name][:3]
    hostile = "lora_\x1b[31m\nx.weight"
    with pytest.raises(AdapterFormatError, match=LEFT) as caught:
        load_adapter(written(tmp_path, shapes | {hostile: (2, 2)}, config, header))
    assert not any(character in str(caught.value) for character in "\n\x1b")
