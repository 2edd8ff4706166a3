"""Sam_LoRA: every pair of factors at its slice of a fused qkv, as the layers themselves add it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError
from lora_analysis.formats import load_adapter

DIM, R, BLOCKS = 8, 2, 3


def pairs(count: int = 2 * BLOCKS, dim: int = DIM, r: int = R) -> dict[str, Tensor]:
    """What ``save_lora_parameters`` writes."""
    down = {f"w_a_{i:03d}": torch.randn(r, dim) for i in range(count)}
    return down | {f"w_b_{i:03d}": torch.randn(dim, r) for i in range(count)}


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path)
    return path


class Attention(nn.Module):
    """A fused qkv whose output is changed as Sam_LoRA's wrapper changes it."""

    def __init__(self, down_q: Tensor, up_q: Tensor, down_v: Tensor, up_v: Tensor) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM).double()
        self.down_q, self.up_q, self.down_v, self.up_v = (t.double() for t in (down_q, up_q, down_v, up_v))

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.split(DIM, dim=-1)
        return torch.cat([q + x @ self.down_q.T @ self.up_q.T, k, v + x @ self.down_v.T @ self.up_v.T], dim=-1)


def change_by_running(layer: Attention) -> NDArray[np.float64]:
    """The matrix that the adapted layer adds, column by column."""
    eye = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        delta: NDArray[np.float64] = (layer(eye) - layer.qkv(eye)).T.numpy()
    return delta


@pytest.mark.parametrize("prefix", ["image_encoder.", "", "model.image_encoder.", "vision_encoder."])
def test_slices_lie_where_the_layers_add_them(tmp_path: Path, prefix: str) -> None:
    tensors = pairs()
    weights = {f"{prefix}blocks.{i}.attn.qkv.weight": torch.randn(3 * DIM, DIM) for i in range(BLOCKS)}
    base = load_base(weights | {f"{prefix}blocks.0.attn.proj.weight": torch.randn(DIM, DIM)})
    adapter = load_adapter(written(tmp_path, tensors), base=base)
    assert list(adapter) == [f"image_encoder.blocks.{i}.attn.qkv.{s}" for i in range(BLOCKS) for s in "qv"]
    for i in range(BLOCKS):
        numbers = (f"{2 * i:03d}", f"{2 * i + 1:03d}")
        layer = Attention(*(tensors[f"w_{side}_{number}"] for number in numbers for side in "ab"))
        whole = np.zeros((3 * DIM, DIM))
        for s in "qv":
            name = f"image_encoder.blocks.{i}.attn.qkv.{s}"
            target = adapter.targets[name]
            assert target.tensor == f"{prefix}blocks.{i}.attn.qkv.weight"
            whole[slice(*target.rows or ())] += adapter[name].dense().numpy()
            matrix = base.matrix(target, adapter[name].shape)
            assert torch.equal(matrix, weights[target.tensor][slice(*target.rows or ())])
        np.testing.assert_allclose(whole, change_by_running(layer), atol=1e-12)


def test_the_ledger_keeps_the_files_numbers(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pairs()))
    assert adapter.ledger["w_b_003"] == adapter.ledger["w_a_003"] == "used by image_encoder.blocks.1.attn.qkv.v"
    assert sorted(adapter.ledger) == sorted(pairs())
    assert len(adapter.notes) == 1
    assert "does not name its slices" in adapter.notes[0]


def test_more_than_a_thousand_pairs_sort_by_number(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pairs(count=1002, dim=2, r=1)))
    assert adapter.modules["image_encoder.blocks.500.attn.qkv.v"].tensors == ("w_a_1001", "w_b_1001")
    assert list(adapter)[-1] == "image_encoder.blocks.500.attn.qkv.v"


def test_the_scale_is_one_unless_the_caller_says(tmp_path: Path) -> None:
    path = written(tmp_path, pairs())
    assert {(m.scale, m.scale_source) for m in load_adapter(path).modules.values()} == {(1.0, "format default")}
    assert {(m.scale, m.scale_source) for m in load_adapter(path, alpha=6).modules.values()} == {(3.0, "caller")}


def test_a_classifier_makes_it_a_plain_vision_transformers(tmp_path: Path) -> None:
    """LoRA-ViT saves its head as ``fc_<in>in_<out>out``; SAMed saves parts of SAM."""
    adapter = load_adapter(written(tmp_path, pairs() | {"fc_8in_4out": torch.ones(4, 8)}))
    assert list(adapter)[1] == "blocks.0.attn.qkv.v"
    assert [unused.reason for unused in adapter.unused] == ["the classifier trained beside LoRA, no part of any update"]
    adapter = load_adapter(written(tmp_path, pairs() | {"mask_decoder.iou.weight": torch.ones(4, 8)}))
    assert [unused.reason for unused in adapter.unused] == ["a full tensor trained beside LoRA, no part of any update"]


def test_a_base_with_other_blocks_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, pairs())
    four = {f"blocks.{i}.attn.qkv.weight": torch.ones(3 * DIM, DIM) for i in range(4)}
    with pytest.raises(AdapterFormatError, match=r"expected a base with 3 blocks .*found 4 in 'blocks' in state dict"):
        load_adapter(path, base=load_base(four))
    with pytest.raises(AdapterFormatError, match="found none in state dict"):
        load_adapter(path, base=load_base({"a.weight": torch.ones(2, 2)}))
    two = {f"{side}.blocks.{i}.attn.qkv.weight": torch.ones(3 * DIM, DIM) for side in "ab" for i in range(3)}
    with pytest.raises(AdapterFormatError, match=r"found 3 in 'a\.blocks', 3 in 'b\.blocks'"):
        load_adapter(path, base=load_base(two))


def without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in pairs().items() if name != key}


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "no b": (without("w_b_002"), "numbered from 000 to 005 without a gap, 'w_b_002' is missing"),
    "gap": (pairs() | {"w_a_007": torch.ones(R, DIM)}, "'w_a_006' is missing"),
    "odd": (pairs(count=3), "an even number of pairs w_a, w_b, got 3"),
    "ranks": (pairs() | {"w_b_001": torch.ones(DIM, 3)}, r"'w_a_001': expected w_a \(r, dim\) and w_b \(dim, r\)"),
    "dims": (pairs() | {"w_b_001": torch.ones(9, R)}, r"'w_a_001': expected w_a \(r, dim\) and w_b \(dim, r\)"),
    "vector": (pairs() | {"w_b_001": torch.ones(DIM)}, r"'w_a_001': .* got \(2, 8\) and \(8,\)"),
    "zero": (
        pairs() | {"w_a_001": torch.ones(0, DIM), "w_b_001": torch.ones(DIM, 0)},
        r"'w_a_001': .* got \(0, 8\) and \(8, 0\)",
    ),
    "integers": (pairs() | {"w_b_001": torch.ones(DIM, R, dtype=torch.int8)}, "expected floating-point factors"),
}


@pytest.mark.parametrize(("tensors", "match"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, tensors: dict[str, Tensor], match: str) -> None:
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(written(tmp_path, tensors))


def test_tensors_that_speak_of_lora_are_not_listed_away(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"'decoder\.lora_A': expected the tensors of LoRA"):
        load_adapter(written(tmp_path, pairs() | {"decoder.lora_A": torch.ones(2, 2)}), format="sam_lora")


def test_an_adapter_pickles_as_its_source(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, pairs()), alpha=6)
    again = pickle.loads(pickle.dumps(adapter))
    name = "image_encoder.blocks.2.attn.qkv.q"
    assert torch.equal(again[name].dense(), adapter[name].dense())


@pytest.mark.parametrize("r", [2, 4, 8, 16])
@pytest.mark.parametrize("folder", ["round_a", "round_b"])
def test_modules_of_real_files_are_slices_of_their_blocks(shared_adapters: Path, folder: str, r: int) -> None:
    path = shared_adapters / "sam_lora" / folder / f"lora_rank{r}.safetensors"
    tensors = load_file(path)
    adapter = load_adapter(path)
    assert len(adapter) == 24
    assert adapter.unused == ()
    assert sorted(adapter.ledger) == sorted(tensors)
    for i, (name, update) in enumerate(adapter.items()):
        assert name == f"image_encoder.blocks.{i // 2}.attn.qkv.{'qv'[i % 2]}"
        rows = (0, 768) if i % 2 == 0 else (1536, 2304)
        assert adapter.targets[name] == Target(f"image_encoder.blocks.{i // 2}.attn.qkv.weight", rows=rows)
        assert (update.r, update.scale) == (r, 1.0)


def test_an_untrained_file_changes_nothing(shared_adapters: Path) -> None:
    adapter = load_adapter(shared_adapters / "sam_lora" / "untrained")
    assert len(adapter) == 24
    assert {update.norm() for update in adapter.values()} == {0.0}
