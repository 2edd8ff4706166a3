"""Adapters: lazy mappings that account for every tensor of their file and pickle as the way to open it again."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis.adapter import Adapter, Contents, Module, Origin, ScaleSource, Target, Unused
from lora_analysis.checkpoint import SafetensorsFile, nbytes
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import load_adapter
from lora_analysis.update import LowRankUpdate, Update

PICKLE_LIMIT = 2000


def update(d_out: int = 4, d_in: int = 3, r: int = 2, scale: float = 2.0) -> LowRankUpdate:
    return LowRankUpdate(torch.randn(d_out, r), torch.randn(r, d_in), scale)


def peft_tensors(modules: int, d: int = 4, r: int = 2) -> dict[str, Tensor]:
    return {
        f"base_model.model.layers.{i}.q.lora_{side}.weight": torch.randn(shape)
        for i in range(modules)
        for side, shape in (("A", (r, d)), ("B", (d, r)))
    }


def described(adapter: Adapter) -> list[Any]:
    """All of an adapter but its numbers, without the readers that no two adapters share."""
    modules = [
        (name, m.shape, m.r, repr(m.scale), m.scale_source, m.target, m.tensors) for name, m in adapter.modules.items()
    ]
    return [
        adapter.source,
        adapter.format,
        adapter.config,
        adapter.metadata,
        adapter.unused,
        adapter.notes,
        adapter.targets,
        modules,
    ]


def assert_same_adapter(a: Adapter, b: Adapter) -> None:
    assert described(a) == described(b)
    for name in a:
        assert torch.equal(a[name].dense(), b[name].dense())


def test_an_adapter_is_a_mapping_of_its_updates() -> None:
    updates: dict[str, Update] = {"b.q": update(), "a.q": update(5, 6, 3)}
    adapter = Adapter(updates, source="mine")
    assert isinstance(adapter, Mapping)
    assert list(adapter) == ["b.q", "a.q"]
    assert adapter["a.q"] is updates["a.q"]
    assert dict(adapter.items()) == updates
    strangers: list[object] = ["q", 3, None]
    assert "b.q" in adapter
    assert not any(stranger in adapter for stranger in strangers)
    assert adapter.get("q") is None
    assert repr(adapter) == "Adapter('mine', format='memory', 2 modules)"
    assert (adapter.config, adapter.metadata, adapter.unused, adapter.notes) == ({}, {}, (), ())


def test_modules_of_a_mapping_describe_their_updates() -> None:
    adapter = Adapter({"a": update(5, 6, 3, scale=0.5), "b": update(scale=math.nan)})
    a, b = adapter.modules["a"], adapter.modules["b"]
    assert (a.shape, a.r, a.scale, a.scale_source, a.tensors) == ((5, 6), 3, 0.5, "caller", ())
    assert a.read() is adapter["a"]
    assert math.isnan(b.scale)
    assert b.scale_source == "unknown"


def test_the_mapping_given_may_change_afterwards() -> None:
    updates: dict[str, Update] = {"a": update()}
    adapter = Adapter(updates)
    updates.clear()
    assert list(adapter) == ["a"]


def test_targets_default_to_the_weight_of_the_module() -> None:
    rows = Target("attn.weight", transposed=True, rows=(0, 4))
    adapter = Adapter({"lin": update(), "attn.q": update()}, targets={"attn.q": rows})
    assert adapter.targets == {"lin": Target("lin.weight"), "attn.q": rows}


def test_targets_of_no_module_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: expected modules of the adapter, got 'other'"):
        Adapter({"lin": update()}, targets={"other": Target("lin.weight")})
    for wrong in ({"lin": torch.ones(2, 2)}, {"lin": None}, {3: update()}):
        with pytest.raises(TypeError, match="updates: expected names and updates, such as LowRankUpdate"):
            Adapter(wrong)  # type: ignore[arg-type]


def test_an_unknown_module_is_named_with_the_adapter() -> None:
    adapter = Adapter({"lin": update()}, source="mine")
    with pytest.raises(KeyError, match="mine: no module 'q'; see list"):
        adapter["q"]


def test_a_failure_while_reading_is_not_taken_for_an_unknown_module() -> None:
    def fail() -> Update:
        raise KeyError("lora_A")

    module = Module((1, 1), 1, 1.0, "config", Target("a.weight"), ("lora_A",), fail)
    adapter = Adapter.from_contents(
        Contents({"a": module}), source="file", format="peft", origin=Origin(lambda: adapter)
    )
    with pytest.raises(KeyError, match=r"^'lora_A'$"):
        adapter["a"]


def test_an_adapter_of_a_mapping_pickles_with_its_tensors() -> None:
    adapter = Adapter({"lin": update()}, targets={"lin": Target("x.weight", columns=(0, 3))}, source="mine")
    again = pickle.loads(pickle.dumps(adapter))
    assert_same_adapter(adapter, again)
    assert again["lin"] is not adapter["lin"]


@pytest.mark.parametrize("modules", [1, 300])
def test_an_adapter_of_a_file_pickles_as_the_way_to_open_it(tmp_path: Path, modules: int) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(peft_tensors(modules), path, metadata={"format": "pt"})
    adapter = load_adapter(path, alpha=8, device="cpu")
    pickled = pickle.dumps(adapter)
    assert len(pickled) < PICKLE_LIMIT
    again = pickle.loads(pickled)
    assert len(again) == modules
    assert_same_adapter(adapter, again)
    assert pickle.dumps(again) == pickled


def test_the_ledger_names_every_module_that_uses_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "merged.bin"
    torch.save({"attn.lora_A": torch.randn(4, 5), "attn.lora_B": torch.randn(4, 2), "bias": torch.ones(2)}, path)
    adapter = load_adapter(path, split="q,v")
    assert adapter.ledger == {
        "attn.lora_A": "used by attn.q, attn.v",
        "attn.lora_B": "used by attn.q, attn.v",
        "bias": "bias: a full bias in place of the base's",
    }


def test_options_of_the_caller_survive_pickling(tmp_path: Path) -> None:
    path, base = tmp_path / "merged.bin", tmp_path / "base.safetensors"
    torch.save({"attn.lora_A": torch.randn(4, 5), "attn.lora_B": torch.randn(4, 2)}, path)
    save_file({"attn.weight": torch.randn(6, 5)}, base)
    adapter = load_adapter(path, alpha=4, split=[True, False, True], base=base, format="loralib")
    pickled = pickle.dumps(adapter)
    assert len(pickled) < PICKLE_LIMIT
    assert list(adapter) == ["attn.q", "attn.v"]
    assert_same_adapter(adapter, pickle.loads(pickled))


def test_numbers_are_read_when_asked_for_and_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(peft_tensors(3), path)
    reads: list[str] = []
    read = SafetensorsFile.__getitem__

    def counting_read(self: SafetensorsFile, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "__getitem__", counting_read)
    adapter = load_adapter(path, alpha=4)
    assert list(adapter)
    assert all(module.shape == (4, 4) for module in adapter.modules.values())
    assert adapter.targets
    assert pickle.loads(pickle.dumps(adapter)).modules["layers.1.q"].r == 2
    assert reads == []
    first, second = adapter["layers.1.q"], adapter["layers.1.q"]
    assert first is not second
    assert sorted(set(reads)) == [f"base_model.model.layers.1.q.lora_{side}.weight" for side in "AB"]
    assert len(reads) == 4


def test_a_file_with_nan_opens_and_only_its_numbers_are_undefined(tmp_path: Path) -> None:
    tensors = peft_tensors(2)
    tensors["base_model.model.layers.0.q.lora_A.weight"][0, 0] = math.nan
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    adapter = load_adapter(path, alpha=4)
    with pytest.raises(LoraAnalysisError, match="NaN or infinities"):
        adapter["layers.0.q"].norm()
    assert adapter["layers.1.q"].norm() > 0


@pytest.mark.parametrize("writer", ["peft", "loralib"])
def test_every_tensor_is_used_or_listed_with_a_reason(tmp_path: Path, writer: str) -> None:
    tensors = peft_tensors(2) | {
        "base_model.model.layers.0.q.bias": torch.zeros(4),
        "base_model.model.head.weight": torch.zeros(7, 4),
        "strange": torch.zeros(3, dtype=torch.float16),
    }
    if writer == "loralib":
        tensors = {name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B"): tensor
                   for name, tensor in tensors.items()}  # fmt: skip
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    adapter = load_adapter(path, alpha=4)
    assert adapter.format == writer
    used = [tensor for module in adapter.modules.values() for tensor in module.tensors]
    listed = [unused.tensor for unused in adapter.unused]
    assert sorted(used + listed) == sorted(tensors)
    assert all(unused.reason for unused in adapter.unused)
    assert adapter.ledger == {
        tensor: f"used by {name}" for name, m in adapter.modules.items() for tensor in m.tensors
    } | {unused.tensor: unused.reason for unused in adapter.unused}
    assert {unused.tensor: unused.nbytes for unused in adapter.unused} == {
        name: tensors[name].numel() * tensors[name].itemsize for name in listed
    }
    assert sum(u.nbytes for u in adapter.unused) == 4 * 4 + 7 * 4 * 4 + 3 * 2


def test_nbytes_counts_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(()), "c": torch.zeros(0, 4)}
    save_file(tensors, path)
    file = SafetensorsFile(path)
    assert [nbytes(file, name) for name in "abc"] == [30, 4, 0]


def test_modules_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(peft_tensors(12), path)
    assert list(load_adapter(path)) == [f"layers.{i}.q" for i in range(12)]


@pytest.mark.parametrize("source", get_args(ScaleSource))
def test_a_scale_is_unknown_exactly_where_it_is_nan(source: ScaleSource) -> None:
    def module(scale: float) -> Module:
        return Module((1, 1), 1, scale, source, Target("a.weight"), (), update)

    right, wrong = (math.nan, 1.0) if source == "unknown" else (1.0, math.nan)
    assert module(right).scale_source == source
    with pytest.raises(ValueError, match=rf"a scale of {wrong} cannot come from '{source}'"):
        module(wrong)


def test_a_scale_has_a_known_source() -> None:
    with pytest.raises(ValueError, match=r"scale_source: expected one of .*'tensor'.*, got 'guess'"):
        Module((1, 1), 1, 1.0, "guess", Target("a.weight"), (), update)  # type: ignore[arg-type]


def test_an_unused_tensor_says_why() -> None:
    unused = Unused("x.bias", "bias: a full bias in place of the base's", 12)
    assert (unused.tensor, unused.nbytes) == ("x.bias", 12)


def test_adapters_compare_by_identity_and_can_be_kept_in_sets() -> None:
    adapter = Adapter({"m": LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), 1.0)})
    assert adapter == adapter
    assert len({adapter, adapter}) == 1
    assert adapter != Adapter(dict(adapter))
