"""What commands say on stderr of the bases they read, and the revisions of the hub."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from command_line import run as run_here
from range_server import serving
from safetensors.torch import save_file

import lora_analysis as la

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
QUANTISED = "note: {}: 2 tensors are GGUF Q8_0, dequantised when read: the rounded weights, not the original ones."


def run(*arguments, **environment):
    """In a process of its own where the environment is the point: the hub's library reads it when imported."""
    if not environment:
        return run_here(*arguments)
    return subprocess.run(
        [sys.executable, "-m", "lora_analysis", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"} | environment,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An adapter, its base, and the same in GGUF, quantised."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal((32, 64)).astype(np.float32) for name in NAMES}
    factors = {name: generator.standard_normal((2, 64, 4)).astype(np.float32) for name in NAMES}
    updates = {
        name: la.LowRankUpdate(torch.from_numpy(pair[0, :32]), torch.from_numpy(pair[1].T.copy()), 0.1)
        for name, pair in factors.items()
    }
    la.save_adapter(la.Adapter(updates), folder / "adapter")
    (folder / "served").mkdir()
    tensors = {f"{name}.weight": torch.from_numpy(weight) for name, weight in weights.items()}
    save_file(tensors, folder / "served" / "base.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, folder / "tuned.safetensors")
    file = gguf.GGUFWriter(folder / "base.gguf", "qwen2")
    for i, weight in enumerate(weights.values()):
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        file.add_tensor(f"blk.{i}.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return folder


@pytest.mark.parametrize("command", ["amplify", "magnitude", "lint"])
def test_a_quantised_base_is_named_with_what_was_read_of_it(files, command):
    found = run(command, files / "adapter", "--base", files / "base.gguf", "--json")
    assert found.returncode in (0, 3), found.stderr
    json.loads(found.stdout)
    assert QUANTISED.format(files / "base.gguf") in found.stderr.splitlines()
    read = found.stderr.splitlines()[-1].removeprefix(f"{files / 'base.gguf'}: ")
    assert read == ("read 0.00 of 4.35 kB" if command == "lint" else "read 4.35 of 4.35 kB")


def test_a_remote_base_is_measured_and_an_ordinary_one_is_not_mentioned(files):
    with serving(files / "served") as server:
        source = f"{server.url}/base.safetensors"
        found = run("amplify", files / "adapter", "--base", f"{source}?sig=hidden")
        assert found.returncode == 0, found.stderr
        assert found.stderr.splitlines()[-1] == f"{source}: read {server.sent / 1e3:.1f} of {server.sent / 1e3:.1f} kB"
        assert "hidden" not in found.stdout + found.stderr
        both = run("diff", files / "tuned.safetensors", source)
        assert both.returncode == 0, both.stderr
        assert both.stderr.splitlines()[-1].startswith(f"{source}: read ")
        assert "tuned.safetensors" not in both.stderr
    plain = run("amplify", files / "adapter", "--base", files / "served" / "base.safetensors")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert plain.stdout == found.stdout


def test_revisions_are_of_the_hub(files):
    adapter, base = files / "adapter", files / "served" / "base.safetensors"
    for arguments, match in (
        (("inspect", adapter, "--revision", "v2"), "revision: expected None for what is no repository of the hub"),
        (("amplify", adapter, "--base", base, "--base-revision", "v2"), "revision: expected None for what is no repos"),
        (("spectrum", adapter, "--base-revision", "v2"), "--base-revision: expected --base beside it"),
        (("diff", files / "tuned.safetensors", base, "--revision", "v2"), "revision: expected None for what is no"),
    ):
        found = run(*arguments, HF_HUB_OFFLINE="1")
        assert found.returncode == 2, found.stderr
        assert match in " ".join(found.stderr.split())
    for arguments in (
        ("inspect", "org/name", "--revision", "v2"),
        ("lint", adapter, "--base", "org/name", "--base-revision", "v2"),
        ("diff", files / "tuned.safetensors", "org/name", "--base-revision", "v2"),
    ):
        found = run(*arguments, HF_HUB_OFFLINE="1")
        assert found.returncode == 1
        assert found.stderr.splitlines()[-1].startswith("lora-analysis: org/name@v2: expected it in the local cache")
