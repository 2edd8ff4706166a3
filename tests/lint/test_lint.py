"""Every fault that is planted is found, under its own code; clean adapters give nothing."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import run as run_command
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats import load_adapter
from lora_analysis.lint import CODES, SEVERITIES, Finding, lint
from lora_analysis.lint.initial import looks_initial
from lora_analysis.update import DenseUpdate, LowRankUpdate

PREFIX = "base_model.model."


def trained(d_out: int, d_in: int, r: int) -> tuple[Tensor, Tensor]:
    """B and A as training leaves them: A well beyond its initialisation."""
    return torch.randn(d_out, r) * 0.02, torch.randn(r, d_in)


def factors_of(*modules: str, d_out: int = 24, d_in: int = 32, r: int = 4) -> dict[str, Tensor]:
    tensors = {}
    for module in modules:
        up, down = trained(d_out, d_in, r)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
    return tensors


def saved(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A PEFT adapter on disk."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def only(findings: list[Finding], code: str) -> Finding:
    """The one finding, which must be of this code."""
    assert codes(findings) == [code]
    return findings[0]


def test_a_clean_adapter_gives_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "clean", factors_of("model.layers.0.q", "model.layers.1.q"))
    base = {f"model.layers.{i}.q.weight": torch.randn(24, 32) for i in range(2)}
    assert lint(path) == []
    assert lint(path, load_base(base)) == []


def test_an_adapter_trained_by_peft_gives_nothing(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(torch.randn(16, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "run")
    assert lint(tmp_path / "run") == []


def test_a_dead_B_is_found(tmp_path: Path) -> None:
    tensors = factors_of("q", "v")
    tensors[f"{PREFIX}v.lora_B.weight"].zero_()
    finding = only(lint(saved(tmp_path / "a", tensors)), "zero-update")
    assert (finding.module, finding.severity) == ("v", "warning")


def test_a_scale_of_zero_is_a_zero_update(tmp_path: Path) -> None:
    only(lint(saved(tmp_path / "a", factors_of("q"), lora_alpha=0)), "zero-update")


def test_a_dense_update_of_zero_is_found() -> None:
    only(lint(Adapter({"q": DenseUpdate(torch.zeros(3, 3))})), "zero-update")


def test_a_fresh_A_is_found(tmp_path: Path) -> None:
    tensors = factors_of("q", d_in=64)
    nn.init.kaiming_uniform_(tensors[f"{PREFIX}q.lora_A.weight"], a=math.sqrt(5))
    finding = only(lint(saved(tmp_path / "a", tensors)), "adapter-init")
    assert finding.module == "q"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_A_of_pefts_own_initialisation_is_recognised_in_any_dtype(dtype: torch.dtype) -> None:
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(256, 64)), peft.LoraConfig(r=8, target_modules=["0"]))
    down = layer.base_model.model[0].lora_A["default"].weight.detach()
    assert looks_initial(down.to(dtype))


def test_a_trained_A_is_not_taken_for_its_initialisation() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        down = torch.empty(8, 768).uniform_(-1, 1, generator=generator) / math.sqrt(768)
        step = torch.randn(8, 768, generator=generator) * 0.01 / math.sqrt(768)
        assert looks_initial(down)
        assert not looks_initial(down + step)
        assert not looks_initial(0.99 * down)  # weight decay alone


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_found(tmp_path: Path, value: float) -> None:
    tensors = factors_of("q", "v")
    tensors[f"{PREFIX}q.lora_A.weight"][0, 0] = value
    finding = only(lint(saved(tmp_path / "a", tensors)), "nonfinite")
    assert (finding.module, finding.severity) == ("q", "error")


def test_denormals_are_found_where_they_are_many(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in factors_of("q").items()}
    tensors[f"{PREFIX}q.lora_B.weight"] *= 1e-4
    finding = only(lint(saved(tmp_path / "a", tensors)), "denormals")
    assert "lora_B.weight" in finding.message


def test_pattern_keys_that_match_nothing_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q"), rank_pattern={"k_proj": 8}, alpha_pattern={"q": 8, "o_proj": 1})
    found = lint(path)
    assert codes(found) == ["pattern-unused", "pattern-unused"]
    assert "'k_proj'" in found[0].message
    assert "'o_proj'" in found[1].message


def test_pattern_keys_that_overlap_are_found_where_they_disagree(tmp_path: Path) -> None:
    tensors = factors_of("layers.0.q", "layers.1.q")
    disagreeing = {"q": 16, r"layers\.0\.q": 32}
    finding = only(
        [f for f in lint(saved(tmp_path / "a", tensors, alpha_pattern=disagreeing)) if f.severity == "warning"],
        "pattern-shadowed",
    )
    assert finding.module == "layers.0.q"
    agreeing = {"q": 16, r"layers\.0\.q": 16}
    only(lint(saved(tmp_path / "b", tensors, alpha_pattern=agreeing)), "duplicate-key")


def test_a_missing_alpha_is_found(tmp_path: Path) -> None:
    assert only(lint(saved(tmp_path / "a", factors_of("q"), lora_alpha=None)), "alpha-missing").module == ""


def test_an_unknown_scale_is_undecided(tmp_path: Path) -> None:
    up, down = trained(24, 32, 4)
    save_file({"q.lora_A": down, "q.lora_B": up}, tmp_path / "loralib.safetensors")
    assert only(lint(tmp_path / "loralib.safetensors"), "unknown-scale").severity == "undecided"
    assert lint(tmp_path / "loralib.safetensors", alpha=8) == []


def test_a_rank_that_contradicts_the_configuration_is_found(tmp_path: Path) -> None:
    assert only(lint(saved(tmp_path / "a", factors_of("q"), r=16)), "rank-contradicted").module == "q"
    path = saved(tmp_path / "b", factors_of("q"), r=16, rank_pattern={"q": 4})
    assert lint(path) == []


def test_a_header_that_contradicts_the_tensors_is_found(tmp_path: Path) -> None:
    up, down = trained(24, 32, 4)
    tensors = {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down}
    tensors["lora_unet_q.alpha"] = torch.tensor(2.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"ss_network_alpha": "4", "ss_network_dim": "8", "ss_network_module": "networks.lora"})
    assert sorted(codes(lint(path))) == ["alpha-contradicted", "rank-contradicted"]
    save_file(tensors, path, {"ss_network_alpha": "2.0", "ss_network_dim": "4", "ss_network_module": "networks.lora"})
    assert lint(path) == []
    save_file(tensors, path, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"})
    assert lint(path) == []


def test_a_kohya_file_without_alpha_is_found(tmp_path: Path) -> None:
    up, down = trained(24, 32, 4)
    tensors = {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down}
    save_file(tensors, tmp_path / "a.safetensors")
    only(lint(tmp_path / "a.safetensors"), "alpha-missing")


def test_an_r_beyond_the_matrix_is_found(tmp_path: Path) -> None:
    assert only(lint(saved(tmp_path / "a", factors_of("q", d_out=3))), "r-exceeds-d").module == "q"


def test_rslora_is_found_because_others_misread_it(tmp_path: Path) -> None:
    assert only(lint(saved(tmp_path / "a", factors_of("q"), use_rslora=True)), "rslora-not-portable").severity == "info"


def test_dora_is_found_because_others_drop_it(tmp_path: Path) -> None:
    tensors = factors_of("q") | {f"{PREFIX}q.lora_magnitude_vector": torch.rand(24)}
    assert codes(lint(saved(tmp_path / "a", tensors, use_dora=True))) == ["dora-not-portable"]


def test_patterns_are_found_because_others_ignore_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q", "v"), alpha_pattern={"v": 2})
    assert only(lint(path), "patterns-not-portable").severity == "info"


def test_an_initialisation_that_moved_the_base_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q"), init_lora_weights="pissa")
    assert only(lint(path), "mutated-base").severity == "error"
    start = saved(tmp_path / "start", factors_of("q"))
    assert lint(path, initial=start) == []


def test_a_base_without_the_module_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("layers.0.q", "layers.1.q"))
    weight = torch.randn(24, 32)
    found = only(lint(path, load_base({"layers.0.q.weight": weight})), "base-mismatch")
    assert (found.module, found.severity) == ("layers.1.q", "error")
    found = only(lint(path, load_base({"other.weight": weight})), "base-mismatch")
    assert found.module == ""


def test_a_base_of_another_shape_is_found_without_reading_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q", "v"))
    base = {"q.weight": torch.randn(24, 32), "v.weight": torch.randn(20, 32)}
    assert only(lint(path, load_base(base)), "base-mismatch").module == "v"
    turned = {"q.weight": torch.randn(32, 24), "v.weight": torch.randn(24, 32)}  # as Conv1D stores it
    assert lint(path, load_base(turned)) == []


def test_directions_that_add_nothing_are_found(tmp_path: Path) -> None:
    tensors = factors_of("q")
    tensors[f"{PREFIX}q.lora_B.weight"][:, 1:3] = 0
    assert only(lint(saved(tmp_path / "a", tensors)), "size-waste").message.startswith("2 of 4 directions")


def test_bfloat16_numbers_in_float32_are_found(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16().float() for name, tensor in factors_of("q").items()}
    finding = only(lint(saved(tmp_path / "a", tensors)), "size-waste")
    assert (finding.module, finding.severity) == ("q", "info")
    assert finding.message.startswith("lora_A.weight and lora_B.weight are stored as float32")


def test_many_full_tensors_that_are_too_wide_are_one_finding(tmp_path: Path) -> None:
    biases = {f"{PREFIX}layers.{i}.bias": torch.randn(32).bfloat16().float() for i in range(9)}
    finding = only(lint(saved(tmp_path / "a", factors_of("q") | biases, bias="all")), "size-waste")
    assert finding.module == ""
    assert "layers.2.bias' and 6 more are stored as float32" in finding.message


def test_the_bases_own_tensors_in_the_file_are_found(tmp_path: Path) -> None:
    tensors = factors_of("q") | {f"{PREFIX}head.original_module.weight": torch.randn(3, 4)}
    only(lint(saved(tmp_path / "a", tensors)), "base-copy")
    tensors |= {f"{PREFIX}head.original_module.{i}.weight": torch.randn(3, 4) for i in range(9)}
    assert "7 more (480 B)" in only(lint(saved(tmp_path / "b", tensors)), "base-copy").message


def test_the_same_numbers_twice_are_found(tmp_path: Path) -> None:
    tensors = factors_of("q", "k")
    tensors[f"{PREFIX}k.lora_A.weight"] = tensors[f"{PREFIX}q.lora_A.weight"].clone()
    finding = only(lint(saved(tmp_path / "a", tensors)), "duplicate-tensor")
    assert (finding.module, finding.severity) == ("k", "info")
    head = torch.randn(5, 4)
    tensors = factors_of("q") | {f"{PREFIX}head.weight": head, f"{PREFIX}head.modules_to_save.weight": head.clone()}
    assert only(lint(saved(tmp_path / "b", tensors)), "duplicate-tensor").severity == "warning"


def test_a_full_tensor_that_equals_the_bases_is_found(tmp_path: Path) -> None:
    head = torch.randn(5, 8)
    path = saved(tmp_path / "a", factors_of("q") | {f"{PREFIX}head.weight": head}, modules_to_save=["head"])
    weights = {"q.weight": torch.randn(24, 32), "head.weight": head}
    assert "equals the base's 'head.weight'" in only(lint(path, load_base(weights)), "base-copy").message
    assert lint(path, load_base(weights | {"head.weight": head + 1})) == []


def test_activated_lora_is_found_because_others_apply_it_everywhere(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q"), alora_invocation_tokens=[1, 2])
    assert only(lint(path), "alora-not-portable").severity == "info"


def test_magnitudes_that_nothing_announces_are_found(tmp_path: Path) -> None:
    tensors = factors_of("q") | {f"{PREFIX}q.lora_magnitude_vector": torch.rand(24)}
    found = {finding.code: finding for finding in lint(saved(tmp_path / "a", tensors, use_dora=False))}
    assert (found["dora-contradicted"].module, found["dora-contradicted"].severity) == ("q", "error")


def test_a_key_that_the_configuration_holds_twice_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", factors_of("q"))
    text = (path / "adapter_config.json").read_text()
    (path / "adapter_config.json").write_text(text.replace("{", '{"lora_alpha": 64, ', 1))
    assert "'lora_alpha' twice" in only(lint(path), "duplicate-key").message


@pytest.mark.parametrize("targets", [["q_proj"], "model.*q_proj"])
def test_a_module_that_target_modules_does_not_find_is_found(tmp_path: Path, targets: list[str] | str) -> None:
    path = saved(tmp_path / "a", factors_of("model.0.q_proj", "model.0.v_proj"), target_modules=targets)
    finding = only(lint(path), "module-untargeted")
    assert (finding.module, finding.severity) == ("model.0.v_proj", "error")


def test_the_out_proj_of_pefts_attention_is_found(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(32, 4)

    model = peft.get_peft_model(Attention(), peft.LoraConfig(r=4, target_modules=["mha"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    found = [finding for finding in lint(tmp_path / "a") if finding.code == "merged-twice"]
    assert [finding.module for finding in found] == ["mha.out_proj"]


def test_projections_that_have_to_be_drawn_again_are_found(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(32, 32))
    base = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    with pytest.warns(UserWarning, match="not save vera_A"):
        config = peft.VeraConfig(r=4, target_modules=["0"], save_projection=False, init_weights=False)
    peft.get_peft_model(layers, config).save_pretrained(tmp_path / "a")
    found = [finding for finding in lint(tmp_path / "a", load_base(base)) if finding.severity != "undecided"]
    assert only(found, "projections-missing").module == ""
    assert codes(lint(tmp_path / "a")) == ["ambiguous-layout"]


def test_blocks_of_a_fused_weight_are_found_for_their_alpha(tmp_path: Path) -> None:
    ups, downs = [torch.randn(24, 4) for _ in "qkv"], [torch.randn(4, 32) for _ in "qkv"]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_up.weight": torch.block_diag(*ups),
        f"{stem}.lora_down.weight": torch.cat(downs),
        f"{stem}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "4.0"})
    found = lint(tmp_path / "a.safetensors")
    assert codes(found) == ["split-qkv-alpha"] * 3
    assert [finding.module.removeprefix(f"{stem}.") for finding in found] == ["q", "k", "v"]


def test_every_code_is_described_and_every_finding_names_its_cure(tmp_path: Path) -> None:
    tensors = factors_of("q", "v", d_out=3)
    tensors[f"{PREFIX}v.lora_B.weight"].zero_()
    found = lint(saved(tmp_path / "a", tensors, use_rslora=True, r=9, alpha_pattern={"x": 1}))
    assert len(found) >= 5
    for finding in found:
        assert finding.severity in SEVERITIES[finding.code]
        assert "\n" not in finding.message
        assert finding.message.endswith(".")


def test_an_adapter_in_memory_can_be_linted() -> None:
    assert lint(Adapter({"q": LowRankUpdate(*trained(24, 32, 4), scale=2.0)})) == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("<html>")
    with pytest.raises(AdapterFormatError, match="HTML"):
        lint(tmp_path / "a.safetensors")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("lint", *arguments)


def test_exit_codes_say_clean_error_findings_undecided(tmp_path: Path) -> None:
    clean = run(str(saved(tmp_path / "clean", factors_of("q"))))
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "Nothing found.\n", "")
    missing = run(str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    found = run(str(saved(tmp_path / "found", factors_of("q"), r=16)), "--json")
    assert found.returncode == 3
    (finding,) = json.loads(found.stdout)["findings"]
    assert finding.keys() == {"code", "severity", "module", "message"}
    assert (finding["code"], finding["module"]) == ("rank-contradicted", "q")
    assert run(str(tmp_path / "found"), "--ignore", "rank-contradicted").returncode == 0
    up, down = trained(24, 32, 4)
    save_file({"q.lora_A": down, "q.lora_B": up}, tmp_path / "loralib.safetensors")
    assert run(str(tmp_path / "loralib.safetensors")).returncode == 4


def test_modules_that_share_a_finding_share_a_line(tmp_path: Path) -> None:
    tensors = factors_of(*(f"layers.{i}.q" for i in range(9)), d_out=3)
    printed = run(str(saved(tmp_path / "a", tensors))).stdout
    first, *cure = printed.splitlines()
    assert first == "warning[r-exceeds-d] layers.0.q, layers.1.q, layers.2.q and 6 more"
    assert " ".join(map(str.strip, cure)).startswith("r=4 exceeds the smaller side of 3x32")
    assert len(cure) == 2


def test_codes_are_listed_and_ignored_by_name_or_severity(tmp_path: Path) -> None:
    listed = run("--codes")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines() if not line.startswith(" ")] == sorted(CODES)
    assert max(map(len, listed.stdout.splitlines())) <= 80
    portable = str(saved(tmp_path / "a", factors_of("q"), use_rslora=True))
    assert run(portable).returncode == 3
    assert run(portable, "--ignore", "info").returncode == 0
    assert run(portable, "--ignore", "warning").returncode == 3
    wrong = run(portable, "--ignore", "rslora-not-portible")
    assert wrong.returncode == 2
    assert "Did you mean rslora-not-portable?" in " ".join(wrong.stderr.split())


def test_every_code_has_severities() -> None:
    assert list(SEVERITIES) == list(CODES) == sorted(CODES)


def test_the_real_peft_adapters_hold_no_errors(shared_adapters: Path) -> None:
    for folder in ("roberta_base_mrpc_r8", "roberta_base_agnews_r4/checkpoint-1200"):
        found = lint(load_adapter(shared_adapters / "peft" / folder))
        assert not [finding for finding in found if finding.severity == "error"]
