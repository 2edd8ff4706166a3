"""MLX adapters against the formulas of mlx-lm's own layers, in numpy."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

# Products of float32 numbers, ours in float64 and numpy's too: only the order of sums differs.
EXACT = 1e-12

Q = "model.layers.3.self_attn.q_proj"
EXPERTS = "model.layers.3.mlp.switch_mlp.gate_proj"
D_OUT, D_IN, R = 12, 20, 3


def linear(stem: str = Q, d_out: int = D_OUT, d_in: int = D_IN, r: int = R) -> dict[str, Tensor]:
    """Factors as mlx-lm's LoRALinear and LoRAEmbedding hold them: y + scale · (x @ a) @ b."""
    return {f"{stem}.lora_a": torch.randn(d_in, r), f"{stem}.lora_b": torch.randn(r, d_out)}


def configuration(**parameters: Any) -> dict[str, Any]:
    return {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": R, "scale": 7.5, **parameters}}


def written(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, name: str = "adapters.safetensors"
) -> Path:
    save_file(tensors, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def assert_close(update: Any, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(update.dense().numpy(), expected, rtol=0, atol=EXACT * np.abs(expected).max())


def test_a_linear_layer_adds_its_scaled_product_to_the_output(tmp_path: Path) -> None:
    tensors = linear()
    adapter = load_adapter(written(tmp_path, tensors, configuration()))
    assert (adapter.format, list(adapter), adapter.notes) == ("mlx", [Q], ())
    module = adapter.modules[Q]
    assert (module.shape, module.r, module.scale, module.scale_source) == ((D_OUT, D_IN), R, 7.5, "config")
    assert module.target == Target(f"{Q}.weight")
    t = as_numpy(tensors)
    x = np.random.default_rng(0).standard_normal((5, D_IN))
    added = 7.5 * (x @ t[f"{Q}.lora_a"]) @ t[f"{Q}.lora_b"]
    np.testing.assert_allclose(x @ adapter[Q].dense().numpy().T, added, atol=EXACT * 1e3)


def test_an_embedding_adds_rows_of_its_scaled_product(tmp_path: Path) -> None:
    stem = "model.embed_tokens"
    tensors = linear(stem, d_out=8, d_in=50)
    adapter = load_adapter(written(tmp_path, tensors, configuration()))
    t = as_numpy(tensors)
    assert adapter.modules[stem].target == Target(f"{stem}.weight", transposed=True)
    table = 7.5 * t[f"{stem}.lora_a"] @ t[f"{stem}.lora_b"]
    assert_close(adapter[stem], table.T)
    base = load_base({f"{stem}.weight": torch.randn(50, 8)})
    assert base.matrix(adapter.targets[stem], adapter[stem].shape).shape == (8, 50)


def test_the_base_says_which_layers_are_embeddings(tmp_path: Path) -> None:
    written(tmp_path, linear("model.tokens", d_out=8, d_in=50) | linear("model.wte", d_out=8, d_in=50), configuration())
    base = load_base({"model.tokens.weight": torch.randn(50, 8), "model.wte.weight": torch.randn(8, 50)})
    adapter = load_adapter(tmp_path, base=base)
    assert {name: target.transposed for name, target in adapter.targets.items()} == {
        "model.tokens": True,
        "model.wte": False,
    }


@pytest.mark.parametrize("stacked", [True, False], ids=["E,r,in", "Er,in"])
def test_experts_of_a_switch_layer_come_apart(tmp_path: Path, stacked: bool) -> None:
    experts = 4
    a, b = torch.randn(experts, R, D_IN), torch.randn(experts, D_OUT, R)
    tensors = {f"{EXPERTS}.lora_a": a if stacked else a.flatten(0, 1), f"{EXPERTS}.lora_b": b}
    adapter = load_adapter(written(tmp_path, tensors, configuration()))
    assert list(adapter) == [f"{EXPERTS}.{i}" for i in range(experts)]
    # fuse(): weight + scale · lora_b @ lora_a, batched over experts.
    fused = 7.5 * np.einsum("eor,eri->eoi", b.double().numpy(), a.double().numpy())
    for expert in range(experts):
        name = f"{EXPERTS}.{expert}"
        assert adapter.modules[name].target == Target(f"{EXPERTS}.weight", expert=expert)
        assert_close(adapter[name], fused[expert])
    base = load_base({f"{EXPERTS}.weight": torch.randn(experts, D_OUT, D_IN)})
    assert base.matrix(adapter.targets[f"{EXPERTS}.2"], (D_OUT, D_IN)).shape == (D_OUT, D_IN)


def test_experts_are_found_in_a_base_that_keeps_them_apart(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.lora_a": torch.randn(2, R, D_IN), f"{EXPERTS}.lora_b": torch.randn(2, D_OUT, R)}
    apart = [f"model.layers.3.mlp.experts.{i}.gate_proj.weight" for i in range(2)]
    base = load_base({name: torch.randn(D_OUT, D_IN) for name in apart})
    adapter = load_adapter(written(tmp_path, tensors, configuration()), base=base)
    assert list(adapter.targets.values()) == [Target(name) for name in apart]


@pytest.mark.parametrize("embedding", [False, True])
def test_dora_rescales_the_rows_of_the_stored_weight(tmp_path: Path, embedding: bool) -> None:
    stem = "model.embed_tokens" if embedding else Q
    tensors = linear(stem)
    rows = D_IN if embedding else D_OUT
    tensors[f"{stem}.m"] = torch.rand(rows) + 0.5
    written(tmp_path, tensors, configuration() | {"fine_tune_type": "dora"})
    t = as_numpy(tensors)
    product = 7.5 * t[f"{stem}.lora_a"] @ t[f"{stem}.lora_b"]

    part = load_adapter(tmp_path)
    assert part.modules[stem].flags == ("dora-low-rank-part",)
    assert part.notes == ("DoRA: the updates are their low-rank part. Pass base= for what DoRA adds to the base.",)
    assert_close(part[stem], product.T)
    magnitude = part.modules[stem].magnitude
    assert magnitude is not None
    assert torch.equal(magnitude(), tensors[f"{stem}.m"])

    # fuse(): m / ‖weight‖ over axis 1 of the weight as stored, (out, in) or (vocab, dim).
    stored = torch.randn(D_IN, D_OUT) if embedding else torch.randn(D_OUT, D_IN)
    whole = load_adapter(tmp_path, base=load_base({f"{stem}.weight": stored}))
    weight = stored.double().numpy()
    adapted = weight + (product if embedding else product.T)
    fused = (t[f"{stem}.m"] / np.linalg.norm(adapted, axis=1))[:, None] * adapted
    assert whole.modules[stem].flags == whole.notes == ()
    assert_close(whole[stem], (fused - weight).T if embedding else fused - weight)
    assert whole.ledger.keys() == tensors.keys()


def test_dora_of_a_config_before_it_had_fine_tune_types(tmp_path: Path) -> None:
    config = {"lora_layers": 2, "use_dora": True, "lora_parameters": {"rank": R, "scale": 7.5}}
    adapter = load_adapter(written(tmp_path, linear() | {f"{Q}.m": torch.rand(D_OUT)}, config))
    assert (adapter.modules[Q].scale, adapter.modules[Q].flags) == (7.5, ("dora-low-rank-part",))


def test_a_magnitude_that_the_configuration_does_not_mention_counts(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, linear() | {f"{Q}.m": torch.rand(D_OUT)}, configuration()))
    assert adapter.modules[Q].flags == ("dora-low-rank-part",)
    assert adapter.notes[0] == "the configuration does not say DoRA, and there are magnitudes m; read as DoRA."


SCALES: dict[str, tuple[dict[str, Any] | None, float, str, str | None]] = {
    "scale": (configuration(), 7.5, "config", None),
    "zero": (configuration(scale=0), 0.0, "config", None),
    "no scale": (
        {"fine_tune_type": "lora", "lora_parameters": {"rank": R}},
        20.0,
        "format default",
        "MLX's default of 20 is taken.",
    ),
    "no parameters": ({"fine_tune_type": "lora"}, 20.0, "format default", "MLX's default of 20 is taken."),
    "alpha only": (
        {"lora_parameters": {"rank": R, "alpha": 6}},
        20.0,
        "format default",
        "MLX's default of 20 is taken; its alpha 6 is not read by MLX.",
    ),
    "alpha of 0.19 to 0.22": (configuration(alpha=16), 7.5, "config", "alpha 16 is not read by MLX"),
    "alpha of before 0.19": (
        {"lora_layers": 4, "lora_parameters": {"rank": R, "alpha": 6, "scale": 7.5}},
        7.5,
        "config",
        "multiplied it by alpha / rank, to 15. If this file is of those, pass alpha=45.",
    ),
    "alpha equal to rank": (
        {"lora_layers": 4, "lora_parameters": {"rank": R, "alpha": R, "scale": 7.5}},
        7.5,
        "config",
        None,
    ),
    "no configuration": (None, math.nan, "unknown", "the scale is unknown. Pass alpha= (scale times r)."),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_is_the_whole_multiplier(tmp_path: Path, case: str) -> None:
    config, scale, source, note = SCALES[case]
    adapter = load_adapter(written(tmp_path, linear(), config))
    module = adapter.modules[Q]
    assert module.scale == pytest.approx(scale, nan_ok=True)
    assert module.scale_source == source
    assert len(adapter.notes) == (note is not None)
    assert note is None or adapter.notes[0].endswith(note) or note in adapter.notes[0]
    # alpha= means what it means elsewhere, and silences the doubts.
    given = load_adapter(tmp_path, alpha=45)
    assert (given.modules[Q].scale, given.modules[Q].scale_source, given.notes) == (45 / R, "caller", ())


def test_an_unknown_scale_asks_for_alpha(tmp_path: Path) -> None:
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        load_adapter(written(tmp_path, linear()))[Q].norm()


def test_tensors_win_over_the_rank_of_the_configuration(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, linear(), configuration(rank=8)))
    assert adapter.modules[Q].r == R
    assert adapter.notes == (f"{Q!r}: the configuration says rank 8, the tensors have {R}; they win.",)


def test_files_of_checkpoints_have_the_configuration_of_their_run(tmp_path: Path) -> None:
    for name in ("0000100_adapters.safetensors", "adapters.safetensors"):
        tensors = linear()
        written(tmp_path, tensors, configuration(), name)
        adapter = load_adapter(tmp_path / name)
        assert adapter.modules[Q].scale == 7.5
        assert torch.equal(adapter[Q].down, tensors[f"{Q}.lora_a"].mT)  # type: ignore[attr-defined]
    # The folder is the run's last state, not its checkpoints.
    assert torch.equal(load_adapter(tmp_path)[Q].down, tensors[f"{Q}.lora_a"].mT)  # type: ignore[attr-defined]


def test_npz_files_of_old_versions(tmp_path: Path) -> None:
    tensors = linear()
    np.savez(tmp_path / "adapters.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    (tmp_path / "adapter_config.json").write_text(json.dumps(configuration()))
    adapter = load_adapter(tmp_path)
    assert (adapter.format, adapter.modules[Q].scale) == ("mlx", 7.5)
    assert_close(adapter[Q], 7.5 * (tensors[f"{Q}.lora_a"].double() @ tensors[f"{Q}.lora_b"].double()).T.numpy())


def test_factors_keep_their_dtype(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in linear().items()}
    update = load_adapter(written(tmp_path, tensors, configuration()), device="meta")[Q]
    assert (update.up.dtype, update.up.device.type) == (torch.bfloat16, "meta")  # type: ignore[attr-defined]


def test_square_factors_without_a_configuration_are_ambiguous(tmp_path: Path) -> None:
    square = linear(d_out=R, d_in=R)
    assert load_adapter(written(tmp_path, square)).modules[Q].flags == ("ambiguous-layout",)
    assert load_adapter(written(tmp_path, square, configuration())).modules[Q].flags == ()
    written(tmp_path, linear(d_out=D_IN), name="other.safetensors")
    assert load_adapter(tmp_path / "other.safetensors").modules[Q].flags == ()


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "without b": ({f"{Q}.lora_a": torch.ones(5, 2)}, rf"'{Q}': expected lora_a and lora_b, '{Q}.lora_b' is missing"),
    "without a": ({f"{Q}.lora_b": torch.ones(2, 5)}, rf"'{Q}': expected lora_a and lora_b, '{Q}.lora_a' is missing"),
    "transposed": (
        {f"{Q}.lora_a": torch.ones(2, 5), f"{Q}.lora_b": torch.ones(7, 2)},
        r"expected lora_a \(d_in, r\) and lora_b \(r, d_out\), got \(2, 5\) and \(7, 2\)\. They look transposed",
    ),
    "unrelated": ({f"{Q}.lora_a": torch.ones(3, 5), f"{Q}.lora_b": torch.ones(7, 2)}, r"got \(3, 5\) and \(7, 2\)\.$"),
    "empty": ({f"{Q}.lora_a": torch.ones(5, 0), f"{Q}.lora_b": torch.ones(0, 7)}, r"got \(5, 0\) and \(0, 7\)"),
    "vectors": ({f"{Q}.lora_a": torch.ones(5), f"{Q}.lora_b": torch.ones(5)}, r"got \(5,\) and \(5,\)"),
    "experts": (
        {f"{Q}.lora_a": torch.ones(3, 2, 5), f"{Q}.lora_b": torch.ones(4, 7, 2)},
        r"of E experts, got \(3, 2, 5\) and \(4, 7, 2\)",
    ),
    "no expert": (
        {f"{Q}.lora_a": torch.ones(0, 5), f"{Q}.lora_b": torch.ones(0, 7, 2)},
        r"of E experts, got \(0, 5\) and \(0, 7, 2\)",
    ),
    "magnitude": (
        linear() | {f"{Q}.m": torch.ones(D_IN)},
        rf"'{Q}.m': expected a magnitude for each of {D_OUT} rows of the stored weight, got shape \({D_IN},\)",
    ),
    "scale tensor": (linear() | {f"{Q}.scale": torch.ones(1)}, rf"'{Q}.scale': expected lora_a, lora_b and m"),
    "integers": (
        {name: tensor.int() for name, tensor in linear().items()},
        "expected floating-point factors, got torch.int32",
    ),
    "other lora": (linear() | {"x.lora_c": torch.ones(1)}, "'x.lora_c': expected the tensors of LoRA to be factors"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_break_the_format_are_named(tmp_path: Path, case: str) -> None:
    tensors, match = BAD[case]
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(written(tmp_path, tensors, configuration()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"fine_tune_type": "full"}, UnsupportedAdapterError, r"is 'full': .* no adapter.*diff\(tuned, base\)"),
        ({"fine_tune_type": "ia3"}, UnsupportedAdapterError, "fine_tune_type is 'ia3'; read are 'lora' and 'dora'"),
        ({"fine_tune_type": "dora"}, AdapterFormatError, f"says DoRA: expected a magnitude, '{Q}.m' is missing"),
        ({"lora_parameters": [1]}, AdapterFormatError, "lora_parameters: expected an object with rank and scale, got"),
        (configuration(scale="20"), AdapterFormatError, "lora_parameters.scale: expected a finite number, got '20'"),
        (configuration(scale=math.nan), AdapterFormatError, "lora_parameters.scale: expected a finite number"),
        (configuration(scale=True), AdapterFormatError, "lora_parameters.scale: expected a finite number"),
        (configuration(alpha=math.inf), AdapterFormatError, "lora_parameters.alpha: expected a finite number"),
        (configuration(rank=0), AdapterFormatError, "lora_parameters.rank: expected a positive integer, got '0'"),
        (configuration(rank=2.5), AdapterFormatError, "lora_parameters.rank: expected a positive integer, got '2.5'"),
    ],
    ids=str,
)
def test_configurations_that_mlx_could_not_use_are_refused(
    tmp_path: Path, config: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load_adapter(written(tmp_path, linear(), config))


def test_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    written(tmp_path, linear(), configuration())
    with pytest.raises(AdapterFormatError, match="mlx's have no names"):
        load_adapter(tmp_path / "adapters.safetensors", name="x")
    with pytest.raises(UnsupportedAdapterError, match="Leave split= out"):
        load_adapter(tmp_path, split="q,v")


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    tensors = linear() | linear("lm_head", d_out=40) | {"model.norm.weight": torch.ones(3), f"{Q}.bias": torch.ones(2)}
    adapter = load_adapter(written(tmp_path, tensors, configuration()))
    assert adapter.ledger == {
        f"{Q}.lora_a": f"used by {Q}",
        f"{Q}.lora_b": f"used by {Q}",
        "lm_head.lora_a": "used by lm_head",
        "lm_head.lora_b": "used by lm_head",
        "model.norm.weight": "a full tensor trained beside LoRA, no part of any update",
        f"{Q}.bias": "bias: a full bias in place of the base's",
    }


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    stem = "a\nb\x1b[31m"
    adapter = load_adapter(written(tmp_path, linear(stem), configuration(rank=99)))
    assert list(adapter) == [stem]
    assert all("\n" not in note and "\x1b" not in note for note in adapter.notes)


def test_an_adapter_reads_the_same_after_pickling(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, linear(), configuration()))
    data = pickle.dumps(adapter)
    again: Adapter = pickle.loads(data)
    assert len(data) < 1000
    assert torch.equal(again[Q].dense(), adapter[Q].dense())


def test_a_real_adapter_of_qwen(shared_adapters: Path) -> None:
    folder = shared_adapters / "mlx" / "qwen2.5_0.5b_dpo"
    adapter = load_adapter(folder)
    tensors = load_file(folder / "adapters.safetensors")
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (22, 23) for p in "qv"]
    assert (adapter.format, list(adapter), adapter.notes) == ("mlx", names, ())
    assert {(m.r, m.scale, m.scale_source) for m in adapter.modules.values()} == {(8, 20.0, "config")}
    assert adapter.ledger.keys() == tensors.keys()
    for name in names:
        a, b = (tensors[f"{name}.lora_{side}"].double().numpy() for side in "ab")
        assert adapter[name].shape == (b.shape[1], 896)
        expected = 20 * (a @ b).T
        assert_close(adapter[name], expected)
        assert adapter[name].norm() == pytest.approx(float(np.linalg.norm(expected)), rel=1e-9)
