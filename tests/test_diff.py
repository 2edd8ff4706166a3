"""Differences of checkpoints, against the subtraction, and truncation against the dense SVD."""

from __future__ import annotations

import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_analysis as la
from lora_analysis import training
from lora_analysis.adapter import Target
from lora_analysis.base import BaseWeights
from lora_analysis.checkpoint import StateDict

# Factors are held in float32: relative to the norm of the matrix.
ROUNDED = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def model(seed: int = 0) -> dict[str, Tensor]:
    shapes = {
        "layer.0.query.weight": (8, 6),
        "layer.0.query.bias": (8,),
        "layer.0.norm.weight": (6,),
        "layer.1.query.weight": (8, 6),
        "stem.weight": (4, 3, 2, 2),
        "embed_tokens.weight": (20, 6),
        "position": (5, 6),
    }
    return {name: normal(*shape, seed=seed + number) for number, (name, shape) in enumerate(shapes.items())}


class Counted(StateDict):
    """A checkpoint that knows which of its tensors were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def _never() -> tuple[Any, ...]:
    raise AssertionError("these are not pickled")


def counted(tensors: dict[str, Tensor]) -> tuple[BaseWeights, list[str]]:
    checkpoint = Counted(tensors)
    return BaseWeights(checkpoint, source="counted", reopen=_never), checkpoint.read


def test_every_matrix_is_the_difference_in_double() -> None:
    before, after = model(), model(100)
    found = la.diff(after, before)
    assert list(found) == ["embed_tokens", "layer.0.query", "layer.1.query", "position", "stem"]
    for name in ("layer.0.query", "layer.1.query"):
        tensor = f"{name}.weight"
        assert torch.equal(found[name].dense(), after[tensor].double() - before[tensor].double())
    stem = after["stem.weight"].double() - before["stem.weight"].double()
    assert torch.equal(found["stem"].dense(), stem.flatten(1))
    assert found.targets["stem"] == Target("stem.weight", kernel=(2, 2))
    assert found.targets["position"] == Target("position")
    assert isinstance(found["stem"], la.DenseUpdate)
    assert math.isnan(found["stem"].eps)
    module = found.modules["layer.0.query"]
    assert (module.shape, module.r, module.scale, module.truncation_error) == ((8, 6), 6, 1.0, 0.0)


def test_embedding_tables_are_turned_and_said_so() -> None:
    before, after = model(), model(100)
    found = la.diff(after, before)
    assert found.targets["embed_tokens"] == Target("embed_tokens.weight", transposed=True)
    delta_w = after["embed_tokens.weight"].double() - before["embed_tokens.weight"].double()
    assert torch.equal(found["embed_tokens"].dense(), delta_w.mT)
    assert "1 embedding tables" in " ".join(found.notes)


class Net(nn.Module):
    """With an embedding that its name does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(9, 4)
        self.lin = nn.Linear(4, 3)


def test_a_live_model_tells_its_embeddings_by_type() -> None:
    before, after = Net(), Net()
    found = la.diff(after, before)
    assert found.modules["lookup"].shape == (4, 9)
    assert torch.equal(found["lookup"].dense(), (after.lookup.weight.double() - before.lookup.weight.double()).mT)
    assert la.diff(after.state_dict(), before.state_dict()).modules["lookup"].shape == (9, 4)
    again = pickle.loads(pickle.dumps(found))
    assert again.modules["lookup"].shape == (4, 9)


def test_weights_stored_transposed_come_back_as_d_out_d_in() -> None:
    from transformers.pytorch_utils import Conv1D

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(16, 4), Conv1D(4, 4)

    before, after = nn.Sequential(Block()), nn.Sequential(Block())
    expected = {
        name: (after.get_parameter(f"{name}.weight").double() - before.get_parameter(f"{name}.weight").double()).mT
        for name in ("0.c_fc", "0.c_proj")
    }
    for pair in [(after, before), (after.state_dict(), before), (la.load_base(after), before)]:
        found = la.diff(*pair)
        assert found.targets["0.c_fc"].transposed
        assert found.modules["0.c_fc"].shape == (16, 4)
        for name, delta_w in expected.items():
            assert torch.equal(found[name].dense(), delta_w)
    # Files prove it by a bias, but for the square one; both sides are read alike whichever of them knows.
    in_file = la.diff(after.state_dict(), before.state_dict())
    assert torch.equal(in_file["0.c_fc"].dense(), expected["0.c_fc"])
    assert torch.equal(in_file["0.c_proj"].dense(), expected["0.c_proj"].mT)
    mixed = la.diff(la.load_base(after), before.state_dict())
    assert torch.equal(mixed["0.c_proj"].dense(), expected["0.c_proj"].mT)


def test_the_difference_meets_its_base_in_tables() -> None:
    before, after = model(), model(100)
    found, base = la.diff(after, before), la.load_base(before)
    table = la.amplification_table(found, base, [1, 2], draws=0)
    assert len(table) == 10
    assert table["gain"].notna().all()
    row = la.spectrum_table(found).set_index("module").loc["layer.0.query"]
    delta_w = (after["layer.0.query.weight"].double() - before["layer.0.query.weight"].double()).numpy()
    np.testing.assert_allclose(row["singular_values"], np.linalg.svd(delta_w, compute_uv=False), rtol=1e-12)
    assert row["noise_floors"] is None


def test_everything_else_is_listed_with_its_reason() -> None:
    before, after = model(), model(100)
    after["head.weight"] = normal(2, 6)
    before["pooler.weight"] = normal(6, 6)
    after["layer.1.query.weight"] = normal(8, 7)
    for side in (before, after):
        side["mask"] = torch.ones(3, 3, dtype=torch.bool)
        side["packed.weight"] = torch.ones(4, 4, dtype=torch.uint8)
        side["nothing.weight"] = torch.ones(0, 4)
    found = la.diff(after, before)
    reasons = {item.tensor: item.reason for item in found.unused}
    assert reasons == {
        "layer.0.query.bias": "no matrix: of shape (8,)",
        "layer.0.norm.weight": "no matrix: of shape (6,)",
        "layer.1.query.weight": "of shape (8, 7), in state dict of (8, 6)",
        "head.weight": "only in state dict",
        "pooler.weight": "only in state dict",
        "mask": "no floating-point weights of two bytes or more: torch.bool in state dict",
        "packed.weight": "no floating-point weights of two bytes or more: torch.uint8 in state dict",
        "nothing.weight": "empty: of shape (0, 4)",
    }
    assert set(found.ledger) == set(before) | set(after)
    assert {item.tensor: item.nbytes for item in found.unused}["head.weight"] == 48


def test_only_what_is_asked_for_is_read() -> None:
    after, read_after = counted(model(100))
    before, read_before = counted(model())
    found = la.diff(after, before)
    assert len(found) == 5
    assert (read_after, read_before) == ([], [])
    found["layer.1.query"].norm()
    assert (read_after, read_before) == (["layer.1.query.weight"], ["layer.1.query.weight"])


def test_truncating_reads_every_matrix_once_and_never_again() -> None:
    after, read_after = counted(model(100))
    before, read_before = counted(model())
    found = la.diff(after, before, r=2)
    la.spectrum_table(found)
    expected = [module.tensors[0] for module in found.modules.values()]
    assert read_after == read_before == expected


class Watched(StateDict):
    """A checkpoint that notes, whenever a tensor is read, how many of all it gave are still in memory."""

    def __init__(self, tensors: dict[str, Tensor], given: list[weakref.ref[np.ndarray]], alive: list[int]) -> None:
        super().__init__(tensors)
        self._given, self._alive = given, alive

    def __getitem__(self, name: str) -> Tensor:
        memory = super().__getitem__(name).numpy().copy()
        self._alive.append(sum(given() is not None for given in self._given))
        self._given.append(weakref.ref(memory))
        return torch.from_numpy(memory)  # keeps the array for as long as any view of it is there


@pytest.mark.parametrize("options", [{}, {"r": 2}, {"energy": 0.9}], ids=str)
def test_one_matrix_of_each_side_at_a_time_is_in_memory(options: dict[str, float]) -> None:
    given: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []
    after, before = (
        BaseWeights(Watched(model(seed), given, alive), source="watched", reopen=_never) for seed in (100, 0)
    )
    found = la.diff(after, before, **options)  # type: ignore[arg-type]
    la.spectrum_table(found, workers=1)
    assert len(alive) == 10
    assert max(alive) == 1


@pytest.mark.parametrize("k", [1, 3, 6, 50])
def test_a_truncation_is_the_best_one_and_its_error_the_tail(k: int) -> None:
    before, after = model(), model(100)
    found = la.diff(after, before, r=k)
    whole = la.diff(after, before)
    errors = []
    for name, module in found.modules.items():
        delta_w = whole[name].dense().numpy()
        U, S, Vh = np.linalg.svd(delta_w, full_matrices=False)
        kept = min(k, len(S))
        size = ROUNDED * float(S[0])
        assert (module.r, found[name].r, found[name].scale) == (kept, kept, 1.0)
        np.testing.assert_allclose(found[name].dense().numpy(), U[:, :kept] * S[:kept] @ Vh[:kept], rtol=0, atol=size)
        assert module.truncation_error == pytest.approx(math.sqrt((S[kept:] ** 2).sum()), rel=1e-5, abs=size)
        # What is held is off by exactly that.
        assert module.truncation_error == pytest.approx(
            float(np.linalg.norm(delta_w - found[name].dense().numpy())), rel=1e-9
        )
        errors.append(module.truncation_error)
    assert f"norm {math.hypot(*errors):.3g} of" in found.notes[-1]


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_keeps_the_least_k_with_that_share(energy: float) -> None:
    before, after = model(), model(100)
    found = la.diff(after, before, energy=energy)
    for name, module in found.modules.items():
        S = la.diff(after, before)[name].singular_values()
        share = 1 - (module.truncation_error / float(S.norm())) ** 2
        assert share >= energy - 1e-9
        assert module.r == found[name].r == la.energy_rank(S, energy)
        assert float((S[: module.r - 1] ** 2).sum()) < energy * float((S**2).sum())


def test_a_lora_merged_into_a_base_is_recovered_to_rounding() -> None:
    before = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24))
    after = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24))
    after.load_state_dict(before.state_dict())
    training.inject(after, "all-linear", r=3, alpha=6)
    for name, parameter in after.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    truth = training.extract(after)
    training.merge(after)
    found = la.diff(after, before, r=3)
    assert set(found) == set(truth)
    assert any("LoRA are no part" in note for note in found.notes)
    for name, module in found.modules.items():
        size = truth[name].norm()
        assert module.truncation_error < 1e-6 * size
        np.testing.assert_allclose(found[name].dense().numpy(), truth[name].dense().numpy(), rtol=0, atol=1e-6 * size)
    angles = la.principal_angles(found["0"].svd().U, truth["0"].svd().U)
    assert float(angles.max()) < 1e-6


def test_the_peft_file_of_a_truncated_difference_merges_to_the_fine_tuned_model(tmp_path: Path) -> None:
    from peft import PeftModel

    before = nn.Sequential(nn.Embedding(9, 20), nn.Linear(20, 12), nn.Linear(12, 8))
    after = {
        name: tensor + (normal(*tensor.shape[:1], 2) @ normal(2, *tensor.shape[1:]) if tensor.ndim == 2 else 0)
        for name, tensor in before.state_dict().items()
    }
    found = la.diff(after, before, r=2)
    assert [module.embedding for module in found.modules.values()] == [True, False, False]
    with pytest.warns(UserWarning, match="1 tensor not written"):
        la.save_adapter(found, tmp_path)
    merged = PeftModel.from_pretrained(before, str(tmp_path)).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, after[name], atol=1e-5), name


def test_what_did_not_change_is_zero_or_listed_once_that_is_known() -> None:
    before, after = model(), model(100)
    after["layer.0.query.weight"] = before["layer.0.query.weight"].clone()
    whole = la.diff(after, before)
    assert whole["layer.0.query"].norm() == 0.0
    table = la.spectrum_table(whole)
    assert table.loc[table["flags"] == "zero", "module"].tolist() == ["layer.0.query"]
    truncated = la.diff(after, before, r=2)
    assert "layer.0.query" not in truncated
    assert truncated.ledger["layer.0.query.weight"] == "identical in state dict"
    nothing = la.diff(before, before, energy=0.9)
    assert len(nothing) == 0
    assert set(nothing.ledger) == set(before)


def test_experts_come_apart() -> None:
    before = {"mlp.experts.gate_up_proj": normal(3, 4, 5)}
    after = {"mlp.experts.gate_up_proj": before["mlp.experts.gate_up_proj"].clone()}
    after["mlp.experts.gate_up_proj"][1] += normal(4, 5, seed=1)
    found = la.diff(after, before)
    assert list(found) == [f"mlp.experts.gate_up_proj.{i}" for i in range(3)]
    assert found.targets["mlp.experts.gate_up_proj.1"] == Target("mlp.experts.gate_up_proj", expert=1)
    assert [update.norm() > 0 for update in found.values()] == [False, True, False]
    assert "1 stacks of experts are read as stored" in found.notes[0]
    truncated = la.diff(after, before, r=1)
    assert list(truncated) == ["mlp.experts.gate_up_proj.1"]
    assert truncated.unused == ()
    assert "2 experts of stacks that changed did not" in " ".join(truncated.notes)


def test_layers_are_in_their_order() -> None:
    before = {f"layers.{i}.weight": torch.zeros(2, 2) for i in (0, 1, 10, 11, 2, 20, 9)}
    after = {name: tensor + 1 for name, tensor in before.items()}
    assert list(la.diff(after, before)) == [f"layers.{i}" for i in (0, 1, 2, 9, 10, 11, 20)]


def test_one_change_of_prefix_is_allowed_and_said() -> None:
    bare = {f"encoder.{i}.weight": normal(4, 4, seed=i) for i in range(3)}
    headed = {f"bert.{name}": tensor + 1 for name, tensor in bare.items()} | {"classifier.weight": normal(2, 4)}
    forward, back = la.diff(headed, bare), la.diff(bare, headed)
    assert list(forward) == ["encoder.0", "encoder.1", "encoder.2"]
    assert "'bert.' dropped" in forward.notes[0]
    assert list(back) == ["bert.encoder.0", "bert.encoder.1", "bert.encoder.2"]
    assert "'bert.' put before" in back.notes[0]
    for name in forward:
        np.testing.assert_allclose(forward[name].dense().numpy(), 1, atol=1e-6)
    assert forward.ledger == {
        **{f"bert.encoder.{i}.weight": f"used by encoder.{i}" for i in range(3)},
        "classifier.weight": "only in state dict",
    }


def test_names_that_fit_in_several_ways_are_refused() -> None:
    base = {"a.lin.weight": normal(2, 2), "b.lin.weight": normal(2, 2)}
    with pytest.raises(la.BaseWeightsError, match=r"fit those of state dict in 2 ways \('a\.' put before; 'b\.'"):
        la.diff({"lin.weight": normal(2, 2)}, base)


def test_a_parameter_beside_a_module_of_its_name_keeps_its_own() -> None:
    both = {"scale": normal(2, 3), "scale.weight": normal(2, 3)}
    assert list(la.diff(both, both)) == ["scale", "scale.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_weights_are_kept_exactly(dtype: torch.dtype) -> None:
    before, after = ({"w": normal(6, 5, seed=seed).to(dtype)} for seed in (0, 1))
    assert torch.equal(la.diff(after, before)["w"].dense(), after["w"].double() - before["w"].double())
    held = la.diff(after, before, r=5)["w"]
    assert isinstance(held, la.LowRankUpdate)
    assert held.up.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert math.isnan(held.eps)


def test_files_pickle_as_paths_and_truncations_with_their_factors(tmp_path: Path) -> None:
    for name, seed in (("before", 0), ("after", 100)):
        save_file(model(seed), tmp_path / f"{name}.safetensors")
    paths = tmp_path / "after.safetensors", tmp_path / "before.safetensors"
    whole, truncated = la.diff(*paths), la.diff(*paths, r=2)
    assert len(pickle.dumps(whole)) < 2000
    assert (whole.format, whole.source) == ("diff", str(paths[0]))
    for adapter in (whole, truncated):
        again = pickle.loads(pickle.dumps(adapter))
        assert (list(again), again.unused, again.notes) == (list(adapter), adapter.unused, adapter.notes)
        for name in adapter:
            assert torch.equal(again[name].dense(), adapter[name].dense())
            assert again.modules[name].truncation_error == adapter.modules[name].truncation_error
    for path in paths:
        path.unlink()
    assert torch.equal(pickle.loads(pickle.dumps(truncated))["stem"].dense(), truncated["stem"].dense())


def test_nan_is_named_where_it_would_be_truncated() -> None:
    before, after = model(), model(100)
    after["stem.weight"][0, 0, 0, 0] = math.nan
    assert "nonfinite" in la.spectrum_table(la.diff(after, before)).set_index("module").loc["stem", "flags"]
    with pytest.raises(la.UndefinedUpdateError, match=r"state dict: 'stem': expected numbers.*NaN"):
        la.diff(after, before, r=1)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    weights = model()
    for options, match in [
        ({"r": 1, "energy": 0.5}, "r, energy: expected one of them, got both"),
        ({"r": 0}, "r: expected at least 1, got 0"),
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], got 0\.0"),
        ({"energy": 1.5}, r"energy: expected a share in \(0, 1\], got 1\.5"),
        ({"energy": math.nan}, r"energy: expected a share in \(0, 1\], got nan"),
    ]:
        with pytest.raises(ValueError, match=match):
            la.diff(weights, weights, **options)  # type: ignore[arg-type]
    with pytest.raises(la.BaseWeightsError, match="missing: no such file or directory"):
        la.diff(tmp_path / "missing", weights)
    with pytest.raises(
        la.BaseWeightsError, match=r"expected matrices that state dict has too, found none \(first: 'x'"
    ):
        la.diff({"x": normal(2, 2)}, {"y": normal(2, 2)})
    with pytest.raises(la.BaseWeightsError, match="both are empty"):
        la.diff({}, {})
