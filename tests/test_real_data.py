"""Whole commands on real adapters and bases against dense linear algebra that shares no code with ours."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import lora_analysis as la
from lora_analysis.cli import app
from lora_analysis.study.minilm import minilm_path

# Relative agreement asked of every figure: the dense oracles keep about 1e-12 of σ₁ themselves.
RELATIVE = 1e-6


def invoke(*arguments):
    found = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output


def dense_svd(update):
    delta_w = update.scale * (update.up.double().numpy() @ update.down.double().numpy())
    u, s, vh = np.linalg.svd(delta_w)
    k = min(update.r, *update.shape)
    return u[:, :k], s[:k], vh[:k].T


def check_amplification(table, adapter, weights):
    """Every row of an amplification table against dense matrices; ``weights[module]`` is (d_out, d_in)."""
    assert sorted(table["module"].unique()) == sorted(adapter)
    for module, rows in table.groupby("module"):
        update, w = adapter[module], np.asarray(weights[module], dtype=np.float64)
        u, s, v = dense_svd(update)
        top = np.linalg.svd(w, compute_uv=False)
        for row in rows.itertuples():
            k = row.k
            projected = np.linalg.norm(u[:, :k].T @ w @ v[:, :k])
            random = np.linalg.norm(w) * k / np.sqrt(w.size)
            assert row.norm_update == pytest.approx(np.linalg.norm(s[:k]), rel=RELATIVE)
            assert row.norm_base == pytest.approx(np.linalg.norm(w), rel=RELATIVE)
            assert row.projected == pytest.approx(projected, rel=RELATIVE)
            assert row.projected_top == pytest.approx(np.linalg.norm(top[:k]), rel=RELATIVE)
            assert row.gain == pytest.approx(projected / random, rel=RELATIVE)
            assert row.amplification == pytest.approx(np.linalg.norm(s[:k]) / projected, rel=RELATIVE)
            cosine = np.sum((u[:, :k] * s[:k]) @ v[:, :k].T * w) / np.linalg.norm(s[:k]) / np.linalg.norm(w)
            # The cosine is a sum that nearly cancels: its error is relative to 1, not to itself.
            assert row.cosine == pytest.approx(cosine, rel=RELATIVE, abs=1e-12)


def test_comparison_of_two_papers_adapters_equals_dense_svd_in_every_cell(shared_adapters, tmp_path):
    mnli = shared_adapters / "loralib" / "roberta_base_mnli_r8"
    mrpc = shared_adapters / "peft" / "roberta_base_mrpc_r8"
    invoke("compare", mnli, mrpc, "--alpha", "16", "--cells", "all", "--out", tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet").set_index(["module_a", "side"])
    a, b = la.load_adapter(mnli, alpha=16), la.load_adapter(mrpc)
    assert len(table) == 24 * 2 * 64
    sizes = np.minimum.outer(np.arange(1, 9), np.arange(1, 9))
    for module in a:
        (u_a, _, v_a), (u_b, _, v_b) = dense_svd(a[module]), dense_svd(b[module])
        for side, basis_a, basis_b in (("out", u_a, u_b), ("in", v_a, v_b)):
            phi = table.loc[(module, side), "phi"].to_numpy().reshape(8, 8)
            for i in range(1, 9):
                for j in range(1, 9):
                    naive = np.linalg.norm(basis_a[:, :i].T @ basis_b[:, :j], "fro") ** 2 / sizes[i - 1, j - 1]
                    # Squared overlaps can be arbitrarily small against the rounding of unit vectors.
                    assert phi[i - 1, j - 1] == pytest.approx(naive, rel=RELATIVE, abs=1e-12)


def test_spectra_of_both_peft_families_equal_dense_svd(shared_adapters, tmp_path):
    folder = shared_adapters / "peft"
    sources = [folder / "roberta_base_mrpc_r8", folder / "roberta_base_agnews_r4" / "checkpoint-1200"]
    invoke("spectrum", *sources, "--out", tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet").set_index(["adapter", "module"])
    assert len(table) == 24 + 36
    for source in sources:
        adapter = la.load_adapter(source)
        for module in adapter:
            found = table.loc[(str(source), module), "singular_values"]
            np.testing.assert_allclose(found, dense_svd(adapter[module])[1], rtol=RELATIVE)


def test_toylora_with_its_real_base_equals_dense(shared_adapters):
    folder = shared_adapters / "toylora"
    tensors = torch.load(folder / "finetuned.pth", map_location="cpu", weights_only=True)
    layers = dict(enumerate(("network.0", "network.3", "network.6", "network.9")))
    adapter = la.Adapter(
        {
            module: la.LowRankUpdate(
                up=tensors[f"lora_layers.{i}.lora_B"].mT, down=tensors[f"lora_layers.{i}.lora_A"].mT, scale=32 / 16
            )
            for i, module in layers.items()
        }
    )
    base = la.load_base(folder / "pretrained.pth")
    weights = torch.load(folder / "pretrained.pth", map_location="cpu", weights_only=True)
    table = la.amplification_table(adapter, base)
    check_amplification(table, adapter, {module: weights[f"{module}.weight"] for module in adapter})
    last = table[table["module"] == "network.9"]
    assert last["k"].max() == 10  # r = 16 exceeds d_out = 10
    assert last["flags"].eq("r>d").all()
    spectrum = la.spectrum_table(adapter).set_index("module")
    for module in adapter:
        np.testing.assert_allclose(
            spectrum.loc[module, "singular_values"], dense_svd(adapter[module])[1], rtol=RELATIVE
        )


# peft 0.21 asks transformers 5 for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_gpt2_through_the_command_line_equals_dense(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=16))
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "attn.c_proj"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    invoke("amplify", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "t.parquet")
    adapter = la.load_adapter(tmp_path / "adapter")
    assert {u.shape for u in adapter.values()} == {(144, 48), (48, 48)}  # the second is stored transposed and square
    weights = {module: stored[f"{module}.weight"].mT for module in adapter}
    check_amplification(pd.read_parquet(tmp_path / "t.parquet"), adapter, weights)


def test_amplification_on_the_pretrained_model_equals_dense(tmp_path):
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    weights = load_file(minilm_path())
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(("query.weight", "value.weight"))]
    updates = {
        m: la.LowRankUpdate(torch.randn(384, 4, generator=generator), torch.randn(4, 384, generator=generator), 0.1)
        for m in modules
    }
    la.save_adapter(la.Adapter(updates), tmp_path / "adapter")
    arguments = ["amplify", tmp_path / "adapter", "--base", minilm_path(), "--ks", "1,4", "--out", tmp_path / "t.json"]
    invoke(*arguments)
    table = pd.DataFrame(json.loads((tmp_path / "t.json").read_text()))
    assert len(modules) == 12
    check_amplification(
        table, la.load_adapter(tmp_path / "adapter"), {m: weights[f"{m}.weight"].numpy() for m in modules}
    )
